// Low-rank updates of many adapters in one call: inner = x A^T in float, then y += scale * inner B^T.
//
// The work is cut into tasks: one projection of one segment, for up to ROW_BLOCK rows. A task reads its A and then its B
// from end to end, which for few rows is all it costs, so memory must never wait: a cursor fetches what the thread will
// read, in the order of addresses and up into its next task (see `Ahead`). Where there are too few tasks for the
// threads they are cut further, with a barrier between the two products. Every sum is taken in an order that depends
// neither on the cut nor on other rows.

#include <algorithm>
#include <vector>

#include "abi.h"
#include "panel.h"
#include "parallel.h"

namespace rekindle {
namespace {

constexpr int64_t TABLE_FIELDS = 4;
constexpr int64_t ROW_BLOCK = 48;
constexpr int64_t RANK_BLOCK = 8;       // ranks whose weights serve all rows from the first-level cache
constexpr int64_t SUMS = 32 << 10;      // outputs whose sums are kept at a time
constexpr int64_t COLUMN_UNIT = 192;    // outputs in one unit where tasks are cut
constexpr int64_t TASKS_PER_THREAD = 3;
constexpr int DOT_ROWS = TILE_ROWS > 4 ? 4 : 2;
constexpr int DOT_RANKS = 4;
constexpr int TILE_PAIRS = TILE_VECTORS / 2;
constexpr int64_t PAIR = 2 * LANES;

struct Range {
  int64_t first, end;

  int64_t size() const { return end - first; }
};

template <class T>
struct Call {
  const T* x;
  int64_t x_stride, size;
  T* y;
  int64_t y_stride;
};

template <class T>
struct Task {
  const T* a;  // [rank, size]
  const T* b;  // [rank, out_size], the transpose of B
  int64_t rank;
  float scale;
  Range rows;
  int64_t out_offset, out_size;
  float* inner;  // [rows, rank], where the two products are apart

  int64_t cost() const { return rank * rows.size() * out_size; }
  int64_t columns_at_once() const { return SUMS / std::min<int64_t>(rows.size(), TILE_ROWS) / PAIR * PAIR; }
  bool reads_b_in_order() const { return out_size <= columns_at_once(); }
};

// What one thread takes where tasks are cut: some ranks of A, or some outputs of B.
struct Unit {
  int64_t task;
  Range part;
};

// Fetches the ranges of memory that a thread reads one after another, LEAD bytes ahead of its reading.
//
// Reading several rows of a matrix side by side halves what a core gets from memory, whatever the processor prefetches
// for it; fetching line by line in the order of addresses restores that, also from one range to the next. It goes to
// the second-level cache, which has more misses in flight than the first.
class Ahead {
 public:
  // To be called before the ranges pushed earlier have been read; the first call fetches the first LEAD bytes.
  void push(const void* begin, const void* end) {
    queue_[num_pushed_++ % QUEUE] = {(const char*)begin, (const char*)end};
    if (num_pushed_ == 1) {
      for (int64_t bytes = 0; bytes < LEAD; bytes += LINE) advance(LINE);
    }
  }

  // To be called for every `bytes` read from the ranges.
  void advance(int64_t bytes) {
    if (end_ - at_ < bytes) start();
    if (at_ == nullptr) return;
    for (int64_t i = 0; i < bytes; i += LINE) prefetch_to_second_level(at_ + i);
    at_ += bytes;
  }

 private:
  static constexpr int64_t LINE = 64, LEAD = 8 << 10;
  static constexpr int64_t QUEUE = 8;

  struct Span {
    const char* begin;
    const char* end;
  };

  void start() {
    num_started_ = std::max(num_started_, num_pushed_ - QUEUE);
    const Span span = num_started_ < num_pushed_ ? queue_[num_started_++ % QUEUE] : Span{nullptr, nullptr};
    at_ = span.begin;
    end_ = span.end;
  }

