// Packing and unpacking of whole frames of planes, for callers in C. The layout's specification is
// `rekindle.store.codecs.planes`; the caller has checked a frame's size and table before it is unpacked here.

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "huffman.h"
#include "planes.h"

namespace rekindle {
namespace {

constexpr double kWorthBits = 7.8;  // of a byte; planes above gain less than their decoding costs

struct PlaneCounts {
  uint32_t of_chunk[kMaxChunks][256];
  uint32_t of_frame[256];
};

void count_bytes(const uint8_t* bytes, int64_t count, uint32_t* counts) {
  uint32_t lanes[4][256] = {};  // so that equal neighbours do not wait for each other
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int lane = 0; lane < 4; ++lane) ++lanes[lane][bytes[i + lane]];
  }
  for (; i < count; ++i) ++lanes[0][bytes[i]];
  for (int b = 0; b < 256; ++b) counts[b] = lanes[0][b] + lanes[1][b] + lanes[2][b] + lanes[3][b];
}

double entropy_bits(const uint32_t* counts, int64_t total) {
  double bits = 0;
  for (int b = 0; b < 256; ++b) {
    if (counts[b] != 0) bits -= counts[b] * std::log2(static_cast<double>(counts[b]) / static_cast<double>(total));
  }
  return bits / static_cast<double>(total);
}

// Memory that a thread keeps for its next frame.
uint8_t* scratch(int64_t num_bytes) {
  thread_local std::unique_ptr<uint8_t[]> memory;
  thread_local int64_t size = 0;
  if (size < num_bytes) {
    memory.reset(new uint8_t[num_bytes]);
    size = num_bytes;
  }
  return memory.get();
}

int64_t chunk_elements(int64_t num_elements, int64_t chunk) {
  return std::min(kStreamBytes, num_elements - chunk * kStreamBytes);
}

int64_t pack_frame(const uint8_t* frame, int64_t frame_bytes, int num_planes, bool rotate, uint8_t* packed,
                   int64_t capacity) {
  const int64_t num_elements = frame_bytes / num_planes, num_chunks = (num_elements + kStreamBytes - 1) / kStreamBytes;
  uint8_t* planes[kMaxPlanes];
  uint8_t* const memory = scratch(kMaxFrameBytes);
  for (int p = 0; p < num_planes; ++p) planes[p] = memory + p * num_elements;
  split(frame, num_elements, num_planes, rotate, planes);

  thread_local std::vector<PlaneCounts> counts(kMaxPlanes);
  thread_local std::vector<Encoder> encoders(kMaxPlanes);
  bool coded[kMaxPlanes];
  for (int p = 0; p < num_planes; ++p) {
    std::fill_n(counts[p].of_frame, 256, 0u);
    for (int64_t c = 0; c < num_chunks; ++c) {
      count_bytes(planes[p] + c * kStreamBytes, chunk_elements(num_elements, c), counts[p].of_chunk[c]);
      for (int b = 0; b < 256; ++b) counts[p].of_frame[b] += counts[p].of_chunk[c][b];
    }
    coded[p] = entropy_bits(counts[p].of_frame, num_elements) < kWorthBits;
    if (coded[p]) encoders[p].build(counts[p].of_frame, num_chunks);
  }

  const int64_t table_bytes = 4 * num_chunks * num_planes;
  const int64_t tail_bytes = frame_bytes - num_elements * num_planes;
  int64_t end = table_bytes;
  for (int64_t c = 0; c < num_chunks; ++c) {
    const int64_t count = chunk_elements(num_elements, c);
    for (int p = 0; p < num_planes; ++p) {
      const uint8_t* const bytes = planes[p] + c * kStreamBytes;
      const uint32_t* const of_chunk = counts[p].of_chunk[c];
      const bool constant = of_chunk[bytes[0]] == count;
      const int64_t coded_bytes = coded[p] ? encoders[p].stream_bytes(of_chunk) : count;
      const int64_t stream_bytes = constant ? 1 : std::min(coded_bytes, count);
      if (end + stream_bytes + tail_bytes > capacity) return -1;
      if (constant || coded_bytes >= count) {
        std::memcpy(packed + end, bytes, stream_bytes);
      } else {
        encoders[p].encode(bytes, count, packed + end);
      }
      const uint32_t length = static_cast<uint32_t>(stream_bytes);
      std::memcpy(packed + 4 * (c * num_planes + p), &length, sizeof length);
      end += stream_bytes;
    }
  }
  if (end + tail_bytes > capacity) return -1;
  std::memcpy(packed + end, frame + num_elements * num_planes, tail_bytes);
  return end + tail_bytes;
}

