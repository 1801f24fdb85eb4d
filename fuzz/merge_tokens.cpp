// mgt_merge_tokens and mgt_unmerge_tokens.
#include "fuzz.h"

using namespace fuzz;

namespace {

constexpr int64_t kMostTokens = 64;
constexpr int64_t kMostChannels = 80;
// of float32
constexpr double kRounding = 0x1p-24;

// what both ops are given; x has as many rows as one of them reads
struct Shape {
  mgt_dtype dtype;
  int64_t num_samples, num_tokens, num_rows, num_channels, stride_sample, stride_token;

  bool documented(int64_t rows_of_x) const {
    if (num_samples < 0 || num_tokens < 0 || num_rows < 0 || num_channels < 0 || num_rows > num_tokens) return false;
    if (dtype < MGT_FLOAT32 || dtype > MGT_FLOAT16) return false;
    const auto span = [](int64_t count, int64_t stride) {
      return count > 1 ? count * (stride < 0 ? -Wide{stride} : Wide{stride}) : 0;
    };
    const Wide samples = span(num_samples, stride_sample), rows = span(rows_of_x, stride_token);
    const Wide reached = samples + rows + num_channels;
    const Wide outputs = Wide{num_samples} * std::max<int64_t>(1, num_tokens);
    return fits(samples) && fits(rows) && fits(reached) && fits(reached * element_bytes(dtype)) && fits(outputs) &&
           fits(num_channels == 0 || outputs <= INT64_MAX / num_channels ? 0 : Wide{INT64_MAX} + 1) &&
           fits(outputs * std::max<int64_t>(1, num_channels) * element_bytes(dtype)) &&
           fits(Wide{num_samples} * (Wide{num_tokens} + 1)) && fits(Wide{num_samples} * (Wide{num_tokens} + 1) * 8);
  }
  bool small() const { return num_samples <= 8 && num_tokens <= kMostTokens && num_channels <= kMostChannels; }
  template <class Args>
  void copy_to(Args& args) const {
    args.dtype = dtype;
    args.num_samples = num_samples;
    args.num_tokens = num_tokens;
    args.num_rows = num_rows;
    args.num_channels = num_channels;
    args.stride_sample = stride_sample;
    args.stride_token = stride_token;
  }
};

// x of so many rows, in memory that ends where the strides do
struct Rows {
  Rows(Input& input, const Shape& shape, int64_t num_rows)
      : shape(shape),
        backwards(num_rows > 0 && shape.stride_token < 0 ? (num_rows - 1) * -shape.stride_token : 0),
        elements(num_elements(shape, num_rows) * element_bytes(shape.dtype)) {
    fill(input, elements.data(), num_elements(shape, num_rows), shape.dtype);
  }
  static int64_t num_elements(const Shape& shape, int64_t num_rows) {
    if (shape.num_samples == 0 || num_rows == 0) return 0;
    return (shape.num_samples - 1) * shape.stride_sample + (num_rows - 1) * std::abs(shape.stride_token) +
           shape.num_channels;
  }
  const char* data() const { return &elements[0] + backwards * element_bytes(shape.dtype); }
  const char* at(int64_t sample, int64_t row, int64_t channel) const {
    return data() + (sample * shape.stride_sample + row * shape.stride_token + channel) * element_bytes(shape.dtype);
  }
  float value(int64_t sample, int64_t row, int64_t channel) const {
    return load(at(sample, row, channel), 0, shape.dtype);
  }

  const Shape& shape;
  int64_t backwards;
  Buffer<char> elements;
};

// The nearest element of a dtype, of equally near ones the even one, by looking at both sides.
uint32_t nearest_bits(float value, mgt_dtype dtype) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (std::isnan(value)) return dtype == MGT_FLOAT32 ? 0x7fc00000 : dtype == MGT_BFLOAT16 ? 0x7fc0 : 0x7e00;
  if (dtype == MGT_FLOAT32) return bits;
  // of magnitudes the bits rise with the value
  const uint32_t sign = bits >> 31 << 15, infinity = dtype == MGT_BFLOAT16 ? 0x7f80 : 0x7c00;
  const double magnitude = std::fabs(double{value});
  const auto magnitude_of = [&](uint32_t raw) {
    // what infinity would be if there were one more exponent, so that the middle below it is where rounding goes to it
    if (raw == infinity) return dtype == MGT_BFLOAT16 ? 0x1p128 : 65536.0;
    const auto half = static_cast<uint16_t>(raw);
    return double{load(&half, 0, dtype)};
  };
  uint32_t low = 0, high = infinity;
  if (magnitude >= magnitude_of(infinity)) return sign | infinity;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (magnitude_of(middle) <= magnitude ? low : high) = middle;
  }
  const double below = magnitude - magnitude_of(low), above = magnitude_of(high) - magnitude;
  return sign | (below < above || (below == above && low % 2 == 0) ? low : high);
}

