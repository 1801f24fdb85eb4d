// Confidences as keys: what mask_by_confidence and commit_tokens rank.
#pragma once

namespace mgt {
namespace {

// the key of +inf, which positions have that take no part
constexpr uint32_t kKnownKey = 0xff800000u;

// A sum of score and noise could else overflow to +inf: where it might, both are divided by 32. |g| < 23, so that below
// 2^90 the noise is less than half a unit of the largest float.
MGT_INLINE float confidence_unit(float temperature) { return temperature > 0x1p90f ? 0x1p-5f : 1.0f; }

// Calls store(i, confidence) for the positions i within [begin, end): merit(score) + temperature g, times the unit.
template <class S, class Merit, class Store>
MGT_INLINE void for_each_confidence(const float* score, const Merit& merit, int64_t begin, int64_t end, uint64_t seed,
                                    int64_t step, float temperature, const Store& store) {
  const float unit = confidence_unit(temperature);
  const typename S::F scale = S::set(temperature * unit);
  for (int64_t first = begin; first < end; first += 16) {
    const int64_t count = std::min<int64_t>(16, end - first);
    float confidence[16] = {};
    std::transform(score + first, score + first + count, confidence, merit);
    if (temperature != 0.0f) {
      const typename S::U word = confidence_word<S>(seed, static_cast<uint32_t>(first), static_cast<uint32_t>(step));
      S::store(confidence, S::fma(scale, gumbel<S>(word), S::mul(S::load(confidence), S::set(unit))));
    }
    for (int64_t i = 0; i < count; ++i) store(first + i, confidence[i]);
  }
}

}  // namespace
}  // namespace mgt
