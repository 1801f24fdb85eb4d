/* What the launchers share; not for users. */
#ifndef MGT_KERNELS_CUDA_LAUNCH_H
#define MGT_KERNELS_CUDA_LAUNCH_H

#include <math.h>
#include <stdbool.h>

#include "mgt_kernels_cuda_variants.h"

enum {
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

/* Launches the variant with this key. arguments: all that the kernel may take, in its order. */
CUresult mgt_cuda_launch(unsigned key, int64_t grid_x, int64_t grid_y, void* const* arguments, CUstream stream);

#endif
