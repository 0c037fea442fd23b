// Floats whose roots and quotients need no special case: a type for the templates of core/adam.h.
//
// nvcc's own root and quotient ask of every operand whether it is zero, subnormal or near the ends of the range, and
// branch to a subroutine if so: 9 of their 20 instructions, zeros take the subroutines, and no two elements overlap.
// Here what is small is scaled, and for the rest the caller vouches, for all of a thread's elements at once. What is
// left are the instructions of nvcc 13's fast paths (cuobjdump of __fsqrt_rn and __fdiv_rn), in their order and in
// their ranges. That results are IEEE's rests on that: for estimates half an ulp off a few are not (2^k by the float
// before a power of two; the root of 0x406e9372), so NVIDIA's tables matter. With the host's estimates every root is,
// and were 3e8 random quotients. gpu-check compares the GPU's: roots of every float in [1, 4) and the hardest
// quotients.
#pragma once

#include "runtime.h"

namespace fused_sched {

// MUFU: estimates with an error of about an ulp, of normal numbers; subnormals, given or due, are zeros. The host's
// are better.
FS_DEVICE float without_subnormals(float value) { return fabsf(value) < 0x1p-126f ? 0.0f : value; }

FS_DEVICE float reciprocal_estimate(float value) {
#if defined(__CUDA_ARCH__)
  float estimate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(value));
  return estimate;
#else
  return without_subnormals(1.0f / without_subnormals(value));
#endif
}

FS_DEVICE float reciprocal_root_estimate(float value) {
#if defined(__CUDA_ARCH__)
  float estimate;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(value));
  return estimate;
#else
  return 1.0f / sqrtf(without_subnormals(value));
#endif
}

struct Ordinary {
  float value;
};

FS_DEVICE Ordinary operator-(Ordinary a) { return {-a.value}; }
FS_DEVICE Ordinary operator-(Ordinary a, Ordinary b) { return {a.value - b.value}; }
FS_DEVICE Ordinary operator*(Ordinary a, Ordinary b) { return {a.value * b.value}; }
FS_DEVICE Ordinary operator*(Ordinary a, float b) { return {a.value * b}; }
FS_DEVICE bool operator<=(Ordinary a, Ordinary b) { return a.value <= b.value; }
FS_DEVICE Ordinary multiply_add(Ordinary a, Ordinary b, Ordinary c) {
  return {multiply_add(a.value, b.value, c.value)};
}
FS_DEVICE Ordinary multiply_add(float a, Ordinary b, Ordinary c) { return {multiply_add(a, b.value, c.value)}; }

// A root times 2^32. What multiplies it is divided by that, once for all elements: both are powers of two far from the
// ends of the range, so the bits of the product are the same.
struct ScaledRoot {
  float value;
};
FS_DEVICE Ordinary multiply_add(ScaledRoot root, float factor, float addend) {
  return {multiply_add(root.value, factor * 0x1p-32f, addend)};
}

// Of 0 <= value < 2^60, subnormals included: times 2^64 all are in the range in which the residual is exact. An
// estimate for at least 2^-96 keeps the root of zero zero.
FS_DEVICE ScaledRoot square_root(Ordinary value) {
  const float scaled = value.value * 0x1p64f;
  const float estimate = reciprocal_root_estimate(fmaxf(scaled, 0x1p-96f));
  const float root = scaled * estimate;
  const float residual = multiply_add(-root, root, scaled);
  return {multiply_add(residual, estimate * 0.5f, root)};
}

// A quotient times 2^64, likewise. One that is subnormal even so need not be the nearest.
struct ScaledQuotient {
  float value;
};
FS_DEVICE Ordinary multiply_add(float factor, ScaledQuotient quotient, Ordinary addend) {
  return {multiply_add(factor * 0x1p-64f, quotient.value, addend.value)};
}

// Of any a, by 0 <= b < 2^125: a NaN or an infinity where b is zero or subnormal, a infinite or 2^63 and more, or the
// quotient 2^64 or more. nvcc subtracts the residual the other way round, which loses the sign of a zero.
FS_DEVICE ScaledQuotient operator/(Ordinary a, Ordinary b) {
  const float scaled = a.value * 0x1p64f;
  const float estimate = reciprocal_estimate(b.value);
  const float reciprocal = multiply_add(estimate, multiply_add(-b.value, estimate, 1.0f), estimate);
  const float quotient = scaled * reciprocal;
  const float excess = multiply_add(b.value, quotient, -scaled);
  return {multiply_add(-reciprocal, excess, quotient)};
}

}  // namespace fused_sched
