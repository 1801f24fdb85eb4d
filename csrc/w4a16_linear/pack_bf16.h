// Include inside a target region with AVX512-BF16.
#pragma once

namespace mgt {
namespace {

// bfloat16 of two vectors, interleaved word by word. The instruction makes zeros of denormals, for which the dot
// products take them anyway.
MGT_INLINE __m512i pack_bfloat16(__m512 first, __m512 second) {
  const auto halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(interleaved, halves);
}

}  // namespace
}  // namespace mgt
