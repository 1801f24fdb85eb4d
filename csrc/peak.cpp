#include "isa.h"
#include "peak.h"

#include <chrono>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

// The compiler neither knows the value from here on nor may leave out what made it.
#define MGT_OPAQUE(x) asm volatile("" : "+v"(x))

// `times` steps of each of so many sums that none waits for its last step. Every factor is `first`: float32 sums of
// ones stay at 2^24 once they are there, integers wrap around.
#define MGT_PEAK_LOOP(name, num_sums, V, first, step) \
  void name(int64_t times) {                          \
    V factor = first, sums[num_sums];                 \
    MGT_OPAQUE(factor);                               \
    MGT_PRAGMA(GCC unroll 24) for (V& sum : sums) {   \
      sum = factor;                                   \
      MGT_OPAQUE(sum);                                \
    }                                                 \
    for (; times > 0; --times) {                      \
      MGT_PRAGMA(GCC unroll 24) for (V& sum : sums) { \
        sum = step(sum, factor);                      \
        MGT_OPAQUE(sum);                              \
      }                                               \
    }                                                 \
  }

#if MGT_X86
MGT_TARGET_AVX2_BEGIN
namespace mgt {
namespace {

MGT_INLINE __m256 float32_step(__m256 sum, __m256 factor) { return _mm256_fmadd_ps(factor, factor, sum); }
MGT_PEAK_LOOP(float32_avx2, 12, __m256, _mm256_set1_ps(1.0f), float32_step)

// 32 inputs of 8 outputs, as csrc/w4a8_linear/maddubs.h adds them
MGT_INLINE __m256i int8_step(__m256i sum, __m256i& factor) {
  __m256i pairs = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    // or all products are one
    MGT_OPAQUE(factor);
    const __m256i products = _mm256_maddubs_epi16(factor, factor);
    pairs = i == 0 ? products : _mm256_add_epi16(pairs, products);
  }
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
MGT_PEAK_LOOP(int8_avx2, 6, __m256i, _mm256_set1_epi8(7), int8_step)

}  // namespace
}  // namespace mgt
MGT_TARGET_END

MGT_TARGET_AVX512_BEGIN
namespace mgt {
namespace {

MGT_INLINE __m512 float32_step(__m512 sum, __m512 factor) { return _mm512_fmadd_ps(factor, factor, sum); }
MGT_PEAK_LOOP(float32_avx512, 24, __m512, _mm512_set1_ps(1.0f), float32_step)

MGT_INLINE __m512i int8_step(__m512i sum, __m512i& factor) {
  __m512i pairs = _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    MGT_OPAQUE(factor);
    const __m512i products = _mm512_maddubs_epi16(factor, factor);
    pairs = i == 0 ? products : _mm512_add_epi16(pairs, products);
  }
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
MGT_PEAK_LOOP(int8_avx512, 6, __m512i, _mm512_set1_epi8(7), int8_step)

}  // namespace
}  // namespace mgt
MGT_TARGET_END

MGT_TARGET_AVX512_VNNI_BEGIN
namespace mgt {
namespace {

MGT_INLINE __m512i vnni_step(__m512i sum, __m512i factor) { return _mm512_dpbusd_epi32(sum, factor, factor); }
MGT_PEAK_LOOP(int8_avx512_vnni, 24, __m512i, _mm512_set1_epi8(7), vnni_step)

}  // namespace
}  // namespace mgt
MGT_TARGET_END

MGT_TARGET_AVX512_BF16_BEGIN
namespace mgt {
namespace {

// a word is two bfloat16 ones
MGT_INLINE __m512 bfloat16_step(__m512 sum, __m512 factor) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(factor), reinterpret_cast<__m512bh>(factor));
}
MGT_PEAK_LOOP(bfloat16_avx512_bf16, 24, __m512, _mm512_castsi512_ps(_mm512_set1_epi32(0x3f803f80)), bfloat16_step)

}  // namespace
}  // namespace mgt
MGT_TARGET_END

