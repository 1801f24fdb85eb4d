#include "dispatch.h"
#include "entry.h"

extern "C" {

mgt_status mgt_philox(const mgt_context* context, int64_t seed, uint32_t position, uint32_t step, uint32_t stream,
                      int64_t first_block, int64_t num_blocks, uint32_t* words) {
  const mgt::FloatState state;
  if (!mgt::valid(context) || first_block < 0 || num_blocks < 0 || first_block > int64_t{1} << 32 ||
      num_blocks > (int64_t{1} << 32) - first_block || (num_blocks > 0 && !words))
    return MGT_INVALID_ARGUMENT;
  mgt_isa isa;
  const mgt_status status = mgt_resolve_isa(context->isa, &isa);
  if (status == MGT_OK) mgt::kKernels[isa].philox({seed, position, step, stream}, first_block, num_blocks, words);
  return status;
}

mgt_status mgt_gaussian(const mgt_context* context, int64_t seed, uint32_t position, uint32_t step, int64_t num_tokens,
                        float* noise) {
  const mgt::FloatState state;
  if (!mgt::valid(context) || num_tokens < 0 || num_tokens > INT32_MAX || (num_tokens > 0 && !noise))
    return MGT_INVALID_ARGUMENT;
  mgt_isa isa;
  const mgt_status status = mgt_resolve_isa(context->isa, &isa);
  // stream 1, the logit noise
  if (status == MGT_OK) mgt::kKernels[isa].gaussian({seed, position, step, 1}, num_tokens, noise);
  return status;
}

}  // extern "C"
