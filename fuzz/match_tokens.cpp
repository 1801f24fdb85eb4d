// mgt_match_tokens.
#include <numeric>

#include "fuzz.h"

using namespace fuzz;

namespace {

constexpr int64_t kMostTokens = 192;
constexpr int64_t kMostChannels = 80;
// of float32
constexpr double kRounding = 0x1p-24;

bool documented(const mgt_match_tokens_args& a) {
  if (a.num_samples < 0 || a.height < 2 || a.width < 2 || a.height % 2 || a.width % 2 || a.num_channels < 1)
    return false;
  const Wide num_tokens = Wide{a.height} * a.width;
  if (num_tokens > INT32_MAX || a.step < 0 || a.step > UINT32_MAX || a.dtype < MGT_FLOAT32 || a.dtype > MGT_FLOAT16)
    return false;
  if (a.num_merged < -1 || a.num_merged > num_tokens / 4 * 3) return false;
  if (a.num_merged == -1 && !(a.threshold >= -1.0f && a.threshold <= 1.0f)) return false;
  const auto magnitude = [](int64_t value) { return value < 0 ? -Wide{value} : Wide{value}; };
  const Wide samples = a.num_samples > 1 ? a.num_samples * magnitude(a.stride_sample) : 0;
  const Wide span = samples + num_tokens * magnitude(a.stride_token) + a.num_channels;
  return fits(samples) && fits(num_tokens * magnitude(a.stride_token)) && fits(span) &&
         fits(span * element_bytes(a.dtype)) && fits(a.num_samples, static_cast<int64_t>(num_tokens) + 1, 8);
}

struct Outputs {
  Outputs(int64_t samples, int64_t num_tokens)
      : rows(samples * num_tokens), members(rows.size()), starts(samples * (num_tokens + 1)), num_rows(samples) {
    view.struct_size = sizeof view;
    view.rows = rows.data();
    view.members = members.data();
    view.starts = starts.data();
    view.num_rows = num_rows.data();
  }
  void poison() {
    for (Buffer<int64_t>* each : {&rows, &members, &starts, &num_rows}) each->poison();
  }
  bool is_poison() const {
    for (const Buffer<int64_t>* each : {&rows, &members, &starts, &num_rows})
      for (int64_t i = 0; i < each->size(); ++i)
        if (!each->is_poison(i)) return false;
    return true;
  }
  bool operator==(const Outputs& other) const {
    return rows.same_bits(other.rows) && members.same_bits(other.members) && starts.same_bits(other.starts) &&
           num_rows.same_bits(other.num_rows);
  }
  Buffer<int64_t> rows, members, starts, num_rows;
  mgt_match_tokens_outputs view{};
};

// One sample as the header says, in the float32 of its sums, and in double.
struct Sample {
  const mgt_match_tokens_args& a;
  int64_t num_tokens;
  std::vector<float> x;
  std::vector<float> inverse;
  std::vector<double> norm;
  int64_t first_bad = -1;

  Sample(const mgt_match_tokens_args& a, int64_t sample) : a(a), num_tokens(a.height * a.width) {
    for (int64_t i = 0; i < num_tokens; ++i) {
      float sum = 0.0f;
      double exact = 0.0;
      for (int64_t c = 0; c < a.num_channels; ++c) {
        const float value = load(a.x, sample * a.stride_sample + i * a.stride_token + c, a.dtype);
        x.push_back(value);
        sum = std::fma(value, value, sum);
        exact += double{value} * value;
      }
      if (first_bad < 0 && !std::isfinite(sum)) first_bad = i;
      const float root = std::sqrt(sum);
      inverse.push_back(root > 0.0f ? 1.0f / root : 0.0f);
      norm.push_back(std::sqrt(exact));
    }
  }

  float score(int64_t from, int64_t to) const {
    float sum = 0.0f;
    for (int64_t c = 0; c < a.num_channels; ++c) sum = std::fma(channel(from, c), channel(to, c), sum);
    return sum * inverse[static_cast<size_t>(to)];
  }

  double cosine(int64_t from, int64_t to) const {
    double sum = 0.0;
    for (int64_t c = 0; c < a.num_channels; ++c) sum += double{channel(from, c)} * channel(to, c);
    const double norms = norm[static_cast<size_t>(from)] * norm[static_cast<size_t>(to)];
    return norms > 0.0 ? sum / norms : 0.0;
  }