void check_means(const mgt_merge_tokens_args& a, const Rows& x, const Buffer<char>& y) {
  const int64_t bytes = element_bytes(a.dtype);
  for (int64_t b = 0; b < a.num_samples; ++b)
    for (int64_t m = 0; m < a.num_rows; ++m) {
      const int64_t first = a.starts[b * (a.num_tokens + 1) + m];
      const int64_t count = a.starts[b * (a.num_tokens + 1) + m + 1] - first;
      for (int64_t c = 0; c < a.num_channels; ++c) {
        const char* mean = &y[((b * a.num_rows + m) * a.num_channels + c) * bytes];
        uint32_t bits = 0, wanted = 0;
        std::memcpy(&bits, mean, static_cast<size_t>(bytes));
        if (count == 1) {
          std::memcpy(&wanted, x.at(b, a.members[b * a.num_tokens + first], c), static_cast<size_t>(bytes));
        } else if (count > 1) {
          float sum = 0.0f;
          double exact = 0.0, size = 0.0;
          for (int64_t k = 0; k < count; ++k) {
            const float value = x.value(b, a.members[b * a.num_tokens + first + k], c);
            sum = k == 0 ? value : sum + value;
            exact += value;
            size += std::fabs(double{value});
          }
          const float quotient = sum / static_cast<float>(count);
          wanted = nearest_bits(quotient, a.dtype);
          // n - 1 additions and a division, and what denormals lose
          if (size < 3e38)
            REQUIRE(std::fabs(quotient - exact / static_cast<double>(count)) <=
                    1.01 * kRounding * size + 0x1p-149 * (1 + kRounding));
        }
        REQUIRE(bits == wanted);
      }
    }
}

