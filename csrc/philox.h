// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11): random words as a function of
// (seed, step, position, block, stream). Seven rounds are the fewest that pass BigCrush; they are part of the contract.
#pragma once

namespace mgt {
namespace {

// streams, the fourth word of the counter
constexpr uint32_t kStreamToken = 0;
constexpr uint32_t kStreamNoise = 1;
constexpr uint32_t kStreamConfidence = 2;
constexpr uint32_t kStreamMerge = 4;

// column c takes word (c / 512) % 4 of block (c / 2048) * 512 + c % 512, so that every path reads straight vectors
constexpr int64_t kWordWidth = 512;
constexpr int64_t kTileWidth = 4 * kWordWidth;

constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxMul0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMul1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKey0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxKey1 = 0xBB67AE85u;

// What all blocks of one row (sample, position) share. The first two rounds see mostly constants: what does not depend
// on the block is worked out once, and the lanes start from these.
struct PhiloxKey {
  PhiloxKey(uint64_t seed, uint32_t position, uint32_t step, uint32_t stream) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    const uint64_t product1 = uint64_t{kPhiloxMul1} * step;
    const uint64_t product0 = uint64_t{kPhiloxMul0} * (static_cast<uint32_t>(product1 >> 32) ^ position ^ key0);
    round1_c2 = stream ^ key1;
    key0 += kPhiloxKey0, key1 += kPhiloxKey1;
    round2_c0 = static_cast<uint32_t>(product1) ^ key0;
    round2_c2 = static_cast<uint32_t>(product0 >> 32) ^ key1;
    round2_c3 = static_cast<uint32_t>(product0);
    for (int round = 2; round < kPhiloxRounds; ++round) {
      round_key0[round - 2] = key0 += kPhiloxKey0;
      round_key1[round - 2] = key1 += kPhiloxKey1;
    }
  }
  uint32_t round1_c2, round2_c0, round2_c2, round2_c3;
  uint32_t round_key0[kPhiloxRounds - 2], round_key1[kPhiloxRounds - 2];
};

template <class S>
struct PhiloxWords {
  typename S::U word[4];
};

template <class S>
MGT_INLINE void philox_round(typename S::U& c0, typename S::U& c1, typename S::U& c2, typename S::U& c3, uint32_t key0,
                             uint32_t key1) {
  typename S::U hi0, lo0, hi1, lo1;
  S::mulhilo(c0, kPhiloxMul0, hi0, lo0);
  S::mulhilo(c2, kPhiloxMul1, hi1, lo1);
  c0 = S::bit_xor3(hi1, c1, S::set_u(key0));
  c1 = lo1;
  c2 = S::bit_xor3(hi0, c3, S::set_u(key1));
  c3 = lo0;
}

template <class S>
MGT_INLINE PhiloxWords<S> philox(typename S::U block, const PhiloxKey& key) {
  using U = typename S::U;
  U hi, c3;
  S::mulhilo(block, kPhiloxMul0, hi, c3);
  U c2 = S::bit_xor(hi, S::set_u(key.round1_c2));
  U c1;
  S::mulhilo(c2, kPhiloxMul1, hi, c1);
  U c0 = S::bit_xor(hi, S::set_u(key.round2_c0));
  c2 = S::bit_xor(c3, S::set_u(key.round2_c2));
  c3 = S::set_u(key.round2_c3);
#pragma GCC unroll 8
  for (int round = 2; round < kPhiloxRounds; ++round)
    philox_round<S>(c0, c1, c2, c3, key.round_key0[round - 2], key.round_key1[round - 2]);
  return {{c0, c1, c2, c3}};
}

// one word per position, for 16 neighbouring positions: word 0 of block 0, stream 2. Here the positions are the lanes.
template <class S>
MGT_INLINE typename S::U confidence_word(uint64_t seed, uint32_t first_position, uint32_t step) {
  using U = typename S::U;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  U c0 = S::set_u(0u), c1 = S::sequence(first_position), c2 = S::set_u(step), c3 = S::set_u(kStreamConfidence);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round<S>(c0, c1, c2, c3, key0, key1);
    key0 += kPhiloxKey0, key1 += kPhiloxKey1;
  }
  return c0;
}

}  // namespace
}  // namespace mgt
