// mgt_sample_tokens and its workspace query.
#include "draw.h"

using namespace fuzz;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  mgt_context c = context(input);
  const unsigned state = float_state(input);
  Draw draw;
  const Verdict verdict = make_draw(input, draw);
  if (verdict == Verdict::skip) return -1;
  const mgt_sample_tokens_args* args = input.rarely(256) ? nullptr : &draw.args;
  const mgt_context* where = input.rarely(256) ? nullptr : &c;

  int64_t num_bytes = mgt_sample_tokens_workspace(where, args);
  ++counter.num_calls;
  const bool sized =
      args && where && c.num_threads >= 1 && documented(draw.args, draw.args.uncond_logits.data != nullptr);
  REQUIRE(sized ? num_bytes >= 0 && num_bytes < (int64_t{1} << 32) : num_bytes == -1);
  const bool refused = !sized || verdict == Verdict::refuse;
  const bool small = !refused && draw.rows > 0 && input.rarely();
  if (small) num_bytes = input.within(0, num_bytes - 1);

  Buffer<int64_t> token_ids(draw.rows), first_ids(draw.rows);
  Buffer<float> logprob(draw.rows), first_logprob(draw.rows);
  Buffer<char> workspace(std::max<int64_t>(0, num_bytes) + 1);
  // a workspace may have any alignment
  char* memory = workspace.data() + 1;
  const auto run = [&](Buffer<int64_t>& ids, Buffer<float>& nats, int64_t* index) {
    ids.poison();
    nats.poison();
    return call_in(state,
                   [&] { return mgt_sample_tokens(where, args, ids.data(), nats.data(), memory, num_bytes, index); });
  };
  int64_t first_index = -1;
  const mgt_status first = run(first_ids, first_logprob, &first_index);
  if (refused || small || !available(c.isa)) {
    REQUIRE(first == MGT_INVALID_ARGUMENT || (first == MGT_ISA_UNAVAILABLE && !available(c.isa)));
    return 0;
  }
  check_draw(draw, first, first_index, first_ids, first_logprob, [&](int64_t row) { return masked(draw, row); });

  static const std::vector<mgt_isa> isas = kernels_of("sample_tokens");
  for (const mgt_isa isa : isas) {
    c.isa = isa;
    int64_t index = -1;
    REQUIRE(run(token_ids, logprob, &index) == first && index == first_index);
    if (first == MGT_OK) REQUIRE(token_ids.same_bits(first_ids) && logprob.same_bits(first_logprob));
  }
  return 0;
}
