// Selection without a sort: the key of a given rank, found by four counting passes over 32-bit keys.
#pragma once

#include "isa.h"

namespace mgt {
namespace {

// unsigned order of the keys = order of the floats; -0 and 0 are one
MGT_INLINE uint32_t ordered_key(float value) {
  value += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// the keys below `key` are selected, and of the equal ones the first `num_tied`
struct Threshold {
  uint32_t key;
  int64_t num_tied;
};

// The threshold that selects the `rank` >= 1 smallest of the positions that take part; all of them where they are
// fewer.
template <class KeyAt, class TakesPart>
Threshold threshold_of_rank(int64_t num_positions, int64_t rank, const KeyAt& key_at, const TakesPart& takes_part) {
  uint32_t threshold = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t histogram[256] = {};
    const uint32_t fixed = shift == 24 ? 0u : ~0u << (shift + 8);
    for (int64_t i = 0; i < num_positions; ++i) {
      const uint32_t key = key_at(i);
      if ((key & fixed) == threshold && takes_part(i)) ++histogram[key >> shift & 0xffu];
    }
    uint32_t digit = 0;
    for (; digit < 255 && rank > histogram[digit]; ++digit) rank -= histogram[digit];
    threshold |= digit << shift;
  }
  return {threshold, rank};
}

}  // namespace
}  // namespace mgt
