// y = x W^T + b in bf16, with W regrouped once into panels of LANES outputs; needs bf16 dot products.
//
// A panel is one stream of memory, read once for up to TILE_ROWS rows and from cache for the rest, so the same layout
// serves one row at memory speed and many rows at arithmetic speed. Every output is one chain over K in rising order:
// results do not depend on the batch. Long rows are done in blocks whose panels fit the second-level cache.

#include <algorithm>

#include "abi.h"
#include "panel.h"
#include "parallel.h"

#if REKINDLE_BF16_DOT

namespace rekindle {
namespace {

constexpr int64_t WORDS_PER_BLOCK = 1024;

inline int64_t panels_of(int64_t outputs) { return (outputs + LANES - 1) / LANES; }

void pack(const bf16* weight, int64_t stride, int64_t outputs, int64_t size, uint32_t* packed, int num_threads) {
  const int64_t panel_stride = words_of(2 * size) * LANES;
  for_each_unit(num_threads, panels_of(outputs), [&](int64_t panel) {
    const char* rows[LANES];
    const int num_rows = (int)std::min<int64_t>(outputs - panel * LANES, LANES);
    for (int i = 0; i < num_rows; ++i) rows[i] = (const char*)(weight + (panel * LANES + i) * stride);
    gather_panel(rows, num_rows, 2 * size, packed + panel * panel_stride);
  });
}

struct Linear {
  const bf16* x;
  int64_t x_stride, rows, size;
  const uint32_t* packed;
  const bf16* bias;
  bf16* y;
  int64_t y_stride, outputs;

  int64_t words() const { return words_of(2 * size); }

  // Outputs of panels first .. first + count <= TILE_VECTORS for all rows.
  void panels(int64_t first, int count) const {
    thread_local Scratch scratch;
    const int64_t num_words = words();
    const bool single = num_words <= WORDS_PER_BLOCK;
    float* sums = single ? nullptr : scratch.reserve<float>(rows * TILE_VECTORS * LANES);
    for (int64_t word = 0; word < num_words; word += WORDS_PER_BLOCK) {
      const int64_t end = std::min(word + WORDS_PER_BLOCK, num_words);
      for_each_row_tile(rows, [&](int64_t row, int tile_rows) {
        with_tile(tile_rows, count, [&](auto M, auto N) { tile<M, N>(first, row, word, end, sums); });
      });
    }
  }

 private:
  template <int M, int N>
  void tile(int64_t first, int64_t row, int64_t word, int64_t end, float* sums) const {
    const int64_t panel_stride = words() * LANES;
    const uint32_t* panel = packed + first * panel_stride;
    float* partial = sums + row * TILE_VECTORS * LANES;
    vf acc[M][N] = {};
    if (word > 0) {
      for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) acc[m][n] = load(partial + (m * TILE_VECTORS + n) * LANES);
      }
    }
    const bf16* from = x + row * x_stride;
    const int64_t whole = std::min(end, size / 2);
    multiply_panels<M, N>(PairRows{from + 2 * word, x_stride}, panel + word * LANES, panel_stride, whole - word, acc);
    if (whole < end) {
      for (int m = 0; m < M; ++m) {
        const vu last = splat((uint32_t)from[m * x_stride + size - 1]);
        for (int n = 0; n < N; ++n) {
          vu words;
          std::memcpy(&words, panel + n * panel_stride + whole * LANES, sizeof words);
          acc[m][n] = dot_pairs(acc[m][n], words, last);
        }
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) {
        if (end < words_of(2 * size)) store(partial + (m * TILE_VECTORS + n) * LANES, acc[m][n]);
        else finish(acc[m][n], row + m, (first + n) * LANES);
      }
    }
  }

  void finish(vf value, int64_t row, int64_t output) const {
    bf16* to = y + row * y_stride + output;
    if (output + LANES <= outputs) {
      store(to, bias == nullptr ? value : value + load(bias + output));
    } else {
      const int count = (int)(outputs - output);
      store(to, bias == nullptr ? value : value + load(bias + output, count), count);
    }
  }
};

// The next panels for a thread: TILE_VECTORS at a time, fewer towards the end so that threads finish together.
bool take(std::atomic<int64_t>& next, int64_t total, int num_threads, int64_t& first, int& count) {
  first = next.load(std::memory_order_relaxed);
  do {
    if (first >= total) return false;
    const int64_t share = (total - first) / (2 * num_threads);
    count = (int)std::clamp<int64_t>(share, 1, TILE_VECTORS);
  } while (!next.compare_exchange_weak(first, first + count, std::memory_order_relaxed));
  return true;
}

}  // namespace
}  // namespace rekindle

REKINDLE_EXPORT void rekindle_linear_pack(const void* weight, int64_t stride, int64_t outputs, int64_t size,
                                          void* packed, int num_threads) {
  rekindle::pack((const rekindle::bf16*)weight, stride, outputs, size, (uint32_t*)packed, num_threads);
}

REKINDLE_EXPORT void rekindle_linear(const void* x, int64_t x_stride, int64_t rows, int64_t size, const void* packed,
                                     const void* bias, void* y, int64_t y_stride, int64_t outputs, int num_threads) {
  using namespace rekindle;
  const Linear linear{(const bf16*)x, x_stride, rows, size, (const uint32_t*)packed, (const bf16*)bias, (bf16*)y, y_stride, outputs};
  const int64_t total = panels_of(outputs);
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    int64_t first;
    int count;
    while (take(next, total, num_threads, first, count)) linear.panels(first, count);
  }
}

#endif
