// The functions Python calls and the records it passes. native_kernels.py mirrors the records field by field.
//
// Each operation exists for bf16 and for float; pointers and strides count elements of that type. Shapes were checked
// by the caller.

#pragma once

#include <cstdint>

#define REKINDLE_EXPORT extern "C" __attribute__((visibility("default")))

struct AttentionBatchRecord {
  const int32_t* query_start;  // [S + 1]
  const int32_t* context;      // [S]
  const int32_t* pages;        // [S, pages_stride]
  const int64_t* slots;        // [T]
  int64_t num_sequences;
  int64_t num_rows;
  int64_t pages_stride;
};

struct AttentionShapeRecord {
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t window;
  double scale;
  double softcap;
};

struct KVPoolRecord {
  void* base;
  int64_t page_tokens;
  int64_t page_stride;
  int64_t layer_stride;
  int64_t token_stride;
};

struct LoraBatchRecord {
  const int32_t* row_start;  // [G + 1]
  const int64_t* tables;     // [G] addresses of int64 [layers, projections, 4], 0 for the base
  const int64_t* vectors;    // [G] addresses of the adapters' elements
  int64_t num_segments;
  int64_t layer_stride;
};

struct LoraGroupRecord {
  int64_t first;
  int64_t count;
  const int64_t* out_offsets;
  const int64_t* out_sizes;
};
