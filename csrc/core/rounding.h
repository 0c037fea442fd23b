// Roundings of a float to bfloat16, and the random bits of those that are stochastic.
#pragma once

#include "platform.h"

FS_NAMESPACE_BEGIN

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kMagnitudeMask = 0x7fffffffu;
constexpr uint16_t kBfloat16Nan = 0x7fffu;

FS_HD bool is_nan_bits(uint32_t bits) { return (bits & kMagnitudeMask) > kInfinityBits; }

// To nearest, ties to even, as torch's cast does; a NaN stays a NaN.
FS_HD uint16_t round_to_even(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(is_nan_bits(bits) ? kBfloat16Nan : rounded);
}

// To nearest, ties away from zero: the rounding that a 16-bit remainder can invert (ties to even maps two
// floats to one pair of parameter and remainder). Differs from round_to_even in 1 float of 65,536.
FS_HD uint16_t round_away(float value) {
  const uint32_t bits = bits_of(value);
  return static_cast<uint16_t>(is_nan_bits(bits) ? kBfloat16Nan : (bits + 0x8000u) >> 16);
}

// To one of the two neighbours, up with the probability that makes the mean exact: bfloat16 drops 16 bits, and
// `draw` is 16 uniform bits. Infinities and NaNs stay what they are; beyond the largest bfloat16 the upper
// neighbour is infinity.
FS_HD uint16_t round_stochastically(float value, uint32_t draw) {
  const uint32_t bits = bits_of(value);
  return static_cast<uint16_t>(is_nan_bits(bits) ? kBfloat16Nan : (bits + draw) >> 16);
}

// What the random bits of one tensor's elements in one update depend on.
struct RandomKey {
  uint32_t first;
  uint32_t second;
};

// The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection in which every input bit flips every
// output bit with probability 1/2.
FS_HD_CALL uint64_t mix_64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Computed once per tensor and update. The schedule clock counts applied updates, so that a resumed run and a
// replayed graph draw what an uninterrupted run would have drawn. ordinal: the parameter's place in its groups.
FS_HD_CALL RandomKey random_key(uint64_t seed, int64_t clock_step, uint32_t ordinal) {
  constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;  // 2^64 over the golden ratio; keeps zeros from staying zeros
  uint64_t key = mix_64(seed + kGolden);
  key = mix_64((key ^ static_cast<uint64_t>(clock_step)) + kGolden);
  key = mix_64((key ^ ordinal) + kGolden);
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// The key of the elements whose index has this element's upper 32 bits: the rest of the index is the counter.
FS_HD RandomKey key_from(RandomKey key, int64_t element) {
  key.second += static_cast<uint32_t>(static_cast<uint64_t>(element) >> 32) * 0x9e3779b9u;
  return key;
}

// The key of the parameter's own rounding; the moments use the tensor's key as it is.
FS_HD RandomKey key_of_parameter(RandomKey key) {
  key.first ^= 0xa511e9b3u;
  return key;
}

// 32 bits for a pair of neighbours, by the even one's index. A counter-based generator needs no state, so that CPU,
// CUDA and plain torch draw the same: Wellons' lowbias32 (github.com/skeeto/hash-prospector; bias 0.17 of a perfect
// hash's 0), keyed twice. Its first step and the others: where low bits of the element were zero, they can be set in
// what the first has made of it, with an exclusive or.
FS_HD uint32_t begin_random_bits(RandomKey key, uint32_t even_element) {
  const uint32_t x = even_element ^ key.first;
  return x ^ (x >> 16);
}
FS_HD uint32_t finish_random_bits(RandomKey key, uint32_t begun) {
  uint32_t x = begun * 0x7feb352du;
  x = (x ^ (x >> 15) ^ key.second) * 0x846ca68bu;
  return x ^ (x >> 16);
}
FS_HD uint32_t random_bits_of_pair(RandomKey key, uint32_t even_element) {
  return finish_random_bits(key, begin_random_bits(key, even_element));
}

FS_HD uint32_t exchange_halves(uint32_t random) { return random >> 16 | random << 16; }

// 32 bits for one element, of which the upper half serves one moment and the lower the other. Its neighbour has the
// halves the other way round: the draws for one moment stay independent (those of more than 16 bits, to 2^-16 of a
// step), and half of the hashing is saved.
FS_HD uint32_t random_bits(RandomKey key, uint32_t element) {
  const uint32_t random = random_bits_of_pair(key, element & ~1u);
  return element & 1u ? exchange_halves(random) : random;
}

FS_NAMESPACE_END
