// A C++ program on the library, which lends it the threads of its own OpenMP: prints token ids, and then an int4 layer.
#include <mgt_kernels.h>

#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

void run_on_openmp(void (*body)(void*), void* data, unsigned num_threads, unsigned) {
#pragma omp parallel num_threads(num_threads)
  body(data);
}

void check(mgt_status status) {
  if (status != MGT_OK) throw std::runtime_error("status " + std::to_string(status));
}

}  // namespace

int main() {
  const mgt_context context{MGT_ISA_AUTO, 2, run_on_openmp};
  constexpr int64_t kPositions = 5, kTokens = 40;
  std::vector<float> logits(kPositions * kTokens);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i % 7) * 0.5f;
  const std::vector<int64_t> tokens(kPositions, kTokens);
  const int64_t seed = 7;
  mgt_sample_tokens_args draw{};
  draw.struct_size = sizeof draw;
  draw.num_samples = 1;
  draw.num_positions = kPositions;
  draw.num_tokens = kTokens;
  draw.dtype = MGT_FLOAT32;
  draw.logits = {logits.data(), kPositions * kTokens, kTokens, 1};
  draw.tokens = tokens.data();
  draw.seeds = &seed;
  draw.mask_token_id = kTokens;
  draw.temperature = 1.0f;
  std::vector<int64_t> token_ids(kPositions);
  mgt_sample_tokens_outputs outputs{};
  outputs.struct_size = sizeof outputs;
  outputs.token_ids = token_ids.data();
  std::vector<char> workspace(static_cast<size_t>(mgt_sample_tokens_workspace(&context, &draw)));
  check(
      mgt_sample_tokens(&context, &draw, &outputs, workspace.data(), static_cast<int64_t>(workspace.size()), nullptr));
  for (const int64_t id : token_ids) std::printf("%d\n", static_cast<int>(id));

  // 3 rows of 64 inputs to 2 outputs
  std::vector<float> x(3 * 64), y(3 * 2);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 11) - 5.0f;
  std::vector<uint8_t> w_q(2 * 32);
  for (size_t i = 0; i < w_q.size(); ++i) w_q[i] = static_cast<uint8_t>(37 * i);
  const std::vector<float> scale{0.5f, 0.25f};
  const std::vector<uint8_t> zero_point{7, 8};
  mgt_int4_linear_args layer{};
  layer.struct_size = sizeof layer;
  layer.num_rows = 3;
  layer.num_inputs = 64;
  layer.num_outputs = 2;
  layer.dtype = layer.scale_dtype = MGT_FLOAT32;
  layer.x = x.data();
  layer.x_stride = 64;
  layer.w_q = w_q.data();
  layer.scale = scale.data();
  layer.zero_point = zero_point.data();
  layer.group_size = 64;
  workspace.resize(static_cast<size_t>(mgt_w4a8_linear_workspace(&context, &layer)));
  check(mgt_w4a8_linear(&context, &layer, nullptr, 0, y.data(), workspace.data(),
                        static_cast<int64_t>(workspace.size()), nullptr));
  for (const float value : y) std::printf("%a\n", value);
  workspace.resize(static_cast<size_t>(mgt_w4a16_linear_workspace(&context, &layer)));
  check(
      mgt_w4a16_linear(&context, &layer, y.data(), workspace.data(), static_cast<int64_t>(workspace.size()), nullptr));
  for (const float value : y) std::printf("%a\n", value);
}
