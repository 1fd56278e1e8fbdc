// Vectors of float for whichever instruction set this translation unit is compiled for.
//
// Arithmetic is written with the compiler's vector types, so that one source serves AVX-512, AVX2, SSE2 and NEON; only
// what those types cannot express uses intrinsics. No operation here depends on neighbouring lanes except `sum`,
// `maximum` and the dot products, whose order of addition is fixed.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define REKINDLE_AVX512 1
#else
#define REKINDLE_AVX512 0
#endif

#if REKINDLE_AVX512 && defined(__AVX512BF16__)
#define REKINDLE_BF16_DOT 1
#else
#define REKINDLE_BF16_DOT 0
#endif

namespace rekindle {

#if REKINDLE_AVX512
constexpr int LANES = 16;
constexpr int TILE_ROWS = 6;  // with TILE_VECTORS accumulators each, they fill the 32 registers
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8;
constexpr int TILE_ROWS = 3;
#elif defined(__aarch64__)
constexpr int LANES = 4;
constexpr int TILE_ROWS = 6;
#else
constexpr int LANES = 4;
constexpr int TILE_ROWS = 3;
#endif
constexpr int TILE_VECTORS = 4;

enum class bf16 : uint16_t {};

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));

inline vf splat(float value) { return vf{} + value; }
inline vu splat(uint32_t value) { return vu{} + value; }

inline vi lane_numbers() {
  vi lanes;
  for (int i = 0; i < LANES; ++i) lanes[i] = i;
  return lanes;
}

inline vf fma(vf a, vf b, vf c) {
#if REKINDLE_AVX512
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

inline vf larger(vf a, vf b) { return a > b ? a : b; }

template <int N>
inline float fold_sum(const float* lanes) {
  if constexpr (N == 1) {
    return lanes[0];
  } else {
    float halves[N / 2];
    for (int i = 0; i < N / 2; ++i) halves[i] = lanes[i] + lanes[i + N / 2];
    return fold_sum<N / 2>(halves);
  }
}

inline float sum(vf v) {
#if REKINDLE_AVX512
  return _mm512_reduce_add_ps((__m512)v);
#else
  float lanes[LANES];
  std::memcpy(lanes, &v, sizeof v);
  return fold_sum<LANES>(lanes);
#endif
}

#if REKINDLE_AVX512
inline __m128 fold_lanes(__m512 v) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// The two halves of a 4 x 2 transposition within each 128-bit lane, added.
inline __m512 add_unpacked(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
inline __m512 add_unpacked_pairs(__m512 a, __m512 b) {
  const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
}
typedef __m512 vx;
#elif defined(__AVX2__)
inline __m128 fold_lanes(__m256 v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }
inline __m256 add_unpacked(__m256 a, __m256 b) { return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); }
inline __m256 add_unpacked_pairs(__m256 a, __m256 b) {
  const __m256d c = _mm256_castps_pd(a), d = _mm256_castps_pd(b);
  return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(c, d)), _mm256_castpd_ps(_mm256_unpackhi_pd(c, d)));
}
typedef __m256 vx;
#endif

// to[i] = the sum of v[i], for N <= 4 vectors. The order of addition does not depend on N, but is not that of `sum`.
template <int N>
inline void store_sums(float* to, const vf (&v)[N]) {
#if defined(__AVX2__)
  static_assert(N == 1 || N == 2 || N == 4);
  const vx ab = add_unpacked((vx)v[0], (vx)v[N > 1]), cd = N > 2 ? add_unpacked((vx)v[N - 2], (vx)v[N - 1]) : ab;
  const __m128 sums = fold_lanes(add_unpacked_pairs(ab, cd));
  std::memcpy(to, &sums, N * sizeof *to);
#else
  for (int i = 0; i < N; ++i) to[i] = sum(v[i]);
#endif
}

inline float maximum(vf v) {
#if REKINDLE_AVX512
  return _mm512_reduce_max_ps((__m512)v);
#else
  float largest = v[0];
  for (int i = 1; i < LANES; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
#endif
}

inline vf widen(vh bits) { return (vf)(__builtin_convertvector(bits, vu) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
inline vh narrow(vf v) {
#if REKINDLE_BF16_DOT
  return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu quiet_nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector(v == v ? rounded : quiet_nan, vh);
#endif
}

inline vf load(const float* from) {
  vf v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline vf load(const bf16* from) {
  vh bits;
  std::memcpy(&bits, from, sizeof bits);
  return widen(bits);
}

inline void store(float* to, vf v) { std::memcpy(to, &v, sizeof v); }

inline void store(bf16* to, vf v) {
  const vh bits = narrow(v);
  std::memcpy(to, &bits, sizeof bits);
}

// The first `count` < LANES elements, followed by zeros; nothing beyond them is read.
inline vf load(const float* from, int count) {
#if REKINDLE_AVX512
  return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#else
  vf v{};
  std::memcpy(&v, from, count * sizeof *from);
  return v;
#endif
}

inline vf load(const bf16* from, int count) {
#if REKINDLE_AVX512
  return widen((vh)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), from));
#else
  vh bits{};
  std::memcpy(&bits, from, count * sizeof *from);
  return widen(bits);
#endif
}

inline void store(float* to, vf v, int count) {
#if REKINDLE_AVX512
  _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)v);
#else
  std::memcpy(to, &v, count * sizeof *to);
#endif
}

