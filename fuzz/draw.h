// Logits, tokens, seeds and the other arrays of a fuzzed draw, and what the header says of them: for sample_tokens and
// differential_sample.
#pragma once

#include <memory>

#include "fuzz.h"

namespace fuzz {

// A half's logits, in a buffer that holds the addresses its strides lead to and nothing else.
struct Half {
  std::unique_ptr<Buffer<uint8_t>> memory;
  mgt_logits view{};
};

struct Draw {
  mgt_sample_tokens_args args{};
  Half cond, uncond, second;
  std::unique_ptr<Buffer<int64_t>> tokens, seeds, first_positions;
  std::unique_ptr<Buffer<float>> guidance_scales, second_guidance_scales, token_bias;
  int64_t rows = 0;
};

inline bool truncates(const mgt_sample_tokens_args& a) {
  return (a.top_k != 0 && a.top_k != a.num_tokens) || (a.top_p != 0.0f && a.top_p != 1.0f) || a.min_p != 0.0f;
}

// whether the arguments are within their documented ranges; of pointers it counts which halves are there
inline bool documented(const mgt_sample_tokens_args& a) {
  if (a.num_samples < 0 || a.num_positions < 0 || a.num_positions > UINT32_MAX || a.num_tokens < 1 ||
      a.num_tokens > INT32_MAX || a.dtype < MGT_FLOAT32 || a.dtype > MGT_FLOAT16 || a.rows < MGT_ROWS_MASKED ||
      a.rows > MGT_ROWS_ALL)
    return false;
  if (a.step < 0 || a.step > UINT32_MAX || !std::isfinite(a.guidance_scale) || !std::isfinite(a.noise_scale) ||
      a.noise_scale < 0.0f || !std::isfinite(a.temperature) || a.temperature < 0.0f ||
      (a.temperature > 0.0f && !std::isfinite(1.0f / a.temperature)))
    return false;
  if (!std::isfinite(a.second_guidance_scale) || a.guidance < MGT_GUIDANCE_NESTED || a.guidance > MGT_GUIDANCE_DUAL ||
      (a.second_uncond_logits.data != nullptr && a.uncond_logits.data == nullptr) || !(a.softcap >= 0.0f) ||
      !std::isfinite(a.softcap) || (a.softcap > 0.0f && !std::isfinite(2.0f / a.softcap)))
    return false;
  if (a.logprob_of < MGT_LOGPROB_OF_KEPT || a.logprob_of > MGT_LOGPROB_OF_FULL || a.top_k < 0 ||
      a.top_k > a.num_tokens || !(a.top_p >= 0.0f && a.top_p <= 1.0f) || !(a.min_p >= 0.0f && a.min_p < 1.0f))
    return false;
  if (a.num_samples == 0 || a.num_positions == 0) return true;
  if (!fits(a.num_samples, a.num_positions, 8)) return false;
  bool by_token = true, by_position = true;
  for (const mgt_logits* half : {&a.logits, &a.uncond_logits, &a.second_uncond_logits}) {
    if (half != &a.logits && half->data == nullptr) continue;
    by_token &= a.num_tokens == 1 || half->stride_token == 1;
    by_position &= a.num_positions == 1 || half->stride_position == 1;
    const auto reach = [](int64_t size, int64_t stride) {
      return Wide{size - 1} * (stride < 0 ? -Wide{stride} : Wide{stride});
    };
    // each a multiple of at most 2^126
    Wide total = 0;
    for (const Wide part : {reach(a.num_samples, half->stride_sample), reach(a.num_positions, half->stride_position),
                            reach(a.num_tokens, half->stride_token)}) {
      if (!fits(part)) return false;
      total += part;
    }
    if (!fits(4 * total)) return false;
  }
  return by_token || by_position;
}

inline mgt_logits strides(Input& input, const mgt_sample_tokens_args& a, bool position_major) {
  const int64_t n = std::max<int64_t>(1, std::min<int64_t>(a.num_positions, kMostElements));
  const int64_t v = std::max<int64_t>(1, std::min<int64_t>(a.num_tokens, kMostElements));
  mgt_logits half{};
  half.stride_sample = n * v;
  half.stride_position = position_major ? 1 : v;
  half.stride_token = position_major ? n : 1;
  if (input.rarely(4)) half.stride_sample = input.within(-300, 300);
  if (input.rarely(4)) (position_major ? half.stride_token : half.stride_position) = input.within(-70, 70);
  if (input.rarely()) half.stride_sample = input.hostile();
  if (input.rarely()) half.stride_position = input.hostile();
  if (input.rarely()) half.stride_token = input.hostile();
  return half;
}

// false where the memory would be too large to have
inline bool allocate(Input& input, const mgt_sample_tokens_args& a, Half& half) {
  Wide low = 0, high = 0;
  const auto reach = [&](int64_t size, int64_t stride) {
    if (size <= 1) return;
    (stride < 0 ? low : high) += Wide{size - 1} * stride;
  };
  reach(a.num_samples, half.view.stride_sample);
  reach(a.num_positions, half.view.stride_position);
  reach(a.num_tokens, half.view.stride_token);
  if (high - low >= kMostElements) return false;
  const auto num = static_cast<int64_t>(high - low + 1);
  half.memory = std::make_unique<Buffer<uint8_t>>(num * element_bytes(a.dtype));
  fill(input, half.memory->data(), num, a.dtype);
  half.view.data = half.memory->data() + static_cast<int64_t>(-low) * element_bytes(a.dtype);
  return true;
}

// Arrays that may be absent, of a draw that has rows; false where a value is outside its documented range.
inline bool make_arrays(Input& input, Draw& draw) {
  mgt_sample_tokens_args& a = draw.args;
  bool in_range = true;
  if (input.coin()) {
    draw.first_positions = std::make_unique<Buffer<int64_t>>(a.num_samples);
    const int64_t last = int64_t{UINT32_MAX} + 1 - a.num_positions;
    for (int64_t i = 0; i < a.num_samples; ++i) {
      const int64_t first = input.rarely(64) ? input.hostile() : input.coin() ? input.within(0, 4096) : last;
      (*draw.first_positions)[i] = first;
      in_range &= first >= 0 && first <= last;
    }
    a.first_positions = draw.first_positions->data();
  }
  const auto make_scales = [&](std::unique_ptr<Buffer<float>>& scales) {
    scales = std::make_unique<Buffer<float>>(a.num_samples);
    for (int64_t i = 0; i < a.num_samples; ++i) {
      const float scale = input.scalar({1.0f, 3.0f, -3.0f, 0.0f, 9.0f});
      (*scales)[i] = scale;
      in_range &= std::isfinite(scale);
    }
    return scales->data();
  };
  if (input.coin()) a.guidance_scales = make_scales(draw.guidance_scales);
  if (input.rarely(4)) a.second_guidance_scales = make_scales(draw.second_guidance_scales);
  if (input.coin()) {
    draw.token_bias = std::make_unique<Buffer<float>>(a.num_tokens);
    fill(input, draw.token_bias->data(), a.num_tokens, MGT_FLOAT32);
    const int64_t every = input.one_of<int64_t>({1, 2, 3, 7, 100, 10000});
    for (int64_t v = every - 1; v < a.num_tokens; v += every) (*draw.token_bias)[v] = -INFINITY;
    a.token_bias = draw.token_bias->data();
  }
  return in_range;
}

// The arguments and, where they are documented and small enough, what they point to. refuse: outside the documented
// ranges, and where those are the ranges of sizes and scalars, pointing nowhere. skip: in range, but too large to run.
enum class Verdict { run, refuse, skip };

// last: of the rows that an op may read
inline Verdict make_draw(Input& input, mgt_rows last, Draw& draw) {
  mgt_sample_tokens_args& a = draw.args;
  a.num_samples = input.size(0, 3);
  const bool position_major = input.coin();
  a.num_positions = input.size(0, input.one_of<int64_t>({1, 3, 3, 20, 70}));
  a.num_tokens = input.size(1, input.one_of<int64_t>({4, 20, 20, 33, 33, 65, 600, 2050}));
  a.dtype = input.enumerator<mgt_dtype>(MGT_FLOAT16);
  a.rows = input.enumerator<mgt_rows>(last);
  const bool guided = input.coin(), guided_twice = guided ? input.rarely(3) : input.rarely(64);
  draw.cond.view = strides(input, a, position_major);
  if (guided) draw.uncond.view = strides(input, a, position_major);
  if (guided_twice) draw.second.view = strides(input, a, position_major);
  a.mask_token_id = input.rarely(8) ? input.hostile() : std::max<int64_t>(a.num_tokens, 1) - input.within(0, 1);
  a.step = input.size(0, 1000);
  a.guidance_scale = input.scalar({1.0f, 3.0f, -3.0f, 0.0f, 9.0f});
  a.noise_scale = input.scalar({0.0f, 0.0f, 1.0f, 0.3f});
  a.temperature = input.scalar({1.0f, 1.0f, 0.0f, 0.5f, 2.0f, 1e-30f});
  if (guided_twice || input.rarely(16)) {
    a.second_guidance_scale = input.scalar({1.0f, 2.0f, -2.0f, 0.0f});
    a.guidance = input.enumerator<mgt_guidance>(MGT_GUIDANCE_DUAL);
  }
  if (input.rarely(3)) a.softcap = input.scalar({0.0f, 30.0f, 1.0f, 1e-30f, 1e30f});
  // a differential draw is refused where it is truncated
  if (input.rarely(last == MGT_ROWS_ALL ? 2 : 64)) {
    a.logprob_of = input.enumerator<mgt_logprob_of>(MGT_LOGPROB_OF_FULL);
    if (input.coin()) a.top_k = input.size(0, std::min<int64_t>(std::max<int64_t>(a.num_tokens, 1), 3000));
    if (input.coin()) a.top_p = input.scalar({0.5f, 0.9f, 0.999f, 1e-6f, 1.0f, 0.99999994f});
    if (input.coin()) a.min_p = input.scalar({0.1f, 0.5f, 1e-9f, 1e-40f, 0.99999994f});
  }
  static const char somewhere = 0;
  a.logits = draw.cond.view;
  a.uncond_logits = draw.uncond.view;
  a.second_uncond_logits = draw.second.view;
  a.logits.data = &somewhere;
  if (guided) a.uncond_logits.data = &somewhere;
  if (guided_twice) a.second_uncond_logits.data = &somewhere;
  if (!documented(a)) return Verdict::refuse;
  if (Wide{a.num_samples} * a.num_positions > 4096 ||
      Wide{a.num_samples} * a.num_positions * a.num_tokens > kMostElements)
    return Verdict::skip;
  draw.rows = a.num_samples * a.num_positions;
  if (draw.rows > 0) {
    if (!allocate(input, a, draw.cond) || (guided && !allocate(input, a, draw.uncond)) ||
        (guided_twice && !allocate(input, a, draw.second)))
      return Verdict::skip;
    a.logits = draw.cond.view;
    a.uncond_logits = draw.uncond.view;
    a.second_uncond_logits = draw.second.view;
  }
  draw.tokens = std::make_unique<Buffer<int64_t>>(draw.rows);
  draw.seeds = std::make_unique<Buffer<int64_t>>(a.num_samples > kMostElements ? 0 : a.num_samples);
  const bool all_masked = input.coin();
  for (int64_t i = 0; i < draw.rows; ++i) (*draw.tokens)[i] = all_masked || i % 3 ? a.mask_token_id : i % a.num_tokens;
  if (draw.rows > 0 && input.rarely(8)) (*draw.tokens)[input.within(0, draw.rows - 1)] = input.hostile();
  for (int64_t i = 0; i < draw.seeds->size(); ++i) (*draw.seeds)[i] = input.any<int64_t>();
  a.tokens = draw.tokens->data();
  a.seeds = draw.seeds->data();
  if (draw.rows > 0 && !make_arrays(input, draw)) return Verdict::refuse;
  if (draw.rows > 0 && input.rarely(64)) {
    switch (input.within(0, 2)) {
      case 0: a.logits.data = nullptr; break;
      case 1: a.tokens = nullptr; break;
      default: a.seeds = nullptr;
    }
    return Verdict::refuse;
  }
  return Verdict::run;
}

inline float logit(const Draw& draw, const mgt_logits& half, int64_t row, int64_t token) {
  const mgt_sample_tokens_args& a = draw.args;
  // where a dimension has size 1, its stride is any
  const auto step = [](int64_t index, int64_t stride) { return index == 0 ? 0 : index * stride; };
  return load(half.data,
              step(row / a.num_positions, half.stride_sample) + step(row % a.num_positions, half.stride_position) +
                  step(token, half.stride_token),
              a.dtype);
}

inline bool masked(const Draw& draw, int64_t row) { return (*draw.tokens)[row] == draw.args.mask_token_id; }

inline bool in_codebook(const mgt_sample_tokens_args& a, int64_t id) { return id >= 0 && id < a.num_tokens; }

// the first row with a token that is neither the mask nor in the codebook, or -1
inline int64_t bad_token(const Draw& draw) {
  for (int64_t row = 0; row < draw.rows; ++row)
    if (!masked(draw, row) && !in_codebook(draw.args, (*draw.tokens)[row])) return row;
  return -1;
}

inline float bias(const Draw& draw, int64_t token) {
  return draw.args.token_bias == nullptr ? 0.0f : (*draw.token_bias)[token];
}

// What a row's logits hold: a NaN or +inf where no half forbids the token, or in the bias of one that is not forbidden
// by it; and whether a token can be drawn at all.
struct Row {
  bool broken = false, drawable = false;
};

// whether any half of guidance that is there gives the token a logit of which holds(logit)
template <class Holds>
bool any_half(const Draw& draw, int64_t row, int64_t token, const Holds& holds) {
  const mgt_sample_tokens_args& a = draw.args;
  for (const mgt_logits* half : {&a.logits, &a.uncond_logits, &a.second_uncond_logits})
    if (half->data != nullptr && holds(logit(draw, *half, row, token))) return true;
  return false;
}

inline bool forbidden(const Draw& draw, int64_t row, int64_t token) {
  return token == draw.args.mask_token_id || bias(draw, token) == -INFINITY ||
         any_half(draw, row, token, [](float value) { return value == -INFINITY; });
}

inline Row examine(const Draw& draw, int64_t row) {
  const mgt_sample_tokens_args& a = draw.args;
  Row found;
  for (int64_t v = 0; v < a.num_tokens; ++v) {
    // NaN is not below
    if (v != a.mask_token_id) found.broken |= !(bias(draw, v) < INFINITY);
    if (forbidden(draw, row, v)) continue;
    found.drawable = true;
    found.broken |= any_half(draw, row, v, [](float value) { return !(value < INFINITY); });
  }
  return found;
}

// whether no number on the way to a score can leave float32
inline bool cannot_overflow(const Draw& draw) {
  const mgt_sample_tokens_args& a = draw.args;
  bool moderate = a.noise_scale < 1e10f;
  for (const float scale : {a.guidance_scale, a.second_guidance_scale}) moderate &= std::fabs(scale) < 1e10f;
  for (const float* scales : {a.guidance_scales, a.second_guidance_scales})
    for (int64_t i = 0; scales != nullptr && i < a.num_samples; ++i) moderate &= std::fabs(scales[i]) < 1e10f;
  for (int64_t v = 0; v < a.num_tokens; ++v) moderate &= bias(draw, v) < 1e10f;
  // float16 logits are below 2^16
  return a.dtype == MGT_FLOAT16 && moderate && (a.temperature == 0.0f || a.temperature > 1e-10f);
}

// What a draw that was taken says of its rows, and one that was refused of its first bad row. misplaced: the first row
// whose known token has no log-probability that is asked for, or -1; logprob: null where it is not asked for; reads:
// whether the op looks at this row's logits.
template <class Reads>
void check_draw(const Draw& draw, mgt_status status, int64_t error_index, int64_t misplaced,
                const Buffer<int64_t>& token_ids, const float* logprob, const Reads& reads) {
  const auto kept = [&](int64_t row) {
    return token_ids[row] == (*draw.tokens)[row] && (logprob == nullptr || logprob[row] == INFINITY);
  };
  REQUIRE((status == MGT_BAD_TOKEN) == (misplaced >= 0));
  if (status == MGT_BAD_TOKEN) {
    REQUIRE(error_index == misplaced);
    return;
  }
  REQUIRE(status == MGT_OK || status == MGT_BAD_LOGITS);
  if (status == MGT_BAD_LOGITS) REQUIRE(error_index >= 0 && error_index < draw.rows && reads(error_index));
  for (int64_t row = 0; row < draw.rows; ++row) {
    if (!reads(row)) {
      if (status == MGT_OK) REQUIRE(kept(row));
      continue;
    }
    const Row found = examine(draw, row);
    const bool bad = found.broken || !found.drawable;
    if (status == MGT_BAD_LOGITS) {
      if (row < error_index) REQUIRE(!bad);
      if (row == error_index) REQUIRE(bad || !cannot_overflow(draw));
      continue;
    }
    REQUIRE(!bad);
    if (!masked(draw, row)) {
      REQUIRE(kept(row));
      continue;
    }
    REQUIRE(in_codebook(draw.args, token_ids[row]) && token_ids[row] != draw.args.mask_token_id);
    REQUIRE(!forbidden(draw, row, token_ids[row]));
    // the logsumexp is rounded
    REQUIRE(logprob == nullptr || logprob[row] <= 1e-3f);
  }
}

}  // namespace fuzz