  Span queue_[QUEUE];
  int64_t num_pushed_ = 0, num_started_ = 0;
  const char* at_ = nullptr;
  const char* end_ = nullptr;
};

template <class T>
struct Plan {
  std::vector<Task<T>> tasks;
  std::vector<Unit> shrinks, expands;
};

inline vf dot(vf acc, const Pair& a, const Pair& b) { return fma(a.second, b.second, fma(a.first, b.first, acc)); }

#if REKINDLE_BF16_DOT
inline vf dot(vf acc, vu a, vu b) { return dot_pairs(acc, a, b); }
inline vu load_factors(const bf16* from) { return (vu)_mm512_loadu_si512(from); }
inline vu load_factors(const bf16* from, int count) {
  return (vu)_mm512_maskz_loadu_epi16((__mmask32)((1u << count) - 1), from);
}
#else
inline Pair load_factors(const bf16* from) { return load_pair(from); }
inline Pair load_factors(const bf16* from, int count) { return load_pair(from, count); }
#endif
inline Pair load_factors(const float* from) { return load_pair(from); }
inline Pair load_factors(const float* from, int count) { return load_pair(from, count); }

template <class T, int M, int R>
inline void dot_tile(const T* x, int64_t x_stride, const T* a, int64_t size, Ahead* ahead, float* out, int64_t out_stride) {
  vf acc[M][R] = {};
  const auto step = [&](int64_t k, auto load) {
    if (ahead != nullptr) ahead->advance(R * PAIR * sizeof(T));
    decltype(load(x)) factors[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) factors[m] = load(x + m * x_stride + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const auto weights = load(a + r * size + k);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) acc[m][r] = dot(acc[m][r], factors[m], weights);
    }
  };
  int64_t k = 0;
  for (; k + PAIR <= size; k += PAIR) step(k, [](const T* from) { return load_factors(from); });
  if (k < size) step(k, [rest = (int)(size - k)](const T* from) { return load_factors(from, rest); });
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) store_sums(out + m * out_stride, acc[m]);
}

template <class T, int M, int R = DOT_RANKS>
inline void dot_rows(const T* x, int64_t x_stride, const T* a, int64_t ranks, int64_t size, Ahead* ahead, float* out,
                     int64_t out_stride) {
  for (; ranks >= R; ranks -= R, a += R * size, out += R) {
    dot_tile<T, M, R>(x, x_stride, a, size, ahead, out, out_stride);
  }
  if constexpr (R > 1) {
    if (ranks > 0) dot_rows<T, M, R / 2>(x, x_stride, a, ranks, size, ahead, out, out_stride);
  }
}

template <class Body, int M = DOT_ROWS>
inline void with_rows(int64_t rows, const Body& body) {
  if constexpr (M > 1) {
    if (rows < M) return with_rows<Body, M - 1>(rows, body);
  }
  body(std::integral_constant<int, M>{});
}

// inner[row, rank] = x[row] . A[rank] for some ranks.
template <class T>
void shrink(const Call<T>& call, const Task<T>& task, Range ranks, float* inner, Ahead* ahead) {
  for (int64_t rank = ranks.first; rank < ranks.end; rank += RANK_BLOCK) {
    const int64_t count = std::min(RANK_BLOCK, ranks.end - rank);
    const T* a = task.a + rank * call.size;
    for (int64_t row = 0; row < task.rows.size(); row += DOT_ROWS) {
      const T* x = call.x + (task.rows.first + row) * call.x_stride;
      with_rows(task.rows.size() - row, [&](auto M) {
        dot_rows<T, M>(x, call.x_stride, a, count, call.size, row == 0 ? ahead : nullptr, inner + row * task.rank + rank, task.rank);
      });
    }
  }
}

// sums[m] (+)= sum over `ranks` of inner[m, rank] * B[rank] for up to TILE_PAIRS pairs of columns; `load` reads a pair.
template <class T, int M, int N, class Load>
inline void outer_tile(const float* inner, int64_t inner_stride, const T* b, int64_t b_stride, int64_t ranks, bool is_first,
                       Ahead* ahead, float* sums, int64_t sums_stride, const Load& load_columns) {
  vf acc[M][N][2];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      const float* from = sums + m * sums_stride + n * PAIR;
      acc[m][n][0] = is_first ? vf{} : load(from);
      acc[m][n][1] = is_first ? vf{} : load(from + LANES);
    }
  }
  for (int64_t r = 0; r < ranks; ++r) {
    if (ahead != nullptr) ahead->advance(N * PAIR * sizeof(T));
    Pair columns[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) columns[n] = load_columns(b + r * b_stride + n * PAIR);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const vf factor = splat(inner[m * inner_stride + r]);
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        acc[m][n][0] = fma(factor, columns[n].first, acc[m][n][0]);
        acc[m][n][1] = fma(factor, columns[n].second, acc[m][n][1]);
      }
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      float* to = sums + m * sums_stride + n * PAIR;
      store(to, acc[m][n][0]);
      store(to + LANES, acc[m][n][1]);
    }
  }
}

