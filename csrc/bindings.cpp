// The Python door of the C ABI: addresses in, a status out, the GIL released while the kernels run. mgt_kernels/cpu.py
// is the only caller; it owns the tensors behind the addresses and turns a status into an exception.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "mgt_kernels.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

mgt_context context(int isa, int num_threads, std::uintptr_t parallel) {
  return {static_cast<mgt_isa>(isa), num_threads, reinterpret_cast<mgt_parallel>(parallel)};
}

mgt_logits logits(py::tuple t) {
  return {pointer<const void>(t[0].cast<std::uintptr_t>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
          t[3].cast<int64_t>()};
}

void require_length(const char* name, int64_t length, int64_t expected) {
  if (length != expected) throw std::length_error(std::string(name) + " has the wrong length");
}

py::tuple sample_tokens(int isa, int num_threads, std::uintptr_t parallel, py::tuple shape, int dtype, py::tuple cond,
                        py::tuple uncond, std::uintptr_t tokens, std::uintptr_t seeds, int64_t mask_token_id,
                        int64_t step, float guidance_scale, float noise_scale, float temperature,
                        std::uintptr_t token_ids, int64_t token_ids_length, std::uintptr_t logprob,
                        int64_t logprob_length) {
  mgt_sample_tokens_args args{};
  args.num_samples = shape[0].cast<int64_t>();
  args.num_positions = shape[1].cast<int64_t>();
  args.num_tokens = shape[2].cast<int64_t>();
  require_length("token_ids", token_ids_length, args.num_samples * args.num_positions);
  require_length("logprob", logprob_length, args.num_samples * args.num_positions);
  args.dtype = static_cast<mgt_dtype>(dtype);
  args.logits = logits(cond);
  args.uncond_logits = logits(uncond);
  args.tokens = pointer<const int64_t>(tokens);
  args.seeds = pointer<const int64_t>(seeds);
  args.mask_token_id = mask_token_id;
  args.step = step;
  args.guidance_scale = guidance_scale;
  args.noise_scale = noise_scale;
  args.temperature = temperature;
  const mgt_context where = context(isa, num_threads, parallel);
  int64_t error_index = -1;
  mgt_status status;
  {
    py::gil_scoped_release released;
    status = mgt_sample_tokens(&where, &args, pointer<int64_t>(token_ids), pointer<float>(logprob), &error_index);
  }
  return py::make_tuple(static_cast<int>(status), error_index);
}

py::tuple mask_by_confidence(int isa, int num_threads, std::uintptr_t parallel, int64_t num_samples,
                             int64_t num_positions, std::uintptr_t token_ids, std::uintptr_t logprob,
                             std::uintptr_t mask_len, std::uintptr_t seeds, int64_t mask_token_id, int64_t step,
                             float temperature, std::uintptr_t tokens, int64_t tokens_length) {
  require_length("tokens", tokens_length, num_samples * num_positions);
  const mgt_mask_by_confidence_args args{num_samples,
                                         num_positions,
                                         pointer<const int64_t>(token_ids),
                                         pointer<const float>(logprob),
                                         pointer<const int64_t>(mask_len),
                                         pointer<const int64_t>(seeds),
                                         mask_token_id,
                                         step,
                                         temperature};
  const mgt_context where = context(isa, num_threads, parallel);
  int64_t error_index = -1;
  mgt_status status;
  {
    py::gil_scoped_release released;
    status = mgt_mask_by_confidence(&where, &args, pointer<int64_t>(tokens), &error_index);
  }
  return py::make_tuple(static_cast<int>(status), error_index);
}

int philox(int isa, int64_t seed, uint32_t position, uint32_t step, uint32_t stream, int64_t first_block,
           int64_t num_blocks, std::uintptr_t words, int64_t words_length) {
  require_length("words", words_length, 4 * num_blocks);
  const mgt_context where = context(isa, 1, 0);
  return mgt_philox(&where, seed, position, step, stream, first_block, num_blocks, pointer<uint32_t>(words));
}

int gaussian(int isa, int64_t seed, uint32_t position, uint32_t step, std::uintptr_t noise, int64_t noise_length) {
  const mgt_context where = context(isa, 1, 0);
  return mgt_gaussian(&where, seed, position, step, noise_length, pointer<float>(noise));
}

py::tuple resolve_isa(int requested) {
  mgt_isa isa = MGT_ISA_AUTO;
  const mgt_status status = mgt_resolve_isa(static_cast<mgt_isa>(requested), &isa);
  return py::make_tuple(static_cast<int>(status), static_cast<int>(isa));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("sample_tokens", &sample_tokens);
  m.def("mask_by_confidence", &mask_by_confidence);
  m.def("philox", &philox);
  m.def("gaussian", &gaussian);
  m.def("resolve_isa", &resolve_isa);
  m.def("version", &mgt_version);
}
