#include "isa.h"
#include "sample_tokens/op.h"

#if MGT_X86
MGT_TARGET_AVX2_BEGIN
#include "simd_scalar.h"
#include "simd_avx2.h"
#include "philox.h"
#include "elementary.h"
#include "noise.h"
#include "select.h"
#include "race.h"
#include "rows.h"
#include "sample_tokens/truncate.h"
#include "sample_tokens/body.h"

namespace mgt {

int64_t sample_tokens_avx2(const mgt_sample_tokens_args& args, const mgt_sample_tokens_outputs& outputs, int64_t begin,
                           int64_t end, float* tiles) {
  return sample_tokens<Avx2>(args, outputs, begin, end, tiles);
}

}  // namespace mgt

MGT_TARGET_END
#endif
