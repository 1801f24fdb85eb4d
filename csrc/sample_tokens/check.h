// What the ops that read logits check alike, and how they hand out their rows. Compiled at the baseline only.
#pragma once

#include <algorithm>
#include <cmath>

#include "entry.h"
#include "parallel.h"
#include "sample_tokens/op.h"

namespace mgt {

// 0, or large enough that 1 / temperature is finite
inline bool valid_temperature(float temperature) {
  return temperature == 0.0f || (temperature > 0.0f && std::isfinite(temperature) && std::isfinite(1.0f / temperature));
}

// The strides of dimensions of size 1, along which nobody steps, become those that kernels expect.
inline mgt_sample_tokens_args normalized(mgt_sample_tokens_args a) {
  for (mgt_logits* half : {&a.logits, &a.uncond_logits, &a.second_uncond_logits}) {
    if (a.num_samples == 1) half->stride_sample = 0;
    if (a.num_positions == 1) half->stride_position = 1;
    if (a.num_tokens == 1) half->stride_token = 1;
  }
  return a;
}

// whether the addresses of a half's elements fit, relative to its first
inline bool offsets_fit(const mgt_sample_tokens_args& a, const mgt_logits& half) {
  const Size samples = Size(a.num_samples - 1) * half.stride_sample;
  const Size positions = Size(a.num_positions - 1) * half.stride_position;
  const Size tokens = Size(a.num_tokens - 1) * half.stride_token;
  return ((samples.magnitude() + positions.magnitude() + tokens.magnitude()) * int64_t{sizeof(float)}).fits();
}

inline bool valid_positions(const mgt_sample_tokens_args& a) {
  const int64_t last = int64_t{UINT32_MAX} + 1 - a.num_positions;
  return std::all_of(a.first_positions, a.first_positions + a.num_samples,
                     [&](int64_t first) { return first >= 0 && first <= last; });
}

inline bool valid_scales(const mgt_sample_tokens_args& a, const float* scales) {
  return !scales || std::all_of(scales, scales + a.num_samples, [](float scale) { return std::isfinite(scale); });
}

inline bool valid_guidance(const mgt_sample_tokens_args& a) {
  return std::isfinite(a.guidance_scale) && std::isfinite(a.second_guidance_scale) &&
         a.guidance >= MGT_GUIDANCE_NESTED && a.guidance <= MGT_GUIDANCE_DUAL &&
         (a.uncond_logits.data != nullptr || a.second_uncond_logits.data == nullptr) &&
         (a.softcap == 0.0f || (a.softcap > 0.0f && std::isfinite(a.softcap) && std::isfinite(2.0f / a.softcap)));
}

inline bool valid_truncation(const mgt_sample_tokens_args& a) {
  return a.top_k >= 0 && a.top_k <= a.num_tokens && a.top_p >= 0.0f && a.top_p <= 1.0f && a.min_p >= 0.0f &&
         a.min_p < 1.0f && a.logprob_of >= MGT_LOGPROB_OF_KEPT && a.logprob_of <= MGT_LOGPROB_OF_FULL;
}

// expects normalized arguments
inline bool valid(const mgt_sample_tokens_args& a) {
  if (a.num_samples < 0 || a.num_positions < 0 || a.num_tokens < 1 || a.num_tokens > INT32_MAX ||
      a.num_positions > UINT32_MAX)
    return false;
  if (a.dtype < MGT_FLOAT32 || a.dtype > MGT_FLOAT16 || !valid_step(a.step) || !valid_temperature(a.temperature) ||
      !valid_guidance(a) || !(a.noise_scale >= 0.0f) || !std::isfinite(a.noise_scale) || a.rows < MGT_ROWS_MASKED ||
      a.rows > MGT_ROWS_ALL || !valid_truncation(a))
    return false;
  const Size rows = Size(a.num_samples) * a.num_positions;
  if (rows.value() == 0) return true;
  bool position_major = true, fits = true;
  for (const mgt_logits* half : {&a.logits, &a.uncond_logits, &a.second_uncond_logits}) {
    if (half != &a.logits && half->data == nullptr) continue;
    position_major &= half->stride_position == 1;
    fits &= offsets_fit(a, *half);
  }
  return (token_major(a) || position_major) && fits && (rows * int64_t{sizeof(int64_t)}).fits();
}

inline int64_t num_rows(const mgt_sample_tokens_args& a) { return a.num_samples * a.num_positions; }

// whether what is read is there, and arrays hold what they may
inline bool valid_inputs(const mgt_sample_tokens_args& a) {
  return a.logits.data && a.tokens && a.seeds && (!a.first_positions || valid_positions(a)) &&
         valid_scales(a, a.guidance_scales) && valid_scales(a, a.second_guidance_scales);
}

// A chunk is worth waking a thread for from about 2^15 logits on. Up to 2^18 it grows as long as every thread gets
// several, because the prefetch past a chunk's end is wasted.
inline Chunks chunks_of_groups(const mgt_context& context, const mgt_sample_tokens_args& a) {
  const int64_t num_groups = a.num_samples * groups_per_sample(a);
  const int64_t group_logits = a.num_tokens * (token_major(a) ? 1 : kGroupPositions);
  int64_t chunk = std::max({int64_t{1}, (int64_t{1} << 15) / group_logits,
                            std::min((int64_t{1} << 18) / group_logits, num_groups / (8 * max_workers(context)))});
  // a row that is truncated fetches the next one of its chunk
  if (truncates(a)) chunk = std::max(chunk, std::min(int64_t{8}, num_groups / (4 * max_workers(context))));
  return {context, num_groups, chunk};
}

}  // namespace mgt
