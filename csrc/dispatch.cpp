// The table of kernels. An instruction set without a kernel of its own for an op has the best one below it.
#include "dispatch.h"

#include <cstring>

#include "mgt_kernels.h"
#include "w4a16_linear/op.h"
#include "w4a8_linear/op.h"

namespace mgt {
namespace {

#if defined(__x86_64__)
constexpr Kernels kAvx512 = {sample_tokens_avx512,
                             differential_sample_avx512,
                             mask_by_confidence_avx512,
                             commit_tokens_avx512,
                             philox_avx512,
                             gaussian_avx512,
                             &match_tokens_avx512,
                             merge_tokens_avx512,
                             &w4a8_linear_avx512,
                             &w4a16_linear_avx512};

constexpr Kernels with_linear(Kernels kernels, const Int4LinearKernel* w4a8, const Int4LinearKernel* w4a16) {
  kernels.w4a8_linear = w4a8;
  kernels.w4a16_linear = w4a16;
  return kernels;
}
#endif

}  // namespace

constexpr Kernels kKernels[] = {
    {},
    {sample_tokens_scalar, differential_sample_scalar, mask_by_confidence_scalar, commit_tokens_scalar, philox_scalar,
     gaussian_scalar, &match_tokens_scalar, merge_tokens_scalar, &w4a8_linear_scalar, &w4a16_linear_scalar},
#if defined(__x86_64__)
    {sample_tokens_avx2, differential_sample_avx2, mask_by_confidence_avx2, commit_tokens_avx2, philox_avx2,
     gaussian_avx2, &match_tokens_avx2, merge_tokens_avx2, &w4a8_linear_avx2, &w4a16_linear_avx2},
    kAvx512,
    with_linear(kAvx512, &w4a8_linear_avx512_vnni, &w4a16_linear_avx512),
    with_linear(kAvx512, &w4a8_linear_avx512_vnni, &w4a16_linear_avx512_bf16),
    with_linear(kAvx512, &w4a8_linear_amx, &w4a16_linear_amx),
#endif
};

namespace {

constexpr int kNumIsas = sizeof kKernels / sizeof *kKernels;

// the first instruction set whose kernel is the same
template <class Member>
mgt_isa first_with_kernel(mgt_isa isa, Member member) {
  int first = MGT_ISA_SCALAR;
  while (kKernels[first].*member != kKernels[isa].*member) ++first;
  return static_cast<mgt_isa>(first);
}

}  // namespace
}  // namespace mgt

extern "C" mgt_status mgt_kernel_isa(const char* op, mgt_isa isa, mgt_isa* kernel) {
  using mgt::first_with_kernel, mgt::Kernels;
  if (op == nullptr || kernel == nullptr || mgt_isa_name(isa) == nullptr) return MGT_INVALID_ARGUMENT;
  if (isa >= mgt::kNumIsas) return MGT_ISA_UNAVAILABLE;
  const auto is = [op](const char* name) { return std::strcmp(op, name) == 0; };
  if (is("sample_tokens"))
    *kernel = first_with_kernel(isa, &Kernels::sample_tokens);
  else if (is("differential_sample"))
    *kernel = first_with_kernel(isa, &Kernels::differential_sample);
  else if (is("mask_by_confidence"))
    *kernel = first_with_kernel(isa, &Kernels::mask_by_confidence);
  else if (is("commit_tokens"))
    *kernel = first_with_kernel(isa, &Kernels::commit_tokens);
  else if (is("match_tokens"))
    *kernel = first_with_kernel(isa, &Kernels::match_tokens);
  else if (is("merge_tokens"))
    *kernel = first_with_kernel(isa, &Kernels::merge_tokens);
  else if (is("w4a8_linear"))
    *kernel = first_with_kernel(isa, &Kernels::w4a8_linear);
  else if (is("w4a16_linear"))
    *kernel = first_with_kernel(isa, &Kernels::w4a16_linear);
  else
    return MGT_INVALID_ARGUMENT;
  return MGT_OK;
}
