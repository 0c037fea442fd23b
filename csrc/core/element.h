// Element formats: how parameters and gradients are stored, and how they become the float (or double) that
// adam.h computes with.
#pragma once

#include "rounding.h"

FS_NAMESPACE_BEGIN

// encode: to nearest, ties to even. encode_beside_master: the rounding of a parameter whose exact value is kept.
struct Float32 {
  using Storage = float;
  using Compute = float;
  static FS_HD Compute decode(Storage stored) { return stored; }
  static FS_HD Storage encode(Compute value) { return value; }
};

struct Float64 {
  using Storage = double;
  using Compute = double;
  static FS_HD Compute decode(Storage stored) { return stored; }
  static FS_HD Storage encode(Compute value) { return value; }
};

struct Bfloat16 {
  using Storage = uint16_t;
  using Compute = float;
  static FS_HD Compute decode(Storage stored) { return float_of(static_cast<uint32_t>(stored) << 16); }
  static FS_HD Storage encode(Compute value) { return round_to_even(value); }
  // Split masters need this rounding; an fp32 master uses it too, so that the two give the same parameters.
  static FS_HD Storage encode_beside_master(Compute value) { return round_away(value); }
};

struct Float16 {
  using Storage = uint16_t;
  using Compute = float;

  static FS_HD Compute decode(Storage stored) {
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(stored));
    return value;
#else
    const uint32_t sign = static_cast<uint32_t>(stored & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(stored & 0x7fffu) << 13;
    // 2^112 moves the exponent bias from 15 to 127; the product is exact, also for fp16's subnormals.
    const uint32_t scaled = bits_of(float_of(magnitude) * 5.192296858534828e33f);
    const bool special = magnitude >= (0x7c00u << 13);
    return float_of(sign | (special ? magnitude | 0x7f800000u : scaled));
#endif
  }

  static FS_HD Storage encode(Compute value) {
#if defined(__CUDA_ARCH__)
    Storage stored;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(stored) : "f"(value));
    return stored;
#else
    const uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
    const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    // Below 2^-14 the unit of fp16 is 2^-24, that of floats in [0.5, 1): adding 0.5 rounds there.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // 65520 and above round to infinity
    result = magnitude > 0x7f800000u ? 0x7fffu : result;   // NaN
    return static_cast<Storage>(sign | result);
#endif
  }

  static FS_HD Storage encode_beside_master(Compute value) { return encode(value); }
};

FS_NAMESPACE_END
