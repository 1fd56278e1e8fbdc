// Causal attention of ragged query rows over paged keys and values.
//
// A tile is some query positions of one sequence times the query heads that share one kv head. Its context is walked in
// blocks of KEYS tokens counted from position 0, whatever the tile: each block gives every row a partial softmax
// (maximum, sum, weighted values), and partials are merged in rising order by one formula (the online softmax of Milakov
// and Gimelshein, arXiv 1805.02867, with blocks reduced independently as in Flash-Decoding). So a row's result is the
// same bits in a prefill tile, a decode step, or a context split over threads. Scores are sums over the head in order,
// for all keys of a vector at once, from keys regrouped into panels; values are weighted in float.

#include <algorithm>
#include <limits>
#include <vector>

#include "abi.h"
#include "panel.h"
#include "parallel.h"

namespace rekindle {
namespace {

constexpr int KEYS = 64;
constexpr int KEY_VECTORS = KEYS / LANES;
constexpr int64_t TILE_TARGET_ROWS = 48;
constexpr int64_t WIDEN_FROM_ROWS = 2 * TILE_ROWS;  // from so many rows on it pays to convert values once per block
constexpr int64_t MAX_PARTIAL_FLOATS = 4 << 20;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

// One piece of work. With `partials` set, each block's partial is kept for a later merge; else the tile is finished.
struct Tile {
  int64_t sequence, kv_head;
  int64_t first_query, num_queries;  // counted within the sequence's rows
  int64_t first_block, end_block;
  float* partials;
};

constexpr int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

// Row-wise state of a softmax: maximum and sum per row, values [rows, stride].
struct Partial {
  float* maximum;
  float* sum;
  float* values;

  static int64_t floats(int64_t rows, int64_t stride) { return 2 * padded(rows) + rows * stride; }
  Partial(float* memory, int64_t rows) : maximum(memory), sum(memory + padded(rows)), values(memory + 2 * padded(rows)) {}
};

// Weights that bring the running state and a block's partial to a common maximum; updates maximum and sum.
void join_rows(const Partial& running, const Partial& block, int64_t rows, float* keep, float* add) {
  for (int64_t row = 0; row < rows; row += LANES) {
    const vf old_max = load(running.maximum + row), old_sum = load(running.sum + row);
    const vf block_max = load(block.maximum + row), block_sum = load(block.sum + row);
    const vf new_max = larger(old_max, block_max);
    const vf kept = old_sum == 0.0f ? vf{} : exponential(old_max - new_max);
    const vf added = block_sum == 0.0f ? vf{} : exponential(block_max - new_max);
    store(running.maximum + row, new_max);
    store(running.sum + row, fma(block_sum, added, old_sum * kept));
    store(keep + row, kept);
    store(add + row, added);
  }
}

void clear(const Partial& state, int64_t rows, int64_t stride) {
  std::fill_n(state.maximum, padded(rows), -INFINITE);
  std::fill_n(state.sum, padded(rows), 0.0f);
  std::fill_n(state.values, rows * stride, 0.0f);
}

template <class T>
struct Attention {
  const T* qkv;
  int64_t qkv_stride;
  T* out;
  KVPoolRecord pool;
  int64_t layer;
  AttentionBatchRecord batch;
  AttentionShapeRecord shape;

  int64_t group() const { return shape.num_heads / shape.num_kv_heads; }
  int64_t value_stride() const { return padded(shape.head_dim); }
  int64_t rows_of(const Tile& tile) const { return tile.num_queries * group(); }
  int64_t partial_floats(const Tile& tile) const { return Partial::floats(rows_of(tile), value_stride()); }

  int64_t num_queries(int64_t sequence) const { return batch.query_start[sequence + 1] - batch.query_start[sequence]; }

  int64_t position(int64_t sequence, int64_t query) const {
    return batch.context[sequence] - num_queries(sequence) + query;
  }

  int64_t first_visible(int64_t position) const {
    return shape.window > 0 ? std::max<int64_t>(0, position + 1 - shape.window) : 0;
  }

