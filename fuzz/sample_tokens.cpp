// mgt_sample_tokens and its workspace query.
#include "draw.h"

using namespace fuzz;

namespace {

constexpr int kNumStatistics = 7;

// what is asked for, each in memory of its own
struct Outputs {
  // asked: a bit for argmax, then one for each of the floats
  Outputs(int64_t rows, unsigned asked) : token_ids(rows), argmax(asked & 1 ? rows : 0) {
    view.struct_size = sizeof view;
    view.token_ids = token_ids.data();
    if (asked & 1) view.argmax = argmax.data();
    float** const pointers[kNumStatistics] = {&view.logprob,   &view.max_logprob,   &view.margin, &view.entropy,
                                              &view.logsumexp, &view.known_logprob, &view.logit};
    for (int i = 0; i < kNumStatistics; ++i) {
      const bool is_asked = asked >> (i + 1) & 1;
      floats.push_back(std::make_unique<Buffer<float>>(is_asked ? rows : 0));
      if (is_asked) *pointers[i] = floats[i]->data();
    }
  }

  void poison() {
    token_ids.poison();
    argmax.poison();
    for (const auto& statistic : floats) statistic->poison();
  }

  // whether all that this holds is in the other too
  bool same_bits(const Outputs& other) const {
    bool same = token_ids.same_bits(other.token_ids) && (argmax.size() == 0 || argmax.same_bits(other.argmax));
    for (int i = 0; i < kNumStatistics; ++i) same &= floats[i]->size() == 0 || floats[i]->same_bits(*other.floats[i]);
    return same;
  }

