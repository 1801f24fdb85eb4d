#include "isa.h"
#include "w4a8_linear/op.h"

#if MGT_X86
MGT_TARGET_AVX2_BEGIN
#include "simd_scalar.h"
#include "simd_avx2.h"
#include "halves.h"
#include "int4_linear/panel.h"
#include "w4a8_linear/body.h"
#include "w4a8_linear/maddubs.h"

namespace mgt {
namespace {

struct Maddubs256 {
  using V = __m256i;
  static constexpr int64_t kLanes = 8;
  static MGT_INLINE V load(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }
  static MGT_INLINE V set(int32_t word) { return _mm256_set1_epi32(word); }
  static MGT_INLINE V maddubs(V w, V x) { return _mm256_maddubs_epi16(w, x); }
  static MGT_INLINE V madd(V a, V b) { return _mm256_madd_epi16(a, b); }
  static MGT_INLINE V add16(V a, V b) { return _mm256_add_epi16(a, b); }
  static MGT_INLINE V add32(V a, V b) { return _mm256_add_epi32(a, b); }
  static MGT_INLINE void add_scaled(const float* scale, V sum, float* result) {
    _mm256_store_ps(result, _mm256_fmadd_ps(_mm256_load_ps(scale), _mm256_cvtepi32_ps(sum), _mm256_load_ps(result)));
  }
};

}  // namespace

const Int4LinearKernel w4a8_linear_avx2 = {prepare_w4a8<Avx2>, multiply_w4a8<Avx2, MaddubsTile<Maddubs256, 3>>, 1, 1};

}  // namespace mgt

MGT_TARGET_END
#endif