  const T* query(const Tile& tile, int64_t row) const {
    const int64_t token = batch.query_start[tile.sequence] + tile.first_query + row / group();
    return qkv + token * qkv_stride + (tile.kv_head * group() + row % group()) * shape.head_dim;
  }

  T* output(const Tile& tile, int64_t row) const {
    const int64_t token = batch.query_start[tile.sequence] + tile.first_query + row / group();
    return out + (token * shape.num_heads + tile.kv_head * group() + row % group()) * shape.head_dim;
  }

  void finish(const Tile& tile, const Partial& state) const {
    for (int64_t row = 0; row < rows_of(tile); ++row) {
      const vf inverse = splat(1.0f / state.sum[row]);
      const float* values = state.values + row * value_stride();
      T* to = output(tile, row);
      for_each_vector(shape.head_dim, [&](int64_t i, auto count) { store_run(to + i, load(values + i) * inverse, count); });
    }
  }
};

#if REKINDLE_BF16_DOT
template <class T>
using Query = std::conditional_t<std::is_same_v<T, bf16>, bf16, float>;
template <class T>
using QueryRows = std::conditional_t<std::is_same_v<T, bf16>, PairRows, FloatRows<float>>;
#else
template <class T>
using Query = float;
template <class T>
using QueryRows = FloatRows<T>;
#endif

// One thread's work on one tile.
template <class T>
class TileWorker {
 public:
  TileWorker(const Attention<T>& attention, const Tile& tile)
      : attention_(attention), tile_(tile), rows_(attention.rows_of(tile)), dim_(attention.shape.head_dim),
        stride_(attention.value_stride()), words_(words_of(dim_ * sizeof(T))) {
    thread_local Scratch scratch;
    const int64_t panels = KEYS * words_, scores = rows_ * KEYS, weights = 2 * padded(rows_);
    const int64_t widened = rows_ >= WIDEN_FROM_ROWS ? KEYS * stride_ : 0;
    const int64_t state = attention.partial_floats(tile);
    const int64_t queries = padded(rows_ * dim_);
    float* memory = scratch.reserve<float>(panels + scores + weights + widened + 2 * state + queries);
    const auto next = [&memory](int64_t count) { return memory += count, memory - count; };
    panels_ = (uint32_t*)next(panels);
    scores_ = next(scores);
    widened_ = next(widened);
    keep_ = next(weights);
    running_ = next(state);
    block_ = next(state);
    queries_ = (Query<T>*)next(queries);
  }

  void run() {
    copy_queries();
    const Partial running(running_, rows_);
    if (tile_.partials == nullptr) clear(running, rows_, stride_);
    for (int64_t block = tile_.first_block; block < tile_.end_block; ++block) {
      if (tile_.partials == nullptr) {
        const Partial partial(block_, rows_);
        score(block, partial);
        join_rows(running, partial, rows_, keep_, keep_ + padded(rows_));
        weigh(running.values, true);
      } else {
        const Partial partial(tile_.partials + (block - tile_.first_block) * attention_.partial_floats(tile_), rows_);
        score(block, partial);
        weigh(partial.values, false);
      }
    }
    if (tile_.partials == nullptr) attention_.finish(tile_, running);
  }

 private:
  void copy_queries() {
    for (int64_t row = 0; row < rows_; ++row) {
      const T* from = attention_.query(tile_, row);
      Query<T>* to = queries_ + row * dim_;
      if constexpr (std::is_same_v<T, Query<T>>) {
        std::memcpy(to, from, dim_ * sizeof(T));
      } else {
        for_each_vector(dim_, [&](int64_t i, auto count) { store_run(to + i, load_run(from + i, count), count); });
      }
    }
  }

