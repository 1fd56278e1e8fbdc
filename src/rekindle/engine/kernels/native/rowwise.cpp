// Operations on single rows: norms, gated activations, rotation of queries and keys and the write into pages.

#include <algorithm>

#include "abi.h"
#include "parallel.h"
#include "simd.h"

namespace rekindle {
namespace {

constexpr int64_t ELEMENTS_PER_UNIT = 8 << 10;  // below two units' worth a parallel region costs more than it gains

// Calls body(row) for every row, in parallel where there is enough to do.
template <class Body>
void for_each_row(int num_threads, int64_t rows, int64_t row_elements, const Body& body) {
  const int64_t rows_per_unit = std::max<int64_t>(1, ELEMENTS_PER_UNIT / std::max<int64_t>(row_elements, 1));
  for_each_unit(num_threads, (rows + rows_per_unit - 1) / rows_per_unit, [&](int64_t unit) {
    const int64_t end = std::min(rows, (unit + 1) * rows_per_unit);
    for (int64_t row = unit * rows_per_unit; row < end; ++row) body(row);
  });
}

template <class T>
float mean_square(const T* x, int64_t size) {
  vf squares{};
  for_each_vector(size, [&](int64_t i, auto count) {
    const vf v = load_run(x + i, count);
    squares = fma(v, v, squares);
  });
  return sum(squares) / (float)size;
}

template <class In, class Out>
void normalize(const In* x, const float* weight, Out* out, int64_t size, float eps) {
  const vf factor = splat(1.0f / __builtin_sqrtf(mean_square(x, size) + eps));
  for_each_vector(size, [&](int64_t i, auto count) {
    store_run(out + i, load_run(x + i, count) * factor * load_run(weight + i, count), count);
  });
}

template <class In, class Out>
void rms_norm(const In* x, int64_t outer_stride, int64_t inner_rows, int64_t inner_stride, int64_t rows, int64_t size,
              const float* weight, float eps, Out* out, int num_threads) {
  for_each_row(num_threads, rows, size, [&](int64_t row) {
    const In* from = x + row / inner_rows * outer_stride + row % inner_rows * inner_stride;
    normalize(from, weight, out + row * size, size, eps);
  });
}

template <class T>
void add_rms_norm(const T* x, int64_t x_stride, float* residual, int64_t residual_stride, int64_t rows, int64_t size,
                  const float* weight, float eps, T* out, int num_threads) {
  for_each_row(num_threads, rows, size, [&](int64_t row) {
    float* total = residual + row * residual_stride;
    const T* branch = x + row * x_stride;
    for_each_vector(size, [&](int64_t i, auto count) {
      store_run(total + i, load_run(total + i, count) + load_run(branch + i, count), count);
    });
    normalize(total, weight, out + row * size, size, eps);
  });
}

inline vf silu(vf x) { return x / (1.0f + exponential(-x)); }

inline vf gelu_tanh(vf x) {
  const vf inner = 0.7978845608f * (x + 0.044715f * x * x * x);
  return 0.5f * x * (1.0f + hyperbolic_tangent(inner));
}

template <class T>
void gated_activation(const T* gate_up, int64_t stride, int64_t rows, int64_t size, bool is_silu, T* out,
                      int num_threads) {
  for_each_row(num_threads, rows, 4 * size, [&](int64_t row) {
    const T* gate = gate_up + row * stride;
    T* to = out + row * size;
    const auto apply = [&](auto activation) {
      for_each_vector(size, [&](int64_t i, auto count) {
        store_run(to + i, activation(load_run(gate + i, count)) * load_run(gate + size + i, count), count);
      });
    };
    if (is_silu) apply([](vf x) { return silu(x); });
    else apply([](vf x) { return gelu_tanh(x); });
  });
}

template <class T>
void rotate(T* head, const float* cos, const float* sin, int64_t half) {
  for_each_vector(half, [&](int64_t i, auto count) {
    const vf low = load_run(head + i, count), high = load_run(head + half + i, count);
    const vf c = load_run(cos + i, count), s = load_run(sin + i, count);
    store_run(head + i, fma(low, c, -(high * s)), count);
    store_run(head + half + i, fma(high, c, low * s), count);
  });
}

template <class T>
void rope_and_store(T* qkv, int64_t stride, const float* cos, const float* sin, const KVPoolRecord& pool, int64_t layer,
                    const AttentionBatchRecord& batch, const AttentionShapeRecord& shape, int num_threads) {
  const int64_t dim = shape.head_dim, rotated = shape.num_heads + shape.num_kv_heads, half = dim / 2;
  const int64_t stored = 2 * shape.num_kv_heads * dim;
  for_each_row(num_threads, batch.num_rows, (rotated + shape.num_kv_heads) * dim, [&](int64_t row) {
    T* heads = qkv + row * stride;
    for (int64_t head = 0; head < rotated; ++head) rotate(heads + head * dim, cos + row * half, sin + row * half, half);
    const int64_t page = batch.slots[row] / pool.page_tokens, offset = batch.slots[row] % pool.page_tokens;
    T* place = (T*)pool.base + page * pool.page_stride + layer * pool.layer_stride + offset * pool.token_stride;
    std::memcpy(place, heads + shape.num_heads * dim, stored * sizeof(T));
  });
}

}  // namespace
}  // namespace rekindle

#define REKINDLE_RMS_NORM(SUFFIX, IN, OUT)                                                                           \
  REKINDLE_EXPORT void rekindle_rms_norm_##SUFFIX(const void* x, int64_t outer_stride, int64_t inner_rows,           \
                                                  int64_t inner_stride, int64_t rows, int64_t size,                  \
                                                  const float* weight, float eps, void* out, int num_threads) {      \
    rekindle::rms_norm((const IN*)x, outer_stride, inner_rows, inner_stride, rows, size, weight, eps, (OUT*)out,     \
                       num_threads);                                                                                 \
  }

REKINDLE_RMS_NORM(bf16, rekindle::bf16, rekindle::bf16)
REKINDLE_RMS_NORM(f32_bf16, float, rekindle::bf16)
REKINDLE_RMS_NORM(f32, float, float)

#define REKINDLE_ROWWISE(SUFFIX, T)                                                                                  \
  REKINDLE_EXPORT void rekindle_add_rms_norm_##SUFFIX(const void* x, int64_t x_stride, void* residual,               \
                                                      int64_t residual_stride, int64_t rows, int64_t size,           \
                                                      const float* weight, float eps, void* out, int num_threads) {  \
    rekindle::add_rms_norm((const T*)x, x_stride, (float*)residual, residual_stride, rows, size, weight, eps, (T*)out,   \
                           num_threads);                                                                             \
  }                                                                                                                  \
  REKINDLE_EXPORT void rekindle_gated_activation_##SUFFIX(const void* gate_up, int64_t stride, int64_t rows,         \
                                                          int64_t size, int is_silu, void* out, int num_threads) {   \
    rekindle::gated_activation((const T*)gate_up, stride, rows, size, is_silu != 0, (T*)out, num_threads);           \
  }                                                                                                                  \
  REKINDLE_EXPORT void rekindle_rope_and_store_##SUFFIX(                                                             \
      void* qkv, int64_t stride, const float* cos, const float* sin, const KVPoolRecord* pool, int64_t layer,        \
      const AttentionBatchRecord* batch, const AttentionShapeRecord* shape, int num_threads) {                       \
    rekindle::rope_and_store((T*)qkv, stride, cos, sin, *pool, layer, *batch, *shape, num_threads);                  \
  }

REKINDLE_ROWWISE(bf16, rekindle::bf16)
REKINDLE_ROWWISE(f32, float)
