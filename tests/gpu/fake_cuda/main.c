/* A C99 program on the exported kernels: one step of a sampler. The addresses are never read, the device is not real.
 */
#include <stdio.h>

#include "mgt_kernels_cuda.h"

static char memory[64];

int main(void) {
  mgt_cuda_sample_tokens_args draw = {0};
  mgt_cuda_mask_by_confidence_args mask = {0};
  if (mgt_cuda_load() != CUDA_SUCCESS) return 4;
  draw.num_samples = 2;
  draw.num_positions = 256;
  draw.num_tokens = 8192;
  draw.dtype = MGT_CUDA_BFLOAT16;
  draw.logits.data = memory;
  draw.logits.stride_sample = 256 * 8192;
  draw.logits.stride_position = 8192;
  draw.logits.stride_token = 1;
  draw.tokens = draw.seeds = draw.step = (const int64_t*)memory;
  draw.mask_token_id = 8192;
  draw.temperature = 1.0f;
  printf("workspace %u\n", (unsigned)mgt_cuda_sample_tokens_workspace(&draw));
  if (mgt_cuda_sample_tokens(&draw, (int64_t*)memory, (float*)memory, memory, 512 * 4 * 5 * sizeof(float), NULL) !=
      CUDA_SUCCESS)
    return 1;

  mask.num_samples = 2;
  mask.num_positions = 256;
  mask.token_ids = mask.mask_len = mask.seeds = mask.step = (const int64_t*)memory;
  mask.logprob = (const float*)memory;
  mask.mask_token_id = 8192;
  mask.temperature = 1.5f;
  if (mgt_cuda_mask_by_confidence(&mask, (int64_t*)memory, NULL) != CUDA_SUCCESS) return 2;
  mask.temperature = -1.0f;
  return mgt_cuda_mask_by_confidence(&mask, (int64_t*)memory, NULL) == CUDA_ERROR_INVALID_VALUE ? 0 : 3;
}
