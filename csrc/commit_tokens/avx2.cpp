#include "isa.h"
#include "commit_tokens/op.h"

#if MGT_X86
MGT_TARGET_AVX2_BEGIN
#include "simd_scalar.h"
#include "simd_avx2.h"
#include "philox.h"
#include "elementary.h"
#include "select.h"
#include "confidence.h"
#include "commit_tokens/body.h"

namespace mgt {

void commit_tokens_avx2(const mgt_commit_tokens_args& args, int64_t sample, int64_t* tokens, uint8_t* done) {
  commit_tokens<Avx2>(args, sample, tokens, done);
}

}  // namespace mgt

MGT_TARGET_END
#endif