// Runs an op on good arguments, on arguments of another size, in a workspace of another one; returns its status.
template <class Args, class Op>
mgt_status check_op(Input& input, mgt_context c, unsigned state, Args& a, const char* name, const Op& op,
                    mgt_status expected, int64_t expected_index, Buffer<char>& y) {
  Buffer<uint32_t> other_size(1);
  const Args* args = sized_structure(input, a, other_size);
  int64_t index = -1;
  const auto run = [&](const Args* what, Buffer<char>& into) {
    index = -1;
    into.poison();
    return call_in(state, [&] { return op(&c, what, into.data(), &index); });
  };
  const auto untouched = [](const Buffer<char>& buffer) {
    for (int64_t i = 0; i < buffer.size(); ++i)
      if (!buffer.is_poison(i)) return false;
    return true;
  };
  const mgt_status first = run(args, y);
  if (args != &a || !available(c.isa)) {
    REQUIRE(first == MGT_INVALID_ARGUMENT || (first == MGT_ISA_UNAVAILABLE && !available(c.isa)));
    REQUIRE(untouched(y) && index == -1);
    return MGT_INVALID_ARGUMENT;
  }
  REQUIRE(first == expected && index == expected_index);
  if (first != MGT_OK) REQUIRE(untouched(y));
  Buffer<char> again(y.size());
  for (const mgt_isa isa : kernels_of(name)) {
    c.isa = isa;
    REQUIRE(run(&a, again) == first && index == expected_index && again.same_bits(y));
  }
  return first;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  mgt_context c = context(input);
  const unsigned state = float_state(input);
  Shape shape{};
  shape.dtype = input.enumerator<mgt_dtype>(MGT_FLOAT16);
  shape.num_samples = input.size(0, 3);
  shape.num_tokens = input.size(0, input.rarely(8) ? kMostTokens : 12);
  shape.num_rows = input.size(0, std::clamp<int64_t>(shape.num_tokens, 0, kMostTokens));
  shape.num_channels = input.size(0, input.rarely(8) ? kMostChannels : 20);
  const int64_t gap = input.rarely(8) ? input.within(0, 5) : 0;
  const bool one_token = input.rarely(16), one_sample = input.rarely(16), backwards = input.rarely(16);
  const bool hostile_strides = input.rarely(64);
  const bool merges = input.coin();
  if (hostile_strides) {
    shape.stride_sample = input.hostile();
    shape.stride_token = input.hostile();
  } else if (shape.small() && shape.num_channels >= 0 && shape.num_tokens >= 0) {
    shape.stride_token = one_token ? 0 : shape.num_channels + gap;
    shape.stride_sample = one_sample ? 0 : shape.num_tokens * shape.stride_token;
    if (backwards) shape.stride_token = -shape.stride_token;
  }
  const int64_t rows_of_x = merges ? shape.num_tokens : shape.num_rows;
  const bool documented = shape.documented(rows_of_x);
  // a dimension of one is never stepped along
  const bool steps_far = hostile_strides && (shape.num_samples > 1 || rows_of_x > 1);
  if (documented && (!shape.small() || steps_far)) return -1;
  mgt_merge_tokens_args merge{};
  mgt_unmerge_tokens_args unmerge{};
  shape.copy_to(merge);
  shape.copy_to(unmerge);
  merge.struct_size = sizeof merge;
  unmerge.struct_size = sizeof unmerge;
  if (!documented || c.num_threads < 1) {
    static const int64_t somewhere = 0;
    char y = 0;
    int64_t index = -1;
    merge.x = unmerge.x = merge.members = merge.starts = unmerge.rows = &somewhere;
    REQUIRE(call_in(state, [&] {
              return merges ? mgt_merge_tokens(&c, &merge, &y, &index) : mgt_unmerge_tokens(&c, &unmerge, &y, &index);
            }) == MGT_INVALID_ARGUMENT);
    return 0;
  }
  if (hostile_strides) shape.stride_sample = shape.stride_token = 0;
  const Rows x(input, shape, rows_of_x);
  const int64_t num_tokens = shape.num_tokens, num_rows = shape.num_rows;
  mgt_status expected = MGT_OK;
  int64_t expected_index = -1;
  const auto expect_match = [&](bool holds, int64_t sample) {
    // without tokens nothing is looked at
    if (holds || expected != MGT_OK || num_tokens == 0) return;
    expected = MGT_BAD_MATCH;
    expected_index = sample;
  };
  const auto broken = [&](int64_t usual) { return input.rarely(128) ? input.hostile() : usual; };
  if (merges) {
    Buffer<int64_t> members(shape.num_samples * num_tokens), starts(shape.num_samples * (num_tokens + 1));
    for (int64_t b = 0; b < shape.num_samples; ++b) {
      int64_t* start = starts.data() + b * (num_tokens + 1);
      std::vector<int64_t> cuts(static_cast<size_t>(num_rows) + 1);
      for (int64_t& cut : cuts) cut = input.within(0, num_tokens);
      std::sort(cuts.begin(), cuts.end());
      cuts.front() = 0;
      cuts.back() = num_tokens;
      bool holds = true;
      for (int64_t m = 0; m <= num_tokens; ++m)
        start[m] = broken(m <= num_rows ? cuts[static_cast<size_t>(m)] : num_tokens);
      holds = start[0] == 0 && start[num_rows] == num_tokens;
      for (int64_t m = 0; m < num_rows; ++m) holds &= start[m] <= start[m + 1];
      for (int64_t i = 0; i < num_tokens; ++i) {
        int64_t& member = members[b * num_tokens + i];
        member = broken(input.rarely(4) ? input.within(0, num_tokens - 1) : (i * 7 + b) % num_tokens);
        holds &= member >= 0 && member < num_tokens;
      }
      expect_match(holds, b);
    }
    merge.x = x.data();
    merge.members = members.data();
    merge.starts = starts.data();
    Buffer<char> y(shape.num_samples * num_rows * shape.num_channels * element_bytes(shape.dtype));
    if (check_op(input, c, state, merge, "merge_tokens", mgt_merge_tokens, expected, expected_index, y) != MGT_OK)
      return 0;
    if (num_tokens > 0) check_means(merge, x, y);
    if (shape.num_samples < 2) return 0;
    const int64_t last = shape.num_samples - 1, bytes = y.size() / shape.num_samples;
    merge.num_samples = 1;
    merge.x = x.at(last, 0, 0);
    merge.members += last * num_tokens;
    merge.starts += last * (num_tokens + 1);
    merge.stride_sample = input.hostile();
    Buffer<char> alone(bytes);
    REQUIRE(mgt_merge_tokens(&c, &merge, alone.data(), nullptr) == MGT_OK);
    REQUIRE(std::equal(alone.data(), alone.data() + (num_tokens > 0 ? bytes : 0), y.data() + last * bytes));
    return 0;
  }
  Buffer<int64_t> rows(shape.num_samples * num_tokens);
  for (int64_t i = 0; i < rows.size(); ++i) {
    rows[i] = broken(input.within(0, std::max<int64_t>(1, num_rows) - 1));
    expect_match(rows[i] >= 0 && rows[i] < num_rows, i / num_tokens);
  }
  unmerge.x = x.data();
  unmerge.rows = rows.data();
  const int64_t bytes = shape.num_channels * element_bytes(shape.dtype);
  Buffer<char> y(rows.size() * bytes);
  if (check_op(input, c, state, unmerge, "merge_tokens", mgt_unmerge_tokens, expected, expected_index, y) != MGT_OK)
    return 0;
  for (int64_t i = 0; i < rows.size(); ++i)
    REQUIRE(std::memcmp(y.data() + i * bytes, x.at(i / num_tokens, rows[i], 0), static_cast<size_t>(bytes)) == 0);
  return 0;
}
