// merge_tokens: one entry per instruction set, for rows [begin, end) of one sample. unmerge_tokens only copies.
#pragma once

#include "mgt_kernels.h"

namespace mgt {

// y: (num_samples, num_rows, num_channels); the caller has checked starts and members.
using MergeTokens = void (*)(const mgt_merge_tokens_args& args, int64_t sample, int64_t begin, int64_t end, void* y);
void merge_tokens_scalar(const mgt_merge_tokens_args&, int64_t, int64_t, int64_t, void*);
void merge_tokens_avx2(const mgt_merge_tokens_args&, int64_t, int64_t, int64_t, void*);
void merge_tokens_avx512(const mgt_merge_tokens_args&, int64_t, int64_t, int64_t, void*);

}  // namespace mgt
