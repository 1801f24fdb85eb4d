// w4a8_linear: one entry per instruction set.
#pragma once

#include "int4_linear/op.h"

namespace mgt {

extern const Int4LinearKernel w4a8_linear_scalar, w4a8_linear_avx2, w4a8_linear_avx512, w4a8_linear_avx512_vnni,
    w4a8_linear_amx;

}  // namespace mgt
