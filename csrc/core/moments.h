// Moments: how the two running averages are kept. A pair of codecs, one per moment; where codes share scales,
// kGroup consecutive elements, in memory order, have one byte of scale per moment.
//
//   moments  bytes  exp_avg                            exp_avg_sq
//   fp32     8      exact                              exact
//   bf16     4      to nearest: <= 2^-8 |m|            stochastic: < 2^-7 v
//   8bit     2.125  stochastic: < 2^-3 |m|, and        stochastic: < 2^-4 v, and
//                   below the group's normal range     below the group's normal range < 2^-18 of the
//                   < 2^-17 of the power of two        power of two that covers the group's largest v,
//                   that covers its largest |m|        where a v > 0 stays at least that
//
// The second moment rounds stochastically because it moves by (1 - beta2) of itself per update, 0.001 where a
// bf16 step is 0.004 to 0.008: to nearest, it would stay where it is. A second moment that is not zero never becomes
// zero: the update divides by its root. (So its mean is exact only above the smallest code.)
#pragma once

#include "element.h"

FS_NAMESPACE_BEGIN

// Every codec has: Storage, in memory; Code, the same in a register, which vectorised loops want as wide as a float;
// decode and encode, from and to a Code. random: 32 uniform bits, of which the first moment's codec uses the lower
// ones and the second's the upper ones, as many as the rounding drops: its mean is exact. (8-bit draws have 20 and 19
// bits: the first's upper 7 are the second's lower 7, which weigh 2^-12 of a step. Between the neighbours of
// random_bits, the upper 4 or 3 bits are the other's lower ones for the same moment, 2^-16 of a step.) What codes
// without a scale are given in its place:
struct Unscaled {
  FS_HD explicit Unscaled(uint32_t) {}
};

template <class T>
struct Exact {
  using Storage = T;
  using Code = T;
  using Scale = Unscaled;
  static FS_HD T decode(Code code, Scale) { return code; }
  static FS_HD Code encode(T value, Scale, uint32_t) { return value; }
};

struct Bfloat16First {
  using Storage = uint16_t;
  using Code = uint32_t;
  using Scale = Unscaled;
  static FS_HD float decode(Code code, Scale) { return float_of(code << 16); }
  static FS_HD Code encode(float value, Scale, uint32_t) { return round_to_even(value); }
};

struct Bfloat16Second {
  using Storage = uint16_t;
  using Code = uint32_t;
  using Scale = Unscaled;
  static FS_HD float decode(Code code, Scale) { return float_of(code << 16); }
  static FS_HD Code encode(float value, Scale, uint32_t random) {
    const uint32_t rounded = round_stochastically(value, random >> 16);
    const uint32_t least = bits_of(value) != 0u ? 1u : 0u;
    return rounded > least ? rounded : least;
  }
};

constexpr uint32_t kBinade = 1u << 23;  // from a float's bits to those of its double

FS_HD uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
FS_HD uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

// The power of two that a group's codes count from.
struct BinaryScale {
  uint32_t base;          // bits of the float whose exponent is one below the smallest normal code's
  float smallest_normal;  // code exponent 1, significand 1
  FS_HD explicit BinaryScale(uint32_t scale) : base(scale << 23), smallest_normal(float_of(base + kBinade)) {}
};

// An 8-bit floating-point code in the manner of IEEE 754, computed with shifts: [sign,] 4 bits of exponent,
// kMantissa bits of significand. Exponent 0 is subnormal, so that codes are evenly spaced down to zero and
// stochastic rounding is unbiased there, too. The code of all ones is NaN, and what infinities become: an
// infinite moment turns into NaN in the next update anyway (inf - inf).
template <int kMantissa, bool kSigned>
struct Float8 {
  using Storage = uint8_t;
  using Code = uint32_t;
  using Scale = BinaryScale;
  static constexpr int kDropped = 23 - kMantissa;
  static constexpr uint32_t kNan = (16u << kMantissa) - 1;

  // The scale of a group whose largest finite magnitude has these bits. That magnitude, rounded up, is at most the
  // code below kNan, so that nothing is clipped and the mean is exact at the top as well.
  static FS_HD uint32_t scale_for(uint32_t largest) {
    const uint32_t exponent = (largest + (2u << kDropped) - 1u) >> 23;
    return exponent > 15u ? exponent - 15u : 0u;
  }

  static FS_HD float decode(Code code, Scale scale) {
    const uint32_t position = (kSigned ? code & 0x7fu : code) << kDropped;
    const uint32_t bits = position + scale.base;
    const float subnormal = float_of(bits + kBinade) - scale.smallest_normal;  // exact
    const uint32_t magnitude = position < kBinade ? bits_of(subnormal) : bits;
    const uint32_t sign = kSigned ? (code & 0x80u) << 24 : 0u;
    return float_of(sign | (position == kNan << kDropped ? 0x7fc00000u : magnitude));
  }

  // A subnormal's place is that of 1 + x among the floats, a normal one's that of 2x, whichever is larger: 2x from x =
  // 1 on, where x is in units of the smallest normal value.
  static FS_HD Code encode(float value, Scale scale, uint32_t random) {
    const uint32_t draw = kSigned ? random & ((1u << kDropped) - 1u) : random >> (32 - kDropped);
    const uint32_t magnitude = bits_of(value) & kMagnitudeMask;
    const uint32_t smallest_normal = scale.base + kBinade;
    const uint32_t subnormal = bits_of(float_of(magnitude) + scale.smallest_normal);
    const uint32_t position = larger(subnormal, magnitude + kBinade) - smallest_normal;
    uint32_t code = (position + draw) >> kDropped;
    if (kSigned) {
      code |= (bits_of(value) >> 24) & 0x80u;
    } else {
      const uint32_t least = magnitude < 1u ? magnitude : 1u;
      code = code > least ? code : least;
    }
    return magnitude < kInfinityBits ? code : kNan;  // without its sign, on which processors disagree
  }
};

// The bits of a finite value's magnitude, else 0; scale_for is given the largest of a group.
FS_HD uint32_t finite_magnitude(float value) {
  const uint32_t magnitude = bits_of(value) & kMagnitudeMask;
  return magnitude < kInfinityBits ? magnitude : 0u;
}

// First<T>, Second<T>: codecs of moments that are computed as T. kGroup: elements per scale, 1 without scales.
// kExact: nothing is rounded, and nothing drawn.
struct MomentsFloat32 {
  template <class T>
  using First = Exact<T>;
  template <class T>
  using Second = Exact<T>;
  static constexpr int kGroup = 1;
  static constexpr bool kExact = true;
};

struct MomentsBfloat16 {
  template <class T>
  using First = Bfloat16First;
  template <class T>
  using Second = Bfloat16Second;
  static constexpr int kGroup = 1;
  static constexpr bool kExact = false;
};

// Groups of 16: one AVX-512 register of floats, one CUDA thread's 16-byte access of codes, and 1/16 byte of scale.
struct Moments8bit {
  template <class T>
  using First = Float8<3, true>;
  template <class T>
  using Second = Float8<4, false>;
  static constexpr int kGroup = 16;
  static constexpr bool kExact = false;
};

FS_NAMESPACE_END
