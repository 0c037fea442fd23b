// The 8-bit codes of a group, four to a register: decoded and encoded where all of its numbers are ordinary.
#pragma once

#include "runtime.h"

namespace fused_sched {

// 2^(scale - 112) is a float up to this one.
constexpr uint32_t kMaxUnitScale = 239;
// 2^-scale is a float, be it a subnormal one, up to scale 149; magnitudes below this power of two have 148 at most.
constexpr uint32_t kLargestPackedLog2 = 36;

// A code is a small float's exponent and significand, and so are fp16's upper bits, which processors convert,
// subnormals included: there the code stands for its value times 2^(112 - scale). Back, a product with 2^-scale has the
// code among the upper bits of a float (subnormals are rounded where Float8 rounds them).
template <class Codec>
struct PackedCodes;

// Two halves as floats.
FS_DEVICE void decode_halves(uint32_t pair, float& lower, float& upper) {
#if defined(__CUDA_ARCH__)
  asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
      : "=f"(lower), "=f"(upper)
      : "r"(pair));
#else
  lower = Float16::decode(static_cast<uint16_t>(pair));
  upper = Float16::decode(static_cast<uint16_t>(pair >> 16));
#endif
}

FS_DEVICE float unit_of(uint32_t scale) { return float_of((scale + 15u) << 23); }                  // 2^(scale - 112)
FS_DEVICE float inverse_of(uint32_t scale) { return float_of((254u - scale) << 23) * 0x1p-127f; }  // 2^-scale

// The highest bit of a byte says whether all of its bits are set, for the lowest such byte at least.
FS_DEVICE uint32_t full_bytes(uint32_t word) { return (0xfefefefeu - word) & word; }

// Of two registers' eight bytes four, by the digits of `selector`; 8 more than a byte's number repeats its sign.
FS_DEVICE uint32_t bytes_of(uint32_t first, uint32_t second, uint32_t selector) {
  return __byte_perm(first, second, selector);
}

struct CodeWords {
  uint32_t word[4];

  // Whether a byte has all bits set, or has with those of `set`.
  FS_DEVICE bool has_full_byte(uint32_t set) const {
    uint32_t full = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) full |= full_bytes(word[i] | set);
    return (full & 0x80808080u) != 0;
  }

  // halves: of a word and which half of it, two codes as fp16.
  template <class Halves>
  FS_DEVICE void decode_halves_of(uint32_t scale, float (&value)[16], const Halves& halves) const {
    const float unit = unit_of(scale);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      decode_halves(halves(word[i / 2], i % 2), value[2 * i], value[2 * i + 1]);
      value[2 * i] *= unit;
      value[2 * i + 1] *= unit;
    }
  }

  // Of every pair's halves the lower bytes.
  FS_DEVICE void pack(const uint32_t (&pair)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = bytes_of(pair[2 * i], pair[2 * i + 1], 0x6420);
  }
};

template <>
struct PackedCodes<Moments8bit::First<float>> : CodeWords {
  using Codec = Moments8bit::First<float>;

  FS_DEVICE bool has_nan() const { return has_full_byte(0x80808080u); }

  FS_DEVICE void decode(uint32_t scale, float (&value)[16]) const {
    decode_halves_of(scale, value, [](uint32_t word, int half) {
      // Each code below eight times its sign. Shifted, the lowest of these is fp16's sign; of the others none is left.
      return bytes_of(word, 0, half == 0 ? 0x9180 : 0xb3a2) << 7 & 0xbf80bf80u;
    });
  }

  // random: of pairs.
  FS_DEVICE void encode(const float (&value)[16], uint32_t scale, const uint32_t (&random)[8]) {
    constexpr uint32_t kDraw = (1u << Codec::kDropped) - 1u;
    const float inverse = inverse_of(scale);
    uint32_t pair[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t lower = bits_of(value[2 * i] * inverse) + (random[i] & kDraw);
      const uint32_t upper = bits_of(value[2 * i + 1] * inverse) + (exchange_halves(random[i]) & kDraw);
      const uint32_t words = bytes_of(lower, upper, 0x7632);  // each: sign, 0000, seven bits of code, four of the draw
      pair[i] = (words >> 4 & 0x007f007fu) | (words >> 8 & ~0x007f007fu);
    }
    pack(pair);
  }
};

template <>
struct PackedCodes<Moments8bit::Second<float>> : CodeWords {
  using Codec = Moments8bit::Second<float>;

  FS_DEVICE bool has_nan() const { return has_full_byte(0); }

  FS_DEVICE void decode(uint32_t scale, float (&value)[16]) const {
    decode_halves_of(scale, value,
                     [](uint32_t word, int half) { return bytes_of(word, 0, half == 0 ? 0x4140 : 0x4342) << 6; });
  }

  FS_DEVICE void encode(const float (&value)[16], uint32_t scale, const uint32_t (&random)[8]) {
    constexpr int kDrawn = 32 - Codec::kDropped;
    const float inverse = inverse_of(scale);
    uint32_t pair[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t lower = bits_of(value[2 * i] * inverse) + (random[i] >> kDrawn);
      const uint32_t upper = bits_of(value[2 * i + 1] * inverse) + (exchange_halves(random[i]) >> kDrawn);
      pair[i] = bytes_of(lower, upper, 0x7632) >> (Codec::kDropped - 16);
    }
    pack(pair);
    uint32_t zeros = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) zeros |= full_bytes(~word[i]);
    if ((zeros & 0x80808080u) == 0) return;
    // What is not zero gets a code that is not.
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint32_t one = 1u << (8 * (i % 4));
      if (value[i] != 0.0f && (word[i / 4] & 255u * one) == 0) word[i / 4] += one;
    }
  }
};

}  // namespace fused_sched
