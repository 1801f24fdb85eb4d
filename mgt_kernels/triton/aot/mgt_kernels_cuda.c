/* The launchers: check the arguments, pick the variant, load it once, launch. The same grids as the Python launchers.
 */
#include "mgt_kernels_cuda.h"

#include <math.h>
#include <stdbool.h>

#include "mgt_kernels_cuda_variants.h"

enum {
  kTileWidth = 2048,
  /* programs that keep a large device busy; of the shape of one sample, so that a result does not depend on the batch
   */
  kFewRows = 2048,
  kMaxSplits = 64,
  kGroupPositions = 16,
  kCombineRows = 32,
  /* of a partial result: maximum, sum, score, logit, token */
  kNumFields = 5,
  kMaxPositions = 1 << 30,
  kMaxTokens = 1 << 30,
  kMinBlockPositions = 128,
  kMaxBlockPositions = 16384,
  kMaxParameters = 32,
  /* more shared memory has to be asked for */
  kDefaultSharedBytes = 48 * 1024,
};

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static unsigned next_power_of_2(int64_t n) {
  unsigned power = 1;
  while (power < n) power *= 2;
  return power;
}

static bool is_aligned(const void* pointer) { return (uintptr_t)pointer % 16 == 0; }

static bool fits_int32(int64_t value) { return value >= INT32_MIN && value <= INT32_MAX; }

static CUresult current_architecture(CUdevice* device, int* architecture) {
  int major, minor;
  CUresult status = cuCtxGetDevice(device);
  if (status == CUDA_SUCCESS)
    status = cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, *device);
  if (status == CUDA_SUCCESS)
    status = cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, *device);
  if (status == CUDA_SUCCESS) *architecture = 10 * major + minor;
  return status;
}

static bool runs_on(const mgt_cuda_table* table, int architecture) {
  if (table->exact) return table->architecture == architecture;
  return table->architecture / 10 == architecture / 10 && table->architecture <= architecture;
}

/* The variant of the latest architecture that the current device runs. */
static CUresult find_variant(unsigned key, CUdevice* device, mgt_cuda_variant** variant) {
  int architecture, best = 0;
  const CUresult status = current_architecture(device, &architecture);
  if (status != CUDA_SUCCESS) return status;
  for (int t = 0; t < mgt_cuda_num_tables; ++t)
    if (runs_on(&mgt_cuda_tables[t], architecture)) best = mgt_cuda_tables[t].architecture;
  if (best == 0) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  for (int t = 0; t < mgt_cuda_num_tables; ++t) {
    if (mgt_cuda_tables[t].architecture != best) continue;
    for (int i = 0; i < mgt_cuda_tables[t].num_variants; ++i) {
      *variant = &mgt_cuda_tables[t].variants[i];
      if ((*variant)->key == key) return CUDA_SUCCESS;
    }
  }
  return CUDA_ERROR_NOT_FOUND;
}

/* A kernel of a library, unlike a function of a module, belongs to no context: one load serves all of them. */
static CUresult load_kernel(mgt_cuda_variant* variant, CUkernel* kernel) {
  CUlibrary library;
  CUkernel loaded_meanwhile = NULL;
  CUresult status;
  *kernel = atomic_load(&variant->kernel);
  if (*kernel != NULL) return CUDA_SUCCESS;
  status = cuLibraryLoadData(&library, variant->cubin, NULL, NULL, 0, NULL, NULL, 0);
  if (status != CUDA_SUCCESS) return status;
  status = cuLibraryGetKernel(kernel, library, variant->name);
  if (status == CUDA_SUCCESS && atomic_compare_exchange_strong(&variant->kernel, &loaded_meanwhile, *kernel))
    return CUDA_SUCCESS;
  cuLibraryUnload(library);
  *kernel = loaded_meanwhile;
  return status;
}

