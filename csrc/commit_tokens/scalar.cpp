#include "isa.h"
#include "commit_tokens/op.h"

#include "simd_scalar.h"
#include "philox.h"
#include "elementary.h"
#include "select.h"
#include "confidence.h"
#include "commit_tokens/body.h"

namespace mgt {

void commit_tokens_scalar(const mgt_commit_tokens_args& args, int64_t sample, int64_t* tokens, uint8_t* done) {
  commit_tokens<Scalar16>(args, sample, tokens, done);
}

}  // namespace mgt
