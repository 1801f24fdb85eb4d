// The C ABI: check the arguments, pick the instruction set, spread the work over threads. Loops below check nothing.
#include <cmath>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "capi.h"
#include "differential_sample/op.h"
#include "draws/op.h"
#include "mask_by_confidence/op.h"
#include "mgt_kernels.h"
#include "parallel.h"
#include "sample_tokens/op.h"
#include "select.h"
#include "w4a16_linear/op.h"
#include "w4a8_linear/op.h"

namespace {

using mgt::fail;
using mgt::FirstIndex;
using mgt::valid;

struct Kernels {
  mgt::SampleTokens sample_tokens;
  mgt::DifferentialSample differential_sample;
  mgt::MaskByConfidence mask_by_confidence;
  mgt::Philox philox;
  mgt::Gaussian gaussian;
  const mgt::Int4LinearKernel* w4a8_linear;
  const mgt::Int4LinearKernel* w4a16_linear;
};

#if defined(__x86_64__)
constexpr Kernels kAvx512 = {
    mgt::sample_tokens_avx512, mgt::differential_sample_avx512, mgt::mask_by_confidence_avx512, mgt::philox_avx512,
    mgt::gaussian_avx512,      &mgt::w4a8_linear_avx512,        &mgt::w4a16_linear_avx512};

constexpr Kernels with_linear(Kernels kernels, const mgt::Int4LinearKernel* w4a8, const mgt::Int4LinearKernel* w4a16) {
  kernels.w4a8_linear = w4a8;
  kernels.w4a16_linear = w4a16;
  return kernels;
}
#endif

// indexed by mgt_isa
constexpr Kernels kKernels[] = {
    {},
    {mgt::sample_tokens_scalar, mgt::differential_sample_scalar, mgt::mask_by_confidence_scalar, mgt::philox_scalar,
     mgt::gaussian_scalar, &mgt::w4a8_linear_scalar, &mgt::w4a16_linear_scalar},
#if defined(__x86_64__)
    {mgt::sample_tokens_avx2, mgt::differential_sample_avx2, mgt::mask_by_confidence_avx2, mgt::philox_avx2,
     mgt::gaussian_avx2, &mgt::w4a8_linear_avx2, &mgt::w4a16_linear_avx2},
    kAvx512,
    with_linear(kAvx512, &mgt::w4a8_linear_avx512_vnni, &mgt::w4a16_linear_avx512),
    with_linear(kAvx512, &mgt::w4a8_linear_avx512_vnni, &mgt::w4a16_linear_avx512_bf16),
    with_linear(kAvx512, &mgt::w4a8_linear_amx, &mgt::w4a16_linear_amx),
#endif
};
constexpr int kNumIsas = sizeof kKernels / sizeof *kKernels;

#if defined(__x86_64__)
#if defined(__linux__)
bool allow_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  // AMX-BF16, AMX-TILE, AMX-INT8
  const unsigned wanted = 1u << 22 | 1u << 24 | 1u << 25;
  // ARCH_REQ_XCOMP_PERM for the tile data
  return (d & wanted) == wanted && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
#endif

// The processor has tile registers for both types, and the system lets this process use them.
bool has_amx() {
#if defined(__linux__)
  // asked once: a virtual machine takes longer over cpuid than over a small call
  static const bool allowed = allow_amx();
  return allowed;
#else
  return false;
#endif
}
#endif

bool runs_here(mgt_isa isa) {
  switch (isa) {
    case MGT_ISA_SCALAR: return true;
#if defined(__x86_64__)
    case MGT_ISA_AVX2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case MGT_ISA_AVX512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case MGT_ISA_AVX512_VNNI: return runs_here(MGT_ISA_AVX512) && __builtin_cpu_supports("avx512vnni");
    case MGT_ISA_AVX512_BF16: return runs_here(MGT_ISA_AVX512_VNNI) && __builtin_cpu_supports("avx512bf16");
    case MGT_ISA_AMX: return runs_here(MGT_ISA_AVX512_BF16) && has_amx();
#endif
    default: return false;
  }
}

mgt_isa best_isa() {
  for (int isa = kNumIsas - 1; isa > MGT_ISA_SCALAR; --isa)
    if (runs_here(static_cast<mgt_isa>(isa))) return static_cast<mgt_isa>(isa);
  return MGT_ISA_SCALAR;
}

bool valid_step(int64_t step) { return step >= 0 && step <= UINT32_MAX; }

// 0, or large enough that 1 / temperature is finite
bool valid_temperature(float temperature) {
  return temperature == 0.0f || (temperature > 0.0f && std::isfinite(temperature) && std::isfinite(1.0f / temperature));
}

bool valid(const mgt_sample_tokens_args& a) {
  const bool guided = a.uncond_logits.data != nullptr;
  if (a.num_samples < 0 || a.num_positions < 0 || a.num_tokens < 1 || a.num_tokens > INT32_MAX ||
      a.num_positions > UINT32_MAX)
    return false;
  if (a.dtype < MGT_FLOAT32 || a.dtype > MGT_FLOAT16 || !valid_step(a.step) || !valid_temperature(a.temperature) ||
      !std::isfinite(a.guidance_scale) || !(a.noise_scale >= 0.0f) || !std::isfinite(a.noise_scale))
    return false;
  const bool position_major = a.logits.stride_position == 1 && (!guided || a.uncond_logits.stride_position == 1);
  return a.num_samples * a.num_positions == 0 || mgt::token_major(a) || position_major;
}

bool has_inputs(const mgt_sample_tokens_args& a) { return a.logits.data && a.tokens && a.seeds; }

// the first row whose token is neither in the codebook nor the mask, or -1
int64_t first_bad_token(const mgt_sample_tokens_args& a) {
  for (int64_t row = 0; row < a.num_samples * a.num_positions; ++row)
    if (a.tokens[row] != a.mask_token_id && (a.tokens[row] < 0 || a.tokens[row] >= a.num_tokens)) return row;
  return -1;
}

// A chunk is worth waking a thread for from about 2^15 logits on; up to 2^18 it grows, as long as every thread gets
// several, because what follows a chunk is fetched in vain.
int64_t chunk_of_groups(const mgt_context& context, const mgt_sample_tokens_args& a) {
  const int64_t num_groups = a.num_samples * mgt::groups_per_sample(a);
  const int64_t group_logits = a.num_tokens * (mgt::token_major(a) ? 1 : mgt::kGroupPositions);
  return std::max({int64_t{1}, (int64_t{1} << 15) / group_logits,
                   std::min((int64_t{1} << 18) / group_logits, num_groups / (8 * context.num_threads))});
}

struct DifferentialWorkspace {
  int64_t floats_per_thread, num_bytes;
};

// the tiles of every thread, then a choice per row
DifferentialWorkspace differential_workspace(const mgt_context& context, const mgt_sample_tokens_args& a) {
  const int64_t rows = mgt::token_major(a) ? 1 : mgt::kGroupPositions;
  const int64_t floats = rows * mgt::row_tiles(a.num_tokens) * mgt::kRowTileFloats;
  const int64_t choices = a.num_samples * a.num_positions * int64_t{sizeof(mgt::DifferentialChoice)};
  return {floats, mgt::kLineBytes + context.num_threads * floats * int64_t{sizeof(float)} + choices};
}

// Gives the share of the sample's rows with the smallest divergence what they would get if selected.
void select_rows(const mgt::DifferentialCall& call, int64_t sample) {
  const mgt_sample_tokens_args& a = call.args.sample;
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

// the first instruction set whose kernel is the same
template <class Member>
mgt_isa first_with_kernel(mgt_isa isa, Member member) {
  int first = MGT_ISA_SCALAR;
  while (kKernels[first].*member != kKernels[isa].*member) ++first;
  return static_cast<mgt_isa>(first);
}

bool valid(const mgt_int4_linear_args& a) {
  return a.num_rows >= 0 && a.num_inputs >= 1 && a.num_outputs >= 1 && a.num_inputs <= INT32_MAX &&
         a.num_outputs <= INT32_MAX && (a.dtype == MGT_FLOAT32 || a.dtype == MGT_BFLOAT16) &&
         (a.scale_dtype == MGT_FLOAT32 || a.scale_dtype == MGT_FLOAT16) && a.group_size >= 32 &&
         a.group_size <= 16384 && a.group_size % 32 == 0 && (a.x_stride >= a.num_inputs || a.num_rows <= 1);
}

// of results, from which on they are written past the caches: two megabytes, a large second level
constexpr int64_t kStreamBytes = int64_t{2} << 20;

// of the workspace of a linear layer
struct LinearWorkspace {
  int64_t row_stride, num_padded_rows;
  // in bytes, all multiples of a line
  int64_t rows, row_scale, row_sums, scratch, total;
};

LinearWorkspace linear_workspace(const mgt_context& context, const mgt_int4_linear_args& a,
                                 const mgt::Int4LinearKernel& kernel) {
  const auto lines = [](int64_t bytes) { return mgt::round_up(bytes, mgt::kLineBytes); };
  LinearWorkspace w;
  w.row_stride = mgt::padded_inputs(a) + mgt::kLineBytes / kernel.row_bytes;
  // tile registers read 32 rows at a time
  w.num_padded_rows = mgt::round_up(a.num_rows, 32);
  w.rows = lines(w.num_padded_rows * w.row_stride * kernel.row_bytes);
  w.row_scale = lines(a.num_rows * 4);
  w.row_sums = lines(a.num_rows * mgt::num_groups(a) * 4);
  w.scratch = lines(mgt::scratch_bytes(a, kernel.panel_bytes));
  w.total = mgt::kLineBytes + w.rows + w.row_scale + w.row_sums + context.num_threads * w.scratch;
  return w;
}

int64_t linear_workspace_bytes(const mgt_context* context, const mgt_int4_linear_args* args,
                               const mgt::Int4LinearKernel* Kernels::* op) {
  mgt_isa isa;
  if (!valid(context) || args == nullptr || !valid(*args) || mgt_resolve_isa(context->isa, &isa) != MGT_OK) return -1;
  return linear_workspace(*context, *args, *(kKernels[isa].*op)).total;
}

mgt_status run_linear(const mgt_context* context, const mgt_int4_linear_args* args,
                      const mgt::Int4LinearKernel* Kernels::* op, const float* x_scale, int64_t num_x_scales, void* y,
                      void* workspace, int64_t workspace_bytes, int64_t* error_index) {
  if (!valid(context) || args == nullptr || !valid(*args)) return MGT_INVALID_ARGUMENT;
  const mgt_int4_linear_args& a = *args;
  if (num_x_scales < 0 || (num_x_scales > 0 && (x_scale == nullptr || a.num_rows % num_x_scales != 0)))
    return MGT_INVALID_ARGUMENT;
  for (int64_t i = 0; i < num_x_scales; ++i)
    if (!std::isnormal(x_scale[i]) || x_scale[i] < 0.0f) return MGT_INVALID_ARGUMENT;
  if (a.num_rows == 0) return MGT_OK;
  if (!a.x || !a.w_q || !a.scale || !a.zero_point || !y || !workspace) return MGT_INVALID_ARGUMENT;
  mgt_isa isa;
  const mgt_status status = mgt_resolve_isa(context->isa, &isa);
  if (status != MGT_OK) return status;
  const mgt::Int4LinearKernel& kernel = *(kKernels[isa].*op);
  const LinearWorkspace layout = linear_workspace(*context, a, kernel);
  if (workspace_bytes < layout.total) return MGT_INVALID_ARGUMENT;

  auto* rows = static_cast<uint8_t*>(mgt::on_line(workspace));
  auto* row_scale = rows + layout.rows;
  auto* row_sums = row_scale + layout.row_scale;
  auto* scratch = row_sums + layout.row_sums;
  const mgt::Int4LinearCall call{a,
                                 x_scale,
                                 num_x_scales,
                                 rows,
                                 layout.row_stride,
                                 reinterpret_cast<float*>(row_scale),
                                 reinterpret_cast<uint32_t*>(row_sums),
                                 y,
                                 a.num_rows * a.num_outputs * (a.dtype == MGT_FLOAT32 ? 4 : 2) > kStreamBytes};
  std::memset(rows + a.num_rows * layout.row_stride * kernel.row_bytes, 0,
              static_cast<size_t>((layout.num_padded_rows - a.num_rows) * layout.row_stride * kernel.row_bytes));
  FirstIndex bad_row;
  // a chunk is worth waking a thread for from about 2^14 activations on
  const int64_t chunk = std::max(int64_t{1}, (int64_t{1} << 14) / a.num_inputs);
  mgt::parallel_chunks(*context, a.num_rows, chunk,
                       [&](int64_t begin, int64_t end) { bad_row.report(kernel.prepare(call, begin, end)); });
  if (bad_row.get() >= 0) return fail(MGT_BAD_ACTIVATION, bad_row.get(), error_index);

  // every panel once for all rows, or, where panels are few, for runs of them
  const int64_t panels = (a.num_outputs + mgt::kPanelOutputs - 1) / mgt::kPanelOutputs;
  const int64_t wanted = panels >= 4 * context->num_threads ? 1 : (4 * context->num_threads + panels - 1) / panels;
  const int64_t run = mgt::round_up((a.num_rows + wanted - 1) / wanted, mgt::kRowAlignment);
  const int64_t runs = (a.num_rows + run - 1) / run;
  mgt::parallel_chunks_by_worker(*context, panels * runs, 1, [&](int64_t begin, int64_t end, int64_t worker) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % runs * run;
      kernel.multiply(call, i / runs, first, std::min(first + run, a.num_rows), scratch + worker * layout.scratch);
    }
  });
  return MGT_OK;
}

}  // namespace

