// mgt_commit_tokens.
#include <memory>

#include "fuzz.h"

using namespace fuzz;

namespace {

constexpr int64_t kMostRows = 4096;
// of what is drawn, unless the mask is one of these
constexpr int64_t kTokens = 400;

bool documented(const mgt_commit_tokens_args& a) {
  const bool any_value = a.rule == MGT_COMMIT_COUNT, any_sign = any_value || a.rule == MGT_COMMIT_THRESHOLD;
  return a.num_samples >= 0 && a.num_positions >= 0 && a.num_positions <= UINT32_MAX && a.step >= 0 &&
         a.step <= UINT32_MAX && a.temperature >= 0.0f && std::isfinite(a.temperature) && a.rule >= MGT_COMMIT_COUNT &&
         a.rule <= MGT_COMMIT_ENTROPY_BOUND && (any_value || std::isfinite(a.value)) && (any_sign || a.value >= 0.0f) &&
         (a.rule != MGT_COMMIT_ENTROPY_BOUND || a.num_positions <= int64_t{1} << 20) && !std::isnan(a.replace_above) &&
         !std::isnan(a.mask_below) && (a.argmax == nullptr) == (a.max_logprob == nullptr) &&
         fits(a.num_samples, std::max<int64_t>(1, a.num_positions), 8);
}

struct Outputs {
  Outputs(int64_t rows, int64_t samples, bool asks_done) : tokens(rows), done(asks_done ? samples : 0) {
    view.struct_size = sizeof view;
    view.tokens = tokens.data();
    view.done = asks_done ? done.data() : nullptr;
  }
  void poison() {
    tokens.poison();
    done.poison();
  }
  Buffer<int64_t> tokens;
  Buffer<uint8_t> done;
  mgt_commit_tokens_outputs view{};
};

struct Rows {
  explicit Rows(int64_t rows) : ids(rows), floats(rows) {}
  Buffer<int64_t> ids;
  Buffer<float> floats;
};

// what is known of one sample before it is decided
struct Window {
  int64_t start, end, num_competing = 0;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  mgt_context c = context(input);
  const unsigned state = float_state(input);
  mgt_commit_tokens_args a{};
  a.rule = input.enumerator<mgt_commit_rule>(MGT_COMMIT_ENTROPY_BOUND);
  a.num_samples = input.size(0, 4);
  a.num_positions = input.size(0, input.rarely(16) ? 300 : 20);
  a.mask_token_id = input.rarely(4) ? input.hostile() : 500;
  a.step = input.size(0, 1000);
  a.value = input.scalar({0.0f, 0.5f, 1.0f, 3.0f, -1.0f});
  a.temperature = input.scalar({0.0f, 0.0f, 1.0f, 10.5f, 1e38f});
  const bool replaces = input.coin(), masks = input.coin(), windows = input.coin(), asks_done = !input.rarely(4);
  a.replace_above = input.scalar({-1.0f, 0.0f, -INFINITY, INFINITY});
  a.mask_below = input.scalar({-1.0f, -2.0f, INFINITY, -INFINITY});
  Buffer<uint32_t> other_size(1), other_outputs_size(1);
  int64_t index = -1;
  const bool small = a.num_samples <= 64 && Wide{a.num_samples} * a.num_positions <= kMostRows;
  if (documented(a) && !small) return -1;
  if (!documented(a) || c.num_threads < 1) {
    static const int64_t somewhere = 0;
    a.struct_size = sizeof a;
    a.token_ids = a.tokens = a.counts = a.seeds = &somewhere;
    a.score = reinterpret_cast<const float*>(&somewhere);
    Outputs none(0, 0, false);
    REQUIRE(call_in(state, [&] { return mgt_commit_tokens(&c, &a, &none.view, &index); }) == MGT_INVALID_ARGUMENT);
    return 0;
  }
  const int64_t rows = a.num_samples * a.num_positions;

