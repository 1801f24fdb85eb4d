#include <cmath>

#include "dispatch.h"
#include "parallel.h"

namespace {

bool valid_rule(const mgt_commit_tokens_args& a) {
  switch (a.rule) {
    case MGT_COMMIT_COUNT: return true;
    case MGT_COMMIT_THRESHOLD: return std::isfinite(a.value);
    case MGT_COMMIT_FACTOR: return std::isfinite(a.value) && a.value >= 0.0f;
    case MGT_COMMIT_ENTROPY_BOUND:
      return std::isfinite(a.value) && a.value >= 0.0f && a.num_positions <= int64_t{1} << 20;
  }
  return false;
}

bool valid(const mgt_commit_tokens_args& a) {
  return a.num_samples >= 0 && a.num_positions >= 0 && a.num_positions <= UINT32_MAX && mgt::valid_step(a.step) &&
         a.temperature >= 0.0f && std::isfinite(a.temperature) && valid_rule(a) &&
         (a.argmax == nullptr) == (a.max_logprob == nullptr) && !std::isnan(a.replace_above) &&
         !std::isnan(a.mask_below) &&
         (mgt::Size(a.num_samples) * std::max(a.num_positions, int64_t{1}) * int64_t{sizeof(int64_t)}).fits();
}

// the first thing wrong with the values
mgt_status check(const mgt_commit_tokens_args& a, int64_t* error_index) {
  for (int64_t sample = 0; sample < a.num_samples; ++sample) {
    const mgt::Window window(a, sample);
    if (window.start < 0 || window.start > window.end || window.end > a.num_positions)
      return mgt::fail(MGT_BAD_WINDOW, sample, error_index);
  }
  for (int64_t sample = 0; sample < a.num_samples; ++sample) {
    const mgt::Window window(a, sample);
    const int64_t first_row = sample * a.num_positions;
    int64_t num_competing = 0;
    for (int64_t row = first_row + window.start; row < first_row + window.end; ++row) {
      if (a.tokens[row] != a.mask_token_id) continue;
      if (std::isnan(a.score[row])) return mgt::fail(MGT_BAD_SCORE, row, error_index);
      ++num_competing;
    }
    if (a.counts[sample] < 0 || (a.rule == MGT_COMMIT_COUNT && a.counts[sample] > num_competing))
      return mgt::fail(MGT_BAD_COUNT, sample, error_index);
  }
  return MGT_OK;
}

}  // namespace

extern "C" mgt_status mgt_commit_tokens(const mgt_context* context, const mgt_commit_tokens_args* args,
                                        const mgt_commit_tokens_outputs* outputs, int64_t* error_index) {
  const mgt::FloatState state;
  if (!mgt::valid(context) || !mgt::whole(args) || !mgt::whole(outputs)) return MGT_INVALID_ARGUMENT;
  const mgt_commit_tokens_args& a = *args;
  if (!valid(a)) return MGT_INVALID_ARGUMENT;
  mgt_isa isa;
  const mgt_status status = mgt_resolve_isa(context->isa, &isa);
  if (status != MGT_OK) return status;
  if (a.num_samples == 0) return MGT_OK;
  if (!a.counts || !a.seeds) return MGT_INVALID_ARGUMENT;
  if (a.num_positions > 0 && (!a.token_ids || !a.score || !a.tokens || !outputs->tokens)) return MGT_INVALID_ARGUMENT;

  const mgt_status found = check(a, error_index);
  if (found != MGT_OK) return found;
  const int64_t chunk = std::max<int64_t>(1, 4096 / std::max<int64_t>(a.num_positions, 1));
  mgt::parallel_chunks(*context, {*context, a.num_samples, chunk}, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t sample = begin; sample < end; ++sample)
      mgt::kKernels[isa].commit_tokens(a, sample, outputs->tokens + sample * a.num_positions,
                                       outputs->done ? outputs->done + sample : nullptr);
  });
  return MGT_OK;
}
