#include "isa.h"
#include "merge_tokens/op.h"

#if MGT_X86
MGT_TARGET_AVX512_BEGIN
#include "simd_scalar.h"
#include "simd_avx512.h"
#include "halves.h"
#include "merge_tokens/body.h"

namespace mgt {

void merge_tokens_avx512(const mgt_merge_tokens_args& args, int64_t sample, int64_t begin, int64_t end, void* y) {
  merge_tokens<Avx512>(args, sample, begin, end, y);
}

}  // namespace mgt

MGT_TARGET_END
#endif
