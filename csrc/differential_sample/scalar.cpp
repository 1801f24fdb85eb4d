#include "isa.h"
#include "differential_sample/op.h"

#include "simd_scalar.h"
#include "philox.h"
#include "elementary.h"
#include "noise.h"
#include "race.h"
#include "rows.h"
#include "differential_sample/body.h"

namespace mgt {

int64_t differential_sample_scalar(const DifferentialCall& call, DifferentialPass pass, int64_t begin, int64_t end,
                                   float* tiles) {
  return differential_sample<Scalar16>(call, pass, begin, end, tiles);
}

}  // namespace mgt
