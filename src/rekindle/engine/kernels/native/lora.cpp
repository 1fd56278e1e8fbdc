// Low-rank updates of many adapters in one call: inner = x A^T in float, then y += scale * inner B^T.
//
// Both phases are cut into units of about equal work over all segments and projections of the group, with a barrier
// between. Every weight is read once per row block of its segment; rows of other segments never matter to a row.

#include <algorithm>
#include <vector>

#include "abi.h"
#include "panel.h"
#include "parallel.h"

namespace rekindle {
namespace {

constexpr int64_t TABLE_FIELDS = 4;
constexpr int64_t ROW_BLOCK = 48;           // rows that share one pass over a block of weights
constexpr int64_t RANK_BLOCK = 8;           // rows of A in one unit
constexpr int64_t EXPAND_BYTES = 16 << 10;  // bytes of B in one unit
constexpr int DOT_ROWS = REKINDLE_AVX512 || LANES == 4 ? 4 : 2;
constexpr int DOT_RANKS = 4;

template <class T>
struct Update {
  const T* a;  // [rank, size]
  const T* b;  // [rank, out_size], the transpose of B
  int64_t rank;
  float scale;
  int64_t first_row, end_row;
  int64_t out_offset, out_size;
  float* inner;  // [rows, inner_stride], zero beyond the rank
  int64_t inner_stride;
};

// Rows first_row .. end_row of an update; ranks, or output columns, first .. end.
struct Unit {
  int update;
  int64_t first_row, end_row;
  int64_t first, end;
};

template <class T, int M, int R>
inline void dot_tile(const T* x, int64_t x_stride, const T* a, int64_t size, float* out, int64_t out_stride) {
  vf acc[M][R] = {};
#if REKINDLE_BF16_DOT
  if constexpr (std::is_same_v<T, bf16>) {
    const auto step = [&](int64_t k, auto load32) {
      vu x_pairs[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) x_pairs[m] = load32(x + m * x_stride + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vu a_pairs = load32(a + r * size + k);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) acc[m][r] = dot_pairs(acc[m][r], x_pairs[m], a_pairs);
      }
    };
    int64_t k = 0;
    for (; k + 32 <= size; k += 32) step(k, [](const bf16* p) { return (vu)_mm512_loadu_si512(p); });
    const __mmask32 rest = (__mmask32)((1ull << (size - k)) - 1);
    if (rest) step(k, [rest](const bf16* p) { return (vu)_mm512_maskz_loadu_epi16(rest, p); });
  } else
#endif
  {
    for_each_vector(size, [&](int64_t k, auto count) {
      vf xs[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) xs[m] = load_run(x + m * x_stride + k, count);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vf as = load_run(a + r * size + k, count);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) acc[m][r] = fma(xs[m], as, acc[m][r]);
      }
    });
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) out[m * out_stride + r] = sum(acc[m][r]);
  }
}

template <class T, int M, int R>
inline void dot_rows(const T* x, int64_t x_stride, const T* a, int64_t ranks, int64_t size, float* out, int64_t out_stride) {
  for (; ranks >= R; ranks -= R, a += R * size, out += R) dot_tile<T, M, R>(x, x_stride, a, size, out, out_stride);
  if constexpr (R > 1) {
    if (ranks > 0) dot_rows<T, M, R / 2>(x, x_stride, a, ranks, size, out, out_stride);
  }
}

template <class T>
void shrink(const Update<T>& update, const Unit& unit, const T* x, int64_t x_stride, int64_t size) {
  const T* a = update.a + unit.first * size;
  const int64_t ranks = unit.end - unit.first;
  int64_t row = unit.first_row;
  const auto inner = [&] { return update.inner + (row - update.first_row) * update.inner_stride + unit.first; };
  for (; row + DOT_ROWS <= unit.end_row; row += DOT_ROWS) {
    dot_rows<T, DOT_ROWS, DOT_RANKS>(x + row * x_stride, x_stride, a, ranks, size, inner(), update.inner_stride);
  }
  for (; row < unit.end_row; ++row) {
    dot_rows<T, 1, RANK_BLOCK>(x + row * x_stride, x_stride, a, ranks, size, inner(), update.inner_stride);
  }
  if (unit.end != update.rank) return;
  for (row = unit.first_row; row < unit.end_row; ++row) {
    float* rest = update.inner + (row - update.first_row) * update.inner_stride;
    for (int64_t r = update.rank; r < update.inner_stride; ++r) rest[r] = 0.0f;
  }
}

