// w4a16_linear, written once against the lanes of simd_*.h but for its innermost loop, a Tile.
//
// Bound by: the bfloat16 (or float32) multiplications, 2 M N K. The weights of a panel are dequantized once for all
// rows. Every tile adds the products of an output in the order of the inputs, so a row's result does not depend on how
// the rows are cut into blocks.
#pragma once

namespace mgt {
namespace {

// Row is uint16_t (bfloat16) or float (a bfloat16, widened)
template <class S, class Row, class X, int64_t kTileRows>
int64_t prepare_w4a16(const Int4LinearCall& call, const X* x, int64_t begin, int64_t end) {
  using U = typename S::U;
  const mgt_int4_linear_args& a = call.args;
  int64_t first_bad = -1;
  for (int64_t row = begin; row < end; ++row) {
    const X* inputs = x + row * a.x_stride;
    // half a unit above the largest bfloat16, from which on all round to infinity
    if (largest_magnitude<S>(inputs, a.num_inputs) >= 0x7f7f8000 && first_bad < 0) first_bad = row;
    for (int64_t k = 0; k < padded_inputs(a); k += 16) {
      const U rounded = bfloat16_bits<S>(load_x<S>(inputs, k, a.num_inputs));
      Row* target = static_cast<Row*>(call.rows) + row_offset<Row, kTileRows>(row, k, call.row_stride);
      if constexpr (sizeof(Row) == 2)
        S::store_low16(target, rounded);
      else
        S::store(target, S::from_bits(S::template shift_left<16>(rounded)));
    }
  }
  return first_bad;
}

template <class S, class Row, int64_t kTileRows = 1>
int64_t prepare_w4a16(const Int4LinearCall& call, int64_t begin, int64_t end) {
  const mgt_int4_linear_args& a = call.args;
  if (a.dtype == MGT_FLOAT32)
    return prepare_w4a16<S, Row, float, kTileRows>(call, static_cast<const float*>(a.x), begin, end);
  return prepare_w4a16<S, Row, uint16_t, kTileRows>(call, static_cast<const uint16_t*>(a.x), begin, end);
}

// num_pairs pairs of inputs of some rows: results += x w, pair after pair
template <class Row>
struct W4A16Pairs {
  const Row* x;
  int64_t x_stride;
  // (pairs, 64): the bfloat16 of two inputs in a word, the first in its low half
  const uint32_t* panel;
  int64_t num_pairs;
  // (rows, 64)
  float* results;
};

template <class S, class Tile>
void multiply_w4a16(const Int4LinearCall& call, int64_t panel, int64_t begin, int64_t end, void* memory) {
  using F = typename S::F;
  using U = typename S::U;
  using Row = typename Tile::Row;
  const mgt_int4_linear_args& a = call.args;
  const int64_t groups = num_groups(a);
  auto* weights = static_cast<uint32_t*>(memory);
  float* scale = reinterpret_cast<float*>(weights + padded_inputs(a) / 2 * kPanelOutputs);
  auto* zero_point = reinterpret_cast<int32_t*>(scale + groups * kPanelOutputs);
  float* results = reinterpret_cast<float*>(zero_point + groups * kPanelOutputs);
  load_groups<S>(a, panel, scale, zero_point);
  const typename Tile::Session session(64);

  const U low = S::set_u(15);
  const auto unpack = [&](int64_t strip) {
    for (int64_t column = 0; column < 4; ++column) {
      unpack_strip<S>(a, panel * kPanelOutputs + 16 * column, strip, [&](int64_t quad, const U* words) {
        const int64_t index = std::min(4 * quad / a.group_size, groups - 1) * kPanelOutputs + 16 * column;
        const F group_scale = S::load(scale + index);
        const U group_zero = S::load_u(zero_point + index);
        const auto weight = [&](U w_q) { return S::mul(S::int_to_float(S::sub_u(w_q, group_zero)), group_scale); };
        for (int j = 0; j < 8; ++j) {
          uint32_t* pair = weights + 2 * (quad + j) * kPanelOutputs + 16 * column;
          const U word = words[j];
          const F w0 = weight(S::bit_and(word, low));
          const F w1 = weight(S::bit_and(S::template shift_right<8>(word), low));
          S::store_u(pair, Tile::pack(w0, w1));
          const F w2 = weight(S::bit_and(S::template shift_right<16>(word), low));
          const F w3 = weight(S::template shift_right<24>(word));
          S::store_u(pair + kPanelOutputs, Tile::pack(w2, w3));
        }
      });
    }
  };

  // the first block of rows unpacks what it needs when it needs it; the others find the whole panel
  const int64_t all = padded_inputs(a);
  int64_t unpacked = 0;
  for (int64_t first = begin; first < end; first += Tile::kBlock) {
    const int64_t num_rows = std::min<int64_t>(Tile::kBlock, end - first);
    clear<S>(results, num_rows * kPanelOutputs);
    // strip by strip, which stays in the first-level cache for all rows of the block
    for (int64_t k = 0; k < all; k += kStripInputs) {
      const int64_t last = std::min(k + kStripInputs, all);
      for (; unpacked < last; unpacked += kStripInputs) unpack(unpacked / kStripInputs);
      const W4A16Pairs<Row> pairs{
          static_cast<const Row*>(call.rows) + row_offset<Row, Tile::kTileRows>(first, k, call.row_stride),
          call.row_stride, weights + k / 2 * kPanelOutputs, (last - k) / 2, results};
      Tile::add(pairs, num_rows);
    }
    store_panel<S>(call, panel, first, num_rows, results, nullptr);
  }
  if (call.stream) S::fence();
}

// two float32 multiply-adds per pair, kRows rows and kVectors times 16 outputs at a time
template <class S, int kRows, int kVectors>
struct FloatTile {
  using F = typename S::F;
  using U = typename S::U;
  using Row = float;
  using Session = NoSession;
  static constexpr int64_t kBlock = 24;
  static constexpr int64_t kTileRows = 1;
  static MGT_INLINE U pack(F first, F second) {
    return S::bit_or(bfloat16_bits<S>(first), S::template shift_left<16>(bfloat16_bits<S>(second)));
  }

  template <int R>
  static MGT_INLINE void add_rows(const W4A16Pairs<float>& pairs, int64_t first, int64_t column) {
    F sum[R][kVectors];
    float* results = pairs.results + first * kPanelOutputs + column;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) sum[r][c] = S::load(results + r * kPanelOutputs + 16 * c);
    const float* x = pairs.x + first * pairs.x_stride;
    const uint32_t* panel = pairs.panel + column;
    for (int64_t pair = 0; pair < pairs.num_pairs; ++pair, panel += kPanelOutputs, x += 2) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        F w[kVectors];
#pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c) {
          const U words = S::load_u(panel + 16 * c);
          w[c] = S::from_bits(half == 0 ? S::template shift_left<16>(words) : S::bit_and(words, S::set_u(0xffff0000)));
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const F input = S::set(x[r * pairs.x_stride + half]);
#pragma GCC unroll 4
          for (int c = 0; c < kVectors; ++c) sum[r][c] = S::fma(w[c], input, sum[r][c]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c) S::hold(sum[r][c]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) S::store(results + r * kPanelOutputs + 16 * c, sum[r][c]);
  }

  static void add(const W4A16Pairs<float>& pairs, int64_t num_rows) {
    for (int64_t column = 0; column < kPanelOutputs; column += 16 * kVectors) {
      for_rows<kRows>(num_rows,
                      [&](auto rows, int64_t first) { add_rows<decltype(rows)::value>(pairs, first, column); });
    }
  }
};

}  // namespace
}  // namespace mgt