extern "C" {

const char* mgt_version(void) { return MGT_VERSION; }

const char* mgt_isa_name(mgt_isa isa) {
  constexpr const char* names[] = {"auto", "scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};
  return isa >= MGT_ISA_SCALAR && isa <= MGT_ISA_AMX ? names[isa] : nullptr;
}

mgt_status mgt_resolve_isa(mgt_isa requested, mgt_isa* isa) {
  if (isa == nullptr) return MGT_INVALID_ARGUMENT;
  const char* wanted = std::getenv("MGT_ISA");
  if (requested == MGT_ISA_AUTO && wanted != nullptr && *wanted != '\0') {
    for (int i = MGT_ISA_SCALAR; i <= MGT_ISA_AMX; ++i)
      if (std::strcmp(wanted, mgt_isa_name(static_cast<mgt_isa>(i))) == 0) requested = static_cast<mgt_isa>(i);
    if (requested == MGT_ISA_AUTO) return MGT_ISA_UNAVAILABLE;
  }
  if (requested == MGT_ISA_AUTO) requested = best_isa();
  if (!runs_here(requested)) return MGT_ISA_UNAVAILABLE;
  *isa = requested;
  return MGT_OK;
}

mgt_status mgt_kernel_isa(const char* op, mgt_isa isa, mgt_isa* kernel) {
  if (op == nullptr || kernel == nullptr || mgt_isa_name(isa) == nullptr) return MGT_INVALID_ARGUMENT;
  if (isa >= kNumIsas) return MGT_ISA_UNAVAILABLE;
  const auto is = [op](const char* name) { return std::strcmp(op, name) == 0; };
  if (is("sample_tokens"))
    *kernel = first_with_kernel(isa, &Kernels::sample_tokens);
  else if (is("differential_sample"))
    *kernel = first_with_kernel(isa, &Kernels::differential_sample);
  else if (is("mask_by_confidence"))
    *kernel = first_with_kernel(isa, &Kernels::mask_by_confidence);
  else if (is("w4a8_linear"))
    *kernel = first_with_kernel(isa, &Kernels::w4a8_linear);
  else if (is("w4a16_linear"))
    *kernel = first_with_kernel(isa, &Kernels::w4a16_linear);
  else
    return MGT_INVALID_ARGUMENT;
  return MGT_OK;
}

mgt_status mgt_sample_tokens(const mgt_context* context, const mgt_sample_tokens_args* args, int64_t* token_ids,
                             float* logprob, int64_t* error_index) {
  if (!valid(context) || args == nullptr) return MGT_INVALID_ARGUMENT;
  const mgt_sample_tokens_args& a = *args;
  if (!valid(a)) return MGT_INVALID_ARGUMENT;
  const int64_t num_rows = a.num_samples * a.num_positions;
  if (num_rows == 0) return MGT_OK;
  if (!has_inputs(a) || !token_ids || !logprob) return MGT_INVALID_ARGUMENT;

  mgt_isa isa;
  const mgt_status status = mgt_resolve_isa(context->isa, &isa);
  if (status != MGT_OK) return status;
  const int64_t bad_token = first_bad_token(a);
  if (bad_token >= 0) return fail(MGT_BAD_TOKEN, bad_token, error_index);

  FirstIndex bad_row;
  const int64_t num_groups = a.num_samples * mgt::groups_per_sample(a);
  mgt::parallel_chunks(*context, num_groups, chunk_of_groups(*context, a), [&](int64_t begin, int64_t end) {
    bad_row.report(kKernels[isa].sample_tokens(a, begin, end, token_ids, logprob));
  });
  return bad_row.get() < 0 ? MGT_OK : fail(MGT_BAD_LOGITS, bad_row.get(), error_index);
}

int64_t mgt_differential_sample_workspace(const mgt_context* context, const mgt_differential_sample_args* args) {
  if (!valid(context) || args == nullptr || !valid(args->sample)) return -1;
  return differential_workspace(*context, args->sample).num_bytes;
}

mgt_status mgt_differential_sample(const mgt_context* context, const mgt_differential_sample_args* args,
                                   uint16_t* history, uint8_t* written, int64_t* token_ids, float* logprob,
                                   float* divergence, void* workspace, int64_t workspace_bytes, int64_t* error_index) {
  if (!valid(context) || args == nullptr) return MGT_INVALID_ARGUMENT;
  const mgt_sample_tokens_args& a = args->sample;
  const bool official = args->variant == MGT_DIFFERENTIAL_OFFICIAL;
  if (!valid(a) || !(official || args->variant == MGT_DIFFERENTIAL_PAPER) || (args->aliased_history && !official) ||
      !(args->share >= 0.0 && args->share <= 1.0))
    return MGT_INVALID_ARGUMENT;
  if (a.num_samples * a.num_positions == 0) return MGT_OK;
  const DifferentialWorkspace layout = differential_workspace(*context, a);
  if (!has_inputs(a) || !history || !written || !token_ids || !logprob || !divergence || !workspace ||
      workspace_bytes < layout.num_bytes)
    return MGT_INVALID_ARGUMENT;

  mgt_isa isa;
  const mgt_status status = mgt_resolve_isa(context->isa, &isa);
  if (status != MGT_OK) return status;
  const int64_t bad_token = first_bad_token(a);
  if (bad_token >= 0) return fail(MGT_BAD_TOKEN, bad_token, error_index);

  auto* tiles = static_cast<float*>(mgt::on_line(workspace));
  auto* choices = reinterpret_cast<mgt::DifferentialChoice*>(tiles + context->num_threads * layout.floats_per_thread);
  const mgt::DifferentialCall call{*args, history, written, token_ids, logprob, divergence, choices};
  FirstIndex bad_row;
  const auto run = [&](mgt::DifferentialPass pass) {
    const int64_t num_groups = a.num_samples * mgt::groups_per_sample(a);
    mgt::parallel_chunks_by_worker(
        *context, num_groups, chunk_of_groups(*context, a), [&](int64_t begin, int64_t end, int64_t worker) {
          float* own_tiles = tiles + worker * layout.floats_per_thread;
          bad_row.report(kKernels[isa].differential_sample(call, pass, begin, end, own_tiles));
        });
    return bad_row.get();
  };
  if (run(mgt::DifferentialPass::draw) >= 0) return fail(MGT_BAD_LOGITS, bad_row.get(), error_index);
  if (!args->has_history) return MGT_OK;
  for (int64_t sample = 0; sample < a.num_samples; ++sample) select_rows(call, sample);
  if (args->aliased_history) run(mgt::DifferentialPass::edit_history);
  return MGT_OK;
}

mgt_status mgt_mask_by_confidence(const mgt_context* context, const mgt_mask_by_confidence_args* args, int64_t* tokens,
                                  int64_t* error_index) {
  if (!valid(context) || args == nullptr) return MGT_INVALID_ARGUMENT;
  const mgt_mask_by_confidence_args& a = *args;
  if (a.num_samples < 0 || a.num_positions < 0 || a.num_positions > UINT32_MAX || !valid_step(a.step) ||
      !(a.temperature >= 0.0f) || !std::isfinite(a.temperature))
    return MGT_INVALID_ARGUMENT;
  if (a.num_samples == 0) return MGT_OK;
  if (!a.mask_len || !a.seeds) return MGT_INVALID_ARGUMENT;
  if (a.num_positions > 0 && (!a.token_ids || !a.logprob || !tokens)) return MGT_INVALID_ARGUMENT;

  mgt_isa isa;
  const mgt_status status = mgt_resolve_isa(context->isa, &isa);
  if (status != MGT_OK) return status;
  for (int64_t sample = 0; sample < a.num_samples; ++sample) {
    int64_t num_masked = 0;
    for (int64_t row = sample * a.num_positions; row < (sample + 1) * a.num_positions; ++row) {
      if (std::isnan(a.logprob[row])) return fail(MGT_BAD_LOGPROB, row, error_index);
      num_masked += a.logprob[row] != INFINITY;
    }
    if (a.mask_len[sample] < 0 || a.mask_len[sample] > num_masked) return fail(MGT_BAD_MASK_LEN, sample, error_index);
  }
  const int64_t chunk = std::max<int64_t>(1, 4096 / std::max<int64_t>(a.num_positions, 1));
  mgt::parallel_chunks(*context, a.num_samples, chunk, [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample)
      kKernels[isa].mask_by_confidence(a, sample, tokens + sample * a.num_positions);
  });
  return MGT_OK;
}

int64_t mgt_w4a8_linear_workspace(const mgt_context* context, const mgt_int4_linear_args* args) {
  return linear_workspace_bytes(context, args, &Kernels::w4a8_linear);
}

int64_t mgt_w4a16_linear_workspace(const mgt_context* context, const mgt_int4_linear_args* args) {
  return linear_workspace_bytes(context, args, &Kernels::w4a16_linear);
}

mgt_status mgt_w4a8_linear(const mgt_context* context, const mgt_int4_linear_args* args, const float* x_scale,
                           int64_t num_x_scales, void* y, void* workspace, int64_t workspace_bytes,
                           int64_t* error_index) {
  return run_linear(context, args, &Kernels::w4a8_linear, x_scale, num_x_scales, y, workspace, workspace_bytes,
                    error_index);
}

mgt_status mgt_w4a16_linear(const mgt_context* context, const mgt_int4_linear_args* args, void* y, void* workspace,
                            int64_t workspace_bytes, int64_t* error_index) {
  return run_linear(context, args, &Kernels::w4a16_linear, nullptr, 0, y, workspace, workspace_bytes, error_index);
}

mgt_status mgt_philox(const mgt_context* context, int64_t seed, uint32_t position, uint32_t step, uint32_t stream,
                      int64_t first_block, int64_t num_blocks, uint32_t* words) {
  if (!valid(context) || first_block < 0 || num_blocks < 0 || (num_blocks > 0 && !words)) return MGT_INVALID_ARGUMENT;
  mgt_isa isa;
  const mgt_status status = mgt_resolve_isa(context->isa, &isa);
  if (status == MGT_OK) kKernels[isa].philox({seed, position, step, stream}, first_block, num_blocks, words);
  return status;
}

mgt_status mgt_gaussian(const mgt_context* context, int64_t seed, uint32_t position, uint32_t step, int64_t num_tokens,
                        float* noise) {
  if (!valid(context) || num_tokens < 0 || (num_tokens > 0 && !noise)) return MGT_INVALID_ARGUMENT;
  mgt_isa isa;
  const mgt_status status = mgt_resolve_isa(context->isa, &isa);
  // stream 1, the logit noise
  if (status == MGT_OK) kKernels[isa].gaussian({seed, position, step, 1}, num_tokens, noise);
  return status;
}

}  // extern "C"