template <class T>
void expand(const Update<T>& update, const Unit& unit, T* y, int64_t y_stride) {
  for (int64_t column = unit.first; column < unit.end; column += LANES * TILE_VECTORS) {
    const int64_t columns = std::min<int64_t>(unit.end - column, LANES * TILE_VECTORS);
    const int num_vectors = (int)((columns + LANES - 1) / LANES);
    for_each_row_tile(unit.end_row - unit.first_row, [&](int64_t tile_row, int tile_rows) {
      const int64_t first_row = unit.first_row + tile_row;
      const float* inner = update.inner + (first_row - update.first_row) * update.inner_stride;
      with_tile(tile_rows, num_vectors, [&](auto M, auto N) {
        const auto count = [&](int n) { return (int)std::min<int64_t>(columns - n * LANES, LANES); };
        vf acc[M][N] = {};
        for (int64_t r = 0; r < update.rank; ++r) {
          const T* b = update.b + r * update.out_size + column;
          vf bs[N];
          for (int n = 0; n < N; ++n) bs[n] = count(n) == LANES ? load(b + n * LANES) : load(b + n * LANES, count(n));
          for (int m = 0; m < M; ++m) {
            const vf x = splat(inner[m * update.inner_stride + r]);
            for (int n = 0; n < N; ++n) acc[m][n] = fma(x, bs[n], acc[m][n]);
          }
        }
        for (int m = 0; m < M; ++m) {
          T* out = y + (first_row + m) * y_stride + update.out_offset + column;
          for (int n = 0; n < N; ++n) {
            T* target = out + n * LANES;
            if (count(n) == LANES) store(target, fma(acc[m][n], splat(update.scale), load(target)));
            else store(target, fma(acc[m][n], splat(update.scale), load(target, count(n))), count(n));
          }
        }
      });
    });
  }
}

template <class T>
std::vector<Update<T>> updates_of(const LoraBatchRecord& batch, const LoraGroupRecord& group, int64_t layer) {
  std::vector<Update<T>> updates;
  for (int64_t g = 0; g < batch.num_segments; ++g) {
    const int64_t first_row = batch.row_start[g], end_row = batch.row_start[g + 1];
    if (first_row >= end_row || batch.tables[g] == 0) continue;
    const int64_t* entries = (const int64_t*)batch.tables[g] + layer * batch.layer_stride;
    const T* vector = (const T*)batch.vectors[g];
    for (int64_t i = 0; i < group.count; ++i) {
      const int64_t* entry = entries + (group.first + i) * TABLE_FIELDS;
      const int64_t rank = entry[2];
      if (rank <= 0) continue;
      double scale;
      std::memcpy(&scale, &entry[3], sizeof scale);
      updates.push_back({vector + entry[0], vector + entry[1], rank, (float)scale, first_row, end_row,
                         group.out_offsets[i], group.out_sizes[i], nullptr, (rank + 1) & ~int64_t{1}});
    }
  }
  return updates;
}

template <class T>
void cut(const std::vector<Update<T>>& updates, std::vector<Unit>& shrinks, std::vector<Unit>& expands) {
  for (size_t u = 0; u < updates.size(); ++u) {
    const Update<T>& update = updates[u];
    const int64_t columns_of_unit = EXPAND_BYTES / (update.rank * (int64_t)sizeof(T));
    const int64_t step = std::max<int64_t>(columns_of_unit & ~int64_t{63}, 64);
    for (int64_t row = update.first_row; row < update.end_row; row += ROW_BLOCK) {
      const int64_t end_row = std::min(row + ROW_BLOCK, update.end_row);
      for (int64_t rank = 0; rank < update.rank; rank += RANK_BLOCK) {
        shrinks.push_back({(int)u, row, end_row, rank, std::min(rank + RANK_BLOCK, update.rank)});
      }
      for (int64_t column = 0; column < update.out_size; column += step) {
        expands.push_back({(int)u, row, end_row, column, std::min(column + step, update.out_size)});
      }
    }
  }
}

template <class T>
void lora(const T* x, int64_t x_stride, int64_t size, T* y, int64_t y_stride, const LoraBatchRecord& batch,
          int64_t layer, const LoraGroupRecord& group, int num_threads) {
  std::vector<Update<T>> updates = updates_of<T>(batch, group, layer);
  if (updates.empty()) return;
  thread_local Scratch scratch;
  int64_t inner_size = 0;
  for (const Update<T>& update : updates) inner_size += (update.end_row - update.first_row) * update.inner_stride;
  float* inner = scratch.reserve<float>(inner_size);
  for (Update<T>& update : updates) {
    update.inner = inner;
    inner += (update.end_row - update.first_row) * update.inner_stride;
  }
  std::vector<Unit> shrinks, expands;
  cut(updates, shrinks, expands);
  Units shrink_units(shrinks.size()), expand_units(expands.size());
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    shrink_units.work([&](int64_t i) { shrink(updates[shrinks[i].update], shrinks[i], x, x_stride, size); });
#pragma omp barrier
    expand_units.work([&](int64_t i) { expand(updates[expands[i].update], expands[i], y, y_stride); });
  }
}

}  // namespace
}  // namespace rekindle

#define REKINDLE_LORA(NAME, T)                                                                                     \
  REKINDLE_EXPORT void NAME(const void* x, int64_t x_stride, int64_t size, void* y, int64_t y_stride,              \
                            const LoraBatchRecord* batch, int64_t layer, const LoraGroupRecord* group, int num_threads) { \
    rekindle::lora((const T*)x, x_stride, size, (T*)y, y_stride, *batch, layer, *group, num_threads);              \
  }

REKINDLE_LORA(rekindle_lora_bf16, rekindle::bf16)
REKINDLE_LORA(rekindle_lora_f32, float)
