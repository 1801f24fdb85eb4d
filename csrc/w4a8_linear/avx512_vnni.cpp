#include "isa.h"
#include "w4a8_linear/op.h"

#if MGT_X86
MGT_TARGET_AVX512_VNNI_BEGIN
#include "simd_scalar.h"
#include "simd_avx512.h"
#include "halves.h"
#include "int4_linear/panel.h"
#include "w4a8_linear/body.h"
#include "w4a8_linear/vnni.h"

namespace mgt {
const Int4LinearKernel w4a8_linear_avx512_vnni = {prepare_w4a8<Avx512>, multiply_w4a8<Avx512, VnniTile>, 1, 1};

}  // namespace mgt

MGT_TARGET_END
#endif
