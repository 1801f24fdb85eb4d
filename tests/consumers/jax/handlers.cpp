// XLA's side of the library: a handler that jax.ffi calls with the buffers of a jitted computation.
#include <mgt_kernels.h>

#include <algorithm>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

static ffi::Error SampleTokens(ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::S32> tokens, ffi::Buffer<ffi::S32> seeds,
                               ffi::Buffer<ffi::S32> step, ffi::ResultBuffer<ffi::S32> token_ids,
                               ffi::ResultBuffer<ffi::F32> logprob, int64_t mask_token_id, float temperature) {
  const auto sizes = logits.dimensions();
  const int64_t rows = sizes[0] * sizes[1];
  // JAX has 32-bit integers by default, the library 64-bit ones
  std::vector<int64_t> known(tokens.typed_data(), tokens.typed_data() + rows), drawn(static_cast<size_t>(rows));
  std::vector<int64_t> keys(seeds.typed_data(), seeds.typed_data() + sizes[0]);
  const mgt_context context{MGT_ISA_AUTO, 2, nullptr};
  mgt_sample_tokens_args args{};
  args.struct_size = sizeof args;
  args.num_samples = sizes[0];
  args.num_positions = sizes[1];
  args.num_tokens = sizes[2];
  args.dtype = MGT_FLOAT32;
  args.logits = {logits.typed_data(), sizes[1] * sizes[2], sizes[2], 1};
  args.tokens = known.data();
  args.seeds = keys.data();
  args.mask_token_id = mask_token_id;
  args.step = *step.typed_data();
  args.temperature = temperature;
  mgt_sample_tokens_outputs outputs{};
  outputs.struct_size = sizeof outputs;
  outputs.token_ids = drawn.data();
  outputs.logprob = logprob->typed_data();
  int64_t bad_row = -1;
  const int64_t num_bytes = mgt_sample_tokens_workspace(&context, &args);
  if (num_bytes < 0) return ffi::Error::InvalidArgument("mgt_sample_tokens: a size or a scalar is outside its range");
  std::vector<char> workspace(static_cast<size_t>(num_bytes));
  const mgt_status status = mgt_sample_tokens(&context, &args, &outputs, workspace.data(), num_bytes, &bad_row);
  if (status != MGT_OK)
    return ffi::Error::InvalidArgument("mgt_sample_tokens: status " + std::to_string(status) + ", row " +
                                       std::to_string(bad_row));
  std::copy(drawn.begin(), drawn.end(), token_ids->typed_data());
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(mgt_jax_sample_tokens, SampleTokens,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("mask_token_id")
                                  .Attr<float>("temperature"));

static ffi::Error MaskByConfidence(ffi::Buffer<ffi::S32> token_ids, ffi::Buffer<ffi::F32> logprob,
                                   ffi::Buffer<ffi::S32> mask_len, ffi::Buffer<ffi::S32> seeds,
                                   ffi::Buffer<ffi::S32> step, ffi::Buffer<ffi::F32> temperature,
                                   ffi::ResultBuffer<ffi::S32> tokens, int64_t mask_token_id) {
  const auto sizes = token_ids.dimensions();
  const int64_t rows = sizes[0] * sizes[1];
  std::vector<int64_t> drawn(token_ids.typed_data(), token_ids.typed_data() + rows), kept(static_cast<size_t>(rows));
  std::vector<int64_t> counts(mask_len.typed_data(), mask_len.typed_data() + sizes[0]);
  std::vector<int64_t> keys(seeds.typed_data(), seeds.typed_data() + sizes[0]);
  const mgt_context context{MGT_ISA_AUTO, 2, nullptr};
  mgt_mask_by_confidence_args args{};
  args.struct_size = sizeof args;
  args.num_samples = sizes[0];
  args.num_positions = sizes[1];
  args.token_ids = drawn.data();
  args.logprob = logprob.typed_data();
  args.mask_len = counts.data();
  args.seeds = keys.data();
  args.mask_token_id = mask_token_id;
  args.step = *step.typed_data();
  args.temperature = *temperature.typed_data();
  int64_t where = -1;
  const mgt_status status = mgt_mask_by_confidence(&context, &args, kept.data(), &where);
  if (status != MGT_OK)
    return ffi::Error::InvalidArgument("mgt_mask_by_confidence: status " + std::to_string(status) + ", at " +
                                       std::to_string(where));
  std::copy(kept.begin(), kept.end(), tokens->typed_data());
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(mgt_jax_mask_by_confidence, MaskByConfidence,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("mask_token_id"));
