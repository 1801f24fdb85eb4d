#include <algorithm>
#include <cmath>

#include "isa.h"
#include "dispatch.h"
#include "parallel.h"
#include "simd_scalar.h"
#include "philox.h"
#include "select.h"

namespace {

using mgt::kPanelTokens, mgt::MatchCall, mgt::MatchSample, mgt::Size;

bool valid(const mgt_match_tokens_args& a) {
  if (a.num_samples < 0 || a.height < 2 || a.width < 2 || a.height % 2 != 0 || a.width % 2 != 0 || a.num_channels < 1)
    return false;
  if (a.dtype != MGT_FLOAT32 && a.dtype != MGT_BFLOAT16 && a.dtype != MGT_FLOAT16) return false;
  const Size num_tokens = Size(a.height) * a.width;
  if (!num_tokens.fits() || num_tokens.value() > INT32_MAX || !mgt::valid_step(a.step)) return false;
  if (a.num_merged < -1 || a.num_merged > num_tokens.value() / 4 * 3) return false;
  if (a.num_merged < 0 && !(a.threshold >= -1.0f && a.threshold <= 1.0f)) return false;
  const int64_t size = a.dtype == MGT_FLOAT32 ? 4 : 2;
  const Size sample_span = a.num_samples > 1 ? Size(a.num_samples) * Size(a.stride_sample).magnitude() : Size(0);
  return ((sample_span + num_tokens * Size(a.stride_token).magnitude() + a.num_channels) * size).fits() &&
         (Size(a.num_samples) * (num_tokens + 1) * int64_t{sizeof(int64_t)}).fits();
}

MatchCall call_of(const mgt_match_tokens_args& a) {
  const int64_t num_destinations = a.height * a.width / 4;
  const int64_t pair = kPanelTokens * mgt::kPanelPair;
  const int64_t num_panels = (num_destinations + pair - 1) / pair * mgt::kPanelPair;
  // whole vectors, and not a power of two, which would crowd the rows into few sets of a cache
  return {a, num_destinations, 3 * num_destinations, num_panels, (a.num_channels + 15) / 16 * 16 + 16};
}

// The workspace: samples, as many at once as there are workers, then each worker's tile. In bytes, whole lines.
struct Workspace {
  int64_t samples_at_once;
  Size destinations, sources, panels, inverse, cosine, sample, tile, total;
};

Size lines(Size bytes) {
  return bytes.fits() ? (bytes + (mgt::kLineBytes - 1)).value() / mgt::kLineBytes * Size(mgt::kLineBytes) : bytes;
}

Workspace workspace_of(const mgt_context& context, const mgt_match_tokens_args& a) {
  const MatchCall call = call_of(a);
  const int64_t workers = mgt::max_workers(context);
  const int64_t samples_at_once = std::max(int64_t{1}, std::min(a.num_samples, workers));
  const Size destinations = lines(Size(call.num_panels) * kPanelTokens * 4);
  const Size sources = lines(Size(call.num_sources) * 4);
  const Size panels = lines(Size(call.num_panels) * kPanelTokens * a.num_channels * 4);
  // destinations, inverse; sources, cosine, nearest; panels
  const Size sample = destinations + destinations + sources + sources + sources + panels;
  const Size tile = lines(Size(mgt::kSourcesAtOnce) * call.tile_stride * 4);
  return {samples_at_once, destinations, sources,
          panels,          destinations, sources,
          sample,          tile,         Size(samples_at_once) * sample + Size(workers) * tile + mgt::kLineBytes};
}

MatchSample sample_at(const Workspace& layout, char* start) {
  MatchSample state;
  char* next = start;
  const auto take = [&next](const Size& bytes) {
    char* taken = next;
    next += bytes.value();
    return taken;
  };
  state.destinations = reinterpret_cast<int32_t*>(take(layout.destinations));
  state.sources = reinterpret_cast<int32_t*>(take(layout.sources));
  state.panels = reinterpret_cast<float*>(take(layout.panels));
  state.inverse = reinterpret_cast<float*>(take(layout.inverse));
  state.cosine = reinterpret_cast<float*>(take(layout.cosine));
  state.nearest = reinterpret_cast<int32_t*>(take(layout.sources));
  return state;
}

// Which positions are destinations, and which are sources, both in rising order. `rows` is scratch of this sample.
void list_tokens(const MatchCall& call, int64_t sample, const MatchSample& state, int64_t* rows) {
  const mgt_match_tokens_args& a = call.args;
  const int64_t num_tokens = a.height * a.width;
  std::fill(rows, rows + num_tokens, int64_t{0});
  for (int64_t cell = 0; cell < call.num_destinations; ++cell) {
    uint32_t corner = 0;
    if (a.seeds != nullptr) {
      const mgt::PhiloxKey key(static_cast<uint64_t>(a.seeds[sample]), static_cast<uint32_t>(cell),
                               static_cast<uint32_t>(a.step), mgt::kStreamMerge);
      corner = mgt::philox<mgt::Lane1>(0u, key).word[0] >> 30;
    }
    const int64_t row = cell / (a.width / 2) * 2 + corner / 2, column = cell % (a.width / 2) * 2 + corner % 2;
    rows[row * a.width + column] = 1;
  }
  int64_t num_destinations = 0, num_sources = 0;
  for (int64_t i = 0; i < num_tokens; ++i) {
    if (rows[i] != 0)
      state.destinations[num_destinations++] = static_cast<int32_t>(i);
    else
      state.sources[num_sources++] = static_cast<int32_t>(i);
  }
  // a second time the last one, which as the later of equal ones is never chosen
  std::fill(state.destinations + num_destinations, state.destinations + call.num_panels * kPanelTokens,
            state.destinations[num_destinations - 1]);
}

// the outputs of a sample whose cosines are known
void write_match(const MatchCall& call, const MatchSample& state, int64_t* rows, int64_t* members, int64_t* starts,
                 int64_t* num_rows) {
  const mgt_match_tokens_args& a = call.args;
  const int64_t num_tokens = a.height * a.width;
  // the smaller the key, the larger the cosine
  const auto key_at = [&](int64_t i) { return ~mgt::ordered_key(state.cosine[i]); };
  mgt::Threshold merged{0, 0};
  if (a.num_merged > 0)
    merged = mgt::threshold_of_rank(call.num_sources, a.num_merged, key_at, [](int64_t) { return true; });
  const auto merges = [&](int64_t i) {
    if (a.num_merged < 0) return state.cosine[i] >= a.threshold;
    if (a.num_merged == 0) return false;
    const bool tied = key_at(i) == merged.key && merged.num_tied > 0;
    merged.num_tied -= tied;
    return key_at(i) < merged.key || tied;
  };
  // kept tokens get their rows, merged ones -1 - the position of their destination
  std::fill(rows, rows + num_tokens, int64_t{0});
  for (int64_t i = 0; i < call.num_sources; ++i)
    if (merges(i)) rows[state.sources[i]] = -1 - int64_t{state.destinations[state.nearest[i]]};
  int64_t num_kept = 0;
  for (int64_t i = 0; i < num_tokens; ++i)
    if (rows[i] == 0) rows[i] = num_kept++;
  for (int64_t i = 0; i < num_tokens; ++i)
    if (rows[i] < 0) rows[i] = rows[-1 - rows[i]];
  // a counting sort of the tokens by row
  std::fill(starts, starts + num_tokens + 1, int64_t{0});
  for (int64_t i = 0; i < num_tokens; ++i) ++starts[rows[i] + 1];
  for (int64_t i = 0; i < num_tokens; ++i) starts[i + 1] += starts[i];
  for (int64_t i = 0; i < num_tokens; ++i) members[starts[rows[i]]++] = i;
  std::copy_backward(starts, starts + num_tokens, starts + num_tokens + 1);
  starts[0] = 0;
  *num_rows = num_kept;
}

}  // namespace