inline void store(bf16* to, vf v, int count) {
  const vh bits = narrow(v);
#if REKINDLE_AVX512
  _mm256_mask_storeu_epi16(to, (__mmask16)((1u << count) - 1), (__m256i)bits);
#else
  std::memcpy(to, &bits, count * sizeof *to);
#endif
}

// Calls body(index, count) for each run of up to LANES elements; all but the last have count == LANES.
template <class Body>
inline void for_each_vector(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) body(i, std::integral_constant<int, LANES>{});
  if (i < size) body(i, (int)(size - i));
}

template <class T, class Count>
inline vf load_run(const T* from, Count count) {
  if constexpr (std::is_same_v<Count, int>) return load(from, count);
  else return load(from);
}

template <class T, class Count>
inline void store_run(T* to, vf v, Count count) {
  if constexpr (std::is_same_v<Count, int>) store(to, v, count);
  else store(to, v);
}

// e^x within 2 ulp; 0 below -87.3, where the result would no longer be a normal number; e^0 is exactly 1.
inline vf exponential(vf x) {
  const vf lowest = splat(-87.3f), highest = splat(88.7f), magic = splat(12582912.0f);
  vf bounded = x < lowest ? lowest : x;
  bounded = bounded > highest ? highest : bounded;
  const vf shifted = fma(bounded, splat(1.44269504f), magic);
  const vf power = shifted - magic;
  vf r = fma(power, splat(-0.693145752f), bounded);
  r = fma(power, splat(-1.42860677e-6f), r);
  vf p = splat(1.98756915e-4f);
  p = fma(p, r, splat(1.39819995e-3f));
  p = fma(p, r, splat(8.33345205e-3f));
  p = fma(p, r, splat(4.16657962e-2f));
  p = fma(p, r, splat(1.66666654e-1f));
  p = fma(p, r, splat(0.5f));
  p = fma(p * r, r, r) + 1.0f;
  // The low bits of `shifted` hold the power as an integer. 2^128 is reached in two factors.
  const vi exponent = (vi)shifted - (vi)magic;
  const vi half = exponent >> 1;
  const vf scale = (vf)((half + 127) << 23), rest = (vf)((exponent - half + 127) << 23);
  return x < lowest ? vf{} : p * scale * rest;
}

// tanh within about 1e-7 of relative error.
inline vf hyperbolic_tangent(vf x) {
  const vf magnitude = x < 0.0f ? -x : x;
  const vf square = x * x;
  vf series = splat(62.0f / 2835.0f);
  series = fma(series, square, splat(-17.0f / 315.0f));
  series = fma(series, square, splat(2.0f / 15.0f));
  series = fma(series, square, splat(-1.0f / 3.0f));
  series = fma(series * square, x, x);
  const vf capped = magnitude > 10.0f ? splat(10.0f) : magnitude;
  const vf far = 1.0f - 2.0f / (exponential(capped + capped) + 1.0f);
  const vf result = magnitude < 0.3f ? series : (x < 0.0f ? -far : far);
  return x == x ? result : x;
}

#if REKINDLE_BF16_DOT
// acc + a.low * b.low + a.high * b.high in each 32-bit lane.
inline vf dot_pairs(vf acc, vu a, vu b) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
#endif

inline vf low_halves(vu pairs) { return (vf)(pairs << 16); }
inline vf high_halves(vu pairs) { return (vf)(pairs & 0xffff0000u); }

// 2 * LANES elements: those in even and in odd places for bf16, which is what widens fastest; two halves for float.
struct Pair {
  vf first, second;
};

inline Pair halves(vu words) { return {low_halves(words), high_halves(words)}; }

inline Pair load_pair(const bf16* from) {
  vu words;
  std::memcpy(&words, from, sizeof words);
  return halves(words);
}

inline Pair load_pair(const float* from) { return {load(from), load(from + LANES)}; }

// The first `count` < 2 * LANES elements of a pair; the others are zero, and nothing beyond is read.
inline Pair load_pair(const bf16* from, int count) {
#if REKINDLE_AVX512
  return halves((vu)_mm512_maskz_loadu_epi16((__mmask32)((1u << count) - 1), from));
#else
  vu words{};
  std::memcpy(&words, from, count * sizeof *from);
  return halves(words);
#endif
}

inline Pair load_pair(const float* from, int count) {
  if (count <= LANES) return {count < LANES ? load(from, count) : load(from), vf{}};
  return {load(from), load(from + LANES, count - LANES)};
}

inline vu narrow(Pair pair) {
  return __builtin_convertvector(narrow(pair.first), vu) | __builtin_convertvector(narrow(pair.second), vu) << 16;
}

inline void store_pair(bf16* to, Pair pair) {
  const vu words = narrow(pair);
  std::memcpy(to, &words, sizeof words);
}

inline void store_pair(float* to, Pair pair) {
  store(to, pair.first);
  store(to + LANES, pair.second);
}

inline void store_pair(bf16* to, Pair pair, int count) {
  const vu words = narrow(pair);
  std::memcpy(to, &words, count * sizeof *to);
}

inline void store_pair(float* to, Pair pair, int count) {
  if (count < LANES) return store(to, pair.first, count);
  store(to, pair.first);
  if (count > LANES) store(to + LANES, pair.second, count - LANES);
}

inline void prefetch(const void* address) { __builtin_prefetch(address); }
inline void prefetch_to_second_level(const void* address) { __builtin_prefetch(address, 0, 2); }

}  // namespace rekindle