// sums[m] (+)= inner[m, ranks] . B[ranks, columns].
template <class T, int M>
inline void outer_block(const float* inner, int64_t inner_stride, const T* b, int64_t b_stride, int64_t ranks, bool is_first,
                        int64_t columns, Ahead* ahead, float* sums, int64_t sums_stride) {
  const auto tile = [&](auto N, int64_t column, const auto& load_columns) {
    outer_tile<T, M, N>(inner, inner_stride, b + column, b_stride, ranks, is_first, ahead,
                        sums + column, sums_stride, load_columns);
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, TILE_PAIRS> most;
  const auto load_whole = [](const T* from) { return load_pair(from); };
  int64_t column = 0;
  for (; column + most * PAIR <= columns; column += most * PAIR) tile(most, column, load_whole);
  for (; column + PAIR <= columns; column += PAIR) tile(one, column, load_whole);
  if (column < columns) {
    tile(one, column, [rest = (int)(columns - column)](const T* from) { return load_pair(from, rest); });
  }
}

template <class T>
inline void add_scaled(T* y, const float* sums, int64_t columns, float scale) {
  const auto updated = [&](Pair old, const float* sum) {
    return Pair{fma(load(sum), splat(scale), old.first), fma(load(sum + LANES), splat(scale), old.second)};
  };
  int64_t column = 0;
  for (; column + PAIR <= columns; column += PAIR) {
    store_pair(y + column, updated(load_pair(y + column), sums + column));
  }
  if (const int rest = (int)(columns - column); rest > 0) {
    store_pair(y + column, updated(load_pair(y + column, rest), sums + column), rest);
  }
}

// y[row, columns] += scale * inner[row] . B[columns].
template <class T>
void expand(const Call<T>& call, const Task<T>& task, Range columns, const float* inner, Ahead* ahead) {
  thread_local Scratch scratch;
  float* sums = scratch.reserve<float>(SUMS);
  const int64_t block = task.columns_at_once();
  for (int64_t column = columns.first; column < columns.end; column += block) {
    const int64_t count = std::min(block, columns.end - column);
    const int64_t sums_stride = (count + PAIR - 1) / PAIR * PAIR;
    for_each_row_tile(task.rows.size(), [&](int64_t row, int tile_rows) {
      for (int64_t rank = 0; rank < task.rank; rank += RANK_BLOCK) {
        const int64_t ranks = std::min(RANK_BLOCK, task.rank - rank);
        const T* b = task.b + rank * task.out_size + column;
        with_tile(tile_rows, 1, [&](auto M, auto) {
          outer_block<T, M>(inner + row * task.rank + rank, task.rank, b, task.out_size, ranks, rank == 0, count,
                            task.reads_b_in_order() && row == 0 ? ahead : nullptr, sums, sums_stride);
        });
      }
      for (int m = 0; m < tile_rows; ++m) {
        T* y = call.y + (task.rows.first + row + m) * call.y_stride + task.out_offset + column;
        add_scaled(y, sums + m * sums_stride, count, task.scale);
      }
    });
  }
}

template <class T>
void find_tasks(const LoraBatchRecord& batch, const LoraGroupRecord& group, int64_t layer, std::vector<Task<T>>& tasks) {
  tasks.clear();
  for (int64_t g = 0; g < batch.num_segments; ++g) {
    const int64_t first_row = batch.row_start[g], end_row = batch.row_start[g + 1];
    if (first_row >= end_row || batch.tables[g] == 0) continue;
    const int64_t* entries = (const int64_t*)batch.tables[g] + layer * batch.layer_stride;
    const T* vector = (const T*)batch.vectors[g];
    for (int64_t i = 0; i < group.count; ++i) {
      const int64_t* entry = entries + (group.first + i) * TABLE_FIELDS;
      if (entry[2] <= 0) continue;
      double scale;
      std::memcpy(&scale, &entry[3], sizeof scale);
      for (int64_t row = first_row; row < end_row; row += ROW_BLOCK) {
        tasks.push_back({vector + entry[0], vector + entry[1], entry[2], (float)scale,
                         {row, std::min(row + ROW_BLOCK, end_row)}, group.out_offsets[i], group.out_sizes[i], nullptr});
      }
    }
  }
}

template <class T>
void run_whole(const Call<T>& call, std::vector<Task<T>>& tasks, int num_threads) {
  // The longest first, so that threads finish together.
  std::sort(tasks.begin(), tasks.end(), [](const Task<T>& a, const Task<T>& b) { return a.cost() > b.cost(); });
  Units units((int64_t)tasks.size());
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    thread_local Scratch scratch;
    Ahead ahead;
    units.work_ahead(
        [&](int64_t i) {
          const Task<T>& task = tasks[i];
          ahead.push(task.a, task.a + task.rank * call.size);
          if (task.reads_b_in_order()) ahead.push(task.b, task.b + task.rank * task.out_size);
        },
        [&](int64_t i) {
          const Task<T>& task = tasks[i];
          float* inner = scratch.reserve<float>(task.rows.size() * task.rank);
          shrink(call, task, {0, task.rank}, inner, &ahead);
          expand(call, task, {0, task.out_size}, inner, &ahead);
        });
  }
}