  // the row of each token, of the destinations that are marked, where first_bad is -1
  std::vector<int64_t> rows(const std::vector<bool>& is_destination) const {
    std::vector<int64_t> sources, nearest(static_cast<size_t>(num_tokens), -1), row(nearest);
    std::vector<float> cosines(static_cast<size_t>(num_tokens));
    for (int64_t i = 0; i < num_tokens; ++i) {
      if (is_destination[static_cast<size_t>(i)]) continue;
      sources.push_back(i);
      float best = -INFINITY;
      int64_t& where = nearest[static_cast<size_t>(i)];
      for (int64_t to = 0; to < num_tokens; ++to) {
        if (!is_destination[static_cast<size_t>(to)]) continue;
        const float found = score(i, to);
        if (where >= 0 && !(found > best)) continue;
        best = found;
        where = to;
      }
      cosines[static_cast<size_t>(i)] = best * inverse[static_cast<size_t>(i)];
      check_rounding(i, where, cosines[static_cast<size_t>(i)]);
    }
    std::stable_sort(sources.begin(), sources.end(), [&](int64_t i, int64_t j) {
      return cosines[static_cast<size_t>(i)] > cosines[static_cast<size_t>(j)];
    });
    std::vector<bool> merged(static_cast<size_t>(num_tokens));
    for (size_t k = 0; k < sources.size(); ++k) {
      const auto i = static_cast<size_t>(sources[k]);
      merged[i] = a.num_merged < 0 ? cosines[i] >= a.threshold : static_cast<int64_t>(k) < a.num_merged;
    }
    int64_t num_rows = 0;
    for (size_t i = 0; i < merged.size(); ++i)
      if (!merged[i]) row[i] = num_rows++;
    for (size_t i = 0; i < merged.size(); ++i)
      if (merged[i]) row[i] = row[static_cast<size_t>(nearest[i])];
    return row;
  }

 private:
  float channel(int64_t i, int64_t c) const { return x[static_cast<size_t>(i * a.num_channels + c)]; }

