#include "isa.h"
#include "w4a8_linear/op.h"

#if MGT_X86
MGT_TARGET_AVX512_BEGIN
#include "simd_scalar.h"
#include "simd_avx512.h"
#include "halves.h"
#include "int4_linear/panel.h"
#include "w4a8_linear/body.h"
#include "w4a8_linear/maddubs.h"

namespace mgt {
namespace {

struct Maddubs512 {
  using V = __m512i;
  static constexpr int64_t kLanes = 16;
  static MGT_INLINE V load(const void* p) { return _mm512_load_si512(p); }
  static MGT_INLINE V set(int32_t word) { return _mm512_set1_epi32(word); }
  static MGT_INLINE V maddubs(V w, V x) { return _mm512_maddubs_epi16(w, x); }
  static MGT_INLINE V madd(V a, V b) { return _mm512_madd_epi16(a, b); }
  static MGT_INLINE V add16(V a, V b) { return _mm512_add_epi16(a, b); }
  static MGT_INLINE V add32(V a, V b) { return _mm512_add_epi32(a, b); }
  static MGT_INLINE void add_scaled(const float* scale, V sum, float* result) {
    _mm512_store_ps(result, _mm512_fmadd_ps(_mm512_load_ps(scale), _mm512_cvtepi32_ps(sum), _mm512_load_ps(result)));
  }
};

}  // namespace

const Int4LinearKernel w4a8_linear_avx512 = {prepare_w4a8<Avx512>, multiply_w4a8<Avx512, MaddubsTile<Maddubs512, 6>>, 1,
                                             1};

}  // namespace mgt

MGT_TARGET_END
#endif
