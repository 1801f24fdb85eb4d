#include "isa.h"
#include "w4a16_linear/op.h"

#if MGT_X86
MGT_TARGET_AVX512_BEGIN
#include "simd_scalar.h"
#include "simd_avx512.h"
#include "halves.h"
#include "int4_linear/panel.h"
#include "w4a16_linear/body.h"

namespace mgt {

const Int4LinearKernel w4a16_linear_avx512 = {prepare_w4a16<Avx512, float>,
                                              multiply_w4a16<Avx512, FloatTile<Avx512, 6, 4>>, 4, 2};

}  // namespace mgt

MGT_TARGET_END
#endif
