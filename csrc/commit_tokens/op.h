// commit_tokens: one entry per instruction set, for one sample.
#pragma once

#include "mgt_kernels.h"

namespace mgt {

// Writes tokens and done of one sample; the caller has checked the window, the count and the scores.
using CommitTokens = void (*)(const mgt_commit_tokens_args& args, int64_t sample, int64_t* tokens, uint8_t* done);
void commit_tokens_scalar(const mgt_commit_tokens_args&, int64_t, int64_t*, uint8_t*);
void commit_tokens_avx2(const mgt_commit_tokens_args&, int64_t, int64_t*, uint8_t*);
void commit_tokens_avx512(const mgt_commit_tokens_args&, int64_t, int64_t*, uint8_t*);

// the window [start, end) of a sample
struct Window {
  Window(const mgt_commit_tokens_args& a, int64_t sample)
      : start(a.starts != nullptr ? a.starts[sample] : 0), end(a.ends != nullptr ? a.ends[sample] : a.num_positions) {}
  int64_t start, end;
};

}  // namespace mgt
