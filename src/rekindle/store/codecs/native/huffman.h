// Huffman-only DEFLATE (RFC 1951): one final block with a dynamic code and literals alone, so that any inflate reads it.

#pragma once

#include <cstdint>

#include "planes.h"

namespace rekindle {

constexpr int kMaxCodeBits = 11;  // DEFLATE allows 15; with 11 the whole code is one small table
constexpr int kTableSize = 1 << kMaxCodeBits;
constexpr int kNumLiterals = 257;  // bytes and the end of the block
constexpr int kEndOfBlock = 256;
constexpr int kNumDistances = 2;  // unused, but two codes of one bit are what every inflate accepts
constexpr int kNumLengthSymbols = 19;
constexpr uint8_t kLengthOrder[kNumLengthSymbols] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
constexpr int kMaxHeaderBytes = 512;
constexpr int kInterleaved = 4;  // streams decoded beside each other, to hide the latency of table reads

// A code and the block header that announces it.
struct Encoder {
  uint16_t codes[kNumLiterals];  // bit-reversed, as DEFLATE sends them
  uint8_t lengths[kNumLiterals];
  uint8_t header[kMaxHeaderBytes];
  int64_t header_bits;

  // `counts` holds 256 bytes' frequencies, at least one of them positive.
  void build(const uint32_t* counts, int64_t num_streams);
  // Length of a stream whose bytes have these frequencies.
  int64_t stream_bytes(const uint32_t* counts) const;
  // Writes exactly `stream_bytes` bytes.
  void encode(const uint8_t* bytes, int64_t count, uint8_t* stream) const;
};

struct Stream {
  const uint8_t* packed;
  int64_t packed_bytes;
  uint8_t* out;
  int64_t out_bytes;
};

// The decoding tables of the latest header met.
class Decoder {
 public:
  // Decodes up to `kInterleaved` streams. False if one of them is damaged, or is DEFLATE of another shape than above:
  // several blocks, matches, longer codes. No byte outside the streams is read or written.
  bool decode(const Stream* streams, int num_streams);

 private:
  bool prepare(const Stream& stream);
  bool same_header(const Stream& stream) const;

  uint64_t table_[kTableSize];  // bits used, number of bytes, up to six bytes
  uint16_t single_[kTableSize];  // bits used << 9 | symbol
  uint8_t header_[kMaxHeaderBytes];
  int64_t header_bits_ = 0;
};

}  // namespace rekindle
