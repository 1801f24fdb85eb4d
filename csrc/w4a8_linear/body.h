// w4a8_linear, written once against the lanes of simd_*.h but for its innermost loop, a Tile: the sums of one group
// over a block of rows.
//
// Bound by: the M N K 8-bit multiply-adds. With a 32-bit dot product of bytes, a group of 16 outputs takes group_size /
// 4 of these instructions, and 3 more for the zero point, the conversion and the scale: a tenth at group 128. The
// weights of a panel are unpacked once for all rows.
#pragma once

namespace mgt {
namespace {

template <class S, class X, int64_t kTileRows, bool kRowSums>
int64_t prepare_w4a8(const Int4LinearCall& call, const X* x, int64_t begin, int64_t end) {
  using F = typename S::F;
  using U = typename S::U;
  const mgt_int4_linear_args& a = call.args;
  const int64_t groups = num_groups(a);
  // adding 1.5 * 2^23 leaves the nearest integer, halves to even, in the low bits
  const F magic = S::set(12582912.0f), lowest = S::set(-128.0f), highest = S::set(127.0f);
  int64_t first_bad = -1;
  for (int64_t row = begin; row < end; ++row) {
    const X* inputs = x + row * a.x_stride;
    const int32_t largest = largest_magnitude<S>(inputs, a.num_inputs);
    if (largest >= 0x7f800000 && first_bad < 0) first_bad = row;
    float scale;
    if (call.num_x_scales > 0) {
      scale = call.x_scale[row / (a.num_rows / call.num_x_scales)];
    } else {
      std::memcpy(&scale, &largest, sizeof scale);
      scale = std::max(scale / 127.0f, std::numeric_limits<float>::min());
    }
    call.row_scale[row] = scale;

    const F inverse = S::set(1.0f / scale);
    int8_t* x_q = static_cast<int8_t*>(call.rows);
    const auto at = [&](int64_t k) { return row_offset<int8_t, kTileRows>(row, k, call.row_stride); };
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t last = std::min((g + 1) * a.group_size, padded_inputs(a));
      U sums = S::set_u(0);
      for (int64_t k = g * a.group_size; k < last; k += 16) {
        const F scaled = S::mul(load_x<S>(inputs, k, a.num_inputs), inverse);
        const F clamped = S::min(S::max(scaled, lowest), highest);
        const U integer = S::sub_u(S::bits(S::add(clamped, magic)), S::bits(magic));
        if constexpr (kRowSums) sums = S::add_u(sums, integer);
        S::store_low8(x_q + at(k), integer);
      }
      if constexpr (kRowSums) {
        const int32_t sum = S::reduce_add(sums);
        call.row_sums[row * groups + g] = static_cast<uint32_t>(sum & 127) | static_cast<uint32_t>(sum >> 7) << 16;
      }
    }
    // what the last group leaves of the padding
    for (int64_t k = groups * a.group_size; k < padded_inputs(a); k += 16) S::store_low8(x_q + at(k), S::set_u(0));
  }
  return first_bad;
}

// kRowSums: a tile without signed weights needs the sums of the rows
template <class S, int64_t kTileRows = 1, bool kRowSums = true>
int64_t prepare_w4a8(const Int4LinearCall& call, int64_t begin, int64_t end) {
  if (call.args.dtype == MGT_FLOAT32)
    return prepare_w4a8<S, float, kTileRows, kRowSums>(call, static_cast<const float*>(call.args.x), begin, end);
  return prepare_w4a8<S, uint16_t, kTileRows, kRowSums>(call, static_cast<const uint16_t*>(call.args.x), begin, end);
}

// A thread's scratch: the panel, then per group and output the scale and what the tile makes of the zero point.
struct W4A8Scratch {
  uint8_t* panel;
  float* scale;
  int32_t* zero_point;
  // (rows of a block, 64) of results so far, and of sums
  float* results;
  int32_t* sums;

