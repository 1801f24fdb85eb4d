// Rows of logits on their way from the caller's memory into tiles of floats: softcap, guidance, what is allowed, noise,
// temperature.
#pragma once

namespace mgt {
namespace {

static_assert(kTileWidth == kRowTileFloats, "the workspace holds whole tiles");

// The bias of a forbidden token wins over whatever its logit is.
template <class S>
void add_bias(const float* bias, int64_t width, float* tile) {
  const auto forbidding = S::set(-kInfinity);
  int64_t j = 0;
  for (; j + 16 <= width; j += 16) {
    const auto added = S::load(bias + j);
    S::store(tile + j, S::select(S::equal(added, forbidding), forbidding, S::add(S::load(tile + j), added)));
  }
  for (; j < width; ++j) tile[j] = bias[j] == -kInfinity ? bias[j] : tile[j] + bias[j];
}

template <class S>
void multiply(float* tile, int64_t width, float factor) {
  for (int64_t j = 0; j < width; j += 16) S::store(tile + j, S::mul(S::load(tile + j), S::set(factor)));
}

MGT_INLINE float load_element(const void* data, int64_t index, mgt_dtype dtype) {
  if (dtype == MGT_FLOAT32) return static_cast<const float*>(data)[index];
  const uint16_t raw = static_cast<const uint16_t*>(data)[index];
  return dtype == MGT_BFLOAT16 ? bfloat16_to_float(raw) : half_to_float(raw);
}

template <class S, mgt_dtype dtype>
MGT_INLINE typename S::F load_vector(const void* data, int64_t index) {
  if constexpr (dtype == MGT_FLOAT32)
    return S::load(static_cast<const float*>(data) + index);
  else
    return S::load(static_cast<const uint16_t*>(data) + index, dtype);
}

// what becomes of a position's logits on their way into a tile
enum class Form {
  // the conditional ones, or both halves with a scale of at least 0
  plain,
  // the scale is below 0, which would make -inf, a forbidden token, of a conditional logit of +inf
  negative_scale,
  // a softcap, and no guidance
  capped,
  // anything that a call may ask for
  any
};

template <class S, bool kKeepsInfinity = false>
MGT_INLINE typename S::F guide(typename S::F cond, typename S::F uncond, typename S::F scale) {
  const auto guided = S::fma(scale, S::sub(cond, uncond), uncond);
  if constexpr (kKeepsInfinity) return S::select(S::equal(cond, S::set(kInfinity)), cond, guided);
  return guided;
}

// c tanh(l / c), infinities left as they are: -inf still forbids, +inf is still an error. Near 0, where 1 - exp has
// lost its digits, it is l and a correction of l: a cap far above the logits leaves them as they are.
template <class S>
MGT_INLINE typename S::F cap(typename S::F logit, typename S::F softcap, typename S::F two_over_softcap) {
  using F = typename S::F;
  const auto sign = S::bit_and(S::bits(logit), S::set_u(0x80000000u));
  const F magnitude = S::from_bits(S::bit_xor(S::bits(logit), sign));
  const F twice = S::mul(magnitude, two_over_softcap), x = S::mul(twice, S::set(0.5f)), x2 = S::mul(x, x);
  const F one = S::set(1.0f), exp = exp_nonpositive<S>(S::sub(S::set(0.0f), twice));
  const F far = S::mul(softcap, S::div(S::sub(one, exp), S::add(one, exp)));
  // tanh(x) / x = 1 + x^2 p(x^2) for x in [0, 0.6]
  F p = S::set(-0.005895157810300589f);
  p = S::fma(p, x2, S::set(0.020795971155166626f));
  p = S::fma(p, x2, S::set(-0.053783830255270004f));
  p = S::fma(p, x2, S::set(0.13331924378871918f));
  p = S::fma(p, x2, S::set(-0.33333298563957214f));
  const F near = S::fma(magnitude, S::mul(x2, p), magnitude);
  // NaN is not less
  const F capped = S::select(S::less(x, S::set(0.6f)), near, far);
  return S::select(S::equal(magnitude, S::set(kInfinity)), logit, S::from_bits(S::bit_xor(S::bits(capped), sign)));
}

// where a sample's logits of one guidance half start, and their strides
struct Half {
  const void* data;
  int64_t stride_position, stride_token;
};

struct Source {
  Half cond, uncond, second;
  bool guided, guided_twice;
  mgt_guidance guidance;
  mgt_dtype dtype;
  float guidance_scale, second_scale, softcap;
  // of the sample, for random draws
  int64_t first_position;

