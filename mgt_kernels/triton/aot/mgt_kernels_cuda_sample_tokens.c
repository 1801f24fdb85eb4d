/* The same grids as the launcher in Python. */
#include "mgt_kernels_cuda_launch.h"

enum {
  /* programs that keep a large device busy; of the shape of one sample, so that a result does not depend on the batch
   */
  kFewRows = 2048,
  kMaxSplits = 64,
  kCombineRows = 32,
  /* of a partial result: maximum, sum, score, logit, token */
  kNumFields = 5,
};

static int64_t tiles_per_split(int64_t num_positions, int64_t num_tokens) {
  const int64_t wanted = ceil_div(kFewRows, num_positions);
  return ceil_div(ceil_div(num_tokens, kTileWidth), wanted < kMaxSplits ? wanted : kMaxSplits);
}

static int64_t num_splits_of(int64_t num_positions, int64_t num_tokens) {
  return ceil_div(ceil_div(num_tokens, kTileWidth), tiles_per_split(num_positions, num_tokens));
}

static bool valid_scalars(const mgt_cuda_sample_tokens_args* a) {
  return a->dtype >= MGT_CUDA_FLOAT32 && a->dtype <= MGT_CUDA_FLOAT16 && fits_int32(a->mask_token_id) &&
         isfinite(a->guidance_scale) && a->noise_scale >= 0.0f && isfinite(a->noise_scale) &&
         (a->temperature == 0.0f ||
          (a->temperature > 0.0f && isfinite(a->temperature) && isfinite(1.0f / a->temperature)));
}

bool mgt_cuda_valid_draw(const mgt_cuda_sample_tokens_args* a) {
  if (!valid_sizes(a) || !valid_scalars(a)) return false;
  if (a->num_samples * a->num_positions == 0) return true;
  return a->logits.data && a->tokens && a->seeds && a->step && (is_token_major(a) || is_position_major(a));
}

size_t mgt_cuda_sample_tokens_workspace(const mgt_cuda_sample_tokens_args* args) {
  int64_t num_splits;
  if (args == NULL || !valid_sizes(args) || args->num_samples * args->num_positions == 0) return 0;
  num_splits = num_splits_of(args->num_positions, args->num_tokens);
  if (num_splits == 1) return 0;
  return kNumFields * sizeof(float) * (size_t)(args->num_samples * args->num_positions * num_splits);
}

CUresult mgt_cuda_sample_tokens(const mgt_cuda_sample_tokens_args* args, int64_t* token_ids, float* logprob,
                                void* workspace, size_t workspace_bytes, CUstream stream) {
  if (args == NULL || !mgt_cuda_valid_draw(args)) return CUDA_ERROR_INVALID_VALUE;
  mgt_cuda_sample_tokens_args a = *args;
  const size_t needed_bytes = mgt_cuda_sample_tokens_workspace(args);
  if (a.num_samples * a.num_positions == 0) return CUDA_SUCCESS;
  if (!token_ids || !logprob) return CUDA_ERROR_INVALID_VALUE;
  if (needed_bytes > 0 && (workspace == NULL || workspace_bytes < needed_bytes)) return CUDA_ERROR_INVALID_VALUE;

  const bool guided = a.uncond_logits.data != NULL, token_major = is_token_major(&a);
  const bool aligned = are_logits_aligned(&a);

  int32_t num_positions = (int32_t)a.num_positions, num_tokens = (int32_t)a.num_tokens;
  int32_t mask_token_id = (int32_t)a.mask_token_id;
  int32_t columns_per_split = (int32_t)tiles_per_split(a.num_positions, a.num_tokens) * kTileWidth;
  float inverse_temperature = inverse_of(a.temperature);
  int32_t num_splits = (int32_t)num_splits_of(a.num_positions, a.num_tokens);
  void* const arguments[kMaxParameters] = {&token_ids,
                                           &logprob,
                                           &workspace,
                                           &a.logits.data,
                                           &a.uncond_logits.data,
                                           &a.tokens,
                                           &a.seeds,
                                           &a.step,
                                           &num_positions,
                                           &num_tokens,
                                           &columns_per_split,
                                           STRIDES_AND_SCALARS(a, mask_token_id, inverse_temperature)};
  const unsigned key = MGT_CUDA_SAMPLE_TOKENS(a.dtype, !token_major, guided, a.noise_scale != 0.0f,
                                              a.temperature == 0.0f, num_splits > 1, aligned);
  const int64_t num_groups = ceil_div(a.num_positions, token_major ? 1 : kGroupPositions);
  const CUresult status = mgt_cuda_launch(key, a.num_samples * num_groups, num_splits, arguments, stream);
  if (status != CUDA_SUCCESS || num_splits == 1) return status;

  int32_t num_rows = (int32_t)(a.num_samples * a.num_positions);
  void* const combine_arguments[kMaxParameters] = {&token_ids, &logprob,    &workspace,    &a.tokens,
                                                   &num_rows,  &num_splits, &mask_token_id};
  return mgt_cuda_launch(MGT_CUDA_COMBINE_SPLITS(next_power_of_2(num_splits)), ceil_div(num_rows, kCombineRows), 1,
                         combine_arguments, stream);
}