/* arguments: all that the kernel may take, in its order. */
static CUresult launch(unsigned key, int64_t grid_x, int64_t grid_y, void* const* arguments, CUstream stream) {
  CUdevice device;
  CUkernel kernel;
  mgt_cuda_variant* variant;
  /* scratch memory for the compiler's own purposes, of which these kernels use none */
  CUdeviceptr scratch = 0;
  void* parameters[kMaxParameters + 2];
  int num_parameters = 0;
  CUresult status = find_variant(key, &device, &variant);
  if (status == CUDA_SUCCESS) status = load_kernel(variant, &kernel);
  if (status == CUDA_SUCCESS && variant->shared_bytes > kDefaultSharedBytes)
    status = cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, (int)variant->shared_bytes, kernel,
                                  device);
  if (status != CUDA_SUCCESS) return status;
  for (int i = 0; i < kMaxParameters; ++i)
    if (variant->parameters >> i & 1) parameters[num_parameters++] = arguments[i];
  parameters[num_parameters++] = &scratch;
  parameters[num_parameters++] = &scratch;
  return cuLaunchKernel((CUfunction)kernel, (unsigned)grid_x, (unsigned)grid_y, 1, 32 * variant->num_warps, 1, 1,
                        variant->shared_bytes, stream, parameters, NULL);
}

static int64_t tiles_per_split(int64_t num_positions, int64_t num_tokens) {
  const int64_t wanted = ceil_div(kFewRows, num_positions);
  return ceil_div(ceil_div(num_tokens, kTileWidth), wanted < kMaxSplits ? wanted : kMaxSplits);
}

static int64_t num_splits_of(int64_t num_positions, int64_t num_tokens) {
  return ceil_div(ceil_div(num_tokens, kTileWidth), tiles_per_split(num_positions, num_tokens));
}

static bool valid_sizes(const mgt_cuda_sample_tokens_args* a) {
  return a->num_samples >= 0 && a->num_positions >= 0 && a->num_positions <= kMaxPositions && a->num_tokens >= 1 &&
         a->num_tokens <= kMaxTokens && (a->num_positions == 0 || a->num_samples <= INT32_MAX / a->num_positions);
}

static bool valid_scalars(const mgt_cuda_sample_tokens_args* a) {
  return a->dtype >= MGT_CUDA_FLOAT32 && a->dtype <= MGT_CUDA_FLOAT16 && fits_int32(a->mask_token_id) &&
         isfinite(a->guidance_scale) && a->noise_scale >= 0.0f && isfinite(a->noise_scale) &&
         (a->temperature == 0.0f ||
          (a->temperature > 0.0f && isfinite(a->temperature) && isfinite(1.0f / a->temperature)));
}

size_t mgt_cuda_sample_tokens_workspace(const mgt_cuda_sample_tokens_args* args) {
  int64_t num_splits;
  if (args == NULL || !valid_sizes(args) || args->num_samples * args->num_positions == 0) return 0;
  num_splits = num_splits_of(args->num_positions, args->num_tokens);
  if (num_splits == 1) return 0;
  return kNumFields * sizeof(float) * (size_t)(args->num_samples * args->num_positions * num_splits);
}

/* Whether all accesses may be as wide as 16 bytes, for a half whose stride over tokens or positions is 1. */
static bool is_half_aligned(const mgt_cuda_logits* half, int64_t other_stride) {
  return is_aligned(half->data) && half->stride_sample % 16 == 0 && other_stride % 16 == 0;
}

