// Byte planes of numbers, and what a frame of planes looks like. The specification is `rekindle.store.codecs.planes`.

#pragma once

#include <cstdint>
#include <cstring>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "frames of planes are little-endian; without this library numpy does the work"
#endif

namespace rekindle {

constexpr int64_t kStreamBytes = 64 * 1024;  // of one plane; also the elements of one chunk
constexpr int kMaxPlanes = 4;
constexpr int64_t kMaxFrameBytes = 4 * 1024 * 1024;
constexpr int64_t kMaxChunks = kMaxFrameBytes / kStreamBytes;

inline uint64_t load64(const uint8_t* from) {
  uint64_t value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store64(uint8_t* to, uint64_t value) { std::memcpy(to, &value, sizeof value); }

// `planes` are given most significant first, `num_elements` bytes each. With `rotate`, elements are rotated left by one
// bit first, which brings the exponent of bf16 and fp32 into the most significant byte and the sign into the least.
void split(const uint8_t* elements, int64_t num_elements, int num_planes, bool rotate, uint8_t* const* planes);
void join(const uint8_t* const* planes, int64_t num_elements, int num_planes, bool rotate, uint8_t* elements);

}  // namespace rekindle