  // Fills scores_ with exp(score - maximum), zero where a row may not look, and the block's maxima and sums.
  void score(int64_t block, const Partial& partial) {
    const int64_t first_key = block * KEYS;
    const int64_t first_position = attention_.position(tile_.sequence, tile_.first_query);
    begin_ = (int)std::max<int64_t>(0, attention_.first_visible(first_position) - first_key);
    end_ = (int)std::min<int64_t>(KEYS, first_position + tile_.num_queries - first_key);
    locate_keys(first_key);
    const int first_vector = begin_ / LANES, end_vector = (end_ + LANES - 1) / LANES;
    for (int vector = first_vector; vector < end_vector; ++vector) {
      const int key = vector * LANES;
      const int skipped = std::max(begin_ - key, 0);
      const char* rows[LANES];
      // A row outside the tile's range stands in for keys before it; its scores are masked.
      for (int i = 0; i < LANES && key + i < end_; ++i) rows[i] = (const char*)keys_[key + std::max(i, skipped)];
      gather_panel(rows, std::min(LANES, end_ - key), dim_ * sizeof(T), panels_ + key * words_);
    }
    multiply(first_vector, end_vector);
    for (int64_t row = 0; row < rows_; ++row) soften(row, first_key, first_vector, end_vector, partial);
    if (widened_rows()) widen_values();
  }

  void locate_keys(int64_t first_key) {
    const KVPoolRecord& pool = attention_.pool;
    const int32_t* pages = attention_.batch.pages + tile_.sequence * attention_.batch.pages_stride;
    const int64_t within = attention_.layer * pool.layer_stride + tile_.kv_head * dim_;
    int64_t page = (first_key + begin_) / pool.page_tokens, offset = (first_key + begin_) % pool.page_tokens;
    for (int key = begin_; key < end_; ++page, offset = 0) {
      const T* base = (const T*)pool.base + pages[page] * pool.page_stride + within;
      for (; key < end_ && offset < pool.page_tokens; ++key, ++offset) {
        keys_[key] = base + offset * pool.token_stride;
        values_[key] = keys_[key] + attention_.shape.num_kv_heads * dim_;
      }
    }
  }

  bool widened_rows() const { return rows_ >= WIDEN_FROM_ROWS; }

  void widen_values() {
    for (int key = begin_; key < end_; ++key) {
      float* to = widened_ + key * stride_;
      const T* from = values_[key];
      for_each_vector(dim_, [&](int64_t i, auto count) { store(to + i, load_run(from + i, count)); });
    }
  }

  void multiply(int first_vector, int end_vector) {
    for_each_row_tile(rows_, [&](int64_t row, int tile_rows) {
      for (int vector = first_vector; vector < end_vector; vector += TILE_VECTORS) {
        with_tile(tile_rows, std::min(TILE_VECTORS, end_vector - vector), [&](auto M, auto N) {
          vf acc[M][N] = {};
          const QueryRows<T> queries{queries_ + row * dim_, dim_};
          multiply_panels<M, N>(queries, panels_ + vector * LANES * words_, LANES * words_, words_, acc);
          for (int m = 0; m < M; ++m) {
            for (int n = 0; n < N; ++n) store(scores_ + (row + m) * KEYS + (vector + n) * LANES, acc[m][n]);
          }
        });
      }
    });
  }

  void soften(int64_t row, int64_t first_key, int first_vector, int end_vector, const Partial& partial) {
    const AttentionShapeRecord& shape = attention_.shape;
    const int64_t position = attention_.position(tile_.sequence, tile_.first_query + row / attention_.group());
    const int lowest = (int)std::max<int64_t>(0, attention_.first_visible(position) - first_key);
    const int highest = (int)std::min<int64_t>(KEYS - 1, position - first_key);
    float* scores = scores_ + row * KEYS;
    vf maxima = splat(-INFINITE);
    for (int vector = first_vector; vector < end_vector; ++vector) {
      vf v = load(scores + vector * LANES) * (float)shape.scale;
      if (shape.softcap > 0) v = hyperbolic_tangent(v * (float)(1.0 / shape.softcap)) * (float)shape.softcap;
      const vi key = lane_numbers() + vector * LANES;
      v = (key >= lowest) & (key <= highest) ? v : splat(-INFINITE);
      maxima = larger(maxima, v);
      store(scores + vector * LANES, v);
    }
    const float peak = maximum(maxima);
    partial.maximum[row] = peak;
    if (highest < lowest) {
      for (int vector = first_vector; vector < end_vector; ++vector) store(scores + vector * LANES, vf{});
      partial.sum[row] = 0.0f;
      return;
    }
    vf sums{};
    for (int vector = first_vector; vector < end_vector; ++vector) {
      const vf weight = exponential(load(scores + vector * LANES) - peak);
      sums += weight;
      store(scores + vector * LANES, weight);
    }
    partial.sum[row] = sum(sums);
  }