bool unpack_frame(const uint8_t* packed, int64_t packed_bytes, uint8_t* frame, int64_t frame_bytes, int num_planes,
                  bool rotate) {
  const int64_t num_elements = frame_bytes / num_planes, num_chunks = (num_elements + kStreamBytes - 1) / kStreamBytes;
  const int64_t tail_bytes = frame_bytes - num_elements * num_planes;
  int64_t at = 4 * num_chunks * num_planes;
  if (at + tail_bytes > packed_bytes) return false;
  thread_local std::vector<Decoder> decoders(kMaxPlanes);
  uint8_t* const memory = scratch(kMaxPlanes * kInterleaved * kStreamBytes);

  for (int64_t first = 0; first < num_chunks; first += kInterleaved) {
    const int num_grouped = static_cast<int>(std::min<int64_t>(kInterleaved, num_chunks - first));
    const uint8_t* planes[kInterleaved][kMaxPlanes];
    Stream streams[kMaxPlanes][kInterleaved];
    int num_streams[kMaxPlanes] = {};
    for (int g = 0; g < num_grouped; ++g) {
      const int64_t count = chunk_elements(num_elements, first + g);
      for (int p = 0; p < num_planes; ++p) {
        uint32_t length;
        std::memcpy(&length, packed + 4 * ((first + g) * num_planes + p), sizeof length);
        if (length == 0 || length > count || length > packed_bytes - tail_bytes - at) return false;
        uint8_t* const bytes = memory + (p * kInterleaved + g) * kStreamBytes;
        planes[g][p] = bytes;
        if (length == count) {
          planes[g][p] = packed + at;
        } else if (length == 1) {
          std::memset(bytes, packed[at], count);
        } else {
          streams[p][num_streams[p]++] = {packed + at, length, bytes, count};
        }
        at += length;
      }
    }
    for (int p = 0; p < num_planes; ++p) {
      if (num_streams[p] != 0 && !decoders[p].decode(streams[p], num_streams[p])) return false;
    }
    for (int g = 0; g < num_grouped; ++g) {
      join(planes[g], chunk_elements(num_elements, first + g), num_planes, rotate,
           frame + (first + g) * kStreamBytes * num_planes);
    }
  }
  if (at + tail_bytes != packed_bytes) return false;
  std::memcpy(frame + num_elements * num_planes, packed + at, tail_bytes);
  return true;
}

bool shape_is_known(int64_t frame_bytes, int num_planes) {
  return frame_bytes >= 0 && frame_bytes <= kMaxFrameBytes && (num_planes == 1 || num_planes == 2 || num_planes == 4);
}

}  // namespace
}  // namespace rekindle

#define REKINDLE_EXPORT extern "C" __attribute__((visibility("default")))


// Bytes written, or -1 where the frame would take more than `capacity` or its shape is not known.
REKINDLE_EXPORT int64_t rekindle_deflate_pack(const uint8_t* frame, int64_t frame_bytes, int num_planes, int rotate,
                                              uint8_t* packed, int64_t capacity) {
  if (!rekindle::shape_is_known(frame_bytes, num_planes)) return -1;
  return rekindle::pack_frame(frame, frame_bytes, num_planes, rotate != 0, packed, capacity);
}

// 1, or 0 where the frame is damaged or its streams are DEFLATE of a shape that only a full inflate reads.
REKINDLE_EXPORT int rekindle_deflate_unpack(const uint8_t* packed, int64_t packed_bytes, int num_planes, int rotate,
                                            uint8_t* frame, int64_t frame_bytes) {
  if (!rekindle::shape_is_known(frame_bytes, num_planes)) return 0;
  return rekindle::unpack_frame(packed, packed_bytes, frame, frame_bytes, num_planes, rotate != 0) ? 1 : 0;
}

REKINDLE_EXPORT void rekindle_split(const uint8_t* elements, int64_t num_elements, int num_planes, int rotate,
                                    uint8_t* const* planes) {
  rekindle::split(elements, num_elements, num_planes, rotate != 0, planes);
}

REKINDLE_EXPORT void rekindle_join(const uint8_t* const* planes, int64_t num_elements, int num_planes, int rotate,
                                   uint8_t* elements) {
  rekindle::join(planes, num_elements, num_planes, rotate != 0, elements);
}
