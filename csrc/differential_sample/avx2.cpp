#include "isa.h"
#include "differential_sample/op.h"

#if MGT_X86
MGT_TARGET_AVX2_BEGIN
#include "simd_scalar.h"
#include "simd_avx2.h"
#include "philox.h"
#include "elementary.h"
#include "noise.h"
#include "race.h"
#include "rows.h"
#include "differential_sample/body.h"

namespace mgt {

int64_t differential_sample_avx2(const DifferentialCall& call, DifferentialPass pass, int64_t begin, int64_t end,
                                 float* tiles) {
  return differential_sample<Avx2>(call, pass, begin, end, tiles);
}

}  // namespace mgt

MGT_TARGET_END
#endif