  W4A8Scratch(const mgt_int4_linear_args& a, void* scratch)
      : panel(static_cast<uint8_t*>(scratch)),
        scale(reinterpret_cast<float*>(panel + padded_inputs(a) * kPanelOutputs)),
        zero_point(reinterpret_cast<int32_t*>(scale + num_groups(a) * kPanelOutputs)),
        results(reinterpret_cast<float*>(zero_point + num_groups(a) * kPanelOutputs)),
        sums(reinterpret_cast<int32_t*>(results + kBlockElements)) {}
};

// Some groups of some rows, one group after the other: results += scale * (sum x_q w_q - zero_point sum x_q), in
// whatever way the tile has it.
struct W4A8Groups {
  const int8_t* x_q;
  int64_t x_stride;
  const uint32_t* row_sums;
  int64_t sums_stride;
  const uint8_t* panel;
  // the layer's
  int64_t group_size;
  // how many groups these are, their first input, and how many times 4 inputs they have
  int64_t num_groups, first_input, num_quads;
  // (num_groups, 64)
  const float* scale;
  const int32_t* zero_point;
  float* results;
  int32_t* sums;
};

template <class S, class Tile>
void multiply_w4a8(const Int4LinearCall& call, int64_t panel, int64_t begin, int64_t end, void* memory) {
  using U = typename S::U;
  const mgt_int4_linear_args& a = call.args;
  const int64_t groups = num_groups(a);
  const W4A8Scratch scratch(a, memory);
  load_groups<S>(a, panel, scratch.scale, scratch.zero_point);
  const typename Tile::Session session(a.group_size);

  const auto unpack = [&](int64_t strip) {
    for (int64_t column = 0; column < 4; ++column) {
      unpack_strip<S>(a, panel * kPanelOutputs + 16 * column, strip, [&](int64_t quad, const U* words) {
        auto* target = reinterpret_cast<uint32_t*>(scratch.panel) + quad * kPanelOutputs + 16 * column;
        if (!Tile::kSignedWeights) {
          for (int j = 0; j < 8; ++j) S::store_u(target + j * kPanelOutputs, words[j]);
          return;
        }
        // w_q - zero_point in each byte, without a borrow from the next
        const int64_t g = std::min(4 * quad / a.group_size, groups - 1);
        const U zero_point = S::load_u(scratch.zero_point + g * kPanelOutputs + 16 * column);
        const U high = S::set_u(0x80808080);
        for (int j = 0; j < 8; ++j)
          S::store_u(target + j * kPanelOutputs, S::bit_xor(S::sub_u(S::bit_or(words[j], high), zero_point), high));
      });
    }
  };
  for (int64_t i = 0; i < groups * kPanelOutputs; ++i) scratch.zero_point[i] = Tile::zero_point(scratch.zero_point[i]);

  // the first block of rows unpacks what it needs when it needs it; the others find the whole panel
  int64_t num_strips = 0;
  const int64_t at_once = Tile::num_groups(a.group_size);
  for (int64_t first = begin; first < end; first += Tile::kBlock) {
    const int64_t num_rows = std::min<int64_t>(Tile::kBlock, end - first);
    clear<S>(scratch.results, num_rows * kPanelOutputs);
    for (int64_t g = 0; g < groups; g += at_once) {
      const int64_t count = std::min(at_once, groups - g);
      const int64_t k = g * a.group_size;
      const int64_t last = std::min(k + count * a.group_size, padded_inputs(a));
      for (; num_strips * kStripInputs < last; ++num_strips) unpack(num_strips);
      const W4A8Groups some{
          static_cast<const int8_t*>(call.rows) + row_offset<int8_t, Tile::kTileRows>(first, k, call.row_stride),
          call.row_stride,
          call.row_sums + first * groups + g,
          groups,
          scratch.panel + k * kPanelOutputs,
          a.group_size,
          count,
          k,
          (last - k) / 4,
          scratch.scale + g * kPanelOutputs,
          scratch.zero_point + g * kPanelOutputs,
          scratch.results,
          scratch.sums};
      Tile::add(some, num_rows);
    }
    store_panel<S>(call, panel, first, num_rows, scratch.results, call.row_scale);
  }
  if (call.stream) S::fence();
}

// -zero_point (low + 128 high), in one multiply-add of 16-bit pairs with a row's sum
inline int32_t negated_zero_point(int32_t zero_point) {
  return static_cast<int32_t>(static_cast<uint32_t>(-zero_point & 0xffff) | static_cast<uint32_t>(-128 * zero_point)
                                                                                << 16);
}

}  // namespace
}  // namespace mgt
