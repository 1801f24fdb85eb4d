// mask_by_confidence: one entry per instruction set, for one sample.
#pragma once

#include "mgt_kernels.h"

namespace mgt {

// Writes tokens of one sample; the caller has checked mask_len and logprob.
using MaskByConfidence = void (*)(const mgt_mask_by_confidence_args& args, int64_t sample, int64_t* tokens);
void mask_by_confidence_scalar(const mgt_mask_by_confidence_args&, int64_t, int64_t*);
void mask_by_confidence_avx2(const mgt_mask_by_confidence_args&, int64_t, int64_t*);
void mask_by_confidence_avx512(const mgt_mask_by_confidence_args&, int64_t, int64_t*);

}  // namespace mgt
