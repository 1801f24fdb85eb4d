#include "dispatch.h"
#include "isa.h"
#include "sample_tokens/check.h"
#include "select.h"

namespace {

struct Workspace {
  int64_t floats_per_worker;
  mgt::Size num_bytes;
};

// the tiles of every thread, then a choice per row
Workspace workspace_of(const mgt_context& context, const mgt_sample_tokens_args& a) {
  const int64_t rows = mgt::token_major(a) ? 1 : mgt::kGroupPositions;
  const int64_t floats = rows * mgt::row_tiles(a.num_tokens) * mgt::kRowTileFloats;
  const mgt::Size tiles = mgt::Size(mgt::chunks_of_groups(context, a).num_workers) * floats * int64_t{sizeof(float)};
  const mgt::Size choices = mgt::Size(mgt::num_rows(a)) * int64_t{sizeof(mgt::DifferentialChoice)};
  return {floats, tiles + choices + mgt::kLineBytes};
}

bool whole(const mgt_differential_sample_args* args) { return mgt::whole(args) && mgt::whole(args->sample); }

// expects a normalized sample
bool valid(const mgt_differential_sample_args& a, const mgt_sample_tokens_args& sample) {
  const bool official = a.variant == MGT_DIFFERENTIAL_OFFICIAL;
  if (!mgt::valid(sample) || sample.rows != MGT_ROWS_MASKED || mgt::truncates(sample) ||
      !(official || a.variant == MGT_DIFFERENTIAL_PAPER) || (a.aliased_history && !official) ||
      !(a.share >= 0.0 && a.share <= 1.0))
    return false;
  return (mgt::Size(mgt::num_rows(sample)) * sample.num_tokens * int64_t{sizeof(uint16_t)}).fits();
}

// Gives the share of the sample's rows with the smallest divergence what they would get if selected.
void select_rows(const mgt::DifferentialCall& call, int64_t sample) {
  const mgt_sample_tokens_args& a = call.sample;
  const bool official = call.args.variant == MGT_DIFFERENTIAL_OFFICIAL;
  const int64_t first = sample * a.num_positions;
  const auto masked = [&](int64_t i) { return a.tokens[first + i] == a.mask_token_id; };
  const auto takes_part = [&](int64_t i) { return official || masked(i); };
  int64_t num_ranked = 0;
  for (int64_t i = 0; i < a.num_positions; ++i) num_ranked += takes_part(i);
  const double wanted = call.args.share * static_cast<double>(num_ranked);
  const auto num_selected = static_cast<int64_t>(official ? wanted : std::floor(wanted + 0.5));
  if (num_selected == 0) return;

  const auto key_at = [&](int64_t i) { return mgt::ordered_key(call.divergence[first + i]); };
  auto [threshold, num_tied] = mgt::threshold_of_rank(a.num_positions, num_selected, key_at, takes_part);
  for (int64_t i = 0; i < a.num_positions; ++i) {
    if (!takes_part(i)) continue;
    const uint32_t key = key_at(i);
    const bool tied = key == threshold && num_tied > 0;
    num_tied -= tied;
    if (!(key < threshold || tied)) continue;
    mgt::DifferentialChoice& choice = call.choices[first + i];
    choice.selected = 1;
    if (!masked(i)) continue;
    call.token_ids[first + i] = choice.token;
    call.logprob[first + i] = choice.logprob;
  }
}

}  // namespace

extern "C" {

int64_t mgt_differential_sample_workspace(const mgt_context* context, const mgt_differential_sample_args* args) {
  const mgt::FloatState state;
  if (!mgt::valid(context) || !whole(args)) return -1;
  const mgt_sample_tokens_args sample = mgt::normalized(*args->sample);
  return valid(*args, sample) ? workspace_of(*context, sample).num_bytes.value() : -1;
}

mgt_status mgt_differential_sample(const mgt_context* context, const mgt_differential_sample_args* args,
                                   uint16_t* history, uint8_t* written, int64_t* token_ids, float* logprob,
                                   float* divergence, void* workspace, int64_t num_bytes, int64_t* error_index) {
  const mgt::FloatState state;
  if (!mgt::valid(context) || !whole(args)) return MGT_INVALID_ARGUMENT;
  const mgt_sample_tokens_args a = mgt::normalized(*args->sample);
  if (!valid(*args, a)) return MGT_INVALID_ARGUMENT;
  mgt_isa isa;
  const mgt_status status = mgt_resolve_isa(context->isa, &isa);
  if (status != MGT_OK) return status;
  if (mgt::num_rows(a) == 0) return MGT_OK;
  const Workspace layout = workspace_of(*context, a);
  if (!mgt::valid_inputs(a) || !history || !written || !token_ids || !logprob || !divergence || !workspace ||
      !layout.num_bytes.fits() || num_bytes < layout.num_bytes.value())
    return MGT_INVALID_ARGUMENT;

  const mgt::Chunks chunks = mgt::chunks_of_groups(*context, a);
  auto* tiles = static_cast<float*>(mgt::on_line(workspace));
  auto* choices = reinterpret_cast<mgt::DifferentialChoice*>(tiles + chunks.num_workers * layout.floats_per_worker);
  const mgt::DifferentialCall call{a, *args, history, written, token_ids, logprob, divergence, choices};
  mgt::FirstIndex bad_row;
  const auto run = [&](mgt::DifferentialPass pass) {
    mgt::parallel_chunks(*context, chunks, [&](int64_t begin, int64_t end, int64_t worker) {
      float* own_tiles = tiles + worker * layout.floats_per_worker;
      bad_row.report(mgt::kKernels[isa].differential_sample(call, pass, begin, end, own_tiles));
    });
    return bad_row.get();
  };
  if (run(mgt::DifferentialPass::draw) >= 0) return mgt::fail(MGT_BAD_LOGITS, bad_row.get(), error_index);
  if (!args->has_history) return MGT_OK;
  for (int64_t sample = 0; sample < a.num_samples; ++sample) select_rows(call, sample);
  if (args->aliased_history) run(mgt::DifferentialPass::edit_history);
  return MGT_OK;
}

}  // extern "C"
