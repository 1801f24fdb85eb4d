// sample_tokens: one entry per instruction set. A group is the rows that are read together: one row where the logits
// have unit stride over tokens, 32 neighbouring positions where they have unit stride over positions.
#pragma once

#include "mgt_kernels.h"

namespace mgt {

constexpr int64_t kGroupPositions = 32;
// logits of a row pass through in tiles of this many floats
constexpr int64_t kRowTileFloats = 2048;
// groups of columns of a tile whose maxima tell, before a truncated draw, what may be left aside unseen
constexpr int64_t kTileMaxima = 64;

inline int64_t row_tiles(int64_t num_tokens) { return (num_tokens + kRowTileFloats - 1) / kRowTileFloats; }

// whether tokens may be left out of the draw
inline bool truncates(const mgt_sample_tokens_args& args) {
  return (args.top_k > 0 && args.top_k < args.num_tokens) || (args.top_p > 0.0f && args.top_p < 1.0f) ||
         args.min_p > 0.0f;
}

inline bool token_major(const mgt_sample_tokens_args& args) {
  const mgt_logits &u = args.uncond_logits, &v = args.second_uncond_logits;
  return args.logits.stride_token == 1 && (u.data == nullptr || u.stride_token == 1) &&
         (v.data == nullptr || v.stride_token == 1);
}

inline int64_t groups_per_sample(const mgt_sample_tokens_args& args) {
  return token_major(args) ? args.num_positions : (args.num_positions + kGroupPositions - 1) / kGroupPositions;
}

inline bool is_read(const mgt_sample_tokens_args& args, int64_t token) {
  return args.rows == MGT_ROWS_ALL || (token == args.mask_token_id) == (args.rows == MGT_ROWS_MASKED);
}

// One tile of each row of a group; or, to look at a row again before a truncated draw, all of its tiles, then the
// maxima of each, then a key and a weight of 32 bits for each token.
inline int64_t floats_per_worker(const mgt_sample_tokens_args& args) {
  const int64_t rows = token_major(args) ? 1 : kGroupPositions;
  if (!truncates(args)) return rows * kRowTileFloats;
  return row_tiles(args.num_tokens) * (rows * (kRowTileFloats + kTileMaxima) + 2 * kRowTileFloats);
}

// Fills the outputs for groups [begin, end) of all samples' groups; returns the first row b * N + n whose logits are
// bad, or -1. tiles: floats_per_worker(args), of one thread, on a cache line.
using SampleTokens = int64_t (*)(const mgt_sample_tokens_args& args, const mgt_sample_tokens_outputs& outputs,
                                 int64_t begin, int64_t end, float* tiles);
int64_t sample_tokens_scalar(const mgt_sample_tokens_args&, const mgt_sample_tokens_outputs&, int64_t, int64_t, float*);
int64_t sample_tokens_avx2(const mgt_sample_tokens_args&, const mgt_sample_tokens_outputs&, int64_t, int64_t, float*);
int64_t sample_tokens_avx512(const mgt_sample_tokens_args&, const mgt_sample_tokens_outputs&, int64_t, int64_t, float*);

}  // namespace mgt
