// The random words and the Gaussian noise by themselves: what other ops draw, for tests and for callers that add it.
#pragma once

#include "mgt_kernels.h"

namespace mgt {

struct DrawPoint {
  int64_t seed;
  uint32_t position, step, stream;
};

// words: (4, num_blocks)
using Philox = void (*)(const DrawPoint& point, int64_t first_block, int64_t num_blocks, uint32_t* words);
void philox_scalar(const DrawPoint&, int64_t, int64_t, uint32_t*);
void philox_avx2(const DrawPoint&, int64_t, int64_t, uint32_t*);
void philox_avx512(const DrawPoint&, int64_t, int64_t, uint32_t*);

using Gaussian = void (*)(const DrawPoint& point, int64_t num_tokens, float* noise);
void gaussian_scalar(const DrawPoint&, int64_t, float*);
void gaussian_avx2(const DrawPoint&, int64_t, float*);
void gaussian_avx512(const DrawPoint&, int64_t, float*);

}  // namespace mgt
