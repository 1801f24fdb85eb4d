#include "isa.h"
#include "draws/op.h"

#include "simd_scalar.h"
#include "philox.h"
#include "elementary.h"
#include "noise.h"
#include "draws/body.h"

namespace mgt {

void philox_scalar(const DrawPoint& point, int64_t first_block, int64_t num_blocks, uint32_t* words) {
  draw_words<Scalar16>(point, first_block, num_blocks, words);
}

void gaussian_scalar(const DrawPoint& point, int64_t num_tokens, float* noise) {
  draw_gaussian<Scalar16>(point, num_tokens, noise);
}

}  // namespace mgt
