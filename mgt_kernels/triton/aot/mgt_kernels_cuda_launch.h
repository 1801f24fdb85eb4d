/* What the launchers share; not for users. */
#ifndef MGT_KERNELS_CUDA_LAUNCH_H
#define MGT_KERNELS_CUDA_LAUNCH_H

#include <math.h>
#include <stdbool.h>

#include "mgt_kernels_cuda_variants.h"

enum {
  kTileWidth = 2048,
  /* neighbouring positions that share a sector, where those have unit stride */
  kGroupPositions = 16,
  kMinBlockPositions = 128,
  kMaxBlockPositions = 16384,
  kMaxPositions = 1 << 30,
  kMaxTokens = 1 << 30,
  kMaxParameters = 32,
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline unsigned next_power_of_2(int64_t n) {
  unsigned power = 1;
  while (power < n) power *= 2;
  return power;
}

static inline bool is_aligned(const void* pointer) { return (uintptr_t)pointer % 16 == 0; }

static inline bool fits_int32(int64_t value) { return value >= INT32_MIN && value <= INT32_MAX; }

/* The launchers in Python take the inverse of a temperature of 0 to be 1. */
static inline float inverse_of(float temperature) { return temperature == 0.0f ? 1.0f : 1.0f / temperature; }

static inline const mgt_cuda_logits* uncond_or_logits(const mgt_cuda_sample_tokens_args* a) {
  return a->uncond_logits.data != NULL ? &a->uncond_logits : &a->logits;
}

static inline bool is_token_major(const mgt_cuda_sample_tokens_args* a) {
  return a->num_tokens == 1 || (a->logits.stride_token == 1 && uncond_or_logits(a)->stride_token == 1);
}

static inline bool is_position_major(const mgt_cuda_sample_tokens_args* a) {
  return a->num_positions == 1 || (a->logits.stride_position == 1 && uncond_or_logits(a)->stride_position == 1);
}

/* Whether all accesses to a half whose stride over tokens or positions is 1 may be as wide as 16 bytes. */
static inline bool is_half_aligned(const mgt_cuda_logits* half, bool token_major) {
  const int64_t other_stride = token_major ? half->stride_position : half->stride_token;
  return is_aligned(half->data) && half->stride_sample % 16 == 0 && other_stride % 16 == 0;
}

static inline bool are_logits_aligned(const mgt_cuda_sample_tokens_args* a) {
  const bool token_major = is_token_major(a);
  return (token_major ? a->num_tokens : a->num_positions) % 16 == 0 && is_half_aligned(&a->logits, token_major) &&
         is_half_aligned(uncond_or_logits(a), token_major);
}

/* The last arguments of every kernel that reads logits, of a copy of what the caller gave and two numbers made of it.
 */
#define STRIDES_AND_SCALARS(a, mask_token_id, inverse_temperature)                                                    \
  &(a).logits.stride_sample, &(a).logits.stride_position, &(a).logits.stride_token, &(a).uncond_logits.stride_sample, \
      &(a).uncond_logits.stride_position, &(a).uncond_logits.stride_token, &(mask_token_id), &(a).guidance_scale,     \
      &(a).noise_scale, &(inverse_temperature)

/* Positions that a kernel with a program per sample takes at a time. */
static inline unsigned block_positions_of(int64_t num_positions) {
  if (num_positions > kMaxBlockPositions) return kMaxBlockPositions;
  return num_positions < kMinBlockPositions ? kMinBlockPositions : next_power_of_2(num_positions);
}

static inline bool valid_sizes(const mgt_cuda_sample_tokens_args* a) {
  return a->num_samples >= 0 && a->num_positions >= 0 && a->num_positions <= kMaxPositions && a->num_tokens >= 1 &&
         a->num_tokens <= kMaxTokens && (a->num_positions == 0 || a->num_samples <= INT32_MAX / a->num_positions);
}

/* Whether all that mgt_cuda_sample_tokens reads of its arguments is in its documented range. */
bool mgt_cuda_valid_draw(const mgt_cuda_sample_tokens_args* args);

/* CUDA_SUCCESS where the current device has a variant with this key. */
CUresult mgt_cuda_find(unsigned key);

/* Launches the variant with this key. arguments: all that the kernel may take, in its order. */
CUresult mgt_cuda_launch(unsigned key, int64_t grid_x, int64_t grid_y, void* const* arguments, CUstream stream);

#endif
