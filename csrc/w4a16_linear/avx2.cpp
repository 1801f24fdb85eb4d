#include "isa.h"
#include "w4a16_linear/op.h"

#if MGT_X86
MGT_TARGET_AVX2_BEGIN
#include "simd_scalar.h"
#include "simd_avx2.h"
#include "halves.h"
#include "int4_linear/panel.h"
#include "w4a16_linear/body.h"

namespace mgt {

const Int4LinearKernel w4a16_linear_avx2 = {prepare_w4a16<Avx2, float>, multiply_w4a16<Avx2, FloatTile<Avx2, 4, 1>>, 4,
                                            2};

}  // namespace mgt

MGT_TARGET_END
#endif
