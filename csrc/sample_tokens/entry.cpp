#include "sample_tokens/check.h"

#include "dispatch.h"

namespace {

// the first row that is read whose known token is not in the codebook, or -1
int64_t first_bad_token(const mgt_sample_tokens_args& a) {
  if (a.rows == MGT_ROWS_MASKED) return -1;
  for (int64_t row = 0; row < mgt::num_rows(a); ++row)
    if (a.tokens[row] != a.mask_token_id && (a.tokens[row] < 0 || a.tokens[row] >= a.num_tokens)) return row;
  return -1;
}

int64_t workspace_bytes(const mgt_context& context, const mgt_sample_tokens_args& a) {
  const int64_t workers = mgt::chunks_of_groups(context, a).num_workers;
  return mgt::kLineBytes + workers * mgt::floats_per_worker(a) * int64_t{sizeof(float)};
}

}  // namespace

extern "C" {

int64_t mgt_sample_tokens_workspace(const mgt_context* context, const mgt_sample_tokens_args* args) {
  const mgt::FloatState state;
  if (!mgt::valid(context) || !mgt::whole(args)) return -1;
  const mgt_sample_tokens_args a = mgt::normalized(*args);
  return mgt::valid(a) ? workspace_bytes(*context, a) : -1;
}

mgt_status mgt_sample_tokens(const mgt_context* context, const mgt_sample_tokens_args* args,
                             const mgt_sample_tokens_outputs* outputs, void* workspace, int64_t num_bytes,
                             int64_t* error_index) {
  const mgt::FloatState state;
  if (!mgt::valid(context) || !mgt::whole(args) || !mgt::whole(outputs)) return MGT_INVALID_ARGUMENT;
  const mgt_sample_tokens_args a = mgt::normalized(*args);
  if (!mgt::valid(a)) return MGT_INVALID_ARGUMENT;
  mgt_isa isa;
  const mgt_status status = mgt_resolve_isa(context->isa, &isa);
  if (status != MGT_OK) return status;
  if (mgt::num_rows(a) == 0) return MGT_OK;
  if (!mgt::valid_inputs(a) || !outputs->token_ids || !workspace || num_bytes < workspace_bytes(*context, a))
    return MGT_INVALID_ARGUMENT;
  const int64_t bad_token = outputs->known_logprob ? first_bad_token(a) : -1;
  if (bad_token >= 0) return mgt::fail(MGT_BAD_TOKEN, bad_token, error_index);

  auto* tiles = static_cast<float*>(mgt::on_line(workspace));
  mgt::FirstIndex bad_row;
  mgt::parallel_chunks(*context, mgt::chunks_of_groups(*context, a), [&](int64_t begin, int64_t end, int64_t worker) {
    float* own_tiles = tiles + worker * mgt::floats_per_worker(a);
    bad_row.report(mgt::kKernels[isa].sample_tokens(a, *outputs, begin, end, own_tiles));
  });
  return bad_row.get() < 0 ? MGT_OK : mgt::fail(MGT_BAD_LOGITS, bad_row.get(), error_index);
}

}  // extern "C"
