/* The same grids as the launcher in Python. */
#include "mgt_kernels_cuda_launch.h"

enum { kMaxTiles = 65535, kAlignment = 16, kRowPositions = 2 };

/* Parts of the workspace, in its order: their first bytes, and where the last one ends. */
typedef struct {
  size_t keys, choice, choice_logprob, softmax, selected, partials, end;
} workspace_layout;

static size_t aligned_bytes(int64_t num, size_t bytes) {
  return ((size_t)num * bytes + kAlignment - 1) / kAlignment * kAlignment;
}

static bool edits_history(const mgt_cuda_differential_sample_args* a) { return a->aliased_history && a->has_history; }

/* What mgt_cuda_sample_tokens does not check. */
static bool valid_differences(const mgt_cuda_differential_sample_args* a) {
  return (a->variant == MGT_CUDA_DIFFERENTIAL_OFFICIAL ||
          (a->variant == MGT_CUDA_DIFFERENTIAL_PAPER && !a->aliased_history)) &&
         a->share >= 0.0 && a->share <= 1.0 && ceil_div(a->sample.num_tokens, kTileWidth) <= kMaxTiles;
}

static workspace_layout layout_of(const mgt_cuda_differential_sample_args* a) {
  const int64_t num_rows = a->sample.num_samples * a->sample.num_positions;
  const int64_t num_compared = a->has_history ? num_rows : 0, num_edited = edits_history(a) ? num_rows : 0;
  workspace_layout w;
  w.keys = 0;
  w.choice = w.keys + aligned_bytes(num_compared, sizeof(int64_t));
  w.choice_logprob = w.choice + aligned_bytes(num_compared, sizeof(int32_t));
  w.softmax = w.choice_logprob + aligned_bytes(num_compared, sizeof(float));
  w.selected = w.softmax + aligned_bytes(num_edited, 3 * sizeof(float));
  w.partials = w.selected + aligned_bytes(num_edited, sizeof(uint8_t));
  w.end = w.partials + mgt_cuda_sample_tokens_workspace(&a->sample);
  return w;
}

size_t mgt_cuda_differential_sample_workspace(const mgt_cuda_differential_sample_args* args) {
  if (args == NULL || !valid_sizes(&args->sample) || !valid_differences(args)) return 0;
  return layout_of(args).end;
}

CUresult mgt_cuda_differential_sample(const mgt_cuda_differential_sample_args* args,
                                      const mgt_cuda_differential_state* state, int64_t* token_ids, float* logprob,
                                      float* divergence, void* workspace, size_t workspace_bytes, CUstream stream) {
  if (args == NULL || !mgt_cuda_valid_draw(&args->sample) || !valid_differences(args)) return CUDA_ERROR_INVALID_VALUE;
  mgt_cuda_sample_tokens_args a = args->sample;
  const workspace_layout w = layout_of(args);
  const uintptr_t start = (uintptr_t)workspace;
  if (a.num_samples * a.num_positions == 0) return CUDA_SUCCESS;
  if (!state || !state->history || !state->written || !state->seeds || !state->step || !token_ids || !logprob ||
      !divergence || (w.end > 0 && (!workspace || !is_aligned(workspace) || workspace_bytes < w.end)))
    return CUDA_ERROR_INVALID_VALUE;

  const bool guided = a.uncond_logits.data != NULL, token_major = is_token_major(&a), noise = a.noise_scale != 0.0f;
  const bool has_history = args->has_history, edits = edits_history(args);
  const bool is_paper = args->variant == MGT_CUDA_DIFFERENTIAL_PAPER;
  const unsigned compare_key = MGT_CUDA_COMPARE(a.dtype, !token_major, guided, noise,
                                                has_history && a.temperature == 0.0f, has_history, is_paper, edits);
  /* the draw may have been exported without the rest */
  CUresult status = mgt_cuda_find(compare_key);
  if (status == CUDA_SUCCESS)
    status = mgt_cuda_sample_tokens(&a, token_ids, logprob, (void*)(start + w.partials), w.end - w.partials, stream);
  if (status != CUDA_SUCCESS) return status;

  mgt_cuda_differential_state kept = *state;
  uintptr_t keys = start + w.keys, choice = start + w.choice, choice_logprob = start + w.choice_logprob;
  uintptr_t softmax = start + w.softmax, selected = start + w.selected;
  int32_t num_positions = (int32_t)a.num_positions, num_tokens = (int32_t)a.num_tokens;
  int32_t mask_token_id = (int32_t)a.mask_token_id;
  float inverse_temperature = inverse_of(a.temperature);
  double share = args->share;
  void* const compare_arguments[kMaxParameters] = {&divergence,
                                                   &keys,
                                                   &choice,
                                                   &choice_logprob,
                                                   &softmax,
                                                   &kept.history,
                                                   &kept.written,
                                                   &kept.seeds,
                                                   &kept.step,
                                                   &a.logits.data,
                                                   &a.uncond_logits.data,
                                                   &a.tokens,
                                                   &a.seeds,
                                                   &a.step,
                                                   &num_positions,
                                                   &num_tokens,
                                                   STRIDES_AND_SCALARS(a, mask_token_id, inverse_temperature)};
  const int64_t compared = token_major ? kRowPositions : kGroupPositions;
  status =
      mgt_cuda_launch(compare_key, a.num_samples * ceil_div(a.num_positions, compared), 1, compare_arguments, stream);

  if (status == CUDA_SUCCESS && has_history) {
    const unsigned block_positions = block_positions_of(a.num_positions);
    const bool in_registers = a.num_positions <= kMaxBlockPositions;
    const bool aligned =
        is_aligned(token_ids) && is_aligned(logprob) && is_aligned(a.tokens) && a.num_positions % 16 == 0;
    void* const arguments[kMaxParameters] = {&token_ids,      &logprob,       &selected,      &keys,     &choice,
                                             &choice_logprob, &kept.seeds,    &kept.step,     &a.tokens, &a.seeds,
                                             &a.step,         &num_positions, &mask_token_id, &share};
    status = mgt_cuda_launch(MGT_CUDA_SELECT(block_positions, in_registers, is_paper, edits, aligned), a.num_samples, 1,
                             arguments, stream);
  }
  if (status == CUDA_SUCCESS && edits) {
    const bool aligned = are_logits_aligned(&a) && a.num_tokens % 16 == 0 && is_aligned(kept.history);
    void* const arguments[kMaxParameters] = {&kept.history,
                                             &softmax,
                                             &selected,
                                             &a.logits.data,
                                             &a.uncond_logits.data,
                                             &a.seeds,
                                             &a.step,
                                             &num_positions,
                                             &num_tokens,
                                             STRIDES_AND_SCALARS(a, mask_token_id, inverse_temperature)};
    status = mgt_cuda_launch(MGT_CUDA_EDIT_HISTORY(a.dtype, !token_major, guided, noise, aligned),
                             a.num_samples * ceil_div(a.num_positions, token_major ? 1 : kGroupPositions),
                             ceil_div(a.num_tokens, kTileWidth), arguments, stream);
  }
  if (status != CUDA_SUCCESS) return status;
  void* const arguments[kMaxParameters] = {&kept.step, &a.step};
  return mgt_cuda_launch(MGT_CUDA_ADVANCE_HISTORY_STEP(has_history), 1, 1, arguments, stream);
}
