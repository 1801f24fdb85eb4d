// commit_tokens, written once against the lanes of simd_*.h.
//
// Bound by: the arithmetic of one Gumbel draw per position; without noise, counting passes over 32-bit keys, four for
// the rule and four for the selection. The keys are kept in the output until the tokens overwrite them, so that nothing
// is allocated.
#pragma once

namespace mgt {
namespace {

// An entropy as an integer, so that sums are exact in any order: units of 2^-36 nats, rounded down, within [0, 64].
// 2^20 of them stay below 2^63.
constexpr float kEntropyUnits = 0x1p36f, kMostEntropy = 64.0f, kMostEntropyBound = 0x1p20f;
MGT_INLINE int64_t entropy_weight(float entropy) {
  return static_cast<int64_t>(std::min(std::max(entropy, 0.0f), kMostEntropy) * kEntropyUnits);
}

// how many the rule commits of those that take part
template <class KeyAt, class TakesPart>
int64_t prefix_of_rule(const mgt_commit_tokens_args& args, int64_t num_positions, const KeyAt& key_at,
                       const TakesPart& takes_part) {
  const float value = args.value;
  const float inverse_unit = 1.0f / confidence_unit(args.temperature);
  const auto confidence_of = [=](uint32_t key) { return value_of_key(key) * inverse_unit; };
  const auto no_weight = [](uint32_t) { return int64_t{0}; };
  switch (args.rule) {
    case MGT_COMMIT_THRESHOLD:
      return longest_prefix(num_positions, key_at, takes_part, no_weight,
                            [&](const Prefix& prefix) { return confidence_of(prefix.smallest) >= value; });
    case MGT_COMMIT_FACTOR:
      return longest_prefix(num_positions, key_at, takes_part, no_weight, [&](const Prefix& prefix) {
        // exact but for two roundings, which leave it rising along the prefix
        return static_cast<double>(prefix.size + 1) * (1.0 - double{confidence_of(prefix.smallest)}) <= double{value};
      });
    case MGT_COMMIT_ENTROPY_BOUND: {
      const auto weight_of = [&](uint32_t key) { return entropy_weight(-confidence_of(key)); };
      const auto bound = static_cast<int64_t>(std::min(value, kMostEntropyBound) * kEntropyUnits);
      return longest_prefix(num_positions, key_at, takes_part, weight_of,
                            [&](const Prefix& prefix) { return prefix.weight - weight_of(prefix.smallest) <= bound; });
    }
    default: return 0;
  }
}

template <class S>
void commit_tokens(const mgt_commit_tokens_args& args, int64_t sample, int64_t* out, uint8_t* done) {
  const int64_t first_row = sample * args.num_positions;
  const int64_t* before = args.tokens + first_row;
  const int64_t* token_ids = args.token_ids + first_row;
  const Window window(args, sample);
  const int64_t size = window.end - window.start;

  // +inf is the key of those that do not compete
  const float sign = args.rule == MGT_COMMIT_ENTROPY_BOUND ? -1.0f : 1.0f;
  const auto merit = [sign](float score) { return std::min(sign * score, std::numeric_limits<float>::max()); };
  int64_t num_competing = 0;
  for_each_confidence<S>(args.score + first_row, merit, window.start, window.end,
                         static_cast<uint64_t>(args.seeds[sample]), args.step, args.temperature,
                         [&](int64_t i, float confidence) {
                           const bool competes = before[i] == args.mask_token_id;
                           num_competing += competes;
                           out[i] = competes ? ordered_key(confidence) : kKnownKey;
                         });
  const auto key_at = [&](int64_t i) { return static_cast<uint32_t>(out[window.start + i]); };
  const auto takes_part = [&](int64_t i) { return key_at(i) != kKnownKey; };
  const int64_t num_committed =
      std::min(std::max(args.counts[sample], prefix_of_rule(args, size, key_at, takes_part)), num_competing);
  const int64_t num_left = num_competing - num_committed;
  Threshold left{0, 0};
  if (num_left > 0) left = threshold_of_rank(size, num_left, key_at, takes_part);

  std::copy(before, before + window.start, out);
  std::copy(before + window.end, before + args.num_positions, out + window.end);
  bool has_masks = false;
  for (int64_t i = window.start; i < window.end; ++i) {
    const auto key = static_cast<uint32_t>(out[i]);
    const int64_t row = first_row + i;
    if (key != kKnownKey) {
      const bool tied = key == left.key && left.num_tied > 0;
      left.num_tied -= tied;
      out[i] = key < left.key || tied ? args.mask_token_id : token_ids[i];
    } else if (args.argmax != nullptr && args.argmax[row] != before[i] && args.max_logprob[row] > args.replace_above) {
      out[i] = args.argmax[row];
    } else if (args.known_logprob != nullptr && args.known_logprob[row] < args.mask_below) {
      out[i] = args.mask_token_id;
    } else {
      out[i] = before[i];
    }
    has_masks |= out[i] == args.mask_token_id;
  }
  if (done != nullptr) *done = !has_masks;
}

}  // namespace
}  // namespace mgt
