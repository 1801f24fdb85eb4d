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
/* edits_history: the history is edited once it is known what is selected, so that its row's softmax is kept */
#define MGT_CUDA_COMPARE(dtype, position_major, guided, noise, greedy, has_history, is_paper, edits_history)     \
  (7u << 24 | (unsigned)(dtype) << 7 | (unsigned)(position_major) << 6 | (unsigned)(guided) << 5 |               \
   (unsigned)(noise) << 4 | (unsigned)(greedy) << 3 | (unsigned)(has_history) << 2 | (unsigned)(is_paper) << 1 | \
   (unsigned)(edits_history))
#define MGT_CUDA_SELECT(block_positions, in_registers, is_paper, edits_history, aligned)                     \
  (8u << 24 | (unsigned)(block_positions) << 4 | (unsigned)(in_registers) << 3 | (unsigned)(is_paper) << 2 | \
   (unsigned)(edits_history) << 1 | (unsigned)(aligned))
#define MGT_CUDA_EDIT_HISTORY(dtype, position_major, guided, noise, aligned)                       \
  (9u << 24 | (unsigned)(dtype) << 4 | (unsigned)(position_major) << 3 | (unsigned)(guided) << 2 | \
   (unsigned)(noise) << 1 | (unsigned)(aligned))
#define MGT_CUDA_ADVANCE_HISTORY_STEP(has_history) (10u << 24 | (unsigned)(has_history))

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
