#include "isa.h"
#include "merge_tokens/op.h"

#include "simd_scalar.h"
#include "halves.h"
#include "merge_tokens/body.h"

namespace mgt {

void merge_tokens_scalar(const mgt_merge_tokens_args& args, int64_t sample, int64_t begin, int64_t end, void* y) {
  merge_tokens<Scalar16>(args, sample, begin, end, y);
}

}  // namespace mgt