  Rows drawn(rows), best(rows), known(rows);
  Buffer<int64_t> tokens(rows), counts(a.num_samples), starts(a.num_samples), ends(a.num_samples), seeds(a.num_samples);
  for (Rows* each : {&drawn, &best, &known}) fill(input, each->floats.data(), rows, MGT_FLOAT32);
  const int64_t every = input.within(1, 8);
  const bool as_entropy = a.rule == MGT_COMMIT_ENTROPY_BOUND && input.coin();
  for (int64_t i = 0; i < rows; ++i) {
    drawn.ids[i] = i % kTokens;
    best.ids[i] = i % 3 ? i % kTokens : i % 7;
    tokens[i] = i % every == 1 ? i % 7 : a.mask_token_id;
    if (as_entropy) drawn.floats[i] = std::fabs(drawn.floats[i]);
    // most hosts have none, and one ends the call
    if (std::isnan(drawn.floats[i]) && !input.rarely(4)) drawn.floats[i] = -INFINITY;
  }
  mgt_status expected = MGT_OK;
  int64_t expected_index = -1;
  const auto expect = [&](mgt_status status, int64_t where) {
    if (expected != MGT_OK) return;
    expected = status;
    expected_index = where;
  };
  std::vector<Window> found;
  for (int64_t b = 0; b < a.num_samples; ++b) {
    starts[b] = windows ? input.within(0, a.num_positions) : 0;
    ends[b] = windows ? input.within(starts[b], a.num_positions) : a.num_positions;
    if (windows && input.rarely(64)) (input.coin() ? starts : ends)[b] = input.hostile();
    if (starts[b] < 0 || starts[b] > ends[b] || ends[b] > a.num_positions) expect(MGT_BAD_WINDOW, b);
    found.push_back({starts[b], ends[b]});
    seeds[b] = input.any<int64_t>();
  }
  // all windows are looked at before any score
  const bool bad_window = expected != MGT_OK;
  for (int64_t b = 0; b < a.num_samples; ++b) {
    Window& window = found[static_cast<size_t>(b)];
    for (int64_t i = window.start; i < window.end && !bad_window; ++i) {
      const int64_t row = b * a.num_positions + i;
      if (tokens[row] != a.mask_token_id) continue;
      if (std::isnan(drawn.floats[row])) expect(MGT_BAD_SCORE, row);
      ++window.num_competing;
    }
    counts[b] = input.rarely() ? input.hostile() : input.within(0, window.num_competing);
    if (counts[b] < 0 || (a.rule == MGT_COMMIT_COUNT && counts[b] > window.num_competing)) expect(MGT_BAD_COUNT, b);
  }
  a.token_ids = drawn.ids.data();
  a.score = drawn.floats.data();
  a.tokens = tokens.data();
  a.counts = counts.data();
  a.seeds = seeds.data();
  if (windows) {
    a.starts = starts.data();
    a.ends = ends.data();
  }
  if (replaces) {
    a.argmax = best.ids.data();
    a.max_logprob = best.floats.data();
  }
  if (masks) a.known_logprob = known.floats.data();

  const mgt_commit_tokens_args* args = sized_structure(input, a, other_size);
  Outputs first_outputs(rows, a.num_samples, asks_done), outputs(rows, a.num_samples, asks_done);
  const mgt_commit_tokens_outputs* given = sized_structure(input, first_outputs.view, other_outputs_size);
  const bool refused = args != &a || given != &first_outputs.view;
  const auto run = [&](const mgt_commit_tokens_outputs* into) {
    index = -1;
    return call_in(state, [&] { return mgt_commit_tokens(&c, args, into, &index); });
  };
  first_outputs.poison();
  const mgt_status first = run(given);
  if (refused || !available(c.isa)) {
    REQUIRE(first == MGT_INVALID_ARGUMENT || (first == MGT_ISA_UNAVAILABLE && !available(c.isa)));
    for (int64_t i = 0; i < rows; ++i) REQUIRE(first_outputs.tokens.is_poison(i));
    return 0;
  }
  REQUIRE(first == expected && index == expected_index);
  if (first != MGT_OK)
    for (int64_t i = 0; i < rows; ++i) REQUIRE(first_outputs.tokens.is_poison(i));
  // ids and the mask are told apart
  const bool tells = first == MGT_OK && (a.mask_token_id >= kTokens || a.mask_token_id < 0);
  for (int64_t b = 0; b < a.num_samples && tells; ++b) {
    const Window& window = found[static_cast<size_t>(b)];
    int64_t num_committed = 0;
    bool any_left = false;
    // without noise nothing that is committed is less confident than anything that is left
    float least_committed = INFINITY, most_left = -INFINITY;
    for (int64_t i = 0; i < a.num_positions; ++i) {
      const int64_t row = b * a.num_positions + i, after = first_outputs.tokens[row];
      if (i < window.start || i >= window.end) {
        REQUIRE(after == tokens[row]);
        continue;
      }
      any_left |= after == a.mask_token_id;
      const float score = drawn.floats[row];
      if (tokens[row] == a.mask_token_id) {
        REQUIRE(after == a.mask_token_id || after == drawn.ids[row]);
        const float confidence = a.rule == MGT_COMMIT_ENTROPY_BOUND ? -score : score;
        if (after == a.mask_token_id) {
          most_left = std::max(most_left, confidence);
        } else {
          least_committed = std::min(least_committed, confidence);
          ++num_committed;
        }
        if (a.temperature == 0.0f && a.rule == MGT_COMMIT_THRESHOLD && score >= a.value)
          REQUIRE(after == drawn.ids[row]);
        continue;
      }
      if (replaces && best.ids[row] != tokens[row] && best.floats[row] > a.replace_above)
        REQUIRE(after == best.ids[row]);
      else if (masks && known.floats[row] < a.mask_below)
        REQUIRE(after == a.mask_token_id);
      else
        REQUIRE(after == tokens[row]);
    }
    if (a.rule == MGT_COMMIT_COUNT)
      REQUIRE(num_committed == counts[b]);
    else
      REQUIRE(num_committed >= std::min(counts[b], window.num_competing));
    // entropies count in units of 2^-36, within [0, 64]
    if (a.temperature == 0.0f && a.rule != MGT_COMMIT_ENTROPY_BOUND) REQUIRE(!(least_committed < most_left));
    if (asks_done) REQUIRE(first_outputs.done[b] == !any_left);
  }
  static const std::vector<mgt_isa> isas = kernels_of("commit_tokens");
  for (const mgt_isa isa : isas) {
    c.isa = isa;
    outputs.poison();
    REQUIRE(run(&outputs.view) == first && index == expected_index);
    if (first == MGT_OK)
      REQUIRE(outputs.tokens.same_bits(first_outputs.tokens) && outputs.done.same_bits(first_outputs.done));
  }
  return 0;
}
