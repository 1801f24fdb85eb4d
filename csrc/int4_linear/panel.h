// Unpacking 64 outputs of w_q and reading and writing rows, written once against the lanes of simd_*.h.
//
// A panel is [input / q][64 outputs][q inputs]: q inputs of one output side by side in 32 bits, as the dot-product
// instructions want them (q = 4 bytes, or q = 2 bfloat16). w_q has the inputs of one output side by side, which a
// 16 x 16 transposition of 32-bit words turns into that.
#pragma once

namespace mgt {
namespace {

// the bytes of w_q that one transposition takes of a row, and the inputs in them
constexpr int64_t kStripBytes = 64;
constexpr int64_t kStripInputs = 128;

// words[j] lane i = bytes 4 j .. 4 j + 3 of strip `strip` of output first + i; zero past the end of w_q
template <class S>
MGT_INLINE void load_strip(const mgt_int4_linear_args& a, int64_t first, int64_t strip, typename S::U words[16]) {
  const int64_t stride = padded_inputs(a) / 2;
  const int64_t bytes = std::min(kStripBytes, stride - strip * kStripBytes);
  const uint8_t* source = a.w_q + first * stride + strip * kStripBytes;
  typename S::F rows[16];
  if (bytes == kStripBytes && first + 16 <= a.num_outputs) {
    for (int i = 0; i < 16; ++i) rows[i] = S::from_bits(S::load_u(source + i * stride));
  } else {
    alignas(64) uint8_t copy[16 * kStripBytes] = {};
    for (int64_t i = 0; i < std::min<int64_t>(16, a.num_outputs - first); ++i)
      std::memcpy(copy + i * kStripBytes, source + i * stride, static_cast<size_t>(bytes));
    for (int i = 0; i < 16; ++i) rows[i] = S::from_bits(S::load_u(copy + i * kStripBytes));
  }
  S::transpose(rows);
  for (int j = 0; j < 16; ++j) words[j] = S::bits(rows[j]);
}

// run(quad, words) for each run of 32 inputs, which share a group: words[j] lane i = w_q of inputs 4 (quad + j) to
// 4 (quad + j) + 3 of output first + i, a byte each
template <class S, class Run>
MGT_INLINE void unpack_strip(const mgt_int4_linear_args& a, int64_t first, int64_t strip, const Run& run) {
  using U = typename S::U;
  U words[16];
  load_strip<S>(a, first, strip, words);
  const U low = S::set_u(0x0f0f0f0f);
  // a chunk of 64 inputs is 32 bytes: 8 words, low nibbles first
  const int64_t num_chunks = std::min<int64_t>(2, padded_inputs(a) / 64 - 2 * strip);
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const int64_t quad = 32 * strip + 16 * chunk;
    U nibbles[8];
    for (int64_t j = 0; j < 8; ++j) nibbles[j] = S::bit_and(words[8 * chunk + j], low);
    run(quad, nibbles);
    for (int64_t j = 0; j < 8; ++j) nibbles[j] = S::bit_and(S::template shift_right<4>(words[8 * chunk + j]), low);
    run(quad + 8, nibbles);
  }
}

// Scale and zero point of outputs [64 panel, 64 panel + 64) for every group: (groups, 64); outputs past the end get 0.
template <class S>
void load_groups(const mgt_int4_linear_args& a, int64_t panel, float* scale, int32_t* zero_point) {
  using F = typename S::F;
  const int64_t groups = num_groups(a);
  for (int64_t column = 0; column < kPanelOutputs; column += 16) {
    for (int64_t g = 0; g < groups; g += 16) {
      const int64_t count = std::min<int64_t>(16, groups - g);
      F scales[16], zero_points[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t output = panel * kPanelOutputs + column + i;
        const int64_t index = output * groups + g;
        float values[16] = {};
        uint16_t halves[16] = {};
        uint32_t zeros[16] = {};
        if (output < a.num_outputs) {
          if (a.scale_dtype == MGT_FLOAT16)
            std::memcpy(halves, static_cast<const uint16_t*>(a.scale) + index, static_cast<size_t>(count) * 2);
          else
            std::memcpy(values, static_cast<const float*>(a.scale) + index, static_cast<size_t>(count) * 4);
          for (int64_t j = 0; j < count; ++j) zeros[j] = a.zero_point[index + j];
        }
        scales[i] = a.scale_dtype == MGT_FLOAT16 ? S::load(halves, MGT_FLOAT16) : S::load(values);
        zero_points[i] = S::from_bits(S::load_u(zeros));
      }
      S::transpose(scales);
      S::transpose(zero_points);
      for (int64_t j = 0; j < count; ++j) {
        S::store(scale + (g + j) * kPanelOutputs + column, scales[j]);
        S::store_u(reinterpret_cast<uint32_t*>(zero_point) + (g + j) * kPanelOutputs + column, S::bits(zero_points[j]));
      }
    }
  }
}

// X is the element of x: float, or uint16_t for bfloat16
template <class S, class X>
MGT_INLINE typename S::F load_x(const X* x) {
  if constexpr (sizeof(X) == 4)
    return S::load(x);
  else
    return S::load(x, MGT_BFLOAT16);
}

// the row's inputs [k, k + 16), zeros past num_inputs
template <class S, class X>
MGT_INLINE typename S::F load_x(const X* row, int64_t k, int64_t num_inputs) {
  if (k + 16 <= num_inputs) return load_x<S>(row + k);
  X copy[16] = {};
  for (int64_t i = 0; k + i < num_inputs; ++i) copy[i] = row[k + i];
  return load_x<S>(copy);
}

// the largest magnitude of a row, as the bits of a float: NaN is above infinity
template <class S, class X>
MGT_INLINE int32_t largest_magnitude(const X* row, int64_t num_inputs) {
  const typename S::U magnitude = S::set_u(0x7fffffff);
  typename S::U largest = S::set_u(0);
  for (int64_t k = 0; k < num_inputs; k += 16)
    largest = S::max_u(largest, S::bit_and(S::bits(load_x<S>(row, k, num_inputs)), magnitude));
  return S::reduce_max(largest);
}

// the element of call.rows that holds input k of a row; Row is the element's type, kRows is 1 or 16 rows to a tile
template <class Row, int64_t kRows>
MGT_INLINE int64_t row_offset(int64_t row, int64_t k, int64_t stride) {
  // unsigned, whose divisions by powers of two are shifts
  constexpr uint64_t kLine = 64 / sizeof(Row), kTile = kRows;
  const auto r = static_cast<uint64_t>(row), i = static_cast<uint64_t>(k);
  return static_cast<int64_t>(r / kTile * kTile * static_cast<uint64_t>(stride) + i / kLine * kLine * kTile +
                              r % kTile * kLine + i % kLine);
}

// add(R, row) with R = kRows, an integral constant, from the first row on, and with the R that is left
template <int kRows, class Add>
MGT_INLINE void for_rows(int64_t num_rows, const Add& add, int64_t row = 0) {
  for (; row + kRows <= num_rows; row += kRows) add(std::integral_constant<int, kRows>{}, row);
  if constexpr (kRows > 1) {
    if (row < num_rows) for_rows<kRows - 1>(num_rows, add, row);
  }
}

// the session of a tile that has nothing to set up
struct NoSession {
  explicit NoSession(int64_t) {}
};

// count is a multiple of 16
template <class S>
MGT_INLINE void clear(float* values, int64_t count) {
  typename S::F zero = S::set(0.0f);
  for (int64_t i = 0; i < count; i += 16) {
    S::hold(zero);
    S::store(values + i, zero);
  }
}

// 16 values of bias, or of -0, which adds to nothing; zeros past the end
template <class S>
MGT_INLINE typename S::F load_bias(const mgt_int4_linear_args& a, int64_t output) {
  if (a.bias == nullptr) return S::set(-0.0f);
  if (output + 16 <= a.num_outputs) return S::load(a.bias + output);
  float copy[16] = {};
  for (int64_t i = 0; output + i < a.num_outputs; ++i) copy[i] = a.bias[output + i];
  return S::load(copy);
}

// y of a panel's outputs, of rows from `first` on: results (num_rows, 64), times row_scale where it is given, plus
// bias. A function of its own: inlined, it takes registers from the multiplication, whose sums then go to the stack.
template <class S>
MGT_NOINLINE void store_panel(const Int4LinearCall& call, int64_t panel, int64_t first, int64_t num_rows,
                              const float* results, const float* row_scale) {
  using F = typename S::F;
  const mgt_int4_linear_args& a = call.args;
  const int64_t output = panel * kPanelOutputs;
  F bias[4];
  for (int64_t c = 0; c < 4; ++c) bias[c] = load_bias<S>(a, output + 16 * c);
  // store(index of 16 elements of y, how many of them there are, their values)
  const auto each = [&](int64_t num_outputs, const auto& store) {
    for (int64_t i = 0; i < num_rows; ++i, results += kPanelOutputs) {
      const F scale = S::set(row_scale != nullptr ? row_scale[first + i] : 1.0f);
      const int64_t index = (first + i) * a.num_outputs + output;
#pragma GCC unroll 4
      for (int64_t c = 0; c < 4; ++c) {
        if (16 * c >= num_outputs) break;
        store(index + 16 * c, num_outputs - 16 * c, S::fma(S::load(results + 16 * c), scale, bias[c]));
      }
    }
  };
  // inf - inf, where float32 itself was too small
  const F quiet = S::from_bits(S::set_u(0x7fc00000));
  const auto rounded = [&](F y) { return bfloat16_bits<S>(S::select(S::is_nan(y), quiet, y)); };
  float* y32 = static_cast<float*>(call.y);
  uint16_t* y16 = static_cast<uint16_t*>(call.y);
  const bool is_float = a.dtype == MGT_FLOAT32;
  if (output + kPanelOutputs > a.num_outputs) {
    each(a.num_outputs - output, [&](int64_t index, int64_t left, F y) {
      float floats[16];
      uint16_t halves[16];
      left = std::min<int64_t>(left, 16);
      S::store(floats, y);
      S::store_low16(halves, rounded(y));
      if (is_float)
        std::copy(floats, floats + left, y32 + index);
      else
        std::copy(halves, halves + left, y16 + index);
    });
  } else if (is_float && call.stream) {
    each(kPanelOutputs, [&](int64_t index, int64_t, F y) { S::stream(y32 + index, y); });
  } else if (is_float) {
    each(kPanelOutputs, [&](int64_t index, int64_t, F y) { S::store(y32 + index, y); });
  } else if (call.stream) {
    each(kPanelOutputs, [&](int64_t index, int64_t, F y) { S::stream_low16(y16 + index, rounded(y)); });
  } else {
    each(kPanelOutputs, [&](int64_t index, int64_t, F y) { S::store_low16(y16 + index, rounded(y)); });
  }
}

}  // namespace
}  // namespace mgt
