// What the three compilers of the core (g++, nvcc's host pass, nvcc's device pass) do differently:
// qualifiers, bit casts and the fused multiply-add. No CUDA runtime and no torch header here or below.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

// The CPU loops are compiled once per instruction set into one library. Every core function lives in an
// inline namespace named after that set, because the linker would otherwise merge the AVX-512 copy of an
// inline function with the baseline's and run it on a machine that has no AVX-512.
#if !defined(FS_ISA)
#define FS_ISA generic
#endif
#define FS_NAMESPACE_BEGIN \
  namespace fused_sched {  \
  inline namespace FS_ISA {
#define FS_NAMESPACE_END \
  }                      \
  }

// FS_HD: small functions of one element, always inlined. FS_HD_CALL: the evaluator and its mathematics,
// which run once per step and would only bloat their callers.
#if defined(__CUDACC__)
#define FS_HD __host__ __device__ __forceinline__
#define FS_HD_CALL __host__ __device__ inline
#else
#define FS_HD inline __attribute__((always_inline))
#define FS_HD_CALL inline
#endif

FS_NAMESPACE_BEGIN

FS_HD uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

FS_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

FS_HD uint64_t bits_of(double value) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint64_t>(__double_as_longlong(value));
#else
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

FS_HD double double_of(uint64_t bits) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(static_cast<long long>(bits));
#else
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// a * b + c rounded once. Contraction is off everywhere (-ffp-contract=off, -fmad=false), so these two are
// the only fused operations and every compiler gives the same bits.
FS_HD double multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

FS_HD float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(__FMA__) || !defined(FS_EMULATE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  // A processor without FMA: the product of two floats is exact in double; the sum is rounded to odd
  // (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums"), after which rounding to
  // float gives what one rounding would have given. No branch and no call, but g++ 12 leaves it scalar.
  const double product = static_cast<double>(a) * static_cast<double>(b);
  const double addend = static_cast<double>(c);
  const double sum = product + addend;
  const double addend_part = sum - product;
  const double error = (product - (sum - addend_part)) + (addend - addend_part);
  const uint64_t sum_bits = bits_of(sum);
  // To odd: cut off towards zero, then let the last bit say that something was cut. An infinite or NaN sum has
  // a NaN error, which compares false.
  const uint64_t inexact = static_cast<uint64_t>(error < 0.0) | static_cast<uint64_t>(error > 0.0);
  const uint64_t beyond = ((bits_of(error) ^ sum_bits) >> 63) & inexact;
  return static_cast<float>(double_of((sum_bits - beyond) | inexact));
#endif
}

FS_HD float square_root(float value) { return sqrtf(value); }
FS_HD double square_root(double value) { return sqrt(value); }

FS_NAMESPACE_END