extern "C" {

int64_t mgt_match_tokens_workspace(const mgt_context* context, const mgt_match_tokens_args* args) {
  if (!mgt::valid(context) || !mgt::whole(args) || !valid(*args)) return -1;
  return workspace_of(*context, *args).total.value();
}

mgt_status mgt_match_tokens(const mgt_context* context, const mgt_match_tokens_args* args,
                            const mgt_match_tokens_outputs* outputs, void* workspace, int64_t workspace_bytes,
                            int64_t* error_index) {
  const mgt::FloatState float_state;
  if (!mgt::valid(context) || !mgt::whole(args) || !mgt::whole(outputs) || !valid(*args)) return MGT_INVALID_ARGUMENT;
  const mgt_match_tokens_args& a = *args;
  mgt_isa isa;
  const mgt_status status = mgt_resolve_isa(context->isa, &isa);
  if (status != MGT_OK) return status;
  if (a.num_samples == 0) return MGT_OK;
  const Workspace layout = workspace_of(*context, a);
  if (!a.x || !outputs->rows || !outputs->members || !outputs->starts || !outputs->num_rows || !workspace ||
      !layout.total.fits() || workspace_bytes < layout.total.value())
    return MGT_INVALID_ARGUMENT;

  const mgt::MatchTokens& kernel = *mgt::kKernels[isa].match_tokens;
  const MatchCall call = call_of(a);
  const int64_t num_tokens = a.height * a.width;
  auto* samples = static_cast<char*>(mgt::on_line(workspace));
  auto* tiles = samples + layout.samples_at_once * layout.sample.value();
  const auto state_of = [&](int64_t i) { return sample_at(layout, samples + i * layout.sample.value()); };
  const int64_t runs = (call.num_sources + mgt::kSourcesAtOnce - 1) / mgt::kSourcesAtOnce;
  for (int64_t first = 0; first < a.num_samples; first += layout.samples_at_once) {
    const int64_t count = std::min(layout.samples_at_once, a.num_samples - first);
    mgt::FirstIndex bad_token;
    const auto report = [&](int64_t sample, int64_t position) {
      if (position >= 0) bad_token.report(sample * num_tokens + position);
    };
    mgt::parallel_chunks(*context, {*context, count, 1}, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t i = begin; i < end; ++i)
        list_tokens(call, first + i, state_of(i), outputs->rows + (first + i) * num_tokens);
    });
    const int64_t num_packs = count * call.num_panels;
    mgt::parallel_chunks(*context, {*context, num_packs, 4}, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t i = k / call.num_panels;
        report(first + i, kernel.pack(call, first + i, state_of(i), k % call.num_panels));
      }
    });
    mgt::parallel_chunks(*context, {*context, count * runs, 1}, [&](int64_t begin, int64_t end, int64_t worker) {
      auto* tile = reinterpret_cast<float*>(tiles + worker * layout.tile.value());
      for (int64_t k = begin; k < end; ++k) {
        const int64_t i = k / runs, source = k % runs * mgt::kSourcesAtOnce;
        const int64_t last = std::min(source + mgt::kSourcesAtOnce, call.num_sources);
        report(first + i, kernel.compare(call, first + i, state_of(i), source, last, tile));
      }
    });
    if (bad_token.get() >= 0) return mgt::fail(MGT_BAD_ACTIVATION, bad_token.get(), error_index);
    mgt::parallel_chunks(*context, {*context, count, 1}, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = first + i;
        write_match(call, state_of(i), outputs->rows + sample * num_tokens, outputs->members + sample * num_tokens,
                    outputs->starts + sample * (num_tokens + 1), outputs->num_rows + sample);
      }
    });
  }
  return MGT_OK;
}

}  // extern "C"
