#include "isa.h"
#include "draws/op.h"

#if MGT_X86
MGT_TARGET_AVX2_BEGIN
#include "simd_scalar.h"
#include "simd_avx2.h"
#include "philox.h"
#include "elementary.h"
#include "noise.h"
#include "draws/body.h"

namespace mgt {

void philox_avx2(const DrawPoint& point, int64_t first_block, int64_t num_blocks, uint32_t* words) {
  draw_words<Avx2>(point, first_block, num_blocks, words);
}

void gaussian_avx2(const DrawPoint& point, int64_t num_tokens, float* noise) {
  draw_gaussian<Avx2>(point, num_tokens, noise);
}

}  // namespace mgt

MGT_TARGET_END
#endif
