// The Python door of the C ABI: addresses in, a status out, the GIL released while the kernels run. mgt_kernels/cpu.py
// is the only caller; it owns the tensors behind the addresses and turns a status into an exception. Nothing here
// outlives a call, so that calls need no lock.
#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string_view>

#include "manylinux.h"
#include "mgt_kernels.h"
#include "peak.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

mgt_context context(int isa, int num_threads, std::uintptr_t parallel) {
  return {static_cast<mgt_isa>(isa), num_threads, reinterpret_cast<mgt_parallel>(parallel)};
}

// A structure of the C ABI as mgt_kernels/cpu.py packs it, its padding included.
template <class T>
T record(const py::bytes& packed) {
  const std::string_view view = packed;
  if (view.size() != sizeof(T)) throw std::length_error("a record has the wrong length");
  T unpacked;
  std::memcpy(&unpacked, view.data(), sizeof(T));
  return unpacked;
}

// A call's workspace. A size of -1 stands for arguments that the call is about to refuse.
struct Workspace {
  explicit Workspace(int64_t size)
      : num_bytes(size), memory(size > 0 ? new char[static_cast<size_t>(size)] : nullptr) {}
  int64_t num_bytes;
  std::unique_ptr<char[]> memory;
};

void require_length(const char* name, int64_t length, int64_t expected) {
  if (length != expected) throw std::length_error(std::string(name) + " has the wrong length");
}

py::tuple sample_tokens(int isa, int num_threads, std::uintptr_t parallel, const py::bytes& packed_args,
                        const py::bytes& packed_outputs) {
  const auto args = record<mgt_sample_tokens_args>(packed_args);
  const auto outputs = record<mgt_sample_tokens_outputs>(packed_outputs);
  const mgt_context where = context(isa, num_threads, parallel);
  int64_t error_index = -1;
  mgt_status status;
  {
    py::gil_scoped_release released;
    const Workspace workspace(mgt_sample_tokens_workspace(&where, &args));
    status = mgt_sample_tokens(&where, &args, &outputs, workspace.memory.get(), workspace.num_bytes, &error_index);
  }
  return py::make_tuple(static_cast<int>(status), error_index);
}

// packed_args lacks the address of its sample; the outputs are addresses
py::tuple differential_sample(int isa, int num_threads, std::uintptr_t parallel, const py::bytes& packed_sample,
                              const py::bytes& packed_args, std::uintptr_t history, std::uintptr_t written,
                              std::uintptr_t token_ids, std::uintptr_t logprob, std::uintptr_t divergence) {
  const auto sample = record<mgt_sample_tokens_args>(packed_sample);
  auto args = record<mgt_differential_sample_args>(packed_args);
  args.sample = &sample;
  const mgt_context where = context(isa, num_threads, parallel);
  int64_t error_index = -1;
  mgt_status status;
  {
    py::gil_scoped_release released;
    const Workspace workspace(mgt_differential_sample_workspace(&where, &args));
    status = mgt_differential_sample(&where, &args, pointer<uint16_t>(history), pointer<uint8_t>(written),
                                     pointer<int64_t>(token_ids), pointer<float>(logprob), pointer<float>(divergence),
                                     workspace.memory.get(), workspace.num_bytes, &error_index);
  }
  return py::make_tuple(static_cast<int>(status), error_index);
}

py::tuple mask_by_confidence(int isa, int num_threads, std::uintptr_t parallel, const py::bytes& packed_args,
                             std::uintptr_t tokens) {
  const auto args = record<mgt_mask_by_confidence_args>(packed_args);
  const mgt_context where = context(isa, num_threads, parallel);
  int64_t error_index = -1;
  mgt_status status;
  {
    py::gil_scoped_release released;
    status = mgt_mask_by_confidence(&where, &args, pointer<int64_t>(tokens), &error_index);
  }
  return py::make_tuple(static_cast<int>(status), error_index);
}

