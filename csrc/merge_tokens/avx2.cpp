#include "isa.h"
#include "merge_tokens/op.h"

#if MGT_X86
MGT_TARGET_AVX2_BEGIN
#include "simd_scalar.h"
#include "simd_avx2.h"
#include "halves.h"
#include "merge_tokens/body.h"

namespace mgt {

void merge_tokens_avx2(const mgt_merge_tokens_args& args, int64_t sample, int64_t begin, int64_t end, void* y) {
  merge_tokens<Avx2>(args, sample, begin, end, y);
}

}  // namespace mgt

MGT_TARGET_END
#endif
