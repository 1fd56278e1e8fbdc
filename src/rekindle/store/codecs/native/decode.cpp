// Reading literals of a Huffman-only DEFLATE block, several streams beside each other and several bytes for each table
// read (the multi-symbol table of ISA-L's inflate and huff0's interleaved streams).

#include <algorithm>

#include "huffman.h"

namespace rekindle {
namespace {

constexpr int kMaxBytesOfEntry = 6;
constexpr int kReadsPerRefill = 5;  // of at most 11 bits, of the 56 that a refill leaves
constexpr int64_t kOutMargin = kReadsPerRefill * kMaxBytesOfEntry + 8;
constexpr uint64_t kEndFlag = 0x8000;

// Bits of a stream, least significant first; zeros after its end, which `overrun` tells.
class BitReader {
 public:
  BitReader(const uint8_t* bytes, int64_t num_bytes, int64_t position)
      : bytes_(bytes), end_(8 * num_bytes), position_(position) {}

  uint32_t peek(int count) const {
    uint32_t value = 0;
    for (int64_t at = position_ / 8, shift = -(position_ % 8); shift < count && 8 * at < end_; ++at, shift += 8) {
      const uint32_t byte = bytes_[at];
      value |= shift < 0 ? byte >> -shift : byte << shift;
    }
    return value & ((1u << count) - 1);
  }
  void skip(int count) { position_ += count; }
  uint32_t take(int count) {
    const uint32_t value = peek(count);
    skip(count);
    return value;
  }
  bool overrun() const { return position_ > end_; }
  int64_t position() const { return position_; }

 private:
  const uint8_t* bytes_;
  int64_t end_;
  int64_t position_;
};

// Fills a table of 2^`table_bits` entries, each `bits used << 9 | symbol`. False unless the code is complete.
bool fill_table(const uint8_t* lengths, int num_symbols, int table_bits, uint16_t* table) {
  int next[17] = {}, per_length[17] = {};
  for (int symbol = 0; symbol < num_symbols; ++symbol) ++per_length[lengths[symbol]];
  per_length[0] = 0;
  int64_t kraft = 0;
  for (int bits = 1; bits <= table_bits; ++bits) {
    next[bits] = (next[bits - 1] + per_length[bits - 1]) << 1;
    kraft += static_cast<int64_t>(per_length[bits]) << (table_bits - bits);
  }
  if (kraft != int64_t{1} << table_bits) return false;
  for (int symbol = 0; symbol < num_symbols; ++symbol) {
    const int length = lengths[symbol];
    if (length == 0) continue;
    const int code = next[length]++;
    int reversed = 0;
    for (int bit = 0; bit < length; ++bit) reversed = reversed << 1 | (code >> bit & 1);
    for (int at = reversed; at < 1 << table_bits; at += 1 << length) {
      table[at] = static_cast<uint16_t>(length << 9 | symbol);
    }
  }
  return true;
}

// The code lengths that a block header announces. False unless it is a final block of literals as `Encoder` makes it.
bool read_header(BitReader& bits, uint8_t* lengths) {
  if (bits.take(1) != 1 || bits.take(2) != 2) return false;
  if (bits.take(5) != kNumLiterals - 257 || bits.take(5) != kNumDistances - 1) return false;
  const int num_announced = static_cast<int>(bits.take(4)) + 4;
  uint8_t token_lengths[kNumLengthSymbols] = {};
  for (int i = 0; i < num_announced; ++i) token_lengths[kLengthOrder[i]] = static_cast<uint8_t>(bits.take(3));
  uint16_t table[1 << 7];
  if (!fill_table(token_lengths, kNumLengthSymbols, 7, table)) return false;
  constexpr int kTotal = kNumLiterals + kNumDistances;
  uint8_t all[kTotal];
  for (int i = 0; i < kTotal;) {
    const uint16_t entry = table[bits.peek(7)];
    bits.skip(entry >> 9);
    const int symbol = entry & 0x1ff;
    int run = 1;
    uint8_t length = static_cast<uint8_t>(symbol);
    if (symbol >= 16) {
      if (symbol == 16 && i == 0) return false;
      length = symbol == 16 ? all[i - 1] : 0;
      run = symbol == 16 ? 3 + static_cast<int>(bits.take(2))
                         : symbol == 17 ? 3 + static_cast<int>(bits.take(3)) : 11 + static_cast<int>(bits.take(7));
    }
    if (i + run > kTotal || bits.overrun()) return false;
    std::fill(all + i, all + i + run, length);
    i += run;
  }
  std::copy(all, all + kNumLiterals, lengths);
  if (all[kNumLiterals] != 1 || all[kNumLiterals + 1] != 1) return false;
  return lengths[kEndOfBlock] != 0 && *std::max_element(lengths, lengths + kNumLiterals) <= kMaxCodeBits;
}

struct Cursor {
  uint64_t bits;
  uint64_t held;  // only the low byte counts: entries are subtracted whole
  const uint8_t* next;
  uint8_t* out;
};

// Decodes while every stream is far from its ends; leaves each cursor's position in the stream in `positions`.
template <int kStreams>
bool decode_bulk(const uint64_t* table, const Stream* streams, int64_t* positions, uint8_t** outs) {
  Cursor cursors[kStreams];
  for (int s = 0; s < kStreams; ++s) {
    cursors[s] = {0, 0, streams[s].packed + positions[s] / 8, outs[s]};
    if (streams[s].packed_bytes - positions[s] / 8 < 8) return true;
  }
  for (int s = 0; s < kStreams; ++s) {
    const unsigned skipped = positions[s] % 8;
    cursors[s].bits = load64(cursors[s].next) >> skipped;
    cursors[s].next += 7;
    cursors[s].held = 56 - skipped;
  }
  uint64_t seen = 0;
  for (;;) {
    int64_t rounds = INT64_MAX;
    for (int s = 0; s < kStreams; ++s) {
      const int64_t in_left = streams[s].packed + streams[s].packed_bytes - cursors[s].next;
      const int64_t out_left = streams[s].out + streams[s].out_bytes - cursors[s].out;
      rounds = std::min({rounds, in_left / 8, out_left / kOutMargin});
    }
    if (rounds <= 0) break;
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 8
      for (int s = 0; s < kStreams; ++s) {
        Cursor& cursor = cursors[s];
        const unsigned held = static_cast<uint8_t>(cursor.held);
        cursor.bits |= load64(cursor.next) << held;
        cursor.next += (63 - held) >> 3;
        cursor.held = held | 56;
      }
#pragma GCC unroll 8
      for (int read = 0; read < kReadsPerRefill; ++read) {
#pragma GCC unroll 8
        for (int s = 0; s < kStreams; ++s) {
          Cursor& cursor = cursors[s];
          const uint64_t entry = table[cursor.bits & (kTableSize - 1)];
          cursor.bits >>= entry & 63;
          cursor.held -= entry;
          store64(cursor.out, entry >> 16);
          cursor.out += entry >> 8 & 7;
          seen |= entry;
        }
      }
    }
  }
  for (int s = 0; s < kStreams; ++s) {
    positions[s] = 8 * (cursors[s].next - streams[s].packed) - static_cast<uint8_t>(cursors[s].held);
    outs[s] = cursors[s].out;
  }
  return (seen & kEndFlag) == 0;
}

}  // namespace

