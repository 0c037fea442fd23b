// Storage of one element: how parameters, gradients and state are kept in memory, and how they become the
// float (or double) that adam.h computes with. Each format is written once, here; loops and kernels only
// move the bytes.
#pragma once

#include "platform.h"

// Element formats: X(identifier, tag, name, type). Tags are in checkpoints: never renumber one.
#define FS_FORMATS(X)               \
  X(kFloat32, 0, "fp32", Float32)   \
  X(kBfloat16, 1, "bf16", Bfloat16) \
  X(kFloat16, 2, "fp16", Float16)   \
  X(kFloat64, 3, "fp64", Float64)

// Where the exact value of a 16-bit parameter is kept: X(identifier, tag, name).
#define FS_MASTERS(X)       \
  X(kMasterNone, 0, "none") \
  X(kMasterFloat32, 1, "fp32")

// How the two moments are kept: X(identifier, tag, name).
#define FS_MOMENTS(X) X(kMomentsFloat32, 0, "fp32")

FS_NAMESPACE_BEGIN

#define FS_ENUMERATOR(identifier, tag, name, ...) identifier = tag,
enum Format : int32_t { FS_FORMATS(FS_ENUMERATOR) };
enum Master : int32_t { FS_MASTERS(FS_ENUMERATOR) };
enum Moments : int32_t { FS_MOMENTS(FS_ENUMERATOR) };
#undef FS_ENUMERATOR

struct Float32 {
  using Storage = float;
  using Compute = float;
  static FS_HD Compute decode(Storage stored) { return stored; }
  static FS_HD Storage encode(Compute value) { return value; }
  static FS_HD Storage encode_beside_master(Compute value) { return value; }
};

struct Float64 {
  using Storage = double;
  using Compute = double;
  static FS_HD Compute decode(Storage stored) { return stored; }
  static FS_HD Storage encode(Compute value) { return value; }
  static FS_HD Storage encode_beside_master(Compute value) { return value; }
};

struct Bfloat16 {
  using Storage = uint16_t;
  using Compute = float;

  static FS_HD Compute decode(Storage stored) { return float_of(static_cast<uint32_t>(stored) << 16); }

  // Round to nearest, ties to even, as torch's cast does; a NaN stays a NaN.
  static FS_HD Storage encode(Compute value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return static_cast<Storage>(nan ? 0x7fffu : rounded);
  }

  // Round to nearest, ties away from zero: the rounding of the split masters, whose 16-bit remainder can
  // then restore the fp32 value (ties to even maps two values to one pair). An fp32 master uses it too, so
  // that the two kinds of master give the same parameters.
  static FS_HD Storage encode_beside_master(Compute value) {
    const uint32_t bits = bits_of(value);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return static_cast<Storage>(nan ? 0x7fffu : (bits + 0x8000u) >> 16);
  }
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

// The master of a parameter that was edited outside (weights loaded, EMA swapped in) no longer rounds to it:
// the parameter wins.
template <class Param>
FS_HD float reconcile_master(float master, typename Param::Storage stored) {
  return Param::encode_beside_master(master) == stored ? master : Param::decode(stored);
}

FS_NAMESPACE_END
