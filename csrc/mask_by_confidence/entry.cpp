#include <cmath>

#include "dispatch.h"
#include "parallel.h"

extern "C" mgt_status mgt_mask_by_confidence(const mgt_context* context, const mgt_mask_by_confidence_args* args,
                                             int64_t* tokens, int64_t* error_index) {
  const mgt::FloatState state;
  if (!mgt::valid(context) || !mgt::whole(args)) return MGT_INVALID_ARGUMENT;
  const mgt_mask_by_confidence_args& a = *args;
  if (a.num_samples < 0 || a.num_positions < 0 || a.num_positions > UINT32_MAX || !mgt::valid_step(a.step) ||
      !(a.temperature >= 0.0f) || !std::isfinite(a.temperature) ||
      !(mgt::Size(a.num_samples) * std::max(a.num_positions, int64_t{1}) * int64_t{sizeof(int64_t)}).fits())
    return MGT_INVALID_ARGUMENT;
  mgt_isa isa;
  const mgt_status status = mgt_resolve_isa(context->isa, &isa);
  if (status != MGT_OK) return status;
  if (a.num_samples == 0) return MGT_OK;
  if (!a.mask_len || !a.seeds) return MGT_INVALID_ARGUMENT;
  if (a.num_positions > 0 && (!a.token_ids || !a.logprob || !tokens)) return MGT_INVALID_ARGUMENT;

  for (int64_t sample = 0; sample < a.num_samples; ++sample) {
    int64_t num_masked = 0;
    for (int64_t row = sample * a.num_positions; row < (sample + 1) * a.num_positions; ++row) {
      if (std::isnan(a.logprob[row])) return mgt::fail(MGT_BAD_LOGPROB, row, error_index);
      num_masked += a.logprob[row] != INFINITY;
    }
    if (a.mask_len[sample] < 0 || a.mask_len[sample] > num_masked)
      return mgt::fail(MGT_BAD_MASK_LEN, sample, error_index);
  }
  const int64_t chunk = std::max<int64_t>(1, 4096 / std::max<int64_t>(a.num_positions, 1));
  mgt::parallel_chunks(*context, {*context, a.num_samples, chunk}, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t sample = begin; sample < end; ++sample)
      mgt::kKernels[isa].mask_by_confidence(a, sample, tokens + sample * a.num_positions);
  });
  return MGT_OK;
}
