// Sums of a group without a 32-bit dot product: pairs of products are added in 16 bits, eight of them at a time, which
// cannot overflow: 8 * 2 * 15 * 128 = 30720 < 2^15. L holds one vector's worth of outputs.
#pragma once

namespace mgt {
namespace {

template <class L, int kRows>
struct MaddubsTile {
  using Session = NoSession;
  using V = typename L::V;
  static constexpr bool kSignedWeights = false;
  static constexpr int64_t kTileRows = 1;
  static constexpr int64_t kBlock = 24;
  static int64_t num_groups(int64_t) { return 1; }
  static int32_t zero_point(int32_t value) { return negated_zero_point(value); }

  template <int R>
  static MGT_INLINE void add_rows(const W4A8Groups& group, int64_t first, int64_t column) {
    V sum[R][2];
    const V zero_point[2] = {L::load(group.zero_point + column), L::load(group.zero_point + column + L::kLanes)};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V row_sum = L::set(static_cast<int>(group.row_sums[(first + r) * group.sums_stride]));
      sum[r][0] = L::madd(zero_point[0], row_sum);
      sum[r][1] = L::madd(zero_point[1], row_sum);
    }
    const int8_t* x_q = group.x_q + first * group.x_stride;
    const uint8_t* panel = group.panel + 4 * column;
    for (int64_t quads = 0; quads < group.num_quads; quads += 8) {
      V pairs[R][2];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i, panel += 4 * kPanelOutputs, x_q += 4) {
        const V w0 = L::load(panel), w1 = L::load(panel + 4 * L::kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          int32_t word;
          std::memcpy(&word, x_q + r * group.x_stride, 4);
          const V x = L::set(word);
          pairs[r][0] = i == 0 ? L::maddubs(w0, x) : L::add16(pairs[r][0], L::maddubs(w0, x));
          pairs[r][1] = i == 0 ? L::maddubs(w1, x) : L::add16(pairs[r][1], L::maddubs(w1, x));
          MGT_HOLD(pairs[r][0]);
          MGT_HOLD(pairs[r][1]);
        }
      }
      const V ones = L::set(0x00010001);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        sum[r][0] = L::add32(sum[r][0], L::madd(pairs[r][0], ones));
        sum[r][1] = L::add32(sum[r][1], L::madd(pairs[r][1], ones));
        MGT_HOLD(sum[r][0]);
        MGT_HOLD(sum[r][1]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float* result = group.results + (first + r) * kPanelOutputs + column;
      L::add_scaled(group.scale + column, sum[r][0], result);
      L::add_scaled(group.scale + column + L::kLanes, sum[r][1], result + L::kLanes);
    }
  }

  static void add(const W4A8Groups& group, int64_t num_rows) {
    for (int64_t column = 0; column < kPanelOutputs; column += 2 * L::kLanes) {
      for_rows<kRows>(num_rows,
                      [&](auto rows, int64_t first) { add_rows<decltype(rows)::value>(group, first, column); });
    }
  }
};

}  // namespace
}  // namespace mgt