  // values (or, joining, keep * values +) add * (weights . V).
  void weigh(float* values, bool joins) {
    const int64_t vectors = stride_ / LANES, whole = dim_ / LANES;
    for_each_row_tile(rows_, [&](int64_t row, int tile_rows) {
      for (int64_t vector = 0; vector < vectors; vector += TILE_VECTORS) {
        if (widened_rows()) {
          const int count = (int)std::min<int64_t>(TILE_VECTORS, vectors - vector);
          with_tile(tile_rows, count, [&](auto M, auto N) {
            weigh_tile<M, N>(row, vector, values, joins,
                             [this](int key, int64_t i) { return load(widened_ + key * stride_ + i); });
          });
          continue;
        }
        const int count = (int)std::min<int64_t>(TILE_VECTORS, whole - vector);
        if (count > 0) {
          with_tile(tile_rows, count, [&](auto M, auto N) {
            weigh_tile<M, N>(row, vector, values, joins, [this](int key, int64_t i) { return load(values_[key] + i); });
          });
        }
        if (vector + TILE_VECTORS >= vectors && whole < vectors) {
          const int rest = (int)(dim_ - whole * LANES);
          with_tile(tile_rows, 1, [&](auto M, auto N) {
            weigh_tile<M, N>(row, whole, values, joins,
                             [this, rest](int key, int64_t i) { return load(values_[key] + i, rest); });
          });
        }
      }
    });
  }

  template <int M, int N, class Load>
  void weigh_tile(int64_t row, int64_t vector, float* values, bool joins, const Load& load_value) {
    vf acc[M][N] = {};
    const float* weights = scores_ + row * KEYS;
    for (int key = begin_; key < end_; ++key) {
      vf v[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) v[n] = load_value(key, (vector + n) * LANES);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        const vf weight = splat(weights[m * KEYS + key]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[m][n] = fma(weight, v[n], acc[m][n]);
      }
    }
    const float* add = keep_ + padded(rows_);
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) {
        float* to = values + (row + m) * stride_ + (vector + n) * LANES;
        store(to, joins ? fma(acc[m][n], splat(add[row + m]), load(to) * splat(keep_[row + m])) : acc[m][n]);
      }
    }
  }

  const Attention<T>& attention_;
  const Tile& tile_;
  const int64_t rows_, dim_, stride_, words_;
  int begin_ = 0, end_ = 0;  // keys of the block that some row of the tile sees
  uint32_t* panels_;
  float* scores_;
  float* widened_;
  float* keep_;
  float* running_;
  float* block_;
  Query<T>* queries_;
  const T* keys_[KEYS];
  const T* values_[KEYS];
};

// Merges the partials of one tile, whose blocks were computed apart.
template <class T>
void merge(const Attention<T>& attention, const Tile& tile) {
  thread_local Scratch scratch;
  const int64_t rows = attention.rows_of(tile), stride = attention.value_stride();
  const int64_t floats = attention.partial_floats(tile);
  float* memory = scratch.reserve<float>(floats + 2 * padded(rows));
  const Partial running(memory, rows);
  float* keep = memory + floats;
  float* add = keep + padded(rows);
  clear(running, rows, stride);
  for (int64_t block = tile.first_block; block < tile.end_block; ++block) {
    const Partial partial(tile.partials + (block - tile.first_block) * floats, rows);
    join_rows(running, partial, rows, keep, add);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = row * stride; i < (row + 1) * stride; i += LANES) {
        const vf kept = load(running.values + i) * splat(keep[row]);
        store(running.values + i, fma(load(partial.values + i), splat(add[row]), kept));
      }
    }
  }
  attention.finish(tile, running);
}

