/* One step with the exported kernels, without Python: reads its inputs from a file and writes the results to another.
 */
#include <stdio.h>
#include <stdlib.h>

#include "mgt_kernels_cuda.h"

enum { kBatch = 2, kPositions = 16, kTokens = 4096, kNum = kBatch * kPositions };

static void check(CUresult status, const char* what) {
  if (status == CUDA_SUCCESS) return;
  fprintf(stderr, "%s: CUDA error %d\n", what, (int)status);
  exit(1);
}

static void* allocated(size_t bytes) {
  CUdeviceptr pointer;
  check(cuMemAlloc(&pointer, bytes), "cuMemAlloc");
  return (void*)(uintptr_t)pointer;
}

static const void* read_array(FILE* file, size_t bytes) {
  void *host = malloc(bytes), *device = allocated(bytes);
  if (host == NULL || fread(host, 1, bytes, file) != bytes) {
    fprintf(stderr, "the input is too short\n");
    exit(1);
  }
  check(cuMemcpyHtoD((CUdeviceptr)(uintptr_t)device, host, bytes), "cuMemcpyHtoD");
  free(host);
  return device;
}

static void write_array(FILE* file, const void* device, size_t bytes) {
  void* host = malloc(bytes);
  if (host == NULL) exit(1);
  check(cuMemcpyDtoH(host, (CUdeviceptr)(uintptr_t)device, bytes), "cuMemcpyDtoH");
  if (fwrite(host, 1, bytes, file) != bytes) exit(1);
  free(host);
}

int main(int argc, char** argv) {
  mgt_cuda_sample_tokens_args draw = {0};
  mgt_cuda_mask_by_confidence_args mask = {0};
  FILE *input = argc == 3 ? fopen(argv[1], "rb") : NULL, *output = argc == 3 ? fopen(argv[2], "wb") : NULL;
  int64_t *token_ids, *tokens;
  float* logprob;
  size_t workspace_bytes;
  CUdevice device;
  CUcontext context;
  if (input == NULL || output == NULL) {
    fprintf(stderr, "usage: %s INPUT OUTPUT\n", argv[0]);
    return 2;
  }
  check(cuInit(0), "cuInit");
  check(cuDeviceGet(&device, 0), "cuDeviceGet");
  check(cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
  check(cuCtxSetCurrent(context), "cuCtxSetCurrent");

  draw.num_samples = mask.num_samples = kBatch;
  draw.num_positions = mask.num_positions = kPositions;
  draw.num_tokens = draw.mask_token_id = mask.mask_token_id = kTokens;
  draw.dtype = MGT_CUDA_BFLOAT16;
  draw.tokens = read_array(input, kNum * sizeof(int64_t));
  draw.seeds = mask.seeds = read_array(input, kBatch * sizeof(int64_t));
  draw.step = mask.step = read_array(input, sizeof(int64_t));
  mask.mask_len = read_array(input, kBatch * sizeof(int64_t));
  draw.logits.data = read_array(input, (size_t)kNum * kTokens * 2);
  draw.logits.stride_sample = (int64_t)kPositions * kTokens;
  draw.logits.stride_position = kTokens;
  draw.logits.stride_token = 1;
  draw.uncond_logits = draw.logits;
  draw.uncond_logits.data = read_array(input, (size_t)kNum * kTokens * 2);
  draw.guidance_scale = 3.0f;
  draw.temperature = 1.0f;
  mask.temperature = 1.3f;

  token_ids = allocated(kNum * sizeof *token_ids);
  tokens = allocated(kNum * sizeof *tokens);
  logprob = allocated(kNum * sizeof *logprob);
  mask.token_ids = token_ids;
  mask.logprob = logprob;
  workspace_bytes = mgt_cuda_sample_tokens_workspace(&draw);
  check(mgt_cuda_sample_tokens(&draw, token_ids, logprob, allocated(workspace_bytes), workspace_bytes, NULL),
        "mgt_cuda_sample_tokens");
  check(mgt_cuda_mask_by_confidence(&mask, tokens, NULL), "mgt_cuda_mask_by_confidence");
  check(cuCtxSynchronize(), "cuCtxSynchronize");
  write_array(output, token_ids, kNum * sizeof *token_ids);
  write_array(output, logprob, kNum * sizeof *logprob);
  write_array(output, tokens, kNum * sizeof *tokens);
  return fclose(output) == 0 ? 0 : 1;
}
