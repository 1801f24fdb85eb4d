/* The same grid as the launcher in Python. */
#include "mgt_kernels_cuda_launch.h"

CUresult mgt_cuda_mask_by_confidence(const mgt_cuda_mask_by_confidence_args* args, int64_t* tokens, CUstream stream) {
  if (args == NULL || args->num_samples < 0 || args->num_samples > INT32_MAX || args->num_positions < 0 ||
      args->num_positions > kMaxPositions || !fits_int32(args->mask_token_id) || !(args->temperature >= 0.0f) ||
      !isfinite(args->temperature))
    return CUDA_ERROR_INVALID_VALUE;
  mgt_cuda_mask_by_confidence_args a = *args;
  if (a.num_samples == 0 || a.num_positions == 0) return CUDA_SUCCESS;
  if (!a.token_ids || !a.logprob || !a.mask_len || !a.seeds || !a.step || !tokens) return CUDA_ERROR_INVALID_VALUE;

  const bool in_registers = a.num_positions <= kMaxBlockPositions;
  const unsigned block_positions = block_positions_of(a.num_positions);
  const bool aligned =
      is_aligned(tokens) && is_aligned(a.token_ids) && is_aligned(a.logprob) && a.num_positions % 16 == 0;
  int32_t num_positions = (int32_t)a.num_positions, mask_token_id = (int32_t)a.mask_token_id;
  void* const arguments[kMaxParameters] = {&tokens, &a.token_ids,   &a.logprob,     &a.mask_len,   &a.seeds,
                                           &a.step, &num_positions, &mask_token_id, &a.temperature};
  return mgt_cuda_launch(MGT_CUDA_MASK_BY_CONFIDENCE(block_positions, in_registers, a.temperature != 0.0f, aligned),
                         a.num_samples, 1, arguments, stream);
}
