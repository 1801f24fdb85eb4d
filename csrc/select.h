// Selection without a sort: the key of a given rank, or how many of the largest keys meet a condition, found by four
// counting passes over 32-bit keys.
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

// the value of a key
MGT_INLINE float value_of_key(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// the first of the positions in the order of falling keys: how many, the sum of their weights, the last one's key
struct Prefix {
  int64_t size, weight;
  uint32_t smallest;
};

// How many positions the longest prefix has that `passes`, where no longer one passes than one that does not.
template <class KeyAt, class TakesPart, class WeightOf, class Passes>
int64_t longest_prefix(int64_t num_positions, const KeyAt& key_at, const TakesPart& takes_part,
                       const WeightOf& weight_of, const Passes& passes) {
  Prefix taken{0, 0, 0};
  uint32_t failing = 0;
  int64_t num_failing = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    Prefix digits[256];
    std::fill(digits, digits + 256, Prefix{0, 0, 0xffffffffu});
    const uint32_t fixed = shift == 24 ? 0u : ~0u << (shift + 8);
    for (int64_t i = 0; i < num_positions; ++i) {
      const uint32_t key = key_at(i);
      if ((key & fixed) != failing || !takes_part(i)) continue;
      Prefix& digit = digits[key >> shift & 0xffu];
      ++digit.size;
      digit.weight += weight_of(key);
      digit.smallest = std::min(digit.smallest, key);
    }
    int digit = 255;
    for (; digit >= 0; --digit) {
      const Prefix whole{taken.size + digits[digit].size, taken.weight + digits[digit].weight, digits[digit].smallest};
      if (digits[digit].size > 0 && !passes(whole)) break;
      taken = whole;
    }
    if (digit < 0) return taken.size;
    failing |= static_cast<uint32_t>(digit) << shift;
    num_failing = digits[digit].size;
  }
  // of equal keys some may pass
  int64_t num_passing = 0;
  while (num_failing - num_passing > 1) {
    const int64_t middle = num_passing + (num_failing - num_passing) / 2;
    const bool passed = passes({taken.size + middle, taken.weight + middle * weight_of(failing), failing});
    (passed ? num_passing : num_failing) = middle;
  }
  return taken.size + num_passing;
}

}  // namespace
}  // namespace mgt
