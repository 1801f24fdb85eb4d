// mgt_mask_by_confidence.
#include <memory>

#include "fuzz.h"

using namespace fuzz;

namespace {

constexpr int64_t kMostRows = 4096;

// a temperature: ordinary, or up to the largest float
float any_temperature(Input& input) {
  switch (input.within(0, 3)) {
    case 0: return input.number();
    case 1:
      return std::ldexp(1.0f + static_cast<float>(input.within(0, 255)) / 256.0f,
                        static_cast<int>(input.within(80, 127)));
    default: return input.one_of<float>({0.0f, 1.0f, 2.0f, 10.5f, 1e-40f});
  }
}

bool documented(const mgt_mask_by_confidence_args& a) {
  return a.num_samples >= 0 && a.num_positions >= 0 && a.num_positions <= UINT32_MAX && a.step >= 0 &&
         a.step <= UINT32_MAX && a.temperature >= 0.0f && std::isfinite(a.temperature) &&
         fits(a.num_samples, std::max<int64_t>(1, a.num_positions), 8);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  mgt_context c = context(input);
  const unsigned state = float_state(input);
  mgt_mask_by_confidence_args a{};
  a.struct_size = sizeof a;
  a.num_samples = input.size(0, 4);
  a.num_positions = input.size(0, input.rarely(16) ? 300 : 20);
  a.mask_token_id = input.rarely(4) ? input.hostile() : 500;
  a.step = input.size(0, 1000);
  a.temperature = any_temperature(input);
  int64_t index = -1;
  if (!documented(a) || c.num_threads < 1) {
    static const char somewhere = 0;
    a.token_ids = a.mask_len = a.seeds = reinterpret_cast<const int64_t*>(&somewhere);
    a.logprob = reinterpret_cast<const float*>(&somewhere);
    const mgt_status status = call_in(state, [&] { return mgt_mask_by_confidence(&c, &a, nullptr, &index); });
    REQUIRE(status == MGT_INVALID_ARGUMENT);
    return 0;
  }
  if (a.num_samples > 64 || Wide{a.num_samples} * a.num_positions > kMostRows) return -1;
  const int64_t rows = a.num_samples * a.num_positions;

  Buffer<int64_t> token_ids(rows), mask_len(a.num_samples), seeds(a.num_samples), tokens(rows), first_tokens(rows);
  Buffer<float> logprob(rows);
  fill(input, logprob.data(), rows, MGT_FLOAT32);
  const int64_t every = input.within(1, 8);
  for (int64_t i = 0; i < rows; ++i) {
    token_ids[i] = i % 400;
    if (i % every == 1) logprob[i] = INFINITY;
    // most hosts have none, and one ends the call
    if (std::isnan(logprob[i]) && !input.rarely(4)) logprob[i] = -INFINITY;
  }
  std::vector<int64_t> num_masked(static_cast<size_t>(a.num_samples));
  mgt_status expected = MGT_OK;
  int64_t expected_index = -1;
  for (int64_t b = 0; b < a.num_samples; ++b) {
    int64_t& count = num_masked[static_cast<size_t>(b)];
    for (int64_t i = b * a.num_positions; i < (b + 1) * a.num_positions; ++i) {
      if (std::isnan(logprob[i]) && expected == MGT_OK) {
        expected = MGT_BAD_LOGPROB;
        expected_index = i;
      }
      count += logprob[i] != INFINITY;
    }
    seeds[b] = input.any<int64_t>();
    mask_len[b] = input.rarely() ? input.hostile() : input.coin() ? count : input.within(0, count);
    if ((mask_len[b] < 0 || mask_len[b] > count) && expected == MGT_OK) {
      expected = MGT_BAD_MASK_LEN;
      expected_index = b;
    }
  }
  a.token_ids = token_ids.data();
  a.logprob = logprob.data();
  a.mask_len = mask_len.data();
  a.seeds = seeds.data();

  const auto run = [&](Buffer<int64_t>& out) {
    out.poison();
    index = -1;
    return call_in(state, [&] { return mgt_mask_by_confidence(&c, &a, out.data(), &index); });
  };
  const mgt_status first = run(first_tokens);
  if (!available(c.isa)) {
    REQUIRE(first == MGT_ISA_UNAVAILABLE);
    return 0;
  }
  REQUIRE(first == expected && index == expected_index);
  if (first == MGT_OK) {
    for (int64_t b = 0; b < a.num_samples; ++b) {
      int64_t count = 0;
      // with no noise nothing that is masked is more confident than anything that is kept
      float most_confident = -INFINITY, least_kept = INFINITY;
      for (int64_t i = b * a.num_positions; i < (b + 1) * a.num_positions; ++i) {
        const bool masked = first_tokens[i] == a.mask_token_id && (a.mask_token_id != token_ids[i]);
        if (!masked) REQUIRE(first_tokens[i] == token_ids[i]);
        if (masked) REQUIRE(logprob[i] != INFINITY);
        count += masked;
        if (masked)
          most_confident = std::max(most_confident, logprob[i]);
        else
          least_kept = std::min(least_kept, logprob[i]);
      }
      if (a.mask_token_id >= 400 || a.mask_token_id < 0) {
        REQUIRE(count == mask_len[b]);
        if (a.temperature == 0.0f) REQUIRE(count == 0 || most_confident <= least_kept);
      }
    }
  }
  static const std::vector<mgt_isa> isas = kernels_of("mask_by_confidence");
  for (const mgt_isa isa : isas) {
    c.isa = isa;
    REQUIRE(run(tokens) == first && index == expected_index);
    if (first == MGT_OK) REQUIRE(tokens.same_bits(first_tokens));
  }
  return 0;
}
