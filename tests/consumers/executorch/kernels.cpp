// ExecuTorch's side of the library: the kernel of the op that consumer.py makes of mgt_kernels::sample_tokens.
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <mgt_kernels.h>

#include <cmath>
#include <memory>
#include <optional>

namespace et = executorch::runtime;
using executorch::aten::ScalarType;
using executorch::aten::Tensor;

static std::optional<mgt_dtype> dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return MGT_FLOAT32;
    case ScalarType::BFloat16: return MGT_BFLOAT16;
    case ScalarType::Half: return MGT_FLOAT16;
    default: return std::nullopt;
  }
}

static mgt_logits half_of(const Tensor& logits) {
  const auto strides = logits.strides();
  return {logits.const_data_ptr(), strides[0], strides[1], strides[2]};
}

// The value of a scalar of the op: exporting a number gives a tensor of float64, a tensor keeps its dtype.
static std::optional<float> number_in(const Tensor& scalar) {
  switch (scalar.scalar_type()) {
    case ScalarType::Double: return static_cast<float>(*scalar.const_data_ptr<double>());
    case ScalarType::Float: return *scalar.const_data_ptr<float>();
    default: return std::nullopt;
  }
}

// sample_tokens(logits, tokens, seed, step, mask_token_id, uncond_logits, guidance_scale, noise_scale, temperature,
//               first_position, token_bias, second_uncond_logits, second_guidance_scale, softcap, top_k, top_p, min_p,
//               *, token_ids, logprob); exporting has checked shapes and types
static void sample_tokens(et::KernelRuntimeContext& context, et::Span<et::EValue*> stack) {
  const Tensor &logits = stack[0]->toTensor(), &tokens = stack[1]->toTensor();
  const Tensor &seed = stack[2]->toTensor(), &step = stack[3]->toTensor();
  Tensor &token_ids = stack[17]->toTensor(), &logprob = stack[18]->toTensor();
  const std::optional<mgt_dtype> dtype = dtype_of(logits);
  ET_KERNEL_CHECK_MSG(context, dtype && et::tensor_is_contiguous(tokens), InvalidArgument, ,
                      "sample_tokens: expected logits in floats of 32 or 16 bits, and contiguous tokens");
  const std::optional<float> guidance_scale = number_in(stack[6]->toTensor());
  const std::optional<float> noise_scale = number_in(stack[7]->toTensor());
  const std::optional<float> temperature = number_in(stack[8]->toTensor());
  const std::optional<float> second_guidance_scale = number_in(stack[12]->toTensor());
  const std::optional<float> softcap = number_in(stack[13]->toTensor());
  const std::optional<float> top_p = number_in(stack[15]->toTensor()), min_p = number_in(stack[16]->toTensor());
  ET_KERNEL_CHECK_MSG(
      context, guidance_scale && noise_scale && temperature && second_guidance_scale && softcap && top_p && min_p,
      InvalidArgument, , "sample_tokens: expected scalars in float64 or float32");
  // where a program was exported for bounds of the sizes, these are the sizes of this call
  ET_KERNEL_CHECK(context, et::resize_tensor(token_ids, tokens.sizes()) == et::Error::Ok, InvalidArgument, );
  ET_KERNEL_CHECK(context, et::resize_tensor(logprob, tokens.sizes()) == et::Error::Ok, InvalidArgument, );
  mgt_sample_tokens_args args{};
  args.struct_size = sizeof args;
  args.num_samples = logits.size(0);
  args.num_positions = logits.size(1);
  args.num_tokens = logits.size(2);
  args.dtype = *dtype;
  args.logits = half_of(logits);
  if (!stack[5]->isNone()) args.uncond_logits = half_of(stack[5]->toTensor());
  args.tokens = tokens.const_data_ptr<int64_t>();
  args.seeds = seed.const_data_ptr<int64_t>();
  if (!stack[9]->isNone()) args.first_positions = stack[9]->toTensor().const_data_ptr<int64_t>();
  if (!stack[10]->isNone()) args.token_bias = stack[10]->toTensor().const_data_ptr<float>();
  if (!stack[11]->isNone()) args.second_uncond_logits = half_of(stack[11]->toTensor());
  args.second_guidance_scale = *second_guidance_scale;
  // the op's infinity caps nothing
  args.softcap = std::isfinite(*softcap) ? *softcap : 0.0f;
  args.top_k = stack[14]->toInt();
  args.top_p = *top_p;
  args.min_p = *min_p;
  args.step = *step.const_data_ptr<int64_t>();
  args.mask_token_id = stack[4]->toInt();
  args.guidance_scale = *guidance_scale;
  args.noise_scale = *noise_scale;
  args.temperature = *temperature;
  const mgt_context threads{MGT_ISA_AUTO, 2, nullptr};
  int64_t bad_row = -1;
  const int64_t num_bytes = mgt_sample_tokens_workspace(&threads, &args);
  ET_KERNEL_CHECK_MSG(context, num_bytes >= 0, InvalidArgument, ,
                      "sample_tokens: a size, stride or scalar is outside its range");
  // the runtime's memory for one call of a kernel, where the program's host has given it some
  const et::Result<void*> lent = context.allocate_temp(static_cast<size_t>(num_bytes));
  const std::unique_ptr<char[]> own(lent.ok() ? nullptr : new char[static_cast<size_t>(num_bytes)]);
  mgt_sample_tokens_outputs outputs{};
  outputs.struct_size = sizeof outputs;
  outputs.token_ids = token_ids.mutable_data_ptr<int64_t>();
  outputs.logprob = logprob.mutable_data_ptr<float>();
  const mgt_status status =
      mgt_sample_tokens(&threads, &args, &outputs, lent.ok() ? *lent : own.get(), num_bytes, &bad_row);
  ET_KERNEL_CHECK_MSG(context, status == MGT_OK, InvalidArgument, , "sample_tokens: status %d, row %d",
                      static_cast<int>(status), static_cast<int>(bad_row));
}

static const et::Error registered = et::register_kernel(et::Kernel("mgt_executorch::sample_tokens.out", sample_tokens));
