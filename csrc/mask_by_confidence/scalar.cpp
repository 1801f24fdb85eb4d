#include "isa.h"
#include "mask_by_confidence/op.h"

#include "simd_scalar.h"
#include "philox.h"
#include "elementary.h"
#include "select.h"
#include "confidence.h"
#include "mask_by_confidence/body.h"

namespace mgt {

void mask_by_confidence_scalar(const mgt_mask_by_confidence_args& args, int64_t sample, int64_t* tokens) {
  mask_by_confidence<Scalar16>(args, sample, tokens);
}

}  // namespace mgt
