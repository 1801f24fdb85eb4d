// One lane (Lane1, for the few elements that a kernel looks at singly) and sixteen lanes without vector instructions
// (Scalar16). The vector headers offer the same functions; a kernel body is written once, against this interface.
#pragma once

namespace mgt {
namespace {

// what a Sum of integers has room for
constexpr int64_t kMaxSummands = int64_t{1} << 19;

MGT_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t mantissa = half & 0x3ffu;
  uint32_t bits;
  if (exponent == 0x1f) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-08f;
    std::memcpy(&bits, &magnitude, 4);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

MGT_INLINE uint32_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u | (magnitude >> 13 & 0x3ffu);
  // from 65520 on
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
  if (magnitude < 0x38800000u) {
    // added to 1/2 it is rounded to whole denormals of half precision
    float sum;
    std::memcpy(&sum, &magnitude, 4);
    sum += 0.5f;
    uint32_t sum_bits;
    std::memcpy(&sum_bits, &sum, 4);
    return sign | (sum_bits - 0x3f000000u);
  }
  return sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13);
}

MGT_INLINE float bfloat16_to_float(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

struct Lane1 {
  using F = float;
  using U = uint32_t;
  using M = bool;
  static MGT_INLINE F set(float x) { return x; }
  static MGT_INLINE F add(F a, F b) { return a + b; }
  static MGT_INLINE F sub(F a, F b) { return a - b; }
  static MGT_INLINE F mul(F a, F b) { return a * b; }
  static MGT_INLINE F div(F a, F b) { return a / b; }
  static MGT_INLINE F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
  static MGT_INLINE F fms(F a, F b, F c) { return __builtin_fmaf(a, b, -c); }
  // b where either is NaN, as the x86 instruction has it
  static MGT_INLINE F max(F a, F b) { return a > b ? a : b; }
  static MGT_INLINE F min(F a, F b) { return a < b ? a : b; }
  static MGT_INLINE F sqrt(F a) { return __builtin_sqrtf(a); }
  static MGT_INLINE M less(F a, F b) { return a < b; }
  static MGT_INLINE M equal(F a, F b) { return a == b; }
  static MGT_INLINE F select(M m, F a, F b) { return m ? a : b; }
  static MGT_INLINE U bits(F a) {
    U u;
    std::memcpy(&u, &a, 4);
    return u;
  }
  static MGT_INLINE F from_bits(U u) {
    F a;
    std::memcpy(&a, &u, 4);
    return a;
  }
  static MGT_INLINE F uint_to_float(U u) { return static_cast<float>(u); }
  static MGT_INLINE F int_to_float(U u) { return static_cast<float>(static_cast<int32_t>(u)); }
  // towards 0, of numbers within [0, 2^31]
  static MGT_INLINE U to_uint(F a) { return static_cast<U>(a); }
  static MGT_INLINE F scale_by_power_of_two(F p, F shifted) { return p * from_bits(bits(shifted) << 23); }
  static MGT_INLINE U set_u(uint32_t x) { return x; }
  static MGT_INLINE U add_u(U a, U b) { return a + b; }
  static MGT_INLINE U sub_u(U a, U b) { return a - b; }
  static MGT_INLINE U bit_and(U a, U b) { return a & b; }
  static MGT_INLINE U bit_xor(U a, U b) { return a ^ b; }
  static MGT_INLINE U bit_xor3(U a, U b, U c) { return a ^ b ^ c; }
  template <int n>
  static MGT_INLINE U shift_left(U a) {
    return a << n;
  }
  template <int n>
  static MGT_INLINE U shift_right(U a) {
    return a >> n;
  }
  template <int n>
  static MGT_INLINE U shift_right_signed(U a) {
    return static_cast<U>(static_cast<int32_t>(a) >> n);
  }
  static MGT_INLINE M test_bit(U a, uint32_t bit) { return (a & bit) != 0; }
  static MGT_INLINE void mulhilo(U a, uint32_t m, U& hi, U& lo) {
    const uint64_t product = uint64_t{a} * m;
    hi = static_cast<U>(product >> 32);
    lo = static_cast<U>(product);
  }
};

struct Scalar16 {
  static constexpr int kLanes = 16;
  struct F {
    float lane[16];
  };
  struct U {
    uint32_t lane[16];
  };
  using M = uint32_t;
  template <class R, class Op>
  static MGT_INLINE R each(Op op) {
    R r;
    for (int i = 0; i < 16; ++i) r.lane[i] = op(i);
    return r;
  }
  static MGT_INLINE void hold(F&) {}
  static MGT_INLINE F set(float x) {
    return each<F>([&](int) { return x; });
  }
  static MGT_INLINE F load(const float* p) {
    return each<F>([&](int i) { return p[i]; });
  }
  static MGT_INLINE F load(const uint16_t* p, mgt_dtype dtype) {
    return each<F>([&](int i) { return dtype == MGT_BFLOAT16 ? bfloat16_to_float(p[i]) : half_to_float(p[i]); });
  }
  static MGT_INLINE void store(float* p, F a) { std::memcpy(p, a.lane, sizeof a.lane); }
  static MGT_INLINE void stream(float* p, F a) { store(p, a); }
  static MGT_INLINE void fence() {}
  static MGT_INLINE void store_u(uint32_t* p, U a) { std::memcpy(p, a.lane, sizeof a.lane); }
  static MGT_INLINE U load_u(const void* p) {
    U u;
    std::memcpy(u.lane, p, sizeof u.lane);
    return u;
  }
  static MGT_INLINE U load_u16(const uint16_t* p) {
    return each<U>([&](int i) { return p[i]; });
  }
  // in the low halves of the lanes
  static MGT_INLINE U float16_bits(F a) {
    return each<U>([&](int i) { return float_to_half(a.lane[i]); });
  }
  static MGT_INLINE void store_low16(uint16_t* p, U a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<uint16_t>(a.lane[i]);
  }
  static MGT_INLINE void stream_low16(uint16_t* p, U a) { store_low16(p, a); }
  static MGT_INLINE void store_low8(int8_t* p, U a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.lane[i]);
  }
  static MGT_INLINE F add(F a, F b) {
    return each<F>([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static MGT_INLINE F sub(F a, F b) {
    return each<F>([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static MGT_INLINE F mul(F a, F b) {
    return each<F>([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static MGT_INLINE F div(F a, F b) {
    return each<F>([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  static MGT_INLINE F fma(F a, F b, F c) {
    return each<F>([&](int i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
  }
  static MGT_INLINE F fms(F a, F b, F c) {
    return each<F>([&](int i) { return Lane1::fms(a.lane[i], b.lane[i], c.lane[i]); });
  }
  static MGT_INLINE F max(F a, F b) {
    return each<F>([&](int i) { return Lane1::max(a.lane[i], b.lane[i]); });
  }
  // b where either is NaN, as the x86 instruction has it
  static MGT_INLINE F min(F a, F b) {
    return each<F>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static MGT_INLINE F sqrt(F a) {
    return each<F>([&](int i) { return __builtin_sqrtf(a.lane[i]); });
  }
  template <class Op>
  static MGT_INLINE M mask(Op op) {
    M m = 0;
    for (int i = 0; i < 16; ++i) m |= static_cast<M>(op(i)) << i;
    return m;
  }
  static MGT_INLINE M less(F a, F b) {
    return mask([&](int i) { return a.lane[i] < b.lane[i]; });
  }
  static MGT_INLINE M equal(F a, F b) {
    return mask([&](int i) { return a.lane[i] == b.lane[i]; });
  }
  // true for NaN
  static MGT_INLINE M not_below(F a, F b) {
    return mask([&](int i) { return !(a.lane[i] < b.lane[i]); });
  }
  static MGT_INLINE M is_nan(F a) {
    return mask([&](int i) { return a.lane[i] != a.lane[i]; });
  }
  static MGT_INLINE uint32_t to_bits(M m) { return m; }
  static MGT_INLINE M mask_or(M a, M b) { return a | b; }
  static MGT_INLINE M mask_and(M a, M b) { return a & b; }
  // Stores the lanes of a mask side by side; returns how many it has.
  static MGT_INLINE int compress(float* p, F a, M m) {
    int count = 0;
    for (int i = 0; i < 16; ++i)
      if (m >> i & 1) p[count++] = a.lane[i];
    return count;
  }
  static MGT_INLINE F select(M m, F a, F b) {
    return each<F>([&](int i) { return (m >> i & 1) ? a.lane[i] : b.lane[i]; });
  }
  static MGT_INLINE U bits(F a) {
    U u;
    std::memcpy(u.lane, a.lane, sizeof a.lane);
    return u;
  }
  static MGT_INLINE F from_bits(U u) {
    F a;
    std::memcpy(a.lane, u.lane, sizeof u.lane);
    return a;
  }
  static MGT_INLINE F uint_to_float(U u) {
    return each<F>([&](int i) { return static_cast<float>(u.lane[i]); });
  }
  static MGT_INLINE F int_to_float(U u) {
    return each<F>([&](int i) { return static_cast<float>(static_cast<int32_t>(u.lane[i])); });
  }
  static MGT_INLINE U to_uint(F a) {
    return each<U>([&](int i) { return static_cast<uint32_t>(a.lane[i]); });
  }
  static MGT_INLINE F scale_by_power_of_two(F p, F shifted) {
    return each<F>([&](int i) { return Lane1::scale_by_power_of_two(p.lane[i], shifted.lane[i]); });
  }
  static MGT_INLINE U set_u(uint32_t x) {
    return each<U>([&](int) { return x; });
  }
  // first, first + 1, ...
  static MGT_INLINE U sequence(uint32_t first) {
    return each<U>([&](int i) { return first + static_cast<uint32_t>(i); });
  }
  static MGT_INLINE U add_u(U a, U b) {
    return each<U>([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static MGT_INLINE U sub_u(U a, U b) {
    return each<U>([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  // as signed integers
  static MGT_INLINE U max_u(U a, U b) {
    return each<U>([&](int i) { return std::max(static_cast<int32_t>(a.lane[i]), static_cast<int32_t>(b.lane[i])); });
  }
  static MGT_INLINE int32_t reduce_max(U a) {
    int32_t largest = static_cast<int32_t>(a.lane[0]);
    for (int i = 1; i < 16; ++i) largest = std::max(largest, static_cast<int32_t>(a.lane[i]));
    return largest;
  }
  static MGT_INLINE int32_t reduce_add(U a) {
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += static_cast<int32_t>(a.lane[i]);
    return sum;
  }
  // a sum of at most kMaxSummands integers of 2^31 at most
  using Sum = uint64_t;
  static MGT_INLINE Sum no_sum() { return 0; }
  static MGT_INLINE void add_to(Sum& sum, U a) {
    for (const uint32_t lane : a.lane) sum += lane;
  }
  static MGT_INLINE uint64_t total(Sum sum) { return sum; }
  static MGT_INLINE U bit_and(U a, U b) {
    return each<U>([&](int i) { return a.lane[i] & b.lane[i]; });
  }
  static MGT_INLINE U bit_or(U a, U b) {
    return each<U>([&](int i) { return a.lane[i] | b.lane[i]; });
  }
  static MGT_INLINE U bit_xor(U a, U b) {
    return each<U>([&](int i) { return a.lane[i] ^ b.lane[i]; });
  }
  static MGT_INLINE U bit_xor3(U a, U b, U c) {
    return each<U>([&](int i) { return a.lane[i] ^ b.lane[i] ^ c.lane[i]; });
  }
  template <int n>
  static MGT_INLINE U shift_left(U a) {
    return each<U>([&](int i) { return a.lane[i] << n; });
  }
  template <int n>
  static MGT_INLINE U shift_right(U a) {
    return each<U>([&](int i) { return a.lane[i] >> n; });
  }
  template <int n>
  static MGT_INLINE U shift_right_signed(U a) {
    return each<U>([&](int i) { return Lane1::shift_right_signed<n>(a.lane[i]); });
  }
  static MGT_INLINE M test_bit(U a, uint32_t bit) {
    return mask([&](int i) { return (a.lane[i] & bit) != 0; });
  }
  static MGT_INLINE void mulhilo(U a, uint32_t m, U& hi, U& lo) {
    for (int i = 0; i < 16; ++i) Lane1::mulhilo(a.lane[i], m, hi.lane[i], lo.lane[i]);
  }
  // rows[i][j] <-> rows[j][i]
  static MGT_INLINE void transpose(F rows[16]) {
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < i; ++j) std::swap(rows[i].lane[j], rows[j].lane[i]);
  }
};

}  // namespace
}  // namespace mgt
