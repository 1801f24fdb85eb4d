// What the fuzzers share: reading arguments out of a fuzzer's bytes, buffers exactly as large as the arguments allow,
// and the sentences of the header that every call is held to.
#pragma once

#include <fuzzer/FuzzedDataProvider.h>
#include <mgt_kernels.h>
#include <xmmintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

namespace fuzz {

#define REQUIRE(holds) fuzz::require(holds, #holds, __FILE__, __LINE__)

inline void require(bool holds, const char* what, const char* file, int line) {
  if (holds) return;
  std::fprintf(stderr, "%s:%d: the header promises: %s\n", file, line, what);
  std::abort();
}

// Printed when the process ends: how many calls of the C ABI it made.
struct CallCounter {
  int64_t num_calls = 0;
  ~CallCounter() { std::fprintf(stderr, "calls: %lld\n", static_cast<long long>(num_calls)); }
};
inline CallCounter counter;

// wide enough for products of three sizes below 2^40, and for what the header calls "does not fit 63 bits"
using Wide = __int128;
inline bool fits(Wide bytes) { return bytes <= INT64_MAX; }
// rows x columns elements of some bytes
inline bool fits(int64_t rows, int64_t columns, int64_t bytes) {
  return fits(Wide{rows} * columns) && fits(Wide{rows} * columns * bytes);
}

// Elements of memory that a fuzzed call may touch. Larger calls are not made, unless they must be refused.
constexpr int64_t kMostElements = 1 << 13;

class Input {
 public:
  Input(const uint8_t* data, size_t size) : bytes_(data, size) {}

  // true once in `every` inputs
  bool rarely(int every = 32) { return bytes_.ConsumeIntegralInRange(1, every) == every; }
  int64_t within(int64_t low, int64_t high) { return bytes_.ConsumeIntegralInRange(low, high); }
  bool coin() { return bytes_.ConsumeBool(); }
  template <class T>
  T any() {
    return bytes_.ConsumeIntegral<T>();
  }
  template <class T>
  T one_of(std::initializer_list<T> list) {
    return list.begin()[bytes_.ConsumeIntegralInRange<size_t>(0, list.size() - 1)];
  }

  // a number at which products wrap around, or signs are lost
  int64_t hostile() {
    const int64_t value =
        one_of<int64_t>({INT64_MIN, INT64_MIN + 1, -(int64_t{1} << 62), -1, 0, 1, 2, INT32_MAX, int64_t{INT32_MAX} + 1,
                         UINT32_MAX, int64_t{UINT32_MAX} + 1, int64_t{1} << 40, int64_t{1} << 61, int64_t{1} << 62,
                         INT64_MAX / 2, INT64_MAX - 1, INT64_MAX});
    return coin() ? value : static_cast<int64_t>(static_cast<uint64_t>(value) + static_cast<uint64_t>(within(-3, 3)));
  }
  int64_t size(int64_t low, int64_t high) { return rarely() ? hostile() : within(low, high); }

  // any float: often ordinary, sometimes an edge, sometimes any bits
  float number() {
    switch (within(0, 7)) {
      case 0:
        return one_of<float>({0.0f, -0.0f, 1.0f, -1.0f, std::numeric_limits<float>::infinity(),
                              -std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN(),
                              std::numeric_limits<float>::max(), std::numeric_limits<float>::lowest(),
                              std::numeric_limits<float>::min(), std::numeric_limits<float>::denorm_min(), 3e38f, 1e37f,
                              -3e-39f});
      case 1: {
        const auto bits = any<uint32_t>();
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
      }
      default: return static_cast<float>(within(-4096, 4096)) * 0x1p-8f;
    }
  }

  // a value for a scalar argument
  float scalar(std::initializer_list<float> usual) { return rarely(8) ? number() : one_of(usual); }

  template <class Enum>
  Enum enumerator(int last) {
    return static_cast<Enum>(rarely() ? one_of({-1, last + 1, 7, 255, INT32_MAX, INT32_MIN}) : within(0, last));
  }

 private:
  FuzzedDataProvider bytes_;
};

// Exactly num elements on the heap: the sanitizer sees the first byte that is read or written past either end.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t num) : num_(num), data_(new T[static_cast<size_t>(num)]) {}
  ~Buffer() { delete[] data_; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }
  int64_t size() const { return num_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  void poison() { std::memset(static_cast<void*>(data_), kPoison, static_cast<size_t>(num_) * sizeof(T)); }
  bool is_poison(int64_t i) const {
    T poison;
    std::memset(&poison, kPoison, sizeof poison);
    return std::memcmp(&poison, data_ + i, sizeof poison) == 0;
  }
  bool same_bits(const Buffer& other) const {
    return std::memcmp(data_, other.data_, static_cast<size_t>(num_) * sizeof(T)) == 0;
  }
  void copy(const Buffer& other) { std::memcpy(data_, other.data_, static_cast<size_t>(num_) * sizeof(T)); }

 private:
  // as a float a NaN that no arithmetic makes, as an id a negative number
  static constexpr int kPoison = 0xff;
  int64_t num_;
  T* data_;
};

// Where a structure lies whose struct_size is right or, seldom, one that says another size, of which no more may be
// read.
template <class T>
const T* sized_structure(Input& input, T& right, Buffer<uint32_t>& wrong) {
  right.struct_size = sizeof(T);
  if (!input.rarely(128)) return &right;
  wrong[0] = input.one_of<uint32_t>({0, 4, sizeof(T) - 8, sizeof(T) - 1, sizeof(T) + 1, sizeof(T) + 8, UINT32_MAX});
  return reinterpret_cast<const T*>(wrong.data());
}

inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

inline float from_bfloat16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// an element of any of the three dtypes, in a buffer of bytes
inline float load(const void* data, int64_t index, mgt_dtype dtype) {
  if (dtype == MGT_FLOAT32) return static_cast<const float*>(data)[index];
  const uint16_t raw = static_cast<const uint16_t*>(data)[index];
  if (dtype == MGT_BFLOAT16) return from_bfloat16(raw);
  const int exponent = raw >> 10 & 31, mantissa = raw & 1023;
  const float sign = raw & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? std::numeric_limits<float>::quiet_NaN() : sign * INFINITY;
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                               : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25));
}