template <class T>
void run_cut(const Call<T>& call, Plan<T>& plan, int num_threads) {
  thread_local Scratch scratch;
  int64_t inner_size = 0;
  for (const Task<T>& task : plan.tasks) inner_size += task.rows.size() * task.rank;
  float* inner = scratch.reserve<float>(inner_size);
  plan.shrinks.clear();
  plan.expands.clear();
  for (int64_t i = 0; i < (int64_t)plan.tasks.size(); ++i) {
    Task<T>& task = plan.tasks[i];
    task.inner = inner;
    inner += task.rows.size() * task.rank;
    for (int64_t rank = 0; rank < task.rank; rank += RANK_BLOCK) {
      plan.shrinks.push_back({i, {rank, std::min(rank + RANK_BLOCK, task.rank)}});
    }
    for (int64_t column = 0; column < task.out_size; column += COLUMN_UNIT) {
      plan.expands.push_back({i, {column, std::min(column + COLUMN_UNIT, task.out_size)}});
    }
  }
  Units shrinks((int64_t)plan.shrinks.size()), expands((int64_t)plan.expands.size());
#pragma omp parallel num_threads(num_threads)
  {
    Ahead ahead;
    shrinks.work_ahead(
        [&](int64_t i) {
          const Unit& unit = plan.shrinks[i];
          const T* a = plan.tasks[unit.task].a;
          ahead.push(a + unit.part.first * call.size, a + unit.part.end * call.size);
        },
        [&](int64_t i) {
          const Unit& unit = plan.shrinks[i];
          const Task<T>& task = plan.tasks[unit.task];
          shrink(call, task, unit.part, task.inner, &ahead);
        });
#pragma omp barrier
    expands.work([&](int64_t i) {
      const Unit& unit = plan.expands[i];
      const Task<T>& task = plan.tasks[unit.task];
      expand(call, task, unit.part, task.inner, nullptr);
    });
  }
}

template <class T>
void lora(const Call<T>& call, const LoraBatchRecord& batch, int64_t layer, const LoraGroupRecord& group, int num_threads) {
  thread_local Plan<T> plan;
  find_tasks(batch, group, layer, plan.tasks);
  if (plan.tasks.empty()) return;
  const bool is_cut = num_threads > 1 && (int64_t)plan.tasks.size() < TASKS_PER_THREAD * num_threads;
  if (is_cut) run_cut(call, plan, num_threads);
  else run_whole(call, plan.tasks, num_threads);
}

}  // namespace
}  // namespace rekindle

#define REKINDLE_LORA(NAME, T)                                                                                     \
  REKINDLE_EXPORT void NAME(const void* x, int64_t x_stride, int64_t size, void* y, int64_t y_stride,              \
                            const LoraBatchRecord* batch, int64_t layer, const LoraGroupRecord* group, int num_threads) { \
    rekindle::lora(rekindle::Call<T>{(const T*)x, x_stride, size, (T*)y, y_stride}, *batch, layer, *group, num_threads); \
  }

REKINDLE_LORA(rekindle_lora_bf16, rekindle::bf16)
REKINDLE_LORA(rekindle_lora_f32, float)