  Form form() const {
    if (softcap != 0.0f && !guided) return Form::capped;
    if (guided_twice || softcap != 0.0f) return Form::any;
    return guidance_scale < 0.0f ? Form::negative_scale : Form::plain;
  }
};

inline Source source_of(const mgt_sample_tokens_args& args, int64_t sample) {
  const auto half = [&](const mgt_logits& logits) {
    const int64_t size = args.dtype == MGT_FLOAT32 ? 4 : 2;
    return Half{static_cast<const char*>(logits.data) + sample * logits.stride_sample * size, logits.stride_position,
                logits.stride_token};
  };
  Source source;
  source.guided = args.uncond_logits.data != nullptr;
  source.guided_twice = args.second_uncond_logits.data != nullptr;
  source.cond = half(args.logits);
  source.uncond = source.guided ? half(args.uncond_logits) : source.cond;
  source.second = source.guided_twice ? half(args.second_uncond_logits) : source.cond;
  source.guidance = args.guidance;
  source.dtype = args.dtype;
  source.guidance_scale = args.guidance_scales ? args.guidance_scales[sample] : args.guidance_scale;
  source.second_scale = args.second_guidance_scales ? args.second_guidance_scales[sample] : args.second_guidance_scale;
  source.softcap = args.softcap;
  source.first_position = args.first_positions ? args.first_positions[sample] : 0;
  return source;
}

// what guidance and softcap make of the logits that load(half) gives: 16 of them or one
template <class S, class Load>
MGT_INLINE typename S::F guide_any(const Source& source, const Load& load) {
  using F = typename S::F;
  // as a function it would pass vectors through memory
  const auto capped = [&](const Half& half) MGT_INLINE_LAMBDA {
    const F logit = load(half);
    if (source.softcap == 0.0f) return logit;
    return cap<S>(logit, S::set(source.softcap), S::set(2.0f / source.softcap));
  };
  const F cond = capped(source.cond), uncond = source.guided ? capped(source.uncond) : cond;
  F guided = source.guided ? guide<S, true>(cond, uncond, S::set(source.guidance_scale)) : cond;
  if (!source.guided_twice) return guided;
  const F second = capped(source.second);
  if (source.guidance == MGT_GUIDANCE_NESTED)
    guided = guide<S>(guided, second, S::set(source.second_scale));
  else
    guided = S::fma(S::set(source.second_scale - 1.0f), S::sub(cond, second), guided);
  // an infinity that is an error stays one, whatever the scales would make of it
  const F infinity = S::set(kInfinity);
  const F largest = S::max(S::max(cond, uncond), S::max(second, S::set(-kInfinity)));
  return S::select(S::equal(largest, infinity), infinity, guided);
}

// one element by the rules: -inf in any half forbids the token, whatever guidance would make of it
MGT_INLINE float guided_element(const Source& source, int64_t position, int64_t column) {
  const auto at = [&](const Half& half) {
    return load_element(half.data, position * half.stride_position + column * half.stride_token, source.dtype);
  };
  const float cond = at(source.cond);
  if (cond == -kInfinity || (source.guided && at(source.uncond) == -kInfinity) ||
      (source.guided_twice && at(source.second) == -kInfinity))
    return -kInfinity;
  return guide_any<Lane1>(source, at);
}

inline void stage_by_element(const Source& source, int64_t position, int64_t first_column, int64_t width, float* tile) {
  for (int64_t j = 0; j < width; ++j) tile[j] = guided_element(source, position, first_column + j);
}

// Returns the largest logit: this pass over a tile is the one that waits for memory, so a maximum costs nothing.
template <class S, mgt_dtype dtype, Form form>
float stage_token_major(const Source& source, int64_t position, int64_t first_column, int64_t width, float* tile) {
  using F = typename S::F;
  const int64_t cond = position * source.cond.stride_position + first_column;
  const int64_t uncond = position * source.uncond.stride_position + first_column;
  const F scale = S::set(source.guidance_scale);
  // copies stay in registers, as what is stored could else be the source
  const void *cond_data = source.cond.data, *uncond_data = source.uncond.data;
  const F softcap = S::set(source.softcap), two_over_softcap = S::set(2.0f / source.softcap);
  const Source any = source;
  const bool guided = source.guided;
  constexpr bool kNegative = form == Form::negative_scale;
  F max0 = S::set(-kInfinity), max1 = max0;
  const auto stage = [&](int64_t j, F& max) {
    F logits;
    if constexpr (form == Form::any) {
      logits = guide_any<S>(any, [&](const Half& half) {
        return load_vector<S, dtype>(half.data, position * half.stride_position + first_column + j);
      });
    } else if constexpr (form == Form::capped) {
      logits = cap<S>(load_vector<S, dtype>(cond_data, cond + j), softcap, two_over_softcap);
    } else {
      logits = load_vector<S, dtype>(cond_data, cond + j);
      if (guided) logits = guide<S, kNegative>(logits, load_vector<S, dtype>(uncond_data, uncond + j), scale);
    }
    S::store(tile + j, logits);
    max = S::max(logits, max);
  };
  int64_t j = 0;
  for (; j + 32 <= width; j += 32) stage(j, max0), stage(j + 16, max1);
  for (; j + 16 <= width; j += 16) stage(j, max0);
  stage_by_element(source, position, first_column + j, width - j, tile + j);
  float max = largest_lane<S>(S::max(max0, max1));
  for (; j < width; ++j) max = Lane1::max(tile[j], max);
  return max;
}

// Neighbouring positions together: a cache line of the logits holds one column of 16 of them, and a memory page, which
// the next column has left, is worth several lines.
template <class S, mgt_dtype dtype, Form form>
void stage_position_major(const Source& source, int64_t position, int64_t count, int64_t first_column, int64_t width,
                          float (*tiles)[kTileWidth]) {
  const auto scale = S::set(source.guidance_scale);
  const Half source_cond = source.cond, source_uncond = source.uncond;
  const auto softcap = S::set(source.softcap), two_over_softcap = S::set(2.0f / source.softcap);
  const Source any = source;
  const bool guided = source.guided;
  constexpr bool kNegative = form == Form::negative_scale;
  const int64_t even_count = count / 16 * 16, even_width = width / 16 * 16;
  for (int64_t j = 0; j < even_width; j += 16) {
    for (int64_t p = 0; p < even_count; p += 16) {
      typename S::F rows[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t column = first_column + j + i;
        const auto load = [&](const Half& half) {
          return load_vector<S, dtype>(half.data, position + p + column * half.stride_token);
        };
        if constexpr (form == Form::any)
          rows[i] = guide_any<S>(any, load);
        else if constexpr (form == Form::capped)
          rows[i] = cap<S>(load(source_cond), softcap, two_over_softcap);
        else
          rows[i] = guided ? guide<S, kNegative>(load(source_cond), load(source_uncond), scale) : load(source_cond);
      }
      S::transpose(rows);
      for (int i = 0; i < 16; ++i) S::store(tiles[p + i] + j, rows[i]);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t j = i < even_count ? even_width : 0;
    stage_by_element(source, position + i, first_column + j, width - j, tiles[i] + j);
  }
}

// One tile of each row of a group. Returns the largest logit of a single row, NaN for several.
template <class S, mgt_dtype dtype>
float stage(const Source& source, bool by_row, int64_t position, int64_t count, int64_t first_column, int64_t width,
            float (*tiles)[kTileWidth]) {
  const auto stage_form = [&](auto form) {
    if (by_row) return stage_token_major<S, dtype, form()>(source, position, first_column, width, tiles[0]);
    stage_position_major<S, dtype, form()>(source, position, count, first_column, width, tiles);
    return std::numeric_limits<float>::quiet_NaN();
  };
  switch (source.form()) {
    case Form::any: return stage_form(std::integral_constant<Form, Form::any>());
    case Form::capped: return stage_form(std::integral_constant<Form, Form::capped>());
    case Form::negative_scale: return stage_form(std::integral_constant<Form, Form::negative_scale>());
    default: return stage_form(std::integral_constant<Form, Form::plain>());
  }
}

// What happens to the staged logits of one row before they compete; `max` is theirs, or NaN where it is not known yet.
// Returns the largest logit.
template <class S>
float finish_tile(const mgt_sample_tokens_args& args, const PhiloxKey& noise_key, int64_t first_column, int64_t width,
                  float* tile, float max) {
  for (int64_t j = width; j % 16; ++j) tile[j] = -kInfinity;
  const bool noisy = args.noise_scale != 0.0f;
  const bool tempered = args.temperature != 0.0f && args.temperature != 1.0f;
  const bool holds_mask = args.mask_token_id >= first_column && args.mask_token_id < first_column + width;
  if (args.token_bias) add_bias<S>(args.token_bias + first_column, width, tile);
  if (noisy) add_noise<S>(tile, width, first_column, noise_key, args.noise_scale);
  if (tempered) multiply<S>(tile, width, 1.0f / args.temperature);
  if (holds_mask) tile[args.mask_token_id - first_column] = -kInfinity;
  return args.token_bias || noisy || tempered || holds_mask || max != max ? tile_max<S>(tile, width) : max;
}

// a tile of a row, to be fetched while another one computes
template <mgt_dtype dtype>
Prefetch tile_at(const mgt_sample_tokens_args& args, const Source& source, int64_t position, int64_t column) {
  const int64_t size = dtype == MGT_FLOAT32 ? 4 : 2;
  const auto start = [&](const Half& half) {
    return static_cast<const char*>(half.data) + (position * half.stride_position + column) * size;
  };
  return {{start(source.cond), start(source.uncond)}, std::min(kTileWidth, args.num_tokens - column) * size};
}

// whether the row after this position's is read too; tokens: from this position on
inline bool reads_next(const mgt_sample_tokens_args& args, const int64_t* tokens, int64_t position) {
  return position + 1 < args.num_positions && is_read(args, tokens[1]);
}

// the tile that this row, or the next position where that is read too, reads next
template <mgt_dtype dtype>
Prefetch next_tile(const mgt_sample_tokens_args& args, const Source& source, const int64_t* tokens, int64_t position,
                   int64_t column) {
  if (column < args.num_tokens) return tile_at<dtype>(args, source, position, column);
  if (!reads_next(args, tokens, position)) return {{nullptr, nullptr}, 0};
  return tile_at<dtype>(args, source, position + 1, 0);
}

// Takes one staged tile of a row into the row's state; false where its logits are bad.
template <class S, bool kStatistics>
bool take_tile(const mgt_sample_tokens_args& args, const Source& source, uint64_t seed, int64_t position,
               int64_t first_column, int64_t width, float staged_max, bool greedy, const Prefetch& prefetch,
               float* tile, RowState& row, RowStatistics& statistics) {
  const auto position32 = static_cast<uint32_t>(source.first_position + position);
  const auto step = static_cast<uint32_t>(args.step);
  const PhiloxKey noise_key(seed, position32, step, kStreamNoise), token_key(seed, position32, step, kStreamToken);
  const auto take = [&](float max) {
    max = finish_tile<S>(args, noise_key, first_column, width, tile, max);
    return consume_tile<S, kStatistics, false>(tile, width, max, -kInfinity, first_column, token_key, greedy, prefetch,
                                               row, statistics);
  };
  if (take(staged_max)) return true;
  // NaN or +inf: of forbidden tokens (then the rules give -inf, at the price of a slow reading) or of bad logits
  stage_by_element(source, position, first_column, width, tile);
  return take(std::numeric_limits<float>::quiet_NaN());
}

}  // namespace
}  // namespace mgt
