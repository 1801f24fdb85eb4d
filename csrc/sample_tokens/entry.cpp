#include "sample_tokens/check.h"

#include "dispatch.h"

namespace {

// the tiles of one thread
int64_t floats_per_worker(const mgt_sample_tokens_args& a) {
  return (mgt::token_major(a) ? 1 : mgt::kGroupPositions) * mgt::kRowTileFloats;
}

int64_t workspace_bytes(const mgt_context& context, const mgt_sample_tokens_args& a) {
  const int64_t workers = mgt::chunks_of_groups(context, a).num_workers;
  return mgt::kLineBytes + workers * floats_per_worker(a) * int64_t{sizeof(float)};
}

}  // namespace

extern "C" {

int64_t mgt_sample_tokens_workspace(const mgt_context* context, const mgt_sample_tokens_args* args) {
  const mgt::FloatState state;
  if (!mgt::valid(context) || args == nullptr) return -1;
  const mgt_sample_tokens_args a = mgt::normalized(*args);
  return mgt::valid(a) ? workspace_bytes(*context, a) : -1;
}

mgt_status mgt_sample_tokens(const mgt_context* context, const mgt_sample_tokens_args* args, int64_t* token_ids,
                             float* logprob, void* workspace, int64_t num_bytes, int64_t* error_index) {
  const mgt::FloatState state;
  if (!mgt::valid(context) || args == nullptr) return MGT_INVALID_ARGUMENT;
  const mgt_sample_tokens_args a = mgt::normalized(*args);
  if (!mgt::valid(a)) return MGT_INVALID_ARGUMENT;
  mgt_isa isa;
  const mgt_status status = mgt_resolve_isa(context->isa, &isa);
  if (status != MGT_OK) return status;
  if (mgt::num_rows(a) == 0) return MGT_OK;
  if (!mgt::has_inputs(a) || !token_ids || !logprob || !workspace || num_bytes < workspace_bytes(*context, a))
    return MGT_INVALID_ARGUMENT;
  const int64_t bad_token = mgt::first_bad_token(a);
  if (bad_token >= 0) return mgt::fail(MGT_BAD_TOKEN, bad_token, error_index);

  auto* tiles = static_cast<float*>(mgt::on_line(workspace));
  mgt::FirstIndex bad_row;
  mgt::parallel_chunks(*context, mgt::chunks_of_groups(*context, a), [&](int64_t begin, int64_t end, int64_t worker) {
    float* own_tiles = tiles + worker * floats_per_worker(a);
    bad_row.report(mgt::kKernels[isa].sample_tokens(a, begin, end, token_ids, logprob, own_tiles));
  });
  return bad_row.get() < 0 ? MGT_OK : mgt::fail(MGT_BAD_LOGITS, bad_row.get(), error_index);
}

}  // extern "C"