  Buffer<int64_t> token_ids, argmax;
  std::vector<std::unique_ptr<Buffer<float>>> floats;
  mgt_sample_tokens_outputs view{};
};

bool is_read(const Draw& draw, int64_t row) {
  return draw.args.rows == MGT_ROWS_ALL || masked(draw, row) == (draw.args.rows == MGT_ROWS_MASKED);
}

// what the header says of the outputs of a draw that was taken, but for token_ids and logprob
void check_statistics(const Draw& draw, const Outputs& outputs) {
  const mgt_sample_tokens_outputs& view = outputs.view;
  const float most_nats = std::log(static_cast<float>(draw.args.num_tokens)) + 1e-3f;
  const auto within = [](const float* value, int64_t row, float low, float high) {
    return value == nullptr || (value[row] >= low && value[row] <= high);
  };
  const auto absent = [](const float* value, int64_t row) { return value == nullptr || value[row] == INFINITY; };
  for (int64_t row = 0; row < draw.rows; ++row) {
    if (!is_read(draw, row)) {
      for (const float* value :
           {view.max_logprob, view.margin, view.entropy, view.logsumexp, view.known_logprob, view.logit})
        REQUIRE(absent(value, row));
      REQUIRE(view.argmax == nullptr || view.argmax[row] == (*draw.tokens)[row]);
      continue;
    }
    REQUIRE(within(view.max_logprob, row, -most_nats, 1e-3f));
    REQUIRE(within(view.margin, row, 0.0f, 1.0f));
    REQUIRE(within(view.entropy, row, 0.0f, most_nats));
    REQUIRE(view.logsumexp == nullptr || std::isfinite(view.logsumexp[row]));
    if (view.argmax != nullptr)
      REQUIRE(in_codebook(draw.args, view.argmax[row]) && !forbidden(draw, row, view.argmax[row]));
    if (!masked(draw, row)) {
      // -inf where the known token is forbidden
      REQUIRE(within(view.known_logprob, row, -INFINITY, 1e-3f) && absent(view.logit, row));
      continue;
    }
    REQUIRE(absent(view.known_logprob, row) && (view.logit == nullptr || !std::isnan(view.logit[row])));
    if (view.logprob != nullptr && view.max_logprob != nullptr) REQUIRE(view.logprob[row] <= view.max_logprob[row]);
    if (draw.args.temperature == 0.0f && view.argmax != nullptr) REQUIRE(view.argmax[row] == view.token_ids[row]);
  }
}

// what top_k says of the tokens that are drawn from logits as they are
void check_top_k(const Draw& draw, const Outputs& outputs) {
  const mgt_sample_tokens_args& a = draw.args;
  if (a.uncond_logits.data != nullptr || a.token_bias != nullptr || a.noise_scale != 0.0f || a.softcap != 0.0f ||
      (a.temperature != 0.0f && a.temperature != 1.0f) || a.top_k == 0)
    return;
  for (int64_t row = 0; row < draw.rows; ++row) {
    if (!is_read(draw, row) || !masked(draw, row)) continue;
    const float drawn = logit(draw, a.logits, row, outputs.token_ids[row]);
    int64_t num_larger = 0;
    for (int64_t v = 0; v < a.num_tokens; ++v)
      num_larger += v != a.mask_token_id && logit(draw, a.logits, row, v) > drawn;
    REQUIRE(num_larger < a.top_k);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  mgt_context c = context(input);
  const unsigned state = float_state(input);
  Draw draw;
  const Verdict verdict = make_draw(input, MGT_ROWS_ALL, draw);
  if (verdict == Verdict::skip) return -1;
  Buffer<uint32_t> other_size(1), other_outputs_size(1);
  const mgt_sample_tokens_args* args = input.rarely(256) ? nullptr : sized_structure(input, draw.args, other_size);
  const mgt_context* where = input.rarely(256) ? nullptr : &c;

  int64_t num_bytes = mgt_sample_tokens_workspace(where, args);
  ++counter.num_calls;
  const bool sized = args == &draw.args && where && c.num_threads >= 1 && documented(draw.args);
  REQUIRE(sized ? num_bytes >= 0 && num_bytes < (int64_t{1} << 32) : num_bytes == -1);
  bool refused = !sized || verdict == Verdict::refuse;
  const bool small = !refused && draw.rows > 0 && input.rarely();
  if (small) num_bytes = input.within(0, num_bytes - 1);

  // most often one or two of them
  const auto asked = static_cast<unsigned>(input.any<uint8_t>() & (input.coin() ? 0xff : input.any<uint8_t>()));
  Outputs first_outputs(draw.rows, asked), outputs(draw.rows, asked);
  const mgt_sample_tokens_outputs* given =
      input.rarely(256) ? nullptr : sized_structure(input, first_outputs.view, other_outputs_size);
  refused |= given != &first_outputs.view;
  if (draw.rows > 0 && input.rarely(256)) {
    first_outputs.view.token_ids = nullptr;
    refused = true;
  }
  Buffer<char> workspace(std::max<int64_t>(0, num_bytes) + 1);
  // a workspace may have any alignment
  char* memory = workspace.data() + 1;
  const auto run = [&](const mgt_sample_tokens_outputs* into, int64_t* index) {
    return call_in(state, [&] { return mgt_sample_tokens(where, args, into, memory, num_bytes, index); });
  };
  first_outputs.poison();
  int64_t first_index = -1;
  const mgt_status first = run(given, &first_index);
  if (refused || small || !available(c.isa)) {
    REQUIRE(first == MGT_INVALID_ARGUMENT || (first == MGT_ISA_UNAVAILABLE && !available(c.isa)));
    return 0;
  }
  const bool asks_known = first_outputs.view.known_logprob != nullptr && draw.args.rows != MGT_ROWS_MASKED;
  const int64_t misplaced = asks_known ? bad_token(draw) : -1;
  check_draw(draw, first, first_index, misplaced, first_outputs.token_ids, first_outputs.view.logprob,
             [&](int64_t row) { return is_read(draw, row); });
  if (first == MGT_OK) {
    check_statistics(draw, first_outputs);
    check_top_k(draw, first_outputs);
  }

  static const std::vector<mgt_isa> isas = kernels_of("sample_tokens");
  for (const mgt_isa isa : isas) {
    c.isa = isa;
    int64_t index = -1;
    outputs.poison();
    REQUIRE(run(&outputs.view, &index) == first && index == first_index);
    if (first == MGT_OK) REQUIRE(first_outputs.same_bits(outputs));
  }
  // what is not asked for changes nothing of what is
  if (first == MGT_OK && (draw.args.rows == MGT_ROWS_MASKED || bad_token(draw) < 0)) {
    Outputs all(draw.rows, 0xff);
    all.poison();
    REQUIRE(run(&all.view, nullptr) == MGT_OK && first_outputs.same_bits(all));
    check_statistics(draw, all);
  }
  return 0;
}
