// The kernels of every instruction set.
#pragma once

#include "commit_tokens/op.h"
#include "differential_sample/op.h"
#include "draws/op.h"
#include "int4_linear/op.h"
#include "mask_by_confidence/op.h"
#include "match_tokens/op.h"
#include "merge_tokens/op.h"
#include "sample_tokens/op.h"

namespace mgt {

struct Kernels {
  SampleTokens sample_tokens;
  DifferentialSample differential_sample;
  MaskByConfidence mask_by_confidence;
  CommitTokens commit_tokens;
  Philox philox;
  Gaussian gaussian;
  const MatchTokens* match_tokens;
  MergeTokens merge_tokens;
  const Int4LinearKernel* w4a8_linear;
  const Int4LinearKernel* w4a16_linear;
};

// indexed by a resolved mgt_isa
extern const Kernels kKernels[];

}  // namespace mgt