template <class T>
std::vector<Tile> tiles_of(const Attention<T>& attention) {
  const int64_t queries_per_tile = std::max<int64_t>(1, TILE_TARGET_ROWS / attention.group());
  std::vector<Tile> tiles;
  for (int64_t sequence = 0; sequence < attention.batch.num_sequences; ++sequence) {
    const int64_t num_queries = attention.num_queries(sequence);
    for (int64_t query = 0; query < num_queries; query += queries_per_tile) {
      const int64_t count = std::min(queries_per_tile, num_queries - query);
      const int64_t first = attention.position(sequence, query);
      const int64_t first_block = attention.first_visible(first) / KEYS, end_block = (first + count - 1) / KEYS + 1;
      for (int64_t kv_head = 0; kv_head < attention.shape.num_kv_heads; ++kv_head) {
        tiles.push_back({sequence, kv_head, query, count, first_block, end_block, nullptr});
      }
    }
  }
  return tiles;
}

// Blocks a unit of work may have: an eighth of a thread's fair share, at least two.
int64_t blocks_per_unit(const std::vector<Tile>& tiles, int num_threads) {
  int64_t total = 0;
  for (const Tile& tile : tiles) total += tile.end_block - tile.first_block;
  return std::max<int64_t>(2, total / (8 * num_threads));
}

template <class T>
void attention(const Attention<T>& attention, int num_threads) {
  std::vector<Tile> units, split;
  std::vector<Tile> tiles = tiles_of(attention);
  const int64_t limit = num_threads > 1 ? blocks_per_unit(tiles, num_threads) : std::numeric_limits<int64_t>::max();
  int64_t partial_floats = 0;
  for (Tile& tile : tiles) {
    const int64_t floats = (tile.end_block - tile.first_block) * attention.partial_floats(tile);
    if (tile.end_block - tile.first_block <= limit || partial_floats + floats > MAX_PARTIAL_FLOATS) {
      units.push_back(tile);
    } else {
      split.push_back(tile);
      partial_floats += floats;
    }
  }
  thread_local Scratch scratch;
  float* partials = scratch.reserve<float>(partial_floats);
  for (Tile& tile : split) {
    tile.partials = partials;
    const int64_t floats = attention.partial_floats(tile);
    for (int64_t block = tile.first_block; block < tile.end_block; block += limit) {
      Tile unit = tile;
      unit.first_block = block;
      unit.end_block = std::min(block + limit, tile.end_block);
      unit.partials = partials + (block - tile.first_block) * floats;
      units.push_back(unit);
    }
    partials += (tile.end_block - tile.first_block) * floats;
  }
  Units tile_units(units.size()), merge_units(split.size());
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    tile_units.work([&](int64_t i) { TileWorker<T>(attention, units[i]).run(); });
    if (!split.empty()) {
#pragma omp barrier
      merge_units.work([&](int64_t i) { merge(attention, split[i]); });
    }
  }
}

}  // namespace
}  // namespace rekindle

#define REKINDLE_ATTENTION(NAME, T)                                                                              \
  REKINDLE_EXPORT void NAME(const void* qkv, int64_t qkv_stride, void* out, const KVPoolRecord* pool, int64_t layer, \
                            const AttentionBatchRecord* batch, const AttentionShapeRecord* shape, int num_threads) { \
    rekindle::attention(rekindle::Attention<T>{(const T*)qkv, qkv_stride, (T*)out, *pool, layer, *batch, *shape}, num_threads); \
  }

REKINDLE_ATTENTION(rekindle_attention_bf16, rekindle::bf16)
REKINDLE_ATTENTION(rekindle_attention_f32, float)
