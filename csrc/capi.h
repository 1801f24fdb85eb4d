// What every entry of the C ABI needs. Compiled at the baseline only.
#pragma once

#include <atomic>
#include <cstdint>

#include "mgt_kernels.h"

namespace mgt {

inline bool valid(const mgt_context* context) { return context != nullptr && context->num_threads >= 1; }

constexpr int64_t kLineBytes = 64;
// the first cache line that begins inside; a workspace has room for it
inline void* on_line(void* workspace) {
  const auto address = reinterpret_cast<std::uintptr_t>(workspace);
  return reinterpret_cast<void*>((address + kLineBytes - 1) / kLineBytes * kLineBytes);
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

inline mgt_status fail(mgt_status status, int64_t index, int64_t* error_index) {
  if (error_index != nullptr) *error_index = index;
  return status;
}

}  // namespace mgt