bool Decoder::same_header(const Stream& stream) const {
  if (header_bits_ == 0 || stream.packed_bytes < (header_bits_ + 7) / 8) return false;
  const int64_t whole = header_bits_ / 8;
  if (std::memcmp(stream.packed, header_, whole) != 0) return false;
  const unsigned mask = (1u << header_bits_ % 8) - 1;
  return mask == 0 || ((stream.packed[whole] ^ header_[whole]) & mask) == 0;
}

bool Decoder::prepare(const Stream& stream) {
  if (same_header(stream)) return true;
  header_bits_ = 0;
  BitReader bits(stream.packed, stream.packed_bytes, 0);
  uint8_t lengths[kNumLiterals];
  if (!read_header(bits, lengths) || !fill_table(lengths, kNumLiterals, kMaxCodeBits, single_)) return false;
  for (int at = 0; at < kTableSize; ++at) {
    uint64_t entry = 0;
    int used = 0, count = 0;
    for (; count < kMaxBytesOfEntry; ++count) {
      const int length = single_[at >> used] >> 9, symbol = single_[at >> used] & 0x1ff;
      if (used + length > kMaxCodeBits || symbol == kEndOfBlock) break;
      entry |= static_cast<uint64_t>(symbol) << (16 + 8 * count);
      used += length;
    }
    if (count == 0) entry = kEndFlag, used = single_[at] >> 9;
    table_[at] = entry | static_cast<uint64_t>(count) << 8 | static_cast<uint64_t>(used);
  }
  const int64_t header_bytes = (bits.position() + 7) / 8;
  if (header_bytes >= kMaxHeaderBytes) return false;
  std::memcpy(header_, stream.packed, header_bytes);
  header_bits_ = bits.position();
  return true;
}

bool Decoder::decode(const Stream* streams, int num_streams) {
  if (!prepare(streams[0])) return false;
  int64_t positions[kInterleaved];
  uint8_t* outs[kInterleaved];
  for (int s = 0; s < num_streams; ++s) {
    if (!same_header(streams[s])) return s > 0 && decode(streams, s) && decode(streams + s, num_streams - s);
    positions[s] = header_bits_;
    outs[s] = streams[s].out;
  }
  bool sound = true;
  if (num_streams == kInterleaved) {
    sound = decode_bulk<kInterleaved>(table_, streams, positions, outs);
  } else {
    for (int s = 0; s < num_streams; ++s) sound &= decode_bulk<1>(table_, streams + s, positions + s, outs + s);
  }
  for (int s = 0; sound && s < num_streams; ++s) {
    BitReader bits(streams[s].packed, streams[s].packed_bytes, positions[s]);
    uint8_t* const end = streams[s].out + streams[s].out_bytes;
    for (uint8_t* out = outs[s];; ++out) {
      const uint16_t entry = single_[bits.peek(kMaxCodeBits)];
      bits.skip(entry >> 9);
      if (bits.overrun()) return false;
      const int symbol = entry & 0x1ff;
      if (symbol == kEndOfBlock) {
        sound = out == end && (bits.position() + 7) / 8 == streams[s].packed_bytes;
        break;
      }
      if (out == end) return false;
      *out = static_cast<uint8_t>(symbol);
    }
  }
  return sound;
}

}  // namespace rekindle
