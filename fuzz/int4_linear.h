// mgt_w4a8_linear and mgt_w4a16_linear with their workspace queries: one driver for both.
#pragma once

#include <memory>

#include "fuzz.h"

namespace fuzz {

inline bool documented(const mgt_int4_linear_args& a) {
  if (a.num_rows < 0 || a.num_inputs < 1 || a.num_inputs > INT32_MAX || a.num_outputs < 1 ||
      a.num_outputs > INT32_MAX || (a.dtype != MGT_FLOAT32 && a.dtype != MGT_BFLOAT16) ||
      (a.scale_dtype != MGT_FLOAT32 && a.scale_dtype != MGT_FLOAT16) || a.group_size < 32 || a.group_size > 16384 ||
      a.group_size % 32 != 0)
    return false;
  if (a.num_rows == 0) return true;
  if (a.num_rows > 1 && (a.x_stride < a.num_inputs || !fits(a.num_rows, a.x_stride, element_bytes(a.dtype))))
    return false;
  return fits(a.num_rows, a.num_inputs, element_bytes(a.dtype)) &&
         fits(a.num_rows, a.num_outputs, element_bytes(a.dtype));
}

// whether a row may be multiplied; `limit` is the first magnitude, as the bits of a float, that may not
inline bool good_row(const mgt_int4_linear_args& a, int64_t row, uint32_t limit) {
  for (int64_t k = 0; k < a.num_inputs; ++k) {
    const float value = load(a.x, row * (a.num_rows == 1 ? 0 : a.x_stride) + k, a.dtype);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) >= limit) return false;
  }
  return true;
}

