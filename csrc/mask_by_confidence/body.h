// mask_by_confidence, written once against the lanes of simd_*.h.
//
// Bound by: the arithmetic of one Gumbel draw per position; the selection is four counting passes over 32-bit keys,
// which are kept in the output until the tokens overwrite them, so that nothing is allocated.
#pragma once

namespace mgt {
namespace {

// unsigned order of the keys = order of the floats; known positions (+inf) come last of all
MGT_INLINE uint32_t ordered_key(float confidence) {
  // -0 and 0 are one confidence
  const uint32_t bits = Lane1::bits(confidence + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

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

  // confidence = logprob + temperature g
  const auto seed = static_cast<uint64_t>(args.seeds[sample]);
  for (int64_t first = 0; first < num_positions; first += 16) {
    const int64_t count = std::min<int64_t>(16, num_positions - first);
    float confidence[16] = {};
    std::copy(logprob + first, logprob + first + count, confidence);
    if (args.temperature != 0.0f) {
      const typename S::U word =
          confidence_word<S>(seed, static_cast<uint32_t>(first), static_cast<uint32_t>(args.step));
      S::store(confidence, S::fma(S::set(args.temperature), gumbel<S>(word), S::load(confidence)));
    }
    for (int64_t i = 0; i < count; ++i) tokens[first + i] = ordered_key(confidence[i]);
  }

  // the key of rank mask_len, eight bits at a time from the top; rank ends as the number of equal keys to take
  const uint32_t known = ordered_key(std::numeric_limits<float>::infinity());
  uint32_t threshold = 0;
  int64_t rank = mask_len;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t histogram[256] = {};
    const uint32_t fixed = shift == 24 ? 0u : ~0u << (shift + 8);
    for (int64_t i = 0; i < num_positions; ++i) {
      const auto key = static_cast<uint32_t>(tokens[i]);
      if ((key & fixed) == threshold && key != known) ++histogram[key >> shift & 0xffu];
    }
    uint32_t digit = 0;
    for (; rank > histogram[digit]; ++digit) rank -= histogram[digit];
    threshold |= digit << shift;
  }
  for (int64_t i = 0; i < num_positions; ++i) {
    const auto key = static_cast<uint32_t>(tokens[i]);
    const bool tied = key == threshold && rank > 0;
    rank -= tied;
    tokens[i] = key < threshold || tied ? args.mask_token_id : token_ids[i];
  }
}

}  // namespace
}  // namespace mgt
