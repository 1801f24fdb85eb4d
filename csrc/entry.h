// What every entry of the C ABI needs. Compiled at the baseline only.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "mgt_kernels.h"

namespace mgt {

inline bool valid(const mgt_context* context) { return context != nullptr && context->num_threads >= 1; }

// whether a structure of the caller's is there and is what this library knows; nothing else of it may be read before
template <class T>
bool whole(const T* given) {
  return given != nullptr && given->struct_size == sizeof(T);
}

constexpr int64_t kLineBytes = 64;
// the first cache line that begins inside; a workspace has room for it
inline void* on_line(void* workspace) {
  const auto address = reinterpret_cast<std::uintptr_t>(workspace);
  return reinterpret_cast<void*>((address + kLineBytes - 1) / kLineBytes * kLineBytes);
}

// A size or an offset that remembers whether it, or anything it was made of, did not fit.
class Size {
 public:
  Size(int64_t value) : value_(value) {}
  bool fits() const { return fits_; }
  // -1 where it does not fit
  int64_t value() const { return fits_ ? value_ : -1; }
  Size magnitude() const { return value_ < 0 ? Size(0) - *this : *this; }

  friend Size operator+(Size a, Size b) {
    Size sum(0);
    sum.fits_ = !__builtin_add_overflow(a.value_, b.value_, &sum.value_) && a.fits_ && b.fits_;
    return sum;
  }
  friend Size operator-(Size a, Size b) {
    Size difference(0);
    difference.fits_ = !__builtin_sub_overflow(a.value_, b.value_, &difference.value_) && a.fits_ && b.fits_;
    return difference;
  }
  friend Size operator*(Size a, Size b) {
    Size product(0);
    product.fits_ = !__builtin_mul_overflow(a.value_, b.value_, &product.value_) && a.fits_ && b.fits_;
    return product;
  }

 private:
  int64_t value_;
  bool fits_ = true;
};

// The floating-point state that results are promised in, as long as it lives: nearest even, denormals kept, no traps.
// What the caller had comes back, its exception flags included.
class FloatState {
 public:
#if defined(__x86_64__)
  // the barriers keep the compiler from moving arithmetic on what a pointer leads to across a change of the state
  FloatState() : callers_(_mm_getcsr()) {
    _mm_setcsr(0x1f80);
    asm volatile("" ::: "memory");
  }
  ~FloatState() {
    asm volatile("" ::: "memory");
    _mm_setcsr(callers_);
  }
#else
  FloatState() {}
#endif
  FloatState(const FloatState&) = delete;
  FloatState& operator=(const FloatState&) = delete;

 private:
#if defined(__x86_64__)
  unsigned callers_;
#endif
};

// the lowest of the indices that threads report
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

inline bool valid_step(int64_t step) { return step >= 0 && step <= UINT32_MAX; }

}  // namespace mgt
