#include "isa.h"
#include "w4a16_linear/op.h"

#include "simd_scalar.h"
#include "halves.h"
#include "int4_linear/panel.h"
#include "w4a16_linear/body.h"

namespace mgt {

const Int4LinearKernel w4a16_linear_scalar = {prepare_w4a16<Scalar16, float>,
                                              multiply_w4a16<Scalar16, FloatTile<Scalar16, 1, 1>>, 4, 2};

}  // namespace mgt