CUresult mgt_cuda_sample_tokens(const mgt_cuda_sample_tokens_args* args, int64_t* token_ids, float* logprob,
                                void* workspace, size_t workspace_bytes, CUstream stream) {
  if (args == NULL || !valid_sizes(args) || !valid_scalars(args)) return CUDA_ERROR_INVALID_VALUE;
  mgt_cuda_sample_tokens_args a = *args;
  const size_t needed_bytes = mgt_cuda_sample_tokens_workspace(args);
  if (a.num_samples * a.num_positions == 0) return CUDA_SUCCESS;
  if (!a.logits.data || !a.tokens || !a.seeds || !a.step || !token_ids || !logprob) return CUDA_ERROR_INVALID_VALUE;
  if (needed_bytes > 0 && (workspace == NULL || workspace_bytes < needed_bytes)) return CUDA_ERROR_INVALID_VALUE;

  const bool guided = a.uncond_logits.data != NULL;
  const mgt_cuda_logits *c = &a.logits, *u = guided ? &a.uncond_logits : &a.logits;
  const bool token_major = a.num_tokens == 1 || (c->stride_token == 1 && u->stride_token == 1);
  if (!token_major && a.num_positions > 1 && (c->stride_position != 1 || u->stride_position != 1))
    return CUDA_ERROR_INVALID_VALUE;
  const bool aligned = (token_major ? a.num_tokens : a.num_positions) % 16 == 0 &&
                       is_half_aligned(c, token_major ? c->stride_position : c->stride_token) &&
                       is_half_aligned(u, token_major ? u->stride_position : u->stride_token);

  int32_t num_positions = (int32_t)a.num_positions, num_tokens = (int32_t)a.num_tokens;
  int32_t mask_token_id = (int32_t)a.mask_token_id;
  int32_t columns_per_split = (int32_t)tiles_per_split(a.num_positions, a.num_tokens) * kTileWidth;
  float inverse_temperature = a.temperature == 0.0f ? 1.0f : 1.0f / a.temperature;
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
                                           &a.logits.stride_sample,
                                           &a.logits.stride_position,
                                           &a.logits.stride_token,
                                           &a.uncond_logits.stride_sample,
                                           &a.uncond_logits.stride_position,
                                           &a.uncond_logits.stride_token,
                                           &mask_token_id,
                                           &a.guidance_scale,
                                           &a.noise_scale,
                                           &inverse_temperature};
  const unsigned key = MGT_CUDA_SAMPLE_TOKENS(a.dtype, !token_major, guided, a.noise_scale != 0.0f,
                                              a.temperature == 0.0f, num_splits > 1, aligned);
  const int64_t num_groups = ceil_div(a.num_positions, token_major ? 1 : kGroupPositions);
  const CUresult status = launch(key, a.num_samples * num_groups, num_splits, arguments, stream);
  if (status != CUDA_SUCCESS || num_splits == 1) return status;

  int32_t num_rows = (int32_t)(a.num_samples * a.num_positions);
  void* const combine_arguments[kMaxParameters] = {&token_ids, &logprob,    &workspace,    &a.tokens,
                                                   &num_rows,  &num_splits, &mask_token_id};
  return launch(MGT_CUDA_COMBINE_SPLITS(next_power_of_2(num_splits)), ceil_div(num_rows, kCombineRows), 1,
                combine_arguments, stream);
}

CUresult mgt_cuda_mask_by_confidence(const mgt_cuda_mask_by_confidence_args* args, int64_t* tokens, CUstream stream) {
  if (args == NULL || args->num_samples < 0 || args->num_samples > INT32_MAX || args->num_positions < 0 ||
      args->num_positions > kMaxPositions || !fits_int32(args->mask_token_id) || !(args->temperature >= 0.0f) ||
      !isfinite(args->temperature))
    return CUDA_ERROR_INVALID_VALUE;
  mgt_cuda_mask_by_confidence_args a = *args;
  if (a.num_samples == 0 || a.num_positions == 0) return CUDA_SUCCESS;
  if (!a.token_ids || !a.logprob || !a.mask_len || !a.seeds || !a.step || !tokens) return CUDA_ERROR_INVALID_VALUE;

  const bool in_registers = a.num_positions <= kMaxBlockPositions;
  unsigned block_positions = in_registers ? next_power_of_2(a.num_positions) : kMaxBlockPositions;
  if (block_positions < kMinBlockPositions) block_positions = kMinBlockPositions;
  const bool aligned =
      is_aligned(tokens) && is_aligned(a.token_ids) && is_aligned(a.logprob) && a.num_positions % 16 == 0;
  int32_t num_positions = (int32_t)a.num_positions, mask_token_id = (int32_t)a.mask_token_id;
  void* const arguments[kMaxParameters] = {&tokens, &a.token_ids,   &a.logprob,     &a.mask_len,   &a.seeds,
                                           &a.step, &num_positions, &mask_token_id, &a.temperature};
  return launch(MGT_CUDA_MASK_BY_CONFIDENCE(block_positions, in_registers, a.temperature != 0.0f, aligned),
                a.num_samples, 1, arguments, stream);
}