MGT_TARGET_AMX_BEGIN
#include "int4_linear/amx.h"

namespace mgt {
namespace {

template <class Step>
MGT_INLINE void tile_loop(int64_t times, int32_t factor, Step step) {
  alignas(64) int32_t factors[256];
  for (int32_t& word : factors) word = factor;
  const TileSession session(64);
  MGT_TILE_READS(factors);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, factors, 64);
  _tile_loadd(5, factors, 64);
  _tile_loadd(6, factors, 64);
  _tile_loadd(7, factors, 64);
  for (; times > 0; --times) step();
  MGT_TILE_BARRIER();
}

void int8_amx(int64_t times) {
  tile_loop(times, 0x07070707, [] {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  });
}

void bfloat16_amx(int64_t times) {
  tile_loop(times, 0x3f803f80, [] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  });
}

}  // namespace
}  // namespace mgt
MGT_TARGET_END
#endif

namespace mgt {
namespace {

struct Loop {
  mgt_isa isa;
  const char* dtype;
  // in one turn of the loop
  double num_operations;
  void (*run)(int64_t times);
};

constexpr Loop kLoops[] = {
#if MGT_X86
    {MGT_ISA_AVX2, "float32", 2.0 * 12 * 8, float32_avx2},
    {MGT_ISA_AVX2, "int8", 2.0 * 6 * 8 * 32, int8_avx2},
    {MGT_ISA_AVX512, "float32", 2.0 * 24 * 16, float32_avx512},
    {MGT_ISA_AVX512, "int8", 2.0 * 6 * 8 * 64, int8_avx512},
    {MGT_ISA_AVX512_VNNI, "int8", 2.0 * 24 * 64, int8_avx512_vnni},
    {MGT_ISA_AVX512_BF16, "bfloat16", 2.0 * 24 * 32, bfloat16_avx512_bf16},
    {MGT_ISA_AMX, "int8", 2.0 * 4 * 16 * 16 * 64, int8_amx},
    {MGT_ISA_AMX, "bfloat16", 2.0 * 4 * 16 * 16 * 32, bfloat16_amx},
#endif
};

const Loop& find_loop(const std::string& isa, const std::string& dtype) {
  bool has_isa = false;
  for (const Loop& loop : kLoops) {
    if (isa != mgt_isa_name(loop.isa)) continue;
    has_isa = true;
    if (dtype == loop.dtype) return loop;
  }
  throw std::invalid_argument(has_isa ? "dtype: " + isa + " has no peak of " + dtype : "isa: " + isa + " has no peak");
}

double operations_per_second(const Loop& loop, double seconds) {
  // far below a millisecond, which leaves the clock out of the figure; the first wakes the vector units
  constexpr int64_t kTimes = 4096;
  loop.run(kTimes);
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  double num_operations = 0.0;
  for (;;) {
    loop.run(kTimes);
    num_operations += kTimes * loop.num_operations;
    const double elapsed = std::chrono::duration<double>(Clock::now() - start).count();
    if (elapsed >= seconds) return num_operations / elapsed;
  }
}

}  // namespace

double peak(const std::string& isa, const std::string& dtype, int num_threads, double seconds) {
  const Loop& loop = find_loop(isa, dtype);
  if (num_threads < 1) throw std::invalid_argument("num_threads: expected 1 or more");
  if (!(seconds > 0.0 && std::isfinite(seconds))) throw std::invalid_argument("seconds: expected more than 0");
  mgt_isa present;
  if (mgt_resolve_isa(loop.isa, &present) != MGT_OK) throw std::runtime_error(isa + " is missing on this processor");
  std::vector<double> each(num_threads);
  std::vector<std::thread> threads;
  for (double& one : each) threads.emplace_back([&] { one = operations_per_second(loop, seconds); });
  for (std::thread& thread : threads) thread.join();
  return std::accumulate(each.begin(), each.end(), 0.0);
}

}  // namespace mgt
