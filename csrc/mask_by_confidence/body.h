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

  // confidence = logprob + temperature g, both divided by 32 where a sum could else overflow: only known positions may
  // have the key of +inf. |g| < 23, so that below 2^90 the noise is less than half a unit of the largest float.
  const float unit = args.temperature > 0x1p90f ? 0x1p-5f : 1.0f;
  const typename S::F temperature = S::set(args.temperature * unit);
  const auto seed = static_cast<uint64_t>(args.seeds[sample]);
  for (int64_t first = 0; first < num_positions; first += 16) {
    const int64_t count = std::min<int64_t>(16, num_positions - first);
    float confidence[16] = {};
    std::copy(logprob + first, logprob + first + count, confidence);
    if (args.temperature != 0.0f) {
      const typename S::U word =
          confidence_word<S>(seed, static_cast<uint32_t>(first), static_cast<uint32_t>(args.step));
      S::store(confidence, S::fma(temperature, gumbel<S>(word), S::mul(S::load(confidence), S::set(unit))));
    }
    for (int64_t i = 0; i < count; ++i) tokens[first + i] = ordered_key(confidence[i]);
  }

  // known positions (+inf) take no part
  const uint32_t known = ordered_key(std::numeric_limits<float>::infinity());
  const auto key_at = [&](int64_t i) { return static_cast<uint32_t>(tokens[i]); };
  const auto takes_part = [&](int64_t i) { return key_at(i) != known; };
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
