// The C ABI: check the arguments, pick the instruction set, spread the work over threads. Loops below check nothing.
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "draws/op.h"
#include "mask_by_confidence/op.h"
#include "mgt_kernels.h"
#include "parallel.h"
#include "sample_tokens/op.h"

namespace {

struct Kernels {
  mgt::SampleTokens sample_tokens;
  mgt::MaskByConfidence mask_by_confidence;
  mgt::Philox philox;
  mgt::Gaussian gaussian;
};

// indexed by mgt_isa
constexpr Kernels kKernels[] = {
    {nullptr, nullptr, nullptr, nullptr},
    {mgt::sample_tokens_scalar, mgt::mask_by_confidence_scalar, mgt::philox_scalar, mgt::gaussian_scalar},
#if defined(__x86_64__)
    {mgt::sample_tokens_avx2, mgt::mask_by_confidence_avx2, mgt::philox_avx2, mgt::gaussian_avx2},
    {mgt::sample_tokens_avx512, mgt::mask_by_confidence_avx512, mgt::philox_avx512, mgt::gaussian_avx512},
#endif
};
constexpr int kNumIsas = sizeof kKernels / sizeof *kKernels;

bool runs_here(mgt_isa isa) {
  switch (isa) {
    case MGT_ISA_SCALAR: return true;
#if defined(__x86_64__)
    case MGT_ISA_AVX2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case MGT_ISA_AVX512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    default: return false;
  }
}

mgt_isa best_isa() {
  for (int isa = kNumIsas - 1; isa > MGT_ISA_SCALAR; --isa)
    if (runs_here(static_cast<mgt_isa>(isa))) return static_cast<mgt_isa>(isa);
  return MGT_ISA_SCALAR;
}

bool valid(const mgt_context* context) { return context != nullptr && context->num_threads >= 1; }

bool valid_step(int64_t step) { return step >= 0 && step <= UINT32_MAX; }

// 0, or large enough that 1 / temperature is finite
bool valid_temperature(float temperature) {
  return temperature == 0.0f || (temperature > 0.0f && std::isfinite(temperature) && std::isfinite(1.0f / temperature));
}

// what is reported first is the lowest index, whichever thread finds it
class FirstIndex {
 public:
  void report(int64_t index) {
    int64_t current = index_.load();
    while (index >= 0 && (current < 0 || index < current) && !index_.compare_exchange_weak(current, index)) {
    }
  }
  int64_t get() const { return index_.load(); }

 private:
  std::atomic<int64_t> index_{-1};
};

mgt_status fail(mgt_status status, int64_t index, int64_t* error_index) {
  if (error_index != nullptr) *error_index = index;
  return status;
}

}  // namespace

extern "C" {

const char* mgt_version(void) { return MGT_VERSION; }

const char* mgt_isa_name(mgt_isa isa) {
  constexpr const char* names[] = {"auto", "scalar", "avx2", "avx512"};
  return isa >= MGT_ISA_SCALAR && isa <= MGT_ISA_AVX512 ? names[isa] : nullptr;
}

mgt_status mgt_resolve_isa(mgt_isa requested, mgt_isa* isa) {
  if (isa == nullptr) return MGT_INVALID_ARGUMENT;
  const char* wanted = std::getenv("MGT_ISA");
  if (requested == MGT_ISA_AUTO && wanted != nullptr && *wanted != '\0') {
    for (int i = MGT_ISA_SCALAR; i <= MGT_ISA_AVX512; ++i)
      if (std::strcmp(wanted, mgt_isa_name(static_cast<mgt_isa>(i))) == 0) requested = static_cast<mgt_isa>(i);
    if (requested == MGT_ISA_AUTO) return MGT_ISA_UNAVAILABLE;
  }
  if (requested == MGT_ISA_AUTO) requested = best_isa();
  if (!runs_here(requested)) return MGT_ISA_UNAVAILABLE;
  *isa = requested;
  return MGT_OK;
}

mgt_status mgt_sample_tokens(const mgt_context* context, const mgt_sample_tokens_args* args, int64_t* token_ids,
                             float* logprob, int64_t* error_index) {
  if (!valid(context) || args == nullptr) return MGT_INVALID_ARGUMENT;
  const mgt_sample_tokens_args& a = *args;
  const bool guided = a.uncond_logits.data != nullptr;
  if (a.num_samples < 0 || a.num_positions < 0 || a.num_tokens < 1 || a.num_tokens > INT32_MAX ||
      a.num_positions > UINT32_MAX)
    return MGT_INVALID_ARGUMENT;
  if (a.dtype < MGT_FLOAT32 || a.dtype > MGT_FLOAT16 || !valid_step(a.step) || !valid_temperature(a.temperature) ||
      !std::isfinite(a.guidance_scale) || !(a.noise_scale >= 0.0f) || !std::isfinite(a.noise_scale))
    return MGT_INVALID_ARGUMENT;
  const int64_t num_rows = a.num_samples * a.num_positions;
  if (num_rows == 0) return MGT_OK;
  if (!a.logits.data || !a.tokens || !a.seeds || !token_ids || !logprob) return MGT_INVALID_ARGUMENT;
  const bool position_major = a.logits.stride_position == 1 && (!guided || a.uncond_logits.stride_position == 1);
  if (!mgt::token_major(a) && !position_major) return MGT_INVALID_ARGUMENT;

  mgt_isa isa;
  const mgt_status status = mgt_resolve_isa(context->isa, &isa);
  if (status != MGT_OK) return status;
  for (int64_t row = 0; row < num_rows; ++row)
    if (a.tokens[row] != a.mask_token_id && (a.tokens[row] < 0 || a.tokens[row] >= a.num_tokens))
      return fail(MGT_BAD_TOKEN, row, error_index);

  // A chunk is worth waking a thread for from about 2^15 logits on; up to 2^18 it grows, as long as every thread gets
  // several, because what follows a chunk is fetched in vain.
  const int64_t num_groups = a.num_samples * mgt::groups_per_sample(a);
  const int64_t group_logits = a.num_tokens * (mgt::token_major(a) ? 1 : mgt::kGroupPositions);
  const int64_t chunk =
      std::max({int64_t{1}, (int64_t{1} << 15) / group_logits,
                std::min((int64_t{1} << 18) / group_logits, num_groups / (8 * context->num_threads))});
  FirstIndex bad_row;
  mgt::parallel_chunks(*context, num_groups, chunk, [&](int64_t begin, int64_t end) {
    bad_row.report(kKernels[isa].sample_tokens(a, begin, end, token_ids, logprob));
  });
  return bad_row.get() < 0 ? MGT_OK : fail(MGT_BAD_LOGITS, bad_row.get(), error_index);
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
