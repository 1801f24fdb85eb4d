#include "isa.h"
#include "w4a8_linear/op.h"

#include "simd_scalar.h"
#include "halves.h"
#include "int4_linear/panel.h"
#include "w4a8_linear/body.h"

namespace mgt {
namespace {

struct ScalarTile {
  using Session = NoSession;
  static constexpr bool kSignedWeights = false;
  static constexpr int64_t kBlock = 1;
  static constexpr int64_t kTileRows = 1;
  static int64_t num_groups(int64_t) { return 1; }
  static int32_t zero_point(int32_t value) { return value; }
  static void add(const W4A8Groups& group, int64_t) {
    const auto sum =
        static_cast<int32_t>(group.row_sums[0] & 127) + 128 * static_cast<int16_t>(group.row_sums[0] >> 16);
    for (int64_t n = 0; n < kPanelOutputs; ++n) group.sums[n] = -group.zero_point[n] * sum;
    for (int64_t quad = 0; quad < group.num_quads; ++quad)
      for (int64_t n = 0; n < kPanelOutputs; ++n)
        for (int64_t i = 0; i < 4; ++i)
          group.sums[n] += group.panel[(quad * kPanelOutputs + n) * 4 + i] * group.x_q[quad * 4 + i];
    for (int64_t n = 0; n < kPanelOutputs; ++n)
      group.results[n] = __builtin_fmaf(group.scale[n], static_cast<float>(group.sums[n]), group.results[n]);
  }
};

}  // namespace

const Int4LinearKernel w4a8_linear_scalar = {prepare_w4a8<Scalar16>, multiply_w4a8<Scalar16, ScalarTile>, 1, 1};

}  // namespace mgt