template <bool kEightBits>
int fuzz_linear(const uint8_t* data, size_t size) {
  Input input(data, size);
  mgt_context c = context(input);
  const unsigned state = float_state(input);
  mgt_int4_linear_args a{};
  a.struct_size = sizeof a;
  a.num_rows = input.size(0, input.one_of<int64_t>({1, 3, 3, 10, 40}));
  a.num_inputs = input.size(1, input.one_of<int64_t>({20, 20, 70, 70, 200, 600}));
  a.num_outputs = input.size(1, input.one_of<int64_t>({4, 4, 20, 70, 130}));
  a.dtype = input.rarely() ? input.enumerator<mgt_dtype>(MGT_FLOAT16) : input.one_of({MGT_FLOAT32, MGT_BFLOAT16});
  a.scale_dtype = input.rarely() ? input.enumerator<mgt_dtype>(MGT_FLOAT16) : input.one_of({MGT_FLOAT32, MGT_FLOAT16});
  a.group_size = input.rarely() ? input.hostile() : input.one_of<int64_t>({32, 64, 96, 128, 160, 256, 16384});
  a.x_stride =
      input.rarely(8)
          ? input.hostile()
          : static_cast<int64_t>(static_cast<uint64_t>(a.num_inputs) + static_cast<uint64_t>(input.within(0, 5)));
  int64_t num_x_scales = 0;
  if (kEightBits && input.coin()) num_x_scales = input.rarely() ? input.hostile() : input.coin() ? 1 : a.num_rows;
  const bool scales_fit = num_x_scales >= 0 && (num_x_scales == 0 || a.num_rows % num_x_scales == 0);

  const auto query = [&] {
    ++counter.num_calls;
    return kEightBits ? mgt_w4a8_linear_workspace(&c, &a) : mgt_w4a16_linear_workspace(&c, &a);
  };
  int64_t num_bytes = query();
  const bool in_range = documented(a);
  const bool sized = in_range && c.num_threads >= 1 && available(c.isa);
  if (!sized) REQUIRE(num_bytes == -1);
  // the rows of a workspace are padded, and may not fit where the arguments do
  const Wide padded = in_range ? Wide{a.num_rows} * (Wide{a.num_inputs} + 256) * 16 : 0;
  if (sized && fits(padded)) REQUIRE(num_bytes >= 0);

  const bool refused = !sized || !scales_fit;
  if (!refused && (a.num_rows > 512 || num_x_scales > 512 || a.num_outputs > 512 || a.num_inputs > kMostElements))
    return -1;
  const Wide span = !refused && a.num_rows > 1 ? Wide{a.num_rows - 1} * a.x_stride + a.num_inputs : Wide{a.num_inputs};
  if (!refused && span > 8 * kMostElements) return -1;
  const bool small = !refused && a.num_rows > 0 && input.rarely();
  if (small) num_bytes = input.within(0, num_bytes - 1);

  // nothing is allocated for a call that must refuse before it looks
  const int64_t rows = refused ? 0 : a.num_rows, outputs = refused ? 0 : a.num_outputs;
  const int64_t groups = refused ? 0 : (a.num_inputs + a.group_size - 1) / a.group_size;
  const int64_t num_scales = refused ? 0 : num_x_scales, x_bytes = element_bytes(a.dtype);
  Buffer<uint8_t> x(rows == 0 ? 0 : static_cast<int64_t>(span) * x_bytes);
  Buffer<uint8_t> w_q(refused ? 0 : outputs * ((a.num_inputs + 63) / 64) * 32);
  Buffer<uint8_t> scale(outputs * groups * element_bytes(a.scale_dtype)), zero_point(outputs * groups);
  Buffer<float> bias(outputs), x_scale(num_scales);
  const int64_t y_bytes = rows * outputs * x_bytes;
  Buffer<uint8_t> y(y_bytes), first_y(y_bytes);
  if (!refused) {
    fill(input, x.data(), x.size() / x_bytes, a.dtype);
    uint32_t random = input.any<uint32_t>();
    const auto next = [&] { return random = random * 1664525u + 1013904223u; };
    for (int64_t i = 0; i < w_q.size(); ++i) w_q[i] = static_cast<uint8_t>(next() >> 24);
    for (int64_t i = 0; i < zero_point.size(); ++i) zero_point[i] = static_cast<uint8_t>(next() >> 28);
    const float factor = input.one_of<float>({0.01f, 1.0f, 1e-38f, 1e30f});
    for (int64_t i = 0; i < zero_point.size(); ++i) {
      if (a.scale_dtype == MGT_FLOAT16)
        reinterpret_cast<uint16_t*>(scale.data())[i] = static_cast<uint16_t>(1 + (next() >> 17) % 0x7bff);
      else
        reinterpret_cast<float*>(scale.data())[i] = factor * static_cast<float>(1 + (next() >> 24));
    }
    for (int64_t i = 0; i < bias.size(); ++i) {
      bias[i] = input.rarely(16) ? input.number() : 0.5f;
      // its payload would come out as that of the poison
      if (std::isnan(bias[i])) bias[i] = INFINITY;
    }
    for (int64_t i = 0; i < x_scale.size(); ++i) x_scale[i] = input.rarely() ? input.number() : 0.03125f;
  }
  a.x = x.data();
  a.w_q = w_q.data();
  a.scale = scale.data();
  a.zero_point = zero_point.data();
  a.bias = input.coin() ? bias.data() : nullptr;
  bool has_pointers = true;
  if (!refused && a.num_rows > 0 && input.rarely(64)) {
    has_pointers = false;
    switch (input.within(0, 3)) {
      case 0: a.x = nullptr; break;
      case 1: a.w_q = nullptr; break;
      case 2: a.scale = nullptr; break;
      default: a.zero_point = nullptr;
    }
  }

  std::unique_ptr<Buffer<char>> workspace;
  const auto run = [&](Buffer<uint8_t>& out, int64_t* index) {
    if (!small && !refused) num_bytes = query();
    workspace = std::make_unique<Buffer<char>>(std::max<int64_t>(0, refused ? 0 : num_bytes) + 1);
    out.poison();
    char* memory = workspace->data() + 1;
    return call_in(state, [&] {
      return kEightBits ? mgt_w4a8_linear(&c, &a, num_x_scales == 0 ? nullptr : x_scale.data(), num_x_scales,
                                          out.data(), memory, num_bytes, index)
                        : mgt_w4a16_linear(&c, &a, out.data(), memory, num_bytes, index);
    });
  };
  int64_t first_index = -1;
  const mgt_status first = run(first_y, &first_index);
  if (refused) {
    REQUIRE(first == MGT_INVALID_ARGUMENT || (first == MGT_ISA_UNAVAILABLE && !available(c.isa)));
    return 0;
  }
  bool scales_good = true;
  for (int64_t i = 0; i < x_scale.size(); ++i) scales_good &= std::isnormal(x_scale[i]) && x_scale[i] > 0.0f;
  if (small || !has_pointers || (!scales_good && a.num_rows > 0)) {
    REQUIRE(first == MGT_INVALID_ARGUMENT);
    return 0;
  }
  int64_t bad_row = -1;
  for (int64_t row = 0; row < a.num_rows && bad_row < 0; ++row)
    if (!good_row(a, row, kEightBits ? 0x7f800000 : 0x7f7f8000)) bad_row = row;
  REQUIRE(first == (bad_row < 0 ? MGT_OK : MGT_BAD_ACTIVATION) && first_index == bad_row);
  static const std::vector<mgt_isa> isas = kernels_of(kEightBits ? "w4a8_linear" : "w4a16_linear");
  const auto check_written = [&](Buffer<uint8_t>& out) {
    for (int64_t i = 0; i < y_bytes; i += x_bytes) {
      bool poison = true;
      for (int64_t j = 0; j < x_bytes; ++j) poison &= out.is_poison(i + j);
      REQUIRE(!poison);
    }
  };
  if (first == MGT_OK) check_written(first_y);
  for (const mgt_isa isa : isas) {
    c.isa = isa;
    int64_t index = -1;
    REQUIRE(run(y, &index) == first && index == bad_row);
    if (first != MGT_OK) continue;
    check_written(y);
    // sums of bfloat16 are rounded as the instruction set has it
    if (kEightBits) REQUIRE(y.same_bits(first_y));
  }
  return 0;
}

}  // namespace fuzz
