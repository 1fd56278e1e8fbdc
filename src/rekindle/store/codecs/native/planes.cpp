// Splitting numbers into byte planes and joining them again. The loops are written for the compiler to vectorise.

#include "planes.h"

namespace rekindle {
namespace {

template <typename Word, bool kRotate>
void split_words(const uint8_t* __restrict elements, int64_t count, uint8_t* const* planes) {
  constexpr int kBits = 8 * sizeof(Word);
  uint8_t* __restrict plane[sizeof(Word)];
  for (size_t p = 0; p < sizeof(Word); ++p) plane[p] = planes[p];
  for (int64_t i = 0; i < count; ++i) {
    Word word;
    std::memcpy(&word, elements + i * sizeof(Word), sizeof word);
    if (kRotate) word = static_cast<Word>((word << 1) | (word >> (kBits - 1)));
    for (size_t p = 0; p < sizeof(Word); ++p) plane[p][i] = static_cast<uint8_t>(word >> (kBits - 8 - 8 * p));
  }
}

template <typename Word, bool kRotate>
void join_words(const uint8_t* const* planes, int64_t count, uint8_t* __restrict elements) {
  constexpr int kBits = 8 * sizeof(Word);
  const uint8_t* __restrict plane[sizeof(Word)];
  for (size_t p = 0; p < sizeof(Word); ++p) plane[p] = planes[p];
  for (int64_t i = 0; i < count; ++i) {
    Word word = 0;
    for (size_t p = 0; p < sizeof(Word); ++p) {
      word = static_cast<Word>(word | static_cast<Word>(static_cast<Word>(plane[p][i]) << (kBits - 8 - 8 * p)));
    }
    if (kRotate) word = static_cast<Word>((word >> 1) | (word << (kBits - 1)));
    std::memcpy(elements + i * sizeof(Word), &word, sizeof word);
  }
}

}  // namespace

void split(const uint8_t* elements, int64_t num_elements, int num_planes, bool rotate, uint8_t* const* planes) {
  if (num_planes == 1) std::memcpy(planes[0], elements, num_elements);
  if (num_planes == 2 && rotate) split_words<uint16_t, true>(elements, num_elements, planes);
  if (num_planes == 2 && !rotate) split_words<uint16_t, false>(elements, num_elements, planes);
  if (num_planes == 4 && rotate) split_words<uint32_t, true>(elements, num_elements, planes);
  if (num_planes == 4 && !rotate) split_words<uint32_t, false>(elements, num_elements, planes);
}

void join(const uint8_t* const* planes, int64_t num_elements, int num_planes, bool rotate, uint8_t* elements) {
  if (num_planes == 1) std::memcpy(elements, planes[0], num_elements);
  if (num_planes == 2 && rotate) join_words<uint16_t, true>(planes, num_elements, elements);
  if (num_planes == 2 && !rotate) join_words<uint16_t, false>(planes, num_elements, elements);
  if (num_planes == 4 && rotate) join_words<uint32_t, true>(planes, num_elements, elements);
  if (num_planes == 4 && !rotate) join_words<uint32_t, false>(planes, num_elements, elements);
}

}  // namespace rekindle
