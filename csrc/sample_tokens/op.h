// sample_tokens: one entry per instruction set. A group is the rows that are read together: one row where the logits
// have unit stride over tokens, 32 neighbouring positions where they have unit stride over positions.
#pragma once

#include "mgt_kernels.h"

namespace mgt {

constexpr int64_t kGroupPositions = 32;
// logits of a row pass through in tiles of this many floats
constexpr int64_t kRowTileFloats = 2048;

inline bool token_major(const mgt_sample_tokens_args& args) {
  const mgt_logits& u = args.uncond_logits;
  return args.logits.stride_token == 1 && (u.data == nullptr || u.stride_token == 1);
}

inline int64_t groups_per_sample(const mgt_sample_tokens_args& args) {
  return token_major(args) ? args.num_positions : (args.num_positions + kGroupPositions - 1) / kGroupPositions;
}

inline bool is_read(const mgt_sample_tokens_args& args, int64_t token) {
  return args.rows == MGT_ROWS_ALL || (token == args.mask_token_id) == (args.rows == MGT_ROWS_MASKED);
}

// Fills the outputs for groups [begin, end) of all samples' groups; returns the first row b * N + n whose logits are
// bad, or -1. tiles: rows of a group x kRowTileFloats, of one thread, on a cache line.
using SampleTokens = int64_t (*)(const mgt_sample_tokens_args& args, const mgt_sample_tokens_outputs& outputs,
                                 int64_t begin, int64_t end, float* tiles);
int64_t sample_tokens_scalar(const mgt_sample_tokens_args&, const mgt_sample_tokens_outputs&, int64_t, int64_t, float*);
int64_t sample_tokens_avx2(const mgt_sample_tokens_args&, const mgt_sample_tokens_outputs&, int64_t, int64_t, float*);
int64_t sample_tokens_avx512(const mgt_sample_tokens_args&, const mgt_sample_tokens_outputs&, int64_t, int64_t, float*);

}  // namespace mgt
