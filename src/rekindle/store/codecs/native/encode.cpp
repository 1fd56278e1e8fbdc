// Making a Huffman code of bounded length, announcing it as DEFLATE does, and writing literals in it.

#include <algorithm>
#include <numeric>

#include "huffman.h"

namespace rekindle {
namespace {

class BitWriter {
 public:
  explicit BitWriter(uint8_t* out) : out_(out) {}

  void put(uint32_t value, int bits) {
    for (int i = 0; i < bits; ++i, ++position_) {
      if (position_ % 8 == 0) out_[position_ / 8] = 0;
      out_[position_ / 8] = static_cast<uint8_t>(out_[position_ / 8] | ((value >> i & 1) << (position_ % 8)));
    }
  }
  int64_t position() const { return position_; }

 private:
  uint8_t* out_;
  int64_t position_ = 0;
};

// Code lengths of a Huffman code (two-queue construction), then bounded: codes that are too long are cut, and the
// Kraft sum is brought back to one by lengthening the rarest of the shorter codes and shortening where room is left.
// At least two counts must be positive.
void code_lengths(const uint32_t* counts, int num_symbols, int max_bits, uint8_t* lengths) {
  int order[kNumLiterals];
  int used = 0;
  for (int symbol = 0; symbol < num_symbols; ++symbol) {
    lengths[symbol] = 0;
    if (counts[symbol] != 0) order[used++] = symbol;
  }
  std::sort(order, order + used, [&](int a, int b) { return counts[a] != counts[b] ? counts[a] < counts[b] : a < b; });

  uint64_t weights[2 * kNumLiterals];
  int parents[2 * kNumLiterals];
  for (int i = 0; i < used; ++i) weights[i] = counts[order[i]];
  int leaf = 0, inner = used;
  for (int node = used; node < 2 * used - 1; ++node) {
    weights[node] = 0;
    for (int child = 0; child < 2; ++child) {
      const int least = leaf < used && (inner == node || weights[leaf] <= weights[inner]) ? leaf++ : inner++;
      weights[node] += weights[least];
      parents[least] = node;
    }
  }
  int depths[2 * kNumLiterals];
  depths[2 * used - 2] = 0;
  for (int node = 2 * used - 3; node >= 0; --node) depths[node] = depths[parents[node]] + 1;

  const int64_t one = int64_t{1} << max_bits;
  int64_t kraft = 0;
  for (int i = 0; i < used; ++i) {
    lengths[order[i]] = static_cast<uint8_t>(std::min(depths[i], max_bits));
    kraft += one >> lengths[order[i]];
  }
  while (kraft > one) {
    for (int i = 0; i < used && kraft > one; ++i) {  // rarest first; each step gives back at least 1
      uint8_t& length = lengths[order[i]];
      if (length == max_bits) continue;
      ++length;
      kraft -= one >> length;
    }
  }
  for (int i = used - 1; i >= 0; --i) {
    uint8_t& length = lengths[order[i]];
    while (length > 1 && kraft + (one >> length) <= one) {
      kraft += one >> length;
      --length;
    }
  }
}

void canonical_codes(const uint8_t* lengths, int num_symbols, uint16_t* codes) {
  uint16_t next[17] = {}, per_length[17] = {};
  for (int symbol = 0; symbol < num_symbols; ++symbol) ++per_length[lengths[symbol]];
  per_length[0] = 0;
  for (int bits = 1; bits <= 15; ++bits) next[bits] = static_cast<uint16_t>((next[bits - 1] + per_length[bits - 1]) << 1);
  for (int symbol = 0; symbol < num_symbols; ++symbol) {
    uint16_t reversed = 0;
    if (lengths[symbol] != 0) {
      const uint16_t code = next[lengths[symbol]]++;
      for (int bit = 0; bit < lengths[symbol]; ++bit) {
        reversed = static_cast<uint16_t>(reversed << 1 | (code >> bit & 1));
      }
    }
    codes[symbol] = reversed;
  }
}

struct LengthToken {
  uint8_t symbol;
  uint8_t extra;
};

// Run-length coding of code lengths, RFC 1951 section 3.2.7.
int length_tokens(const uint8_t* lengths, int count, LengthToken* tokens) {
  int num_tokens = 0;
  for (int i = 0; i < count;) {
    int run = 1;
    while (i + run < count && lengths[i + run] == lengths[i]) ++run;
    if (lengths[i] == 0 && run >= 3) {
      run = std::min(run, 138);
      tokens[num_tokens++] = run < 11 ? LengthToken{17, static_cast<uint8_t>(run - 3)}
                                      : LengthToken{18, static_cast<uint8_t>(run - 11)};
      i += run;
    } else if (lengths[i] != 0 && run >= 4) {
      run = std::min(run, 7);
      tokens[num_tokens++] = {lengths[i], 0};
      tokens[num_tokens++] = {16, static_cast<uint8_t>(run - 4)};
      i += run;
    } else {
      tokens[num_tokens++] = {lengths[i++], 0};
    }
  }
  return num_tokens;
}

}  // namespace

void Encoder::build(const uint32_t* counts, int64_t num_streams) {
  uint32_t all[kNumLiterals];
  std::copy(counts, counts + 256, all);
  all[kEndOfBlock] = static_cast<uint32_t>(num_streams);
  code_lengths(all, kNumLiterals, kMaxCodeBits, lengths);
  canonical_codes(lengths, kNumLiterals, codes);

  uint8_t announced[kNumLiterals + kNumDistances];
  std::copy(lengths, lengths + kNumLiterals, announced);
  std::fill(announced + kNumLiterals, announced + kNumLiterals + kNumDistances, uint8_t{1});
  LengthToken tokens[kNumLiterals + kNumDistances];
  const int num_tokens = length_tokens(announced, kNumLiterals + kNumDistances, tokens);
  uint32_t token_counts[kNumLengthSymbols] = {};
  for (int i = 0; i < num_tokens; ++i) ++token_counts[tokens[i].symbol];
  uint8_t token_lengths[kNumLengthSymbols];
  uint16_t token_codes[kNumLengthSymbols];
  code_lengths(token_counts, kNumLengthSymbols, 7, token_lengths);  // at least 1 and another length occur
  canonical_codes(token_lengths, kNumLengthSymbols, token_codes);
  int num_announced = kNumLengthSymbols;
  while (num_announced > 4 && token_lengths[kLengthOrder[num_announced - 1]] == 0) --num_announced;

  BitWriter bits(header);
  bits.put(1, 1);  // the final block
  bits.put(2, 2);  // of dynamic codes
  bits.put(kNumLiterals - 257, 5);
  bits.put(kNumDistances - 1, 5);
  bits.put(static_cast<uint32_t>(num_announced - 4), 4);
  for (int i = 0; i < num_announced; ++i) bits.put(token_lengths[kLengthOrder[i]], 3);
  for (int i = 0; i < num_tokens; ++i) {
    const LengthToken token = tokens[i];
    bits.put(token_codes[token.symbol], token_lengths[token.symbol]);
    if (token.symbol >= 16) bits.put(token.extra, token.symbol == 16 ? 2 : token.symbol == 17 ? 3 : 7);
  }
  header_bits = bits.position();
}

int64_t Encoder::stream_bytes(const uint32_t* counts) const {
  int64_t bits = header_bits + lengths[kEndOfBlock];
  for (int symbol = 0; symbol < 256; ++symbol) bits += int64_t{counts[symbol]} * lengths[symbol];
  return (bits + 7) / 8;
}

void Encoder::encode(const uint8_t* bytes, int64_t count, uint8_t* stream) const {
  uint32_t entries[kNumLiterals];  // code << 4 | length, in one read
  for (int symbol = 0; symbol < kNumLiterals; ++symbol) {
    entries[symbol] = static_cast<uint32_t>(codes[symbol]) << 4 | lengths[symbol];
  }
  std::memcpy(stream, header, header_bits / 8);
  uint8_t* out = stream + header_bits / 8;
  unsigned held = header_bits % 8;
  uint64_t bits = held == 0 ? 0 : header[header_bits / 8];
  const auto put = [&](uint32_t entry) {
    bits |= static_cast<uint64_t>(entry >> 4) << held;
    held += entry & 15;
  };
  int64_t i = 0;
  // Five codes and what is held fit 64 bits. Each code takes at least a bit, so that with 64 more bytes to come the
  // eight that are stored end before the stream does.
  for (; i + 64 + 5 <= count; i += 5) {
    for (int k = 0; k < 5; ++k) put(entries[bytes[i + k]]);
    store64(out, bits);
    out += held >> 3;
    bits >>= held & ~7u;
    held &= 7;
  }
  const auto flush = [&] {
    for (; held >= 8; held -= 8, bits >>= 8) *out++ = static_cast<uint8_t>(bits);
  };
  for (; i < count; ++i) {
    put(entries[bytes[i]]);
    flush();
  }
  put(entries[kEndOfBlock]);
  flush();
  if (held != 0) *out = static_cast<uint8_t>(bits);
}

}  // namespace rekindle