inline int64_t element_bytes(mgt_dtype dtype) { return dtype == MGT_FLOAT32 ? 4 : 2; }

// num values of a dtype: a few of the fuzzer's own, the others a cheap sequence of ordinary ones between them
inline void fill(Input& input, void* data, int64_t num, mgt_dtype dtype) {
  const auto store = [&](int64_t i, float value) {
    if (dtype == MGT_FLOAT32)
      static_cast<float*>(data)[i] = value;
    else if (dtype == MGT_BFLOAT16)
      static_cast<uint16_t*>(data)[i] = to_bfloat16(value);
  };
  uint32_t state = input.any<uint32_t>();
  const float spread = input.one_of<float>({1.0f, 1.0f, 8.0f, 0.0f, 100.0f, 1e-38f, 1e30f});
  for (int64_t i = 0; i < num; ++i) {
    state = state * 1664525u + 1013904223u;
    if (dtype == MGT_FLOAT16)
      // every second one negative, exponents of 2^-5 to 2^2
      static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>((state >> 16 & 0x9fff) | 0x2800);
    else
      store(i, (static_cast<float>(state >> 8) * 0x1p-23f - 1.0f) * spread);
  }
  if (num == 0) return;
  for (int64_t left = input.within(0, 6); left > 0; --left) {
    const int64_t where = input.within(0, num - 1);
    if (dtype == MGT_FLOAT16)
      static_cast<uint16_t*>(data)[where] =
          input.coin() ? input.any<uint16_t>() : input.one_of<uint16_t>({0x7c00, 0xfc00, 0x7e00, 1, 0x8001, 0x7bff});
    else
      store(where, input.number());
  }
}

// the floating-point states that a host may leave a thread in: flushing, rounding, an exception that was raised
inline unsigned float_state(Input& input) {
  return input.rarely(4) ? 0x1f80u | input.one_of<unsigned>({0x8040, 0x2000, 0x4000, 0x6000, 0xe040, 0x3f}) : 0x1f80u;
}

// a pool of one thread, which runs the body as often as it was asked to, or once more
inline void run_in_turn(void (*body)(void*), void* data, unsigned num_threads, unsigned) {
  REQUIRE(num_threads >= 2 && num_threads <= std::max(16u, std::thread::hardware_concurrency()));
  for (unsigned i = 0; i <= num_threads; ++i) body(data);
}

inline mgt_context context(Input& input) {
  mgt_context c{};
  c.isa = input.rarely(64) ? input.enumerator<mgt_isa>(MGT_ISA_AMX) : MGT_ISA_SCALAR;
  c.num_threads = input.rarely(16)  ? input.one_of({INT32_MIN, -1, 0, 1000, 1 << 29, INT32_MAX})
                  : input.rarely(4) ? 3
                                    : 1;
  // real threads are slow to start
  c.parallel = input.rarely(64) && c.num_threads <= 3 ? nullptr : run_in_turn;
  return c;
}

// Calls an op in a host's floating-point state, which must come back.
template <class Call>
mgt_status call_in(unsigned state, const Call& call) {
  ++counter.num_calls;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(state);
  const mgt_status status = call();
  const unsigned after = _mm_getcsr();
  _mm_setcsr(before);
  REQUIRE(after == state);
  return status;
}

// the instruction sets of this processor but the scalar one
inline const std::vector<mgt_isa>& vector_isas() {
  static const std::vector<mgt_isa> isas = [] {
    std::vector<mgt_isa> found;
    for (int isa = MGT_ISA_AVX2; isa <= MGT_ISA_AMX; ++isa) {
      mgt_isa resolved;
      if (mgt_resolve_isa(static_cast<mgt_isa>(isa), &resolved) == MGT_OK) found.push_back(resolved);
    }
    return found;
  }();
  return isas;
}

// the instruction sets that have a kernel of their own for an op
inline std::vector<mgt_isa> kernels_of(const char* op) {
  std::vector<mgt_isa> found;
  for (const mgt_isa isa : vector_isas()) {
    mgt_isa kernel;
    REQUIRE(mgt_kernel_isa(op, isa, &kernel) == MGT_OK && kernel <= isa);
    if (kernel == isa) found.push_back(isa);
  }
  return found;
}

inline bool available(mgt_isa isa) {
  return isa == MGT_ISA_AUTO || isa == MGT_ISA_SCALAR ||
         std::count(vector_isas().begin(), vector_isas().end(), isa) != 0;
}

}  // namespace fuzz