py::tuple commit_tokens(int isa, int num_threads, std::uintptr_t parallel, py::bytes args, py::bytes outputs) {
  const auto given = record<mgt_commit_tokens_args>(args);
  const auto written = record<mgt_commit_tokens_outputs>(outputs);
  const mgt_context where = context(isa, num_threads, parallel);
  int64_t error_index = -1;
  mgt_status status;
  {
    py::gil_scoped_release released;
    status = mgt_commit_tokens(&where, &given, &written, &error_index);
  }
  return py::make_tuple(static_cast<int>(status), error_index);
}

py::tuple match_tokens(int isa, int num_threads, std::uintptr_t parallel, const py::bytes& packed_args,
                       const py::bytes& packed_outputs) {
  const auto args = record<mgt_match_tokens_args>(packed_args);
  const auto outputs = record<mgt_match_tokens_outputs>(packed_outputs);
  const mgt_context where = context(isa, num_threads, parallel);
  int64_t error_index = -1;
  mgt_status status;
  {
    py::gil_scoped_release released;
    const Workspace workspace(mgt_match_tokens_workspace(&where, &args));
    status = mgt_match_tokens(&where, &args, &outputs, workspace.memory.get(), workspace.num_bytes, &error_index);
  }
  return py::make_tuple(static_cast<int>(status), error_index);
}

// of merge_tokens and of unmerge_tokens
template <class Args, mgt_status (*op)(const mgt_context*, const Args*, void*, int64_t*)>
py::tuple with_match(int isa, int num_threads, std::uintptr_t parallel, const py::bytes& packed_args,
                     std::uintptr_t y) {
  const auto args = record<Args>(packed_args);
  const mgt_context where = context(isa, num_threads, parallel);
  int64_t error_index = -1;
  mgt_status status;
  {
    py::gil_scoped_release released;
    status = op(&where, &args, pointer<void>(y), &error_index);
  }
  return py::make_tuple(static_cast<int>(status), error_index);
}

// of w4a8_linear where a8, else of w4a16_linear, which has no scales of x
py::tuple int4_linear(bool a8, int isa, int num_threads, std::uintptr_t parallel, const py::bytes& packed_args,
                      std::uintptr_t x_scale, int64_t num_x_scales, std::uintptr_t y) {
  const auto args = record<mgt_int4_linear_args>(packed_args);
  const auto* scales = pointer<const float>(x_scale);
  auto* result = pointer<void>(y);
  const mgt_context where = context(isa, num_threads, parallel);
  int64_t error_index = -1;
  mgt_status status;
  {
    py::gil_scoped_release released;
    const Workspace workspace(a8 ? mgt_w4a8_linear_workspace(&where, &args)
                                 : mgt_w4a16_linear_workspace(&where, &args));
    char* memory = workspace.memory.get();
    status =
        a8 ? mgt_w4a8_linear(&where, &args, scales, num_x_scales, result, memory, workspace.num_bytes, &error_index)
           : mgt_w4a16_linear(&where, &args, result, memory, workspace.num_bytes, &error_index);
  }
  return py::make_tuple(static_cast<int>(status), error_index);
}

py::tuple kernel_isa(const std::string& op, int isa) {
  mgt_isa kernel = MGT_ISA_AUTO;
  const mgt_status status = mgt_kernel_isa(op.c_str(), static_cast<mgt_isa>(isa), &kernel);
  return py::make_tuple(static_cast<int>(status), static_cast<int>(kernel));
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

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.def("sample_tokens", &sample_tokens);
  m.def("differential_sample", &differential_sample);
  m.def("mask_by_confidence", &mask_by_confidence);
  m.def("commit_tokens", &commit_tokens);
  m.def("match_tokens", &match_tokens);
  m.def("merge_tokens", &with_match<mgt_merge_tokens_args, mgt_merge_tokens>);
  m.def("unmerge_tokens", &with_match<mgt_unmerge_tokens_args, mgt_unmerge_tokens>);
  m.def("int4_linear", &int4_linear);
  m.def("kernel_isa", &kernel_isa);
  m.def("philox", &philox);
  m.def("gaussian", &gaussian);
  m.def("resolve_isa", &resolve_isa);
  m.def("peak", &mgt::peak, py::call_guard<py::gil_scoped_release>());
  m.def("version", &mgt_version);
}
