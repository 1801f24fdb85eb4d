/* How the launchers find machine code; not for users. */
#ifndef MGT_KERNELS_CUDA_VARIANTS_H
#define MGT_KERNELS_CUDA_VARIANTS_H

#include <stdatomic.h>

#include "mgt_kernels_cuda.h"

/* What a kernel is compiled for, as a number that tells it from all other variants. Flags are 0 or 1; aligned: with
 * 16-byte accesses. */
#define MGT_CUDA_SAMPLE_TOKENS(dtype, position_major, guided, noise, greedy, split, aligned)       \
  (1u << 24 | (unsigned)(dtype) << 6 | (unsigned)(position_major) << 5 | (unsigned)(guided) << 4 | \
   (unsigned)(noise) << 3 | (unsigned)(greedy) << 2 | (unsigned)(split) << 1 | (unsigned)(aligned))
#define MGT_CUDA_COMBINE_SPLITS(block_splits) (2u << 24 | (unsigned)(block_splits))
#define MGT_CUDA_MASK_BY_CONFIDENCE(block_positions, in_registers, noise, aligned)                        \
  (3u << 24 | (unsigned)(block_positions) << 3 | (unsigned)(in_registers) << 2 | (unsigned)(noise) << 1 | \
   (unsigned)(aligned))
/* group_size is a multiple of 32, at most 2^14 */
#define MGT_CUDA_QUANTIZE_ROWS(dtype, group_size, is_static, aligned) \
  (4u << 24 | (unsigned)(group_size) << 4 | (unsigned)(dtype) << 2 | (unsigned)(is_static) << 1 | (unsigned)(aligned))
#define MGT_CUDA_W4A8_LINEAR(dtype, group_size, scale_dtype, bias, few_rows)                        \
  (5u << 24 | (unsigned)(group_size) << 4 | (unsigned)(dtype) << 4 | (unsigned)(scale_dtype) << 2 | \
   (unsigned)(bias) << 1 | (unsigned)(few_rows))
#define MGT_CUDA_W4A16_LINEAR(dtype, group_size, scale_dtype, bias, few_rows, aligned)              \
  (6u << 24 | (unsigned)(group_size) << 4 | (unsigned)(dtype) << 5 | (unsigned)(scale_dtype) << 3 | \
   (unsigned)(bias) << 2 | (unsigned)(few_rows) << 1 | (unsigned)(aligned))

typedef struct {
  unsigned key;
  const char* name;
  const void* cubin;
  /* bit i: the kernel takes argument i of its launcher; the others are compiled in */
  unsigned parameters;
  unsigned num_warps;
  unsigned shared_bytes;
  /* NULL until the first launch */
  _Atomic(CUkernel) kernel;
} mgt_cuda_variant;

typedef struct {
  /* 10 major + minor */
  int architecture;
  /* whether later minors of the same major do not run it */
  int exact;
  mgt_cuda_variant* variants;
  int num_variants;
} mgt_cuda_table;

/* in ascending order of architectures */
extern const mgt_cuda_table mgt_cuda_tables[];
extern const int mgt_cuda_num_tables;

#endif
