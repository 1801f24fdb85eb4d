// mask_by_confidence, written once against the lanes of simd_*.h.
//
// Bound by: the arithmetic of one Gumbel draw per position; the selection is four counting passes over 32-bit keys,
// which are kept in the output until the tokens overwrite them, so that nothing is allocated.
#pragma once

namespace mgt {
namespace {

template <class S>
void mask_by_confidence(const mgt_mask_by_confidence_args& args, int64_t sample, int64_t* tokens) {
  const int64_t num_positions = args.num_positions;
  const int64_t* token_ids = args.token_ids + sample * num_positions;
  const float* logprob = args.logprob + sample * num_positions;
  const int64_t mask_len = args.mask_len[sample];
  if (mask_len == 0) {
    std::copy(token_ids, token_ids + num_positions, tokens);
    return;
  }

  for_each_confidence<S>(
      logprob, [](float nats) { return nats; }, 0, num_positions, static_cast<uint64_t>(args.seeds[sample]), args.step,
      args.temperature, [&](int64_t i, float confidence) { tokens[i] = ordered_key(confidence); });

  const auto key_at = [&](int64_t i) { return static_cast<uint32_t>(tokens[i]); };
  const auto takes_part = [&](int64_t i) { return key_at(i) != kKnownKey; };
  auto [threshold, num_tied] = threshold_of_rank(num_positions, mask_len, key_at, takes_part);
  for (int64_t i = 0; i < num_positions; ++i) {
    const uint32_t key = key_at(i);
    const bool tied = key == threshold && num_tied > 0;
    num_tied -= tied;
    tokens[i] = key < threshold || tied ? args.mask_token_id : token_ids[i];
  }
}

}  // namespace
}  // namespace mgt
