// differential_sample: one entry per instruction set, over the groups of rows that sample_tokens/op.h defines. Rows are
// independent of each other until the selection, which entry.cpp makes between the passes.
#pragma once

#include "mgt_kernels.h"
#include "sample_tokens/op.h"

namespace mgt {

// what a row would get if it were selected; `selected` is written after all rows have been seen
struct DifferentialChoice {
  float logprob;
  int32_t token;
  int32_t selected;
};

struct DifferentialCall {
  const mgt_sample_tokens_args& sample;
  const mgt_differential_sample_args& args;
  uint16_t* history;
  uint8_t* written;
  int64_t* token_ids;
  float* logprob;
  float* divergence;
  DifferentialChoice* choices;
};

enum class DifferentialPass {
  // fill token_ids, logprob, divergence and choices; overwrite the history unless the aliased one is asked for
  draw,
  // the aliased history, once `selected` is known
  edit_history
};

// Groups [begin, end) of all samples' groups; tiles: group positions x row_tiles x kRowTileFloats, of one thread.
// Returns the first row b * N + n whose logits are bad, or -1.
using DifferentialSample = int64_t (*)(const DifferentialCall& call, DifferentialPass pass, int64_t begin, int64_t end,
                                       float* tiles);
int64_t differential_sample_scalar(const DifferentialCall&, DifferentialPass, int64_t, int64_t, float*);
int64_t differential_sample_avx2(const DifferentialCall&, DifferentialPass, int64_t, int64_t, float*);
int64_t differential_sample_avx512(const DifferentialCall&, DifferentialPass, int64_t, int64_t, float*);

}  // namespace mgt
