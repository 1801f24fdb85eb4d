// mgt_differential_sample and its workspace query, over several steps.
#include "draw.h"

using namespace fuzz;

namespace {

struct Outputs {
  explicit Outputs(const Draw& draw)
      : history(draw.rows * draw.args.num_tokens),
        written(draw.rows),
        token_ids(draw.rows),
        logprob(draw.rows),
        divergence(draw.rows) {
    history.poison();
    written.poison();
  }
  Buffer<uint16_t> history;
  Buffer<uint8_t> written;
  Buffer<int64_t> token_ids;
  Buffer<float> logprob, divergence;

  bool same_bits(const Outputs& other) const {
    return history.same_bits(other.history) && written.same_bits(other.written) &&
           token_ids.same_bits(other.token_ids) && logprob.same_bits(other.logprob) &&
           divergence.same_bits(other.divergence);
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  mgt_context c = context(input);
  const unsigned state = float_state(input);
  mgt_differential_sample_args args{};
  args.variant = input.enumerator<mgt_differential_variant>(MGT_DIFFERENTIAL_OFFICIAL);
  args.aliased_history = input.rarely(4) ? input.any<int32_t>() : 0;
  args.share = input.rarely() ? static_cast<double>(input.number()) : input.one_of({0.0, 0.25, 0.5, 0.75, 1.0});
  Draw draw;
  const Verdict verdict = make_draw(input, MGT_ROWS_MASKED, draw);
  if (verdict == Verdict::skip) return -1;
  const mgt_sample_tokens_args& a = draw.args;
  Buffer<uint32_t> other_size(1), other_sample_size(1);
  args.sample = input.rarely(256) ? nullptr : sized_structure(input, draw.args, other_sample_size);
  const mgt_differential_sample_args* given = sized_structure(input, args, other_size);

  int64_t num_bytes = mgt_differential_sample_workspace(&c, given);
  ++counter.num_calls;
  const bool official = args.variant == MGT_DIFFERENTIAL_OFFICIAL;
  bool sized = given == &args && args.sample == &a && c.num_threads >= 1 && a.rows == MGT_ROWS_MASKED &&
               documented(a) && !truncates(a) && (official || args.variant == MGT_DIFFERENTIAL_PAPER) &&
               (official || !args.aliased_history) && args.share >= 0.0 && args.share <= 1.0;
  if (sized) sized = fits(Wide{a.num_samples} * a.num_positions * a.num_tokens * 2);
  REQUIRE(sized ? num_bytes >= 0 : num_bytes == -1);
  const bool refused = !sized || verdict == Verdict::refuse;
  const bool small = !refused && draw.rows > 0 && input.rarely();
  if (small) num_bytes = input.within(0, num_bytes - 1);
  if (refused) draw.rows = 0;
  if (num_bytes > (int64_t{1} << 24)) return -1;

  Buffer<char> workspace(std::max<int64_t>(0, num_bytes) + 1);
  char* memory = workspace.data() + 1;
  const auto run = [&](Outputs& outputs, int64_t* index) {
    outputs.token_ids.poison();
    outputs.logprob.poison();
    outputs.divergence.poison();
    return call_in(state, [&] {
      return mgt_differential_sample(&c, given, outputs.history.data(), outputs.written.data(),
                                     outputs.token_ids.data(), outputs.logprob.data(), outputs.divergence.data(),
                                     memory, num_bytes, index);
    });
  };
  if (refused || small || !available(c.isa)) {
    Buffer<uint16_t> history(0);
    int64_t index = -1;
    const mgt_status status = call_in(state, [&] {
      return mgt_differential_sample(&c, given, history.data(), nullptr, nullptr, nullptr, nullptr, memory, num_bytes,
                                     &index);
    });
    const bool empty = !refused && draw.rows == 0 && available(c.isa);
    REQUIRE(empty ? status == MGT_OK
                  : status == MGT_INVALID_ARGUMENT || (status == MGT_ISA_UNAVAILABLE && !available(c.isa)));
    return 0;
  }

  static const std::vector<mgt_isa> kernels = kernels_of("differential_sample");
  std::vector<mgt_isa> isas = {MGT_ISA_SCALAR};
  isas.insert(isas.end(), kernels.begin(), kernels.end());
  std::vector<std::unique_ptr<Outputs>> outputs;
  for (size_t i = 0; i < isas.size(); ++i) outputs.push_back(std::make_unique<Outputs>(draw));
  const auto reads = [&](int64_t row) { return official || masked(draw, row); };
  const int64_t num_steps = input.within(1, 4);
  for (int64_t step = 0; step < num_steps; ++step) {
    args.has_history = step > 0;
    draw.args.step = std::min<int64_t>(UINT32_MAX, a.step + step);
    mgt_status first = MGT_OK;
    int64_t first_index = -1;
    for (size_t i = 0; i < isas.size(); ++i) {
      c.isa = isas[i];
      int64_t index = -1;
      const mgt_status status = run(*outputs[i], &index);
      if (i == 0) {
        first = status;
        first_index = index;
        check_draw(draw, status, index, -1, outputs[0]->token_ids, outputs[0]->logprob.data(), reads);
      }
      REQUIRE(status == first && index == first_index);
      if (status != MGT_OK) continue;
      REQUIRE(outputs[i]->same_bits(*outputs[0]));
    }
    // outputs, history and written are unspecified now
    if (first != MGT_OK) return 0;
    for (int64_t row = 0; row < draw.rows; ++row) {
      REQUIRE(outputs[0]->written[row] == reads(row));
      // the difference of two logarithms is rounded, so it may be a little below 0
      REQUIRE(outputs[0]->divergence[row] >= -1e-2f);
      if (step == 0 || !reads(row)) REQUIRE(outputs[0]->divergence[row] == INFINITY);
    }
    // the next step sees other logits where some are known by now
    for (int64_t row = 0; row < draw.rows; ++row)
      if (masked(draw, row) && input.rarely(4) && in_codebook(a, outputs[0]->token_ids[row]))
        (*draw.tokens)[row] = outputs[0]->token_ids[row];
    const int64_t num = draw.cond.memory ? draw.cond.memory->size() / element_bytes(a.dtype) : 0;
    if (input.coin()) fill(input, draw.cond.memory ? draw.cond.memory->data() : nullptr, num, a.dtype);
  }
  return 0;
}