  // a cosine of float32 is the exact one but for its rounding, where no square is near the smallest or largest float
  void check_rounding(int64_t from, int64_t to, float found) const {
    const double smaller = std::min(norm[static_cast<size_t>(from)], norm[static_cast<size_t>(to)]);
    const double larger = std::max(norm[static_cast<size_t>(from)], norm[static_cast<size_t>(to)]);
    if (smaller < 1e-12 || larger > 1e18) return;
    const double summing = static_cast<double>(a.num_channels) * kRounding;
    REQUIRE(std::fabs(found - cosine(from, to)) <= 1.01 * (2 * summing + 6 * kRounding));
  }
};

// which tokens are destinations, by the words of mgt_philox
std::vector<bool> destinations(const mgt_match_tokens_args& a, int64_t sample) {
  std::vector<bool> found(static_cast<size_t>(a.height * a.width));
  const mgt_context c{MGT_ISA_SCALAR, 1, nullptr};
  for (int64_t cell = 0; cell < a.height * a.width / 4; ++cell) {
    uint32_t words[4] = {};
    if (a.seeds)
      REQUIRE(mgt_philox(&c, a.seeds[sample], static_cast<uint32_t>(cell), static_cast<uint32_t>(a.step), 4, 0, 1,
                         words) == MGT_OK);
    const int64_t corner = words[0] >> 30;
    const int64_t row = cell / (a.width / 2) * 2 + corner / 2, column = cell % (a.width / 2) * 2 + corner % 2;
    found[static_cast<size_t>(row * a.width + column)] = true;
  }
  return found;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  mgt_context c = context(input);
  const unsigned state = float_state(input);
  mgt_match_tokens_args a{};
  a.dtype = input.enumerator<mgt_dtype>(MGT_FLOAT16);
  a.num_samples = input.size(0, 3);
  a.height = input.rarely() ? input.hostile() : 2 * input.within(1, 4);
  a.width = input.rarely() ? input.hostile() : 2 * input.within(1, input.rarely(8) ? 24 : 4);
  a.num_channels = input.size(1, input.rarely(8) ? kMostChannels : 20);
  const bool seeded = input.coin();
  a.step = input.size(0, 1000);
  const int64_t three_quarters =
      a.height > 0 && a.width > 0 && a.height < 100 && a.width < 100 ? a.height * a.width / 4 * 3 : 3;
  a.num_merged = input.rarely(4) ? -1 : input.rarely() ? input.hostile() : input.within(0, three_quarters);
  a.threshold = input.scalar({0.0f, 0.5f, 0.9f, 1.0f, -1.0f});
  // gaps, one token or one sample for all, backwards
  const int64_t token_gap = input.rarely(8) ? input.within(-2, 3) : 0;
  const bool one_token = input.rarely(16), one_sample = input.rarely(16), backwards = input.rarely(16);
  const bool hostile_strides = input.rarely(64);
  const int64_t hostile_sample = hostile_strides ? input.hostile() : 0;
  const int64_t hostile_token = hostile_strides ? input.hostile() : 0;
  Buffer<uint32_t> other_size(1), other_outputs_size(1);
  int64_t index = -1;
  const bool small = a.num_samples <= 8 && a.height > 0 && a.width > 0 && a.height <= 100 && a.width <= 100 &&
                     Wide{a.height} * a.width <= kMostTokens && a.num_channels <= kMostChannels;
  if (small && a.num_channels > 0) {
    a.stride_token = one_token ? 0 : std::max<int64_t>(1, a.num_channels + token_gap);
    a.stride_sample = one_sample ? 0 : a.height * a.width * a.stride_token;
    if (backwards) a.stride_token = -a.stride_token;
  }
  if (hostile_strides) {
    a.stride_sample = hostile_sample;
    a.stride_token = hostile_token;
  }
  if (documented(a) && (!small || (hostile_strides && (a.stride_token != 0 || a.num_samples > 1)))) {
    if (c.num_threads >= 1) {
      a.struct_size = sizeof a;
      ++counter.num_calls;
      REQUIRE(mgt_match_tokens_workspace(&c, &a) >= -1);
    }
    return -1;
  }
  a.struct_size = sizeof a;
  if (!documented(a) || c.num_threads < 1) {
    static const float somewhere = 0.0f;
    a.x = &somewhere;
    Outputs none(0, 0);
    char memory[1];
    REQUIRE(mgt_match_tokens_workspace(&c, &a) == -1);
    REQUIRE(call_in(state, [&] { return mgt_match_tokens(&c, &a, &none.view, memory, INT64_MAX, &index); }) ==
            MGT_INVALID_ARGUMENT);
    return 0;
  }
  const int64_t num_tokens = a.height * a.width;
  // exactly what the strides reach
  const int64_t samples_span = a.num_samples > 1 ? (a.num_samples - 1) * a.stride_sample : 0;
  const int64_t tokens_span = (num_tokens - 1) * std::abs(a.stride_token);
  const int64_t num_elements = a.num_samples ? samples_span + tokens_span + a.num_channels : 0;
  Buffer<char> x(num_elements * element_bytes(a.dtype));
  Buffer<int64_t> seeds(a.num_samples);
  fill(input, x.data(), num_elements, a.dtype);
  a.x = x.data() + (a.stride_token < 0 ? tokens_span * element_bytes(a.dtype) : 0);
  // most hosts have no NaN, and one ends the call; copies of tokens tie
  const int64_t every = input.within(1, 12);
  const bool cleans = !input.rarely(8), ties = input.coin();
  const auto element = [&](int64_t sample, int64_t i, int64_t channel) {
    return const_cast<char*>(static_cast<const char*>(a.x)) +
           (sample * a.stride_sample + i * a.stride_token + channel) * element_bytes(a.dtype);
  };
  if (cleans)
    for (int64_t i = 0; i < num_elements; ++i)
      if (!std::isfinite(load(x.data(), i, a.dtype)))
        std::memset(x.data() + i * element_bytes(a.dtype), 0, static_cast<size_t>(element_bytes(a.dtype)));
  for (int64_t b = 0; b < a.num_samples; ++b) {
    for (int64_t i = every; i < num_tokens && ties; ++i)
      if (i * 7 % 5 < 3)
        for (int64_t channel = 0; channel < a.num_channels; ++channel)
          std::memmove(element(b, i, channel), element(b, i % every, channel),
                       static_cast<size_t>(element_bytes(a.dtype)));
    seeds[b] = input.any<int64_t>();
  }
  if (seeded) a.seeds = seeds.data();

  const int64_t workspace_bytes = mgt_match_tokens_workspace(&c, &a);
  REQUIRE(workspace_bytes > 0 && workspace_bytes < int64_t{1} << 26);
  const int64_t offset = input.within(0, 63);
  Buffer<char> workspace(workspace_bytes + offset);
  const int64_t lent = input.rarely(64) ? workspace_bytes - input.within(1, workspace_bytes) : workspace_bytes;
  const mgt_match_tokens_args* args = sized_structure(input, a, other_size);
  Outputs first_outputs(a.num_samples, num_tokens), outputs(a.num_samples, num_tokens);
  const mgt_match_tokens_outputs* given = sized_structure(input, first_outputs.view, other_outputs_size);
  const auto run = [&](const mgt_match_tokens_args* what, const mgt_match_tokens_outputs* into, int64_t num_bytes) {
    index = -1;
    workspace.poison();
    return call_in(state,
                   [&] { return mgt_match_tokens(&c, what, into, workspace.data() + offset, num_bytes, &index); });
  };
  first_outputs.poison();
  const mgt_status first = run(args, given, lent);
  if (args != &a || given != &first_outputs.view || !available(c.isa) || (lent < workspace_bytes && a.num_samples)) {
    REQUIRE(first == MGT_INVALID_ARGUMENT || (first == MGT_ISA_UNAVAILABLE && !available(c.isa)));
    REQUIRE(first_outputs.is_poison() && index == -1);
    return 0;
  }

  mgt_status expected = MGT_OK;
  int64_t expected_index = -1;
  for (int64_t b = 0; b < a.num_samples; ++b) {
    const Sample sample(a, b);
    if (sample.first_bad >= 0) {
      expected = MGT_BAD_ACTIVATION;
      expected_index = b * num_tokens + sample.first_bad;
      break;
    }
  }
  REQUIRE(first == expected && index == expected_index);
  for (int64_t b = 0; b < a.num_samples && first == MGT_OK; ++b) {
    const std::vector<int64_t> row = Sample(a, b).rows(destinations(a, b));
    REQUIRE(std::equal(row.begin(), row.end(), first_outputs.rows.data() + b * num_tokens));
    std::vector<int64_t> members(row.size());
    std::iota(members.begin(), members.end(), 0);
    const auto row_of = [&](int64_t i) { return row[static_cast<size_t>(i)]; };
    std::stable_sort(members.begin(), members.end(), [&](int64_t i, int64_t j) { return row_of(i) < row_of(j); });
    REQUIRE(std::equal(members.begin(), members.end(), first_outputs.members.data() + b * num_tokens));
    const int64_t num_rows = *std::max_element(row.begin(), row.end()) + 1;
    REQUIRE(first_outputs.num_rows[b] == num_rows);
    if (a.num_merged >= 0) REQUIRE(num_rows == num_tokens - a.num_merged);
    for (int64_t m = 0; m <= num_tokens; ++m)
      REQUIRE(first_outputs.starts[b * (num_tokens + 1) + m] ==
              std::count_if(row.begin(), row.end(), [&](int64_t r) { return r < m; }));
  }
  // the last sample alone
  if (first == MGT_OK && a.num_samples > 1) {
    const int64_t last = a.num_samples - 1;
    mgt_match_tokens_args one = a;
    one.num_samples = 1;
    one.x = static_cast<const char*>(a.x) + last * a.stride_sample * element_bytes(a.dtype);
    one.stride_sample = input.hostile();
    if (one.seeds) one.seeds += last;
    Outputs alone(1, num_tokens);
    REQUIRE(run(&one, &alone.view, workspace_bytes) == MGT_OK);
    const auto same = [&](const Buffer<int64_t>& ours, const Buffer<int64_t>& all) {
      const int64_t each = ours.size();
      return std::memcmp(&ours[0], &all[last * each], static_cast<size_t>(each) * 8) == 0;
    };
    REQUIRE(same(alone.rows, first_outputs.rows) && same(alone.members, first_outputs.members) &&
            same(alone.starts, first_outputs.starts) && same(alone.num_rows, first_outputs.num_rows));
  }
  static const std::vector<mgt_isa> isas = kernels_of("match_tokens");
  for (const mgt_isa isa : isas) {
    c.isa = isa;
    outputs.poison();
    REQUIRE(run(&a, &outputs.view, workspace_bytes) == first && index == expected_index);
    if (first == MGT_OK) REQUIRE(outputs == first_outputs);
  }
  return 0;
}
