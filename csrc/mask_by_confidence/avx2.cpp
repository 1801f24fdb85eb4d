#include "isa.h"
#include "mask_by_confidence/op.h"

#if MGT_X86
MGT_TARGET_AVX2_BEGIN
#include "simd_scalar.h"
#include "simd_avx2.h"
#include "philox.h"
#include "elementary.h"
#include "select.h"
#include "confidence.h"
#include "mask_by_confidence/body.h"

namespace mgt {

void mask_by_confidence_avx2(const mgt_mask_by_confidence_args& args, int64_t sample, int64_t* tokens) {
  mask_by_confidence<Avx2>(args, sample, tokens);
}

}  // namespace mgt

MGT_TARGET_END
#endif
