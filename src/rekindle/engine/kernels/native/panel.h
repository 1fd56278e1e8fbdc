// Panels: matrix rows regrouped so that one vector holds the same 32-bit word of LANES rows, and products with them.
//
// A word is one float or two adjacent bf16. A panel is [words][LANES]. Products run over the words in rising order, one
// accumulator per result, so a result never depends on what else is computed beside it.

#pragma once

#include "simd.h"

namespace rekindle {

constexpr int64_t words_of(int64_t row_bytes) { return (row_bytes + 3) / 4; }

#if REKINDLE_AVX512

inline __m512i load_bytes(const char* from, int64_t count) {
  if (count >= 64) return _mm512_loadu_si512(from);
  return count <= 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi8(~0ull >> (64 - count), from);
}

// Transposes 4 x 4 words within each 128-bit lane of v[0..3].
inline void transpose_lanes(__m512i* v) {
  const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
  const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm512_unpacklo_epi64(a, c);
  v[1] = _mm512_unpackhi_epi64(a, c);
  v[2] = _mm512_unpacklo_epi64(b, d);
  v[3] = _mm512_unpackhi_epi64(b, d);
}

// 16 rows of at most 4 words.
inline void gather_narrow(const char* const* rows, int num_rows, int64_t row_bytes, uint32_t* panel) {
  const __mmask16 bytes = (__mmask16)((1u << row_bytes) - 1);
  __m512i v[4];
  for (int i = 0; i < 4; ++i) {
    __m128i lanes[4];
    for (int j = 0; j < 4; ++j) {
      const int row = 4 * j + i;
      lanes[j] = row < num_rows ? _mm_maskz_loadu_epi8(bytes, rows[row]) : _mm_setzero_si128();
    }
    v[i] = _mm512_castsi128_si512(lanes[0]);
    v[i] = _mm512_inserti32x4(v[i], lanes[1], 1);
    v[i] = _mm512_inserti32x4(v[i], lanes[2], 2);
    v[i] = _mm512_inserti32x4(v[i], lanes[3], 3);
  }
  transpose_lanes(v);
  const int words = (int)words_of(row_bytes);
  for (int i = 0; i < words; ++i) _mm512_storeu_si512(panel + i * 16, v[i]);
}

// 16 words of 16 rows.
inline void gather_square(const char* const* rows, int num_rows, int64_t offset, int64_t row_bytes, uint32_t* panel) {
  __m512i v[16], w[16];
  for (int row = 0; row < 16; ++row) {
    w[row] = row < num_rows ? load_bytes(rows[row] + offset, row_bytes - offset) : _mm512_setzero_si512();
  }
  for (int j = 0; j < 4; ++j) transpose_lanes(w + 4 * j);
  // w[4 j + i] now holds, in 128-bit lane c, word 4 c + i of rows 4 j .. 4 j + 3.
  for (int i = 0; i < 4; ++i) {
    const __m512i ab_low = _mm512_shuffle_i32x4(w[i], w[4 + i], 0x44), ab_high = _mm512_shuffle_i32x4(w[i], w[4 + i], 0xee);
    const __m512i cd_low = _mm512_shuffle_i32x4(w[8 + i], w[12 + i], 0x44);
    const __m512i cd_high = _mm512_shuffle_i32x4(w[8 + i], w[12 + i], 0xee);
    v[i] = _mm512_shuffle_i32x4(ab_low, cd_low, 0x88);
    v[4 + i] = _mm512_shuffle_i32x4(ab_low, cd_low, 0xdd);
    v[8 + i] = _mm512_shuffle_i32x4(ab_high, cd_high, 0x88);
    v[12 + i] = _mm512_shuffle_i32x4(ab_high, cd_high, 0xdd);
  }
  const int64_t words = words_of(row_bytes - offset) < 16 ? words_of(row_bytes - offset) : 16;
  for (int64_t i = 0; i < words; ++i) _mm512_storeu_si512(panel + i * 16, v[i]);
}

inline void gather_panel(const char* const* rows, int num_rows, int64_t row_bytes, uint32_t* panel) {
  if (row_bytes <= 16) return gather_narrow(rows, num_rows, row_bytes, panel);
  for (int64_t offset = 0; offset < row_bytes; offset += 64) {
    gather_square(rows, num_rows, offset, row_bytes, panel + offset / 4 * 16);
  }
}

#else

inline void gather_panel(const char* const* rows, int num_rows, int64_t row_bytes, uint32_t* panel) {
  const int64_t whole = row_bytes / 4;
  for (int row = 0; row < LANES; ++row) {
    if (row >= num_rows) {
      for (int64_t word = 0; word < words_of(row_bytes); ++word) panel[word * LANES + row] = 0;
      continue;
    }
    for (int64_t word = 0; word < whole; ++word) {
      std::memcpy(panel + word * LANES + row, rows[row] + 4 * word, 4);
    }
    if (row_bytes % 4) {
      uint16_t last;
      std::memcpy(&last, rows[row] + 4 * whole, 2);
      panel[whole * LANES + row] = last;
    }
  }
}

#endif

// Left factors of a product with a panel of T. `accumulate` adds word `word` of row `row` times `words`.

template <class T>
struct FloatRows {
  const float* base;
  int64_t stride;

  vf accumulate(vf acc, vu words, int row, int64_t word) const {
    const float* x = base + row * stride;
    if constexpr (std::is_same_v<T, float>) return fma((vf)words, splat(x[word]), acc);
    acc = fma(low_halves(words), splat(x[2 * word]), acc);
    return fma(high_halves(words), splat(x[2 * word + 1]), acc);
  }
};

#if REKINDLE_BF16_DOT
struct PairRows {
  const bf16* base;
  int64_t stride;

  vf accumulate(vf acc, vu words, int row, int64_t word) const {
    uint32_t pair;
    std::memcpy(&pair, base + row * stride + 2 * word, 4);
    return dot_pairs(acc, words, splat(pair));
  }
};
#endif

// acc[m][n] += row m of `rows` . panel n, over `num_words` words. Panels lie `panel_stride` words apart.
template <int M, int N, class Rows>
inline void multiply_panels(const Rows& rows, const uint32_t* panel, int64_t panel_stride, int64_t num_words, vf (&acc)[M][N]) {
  for (int64_t word = 0; word < num_words; ++word) {
    vu words[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) std::memcpy(&words[n], panel + n * panel_stride + word * LANES, sizeof(vu));
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] = rows.accumulate(acc[m][n], words[n], m, word);
    }
  }
}

// Calls body(constant M, constant N) for the run-time sizes 1 <= m <= TILE_ROWS, 1 <= n <= TILE_VECTORS.
template <class Body, int M = 1, int N = 1>
inline void with_tile(int m, int n, const Body& body) {
  if constexpr (M < TILE_ROWS) {
    if (m > M) return with_tile<Body, M + 1, N>(m, n, body);
  }
  if constexpr (N < TILE_VECTORS) {
    if (n > N) return with_tile<Body, M, N + 1>(m, n, body);
  }
  body(std::integral_constant<int, M>{}, std::integral_constant<int, N>{});
}

// Cuts `rows` into tiles of nearly equal size, none above TILE_ROWS, and calls body(first, size) for each.
template <class Body>
inline void for_each_row_tile(int64_t rows, const Body& body) {
  const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = rows * tile / tiles, end = rows * (tile + 1) / tiles;
    body(first, (int)(end - first));
  }
}

}  // namespace rekindle
