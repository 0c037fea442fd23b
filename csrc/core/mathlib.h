// cos(pi x), exp, log, pow and tanh in double, from additions, multiplications, divisions, fused
// multiply-adds and floor alone. The C library's and CUDA's versions of these differ in their last bits; a
// learning rate must not, or a run could not move between CPU and GPU.
//
// Accuracy: exponential, logarithm and power are within 0.7 ulp (in practice correctly rounded but for about
// one argument in fifty), cos_pi within 1 ulp, hyperbolic_tangent within 3 ulp; special values as in C99's
// annex F. tests/test_mathlib.py holds them to these numbers.
//
// The polynomials are Taylor series, cut where the next term is below 2^-57 of the sum: with one evaluation
// per group and step, coefficients a reader can check are worth more than a minimax fit's few terms less.
#pragma once

#include "platform.h"

#if defined(__FAST_MATH__)
#error "fast-math would rewrite the compensated sums below; build without -ffast-math"
#endif

FS_NAMESPACE_BEGIN

// An unevaluated sum hi + lo with |lo| <= ulp(hi) / 2: about 106 bits.
struct DoubleDouble {
  double hi;
  double lo;
};

// a + b exactly, where |a| >= |b| or both have one exponent (Dekker 1971).
FS_HD_CALL DoubleDouble fast_two_sum(double a, double b) {
  const double sum = a + b;
  return {sum, b - (sum - a)};
}

// a + b exactly, in any order of magnitude (Knuth, TAOCP 2, 4.2.2).
FS_HD_CALL DoubleDouble two_sum(double a, double b) {
  const double sum = a + b;
  const double b_part = sum - a;
  return {sum, (a - (sum - b_part)) + (b - b_part)};
}

// a * b exactly, barring underflow.
FS_HD_CALL DoubleDouble two_product(double a, double b) {
  const double product = a * b;
  return {product, multiply_add(a, b, -product)};
}

// a * b with a relative error of a few 2^-106.
FS_HD_CALL DoubleDouble multiply(DoubleDouble a, DoubleDouble b) {
  const DoubleDouble product = two_product(a.hi, b.hi);
  return fast_two_sum(product.hi, product.lo + (a.hi * b.lo + a.lo * b.hi));
}

// a + b with an absolute error of a few 2^-106 |a|, where |a| >= |b|.
FS_HD_CALL DoubleDouble add_smaller(DoubleDouble a, DoubleDouble b) {
  const DoubleDouble sum = fast_two_sum(a.hi, b.hi);
  return fast_two_sum(sum.hi, sum.lo + (a.lo + b.lo));
}

FS_HD_CALL double infinity() { return double_of(uint64_t{0x7ff0000000000000}); }
FS_HD_CALL double not_a_number() { return double_of(uint64_t{0x7ff8000000000000}); }
FS_HD_CALL double magnitude(double x) { return double_of(bits_of(x) & uint64_t{0x7fffffffffffffff}); }
FS_HD_CALL bool sign_bit(double x) { return (bits_of(x) >> 63) != 0; }

// 2^n for a whole n in [-1022, 1023].
FS_HD_CALL double power_of_two(double n) {
  return double_of(static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52);
}

// ln 2 in two parts: 42 bits, so that a product with an exponent of at most 11 bits is exact, and the rest.
constexpr double kLn2High = 0x1.62e42fefa3800p-1;
constexpr double kLn2Low = 0x1.ef35793c76730p-45;
constexpr double kLog2E = 0x1.71547652b82fep+0;
constexpr double kPiHigh = 0x1.921fb54442d18p+1;
constexpr double kPiLow = 0x1.1a62633145c07p-53;

// e^x = 2^exponent * (1 + fraction), |fraction| < 0.42.
struct ExponentialParts {
  double exponent;
  DoubleDouble fraction;
};

// Of e^(hi + lo), for |hi| < 1100.
FS_HD_CALL ExponentialParts exponential_parts(double hi, double lo) {
  const double n = floor(hi * kLog2E + 0.5);
  // The first difference is exact: n * kLn2High is, and the two are close or n is 0.
  const DoubleDouble r = two_sum(hi - n * kLn2High, lo - n * kLn2Low);
  double series = 1.0 / 87178291200.0;  // 1/14!; |r| <= ln(2)/2, and 0.3466^15 / 15! is 2^-63
  series = multiply_add(series, r.hi, 1.0 / 6227020800.0);
  series = multiply_add(series, r.hi, 1.0 / 479001600.0);
  series = multiply_add(series, r.hi, 1.0 / 39916800.0);
  series = multiply_add(series, r.hi, 1.0 / 3628800.0);
  series = multiply_add(series, r.hi, 1.0 / 362880.0);
  series = multiply_add(series, r.hi, 1.0 / 40320.0);
  series = multiply_add(series, r.hi, 1.0 / 5040.0);
  series = multiply_add(series, r.hi, 1.0 / 720.0);
  series = multiply_add(series, r.hi, 1.0 / 120.0);
  series = multiply_add(series, r.hi, 1.0 / 24.0);
  series = multiply_add(series, r.hi, 1.0 / 6.0);
  series = multiply_add(series, r.hi, 1.0 / 2.0);
  const DoubleDouble sum = fast_two_sum(r.hi, r.hi * r.hi * series);
  return {n, {sum.hi, sum.lo + r.lo}};
}

// e^(hi + lo) rounded once, or twice where the result is subnormal.
FS_HD_CALL double exponential_of_sum(double hi, double lo) {
  if (!(hi <= 710.0)) return hi > 710.0 ? infinity() : hi;
  if (hi < -746.0) return 0.0;
  const ExponentialParts parts = exponential_parts(hi, lo);
  const DoubleDouble sum = fast_two_sum(1.0, parts.fraction.hi);
  const double mantissa = sum.hi + (sum.lo + parts.fraction.lo);
  // Two factors, because 2^exponent alone may be 2^1024 or subnormal.
  const double half = floor(0.5 * parts.exponent);
  return mantissa * power_of_two(half) * power_of_two(parts.exponent - half);
}

// ln x to about 66 bits, for a positive finite x. power needs them: y * ln x reaches 709, which turns a
// relative error of 2^-53 in the logarithm into one of 2^-44 in the result.
FS_HD_CALL DoubleDouble logarithm_parts(double x) {
  double exponent = -1023.0;
  if (x < 0x1p-1022) {
    x *= 0x1p54;
    exponent -= 54.0;
  }
  exponent += static_cast<double>(bits_of(x) >> 52);
  double m = double_of((bits_of(x) & uint64_t{0x000fffffffffffff}) | uint64_t{0x3ff0000000000000});
  if (m > 0x1.6a09e667f3bcdp+0) {  // sqrt 2: m ends in [sqrt(1/2), sqrt(2)]
    m *= 0.5;
    exponent += 1.0;
  }
  // ln m = 2 atanh(s) = 2 (s + s^3/3 + s^5/5 + ...), s = (m-1)/(m+1), |s| < 0.1716.
  const double numerator = m - 1.0;  // exact
  const DoubleDouble denominator = fast_two_sum(1.0, m);
  const double quotient = numerator / denominator.hi;
  const double remainder = multiply_add(-quotient, denominator.hi, numerator) - quotient * denominator.lo;
  const DoubleDouble s = fast_two_sum(quotient, remainder / denominator.hi);
  const DoubleDouble z = multiply(s, s);
  double series = 1.0 / 25.0;  // z < 0.0295, and z^13 / 27 is 2^-71
  series = multiply_add(series, z.hi, 1.0 / 23.0);
  series = multiply_add(series, z.hi, 1.0 / 21.0);
  series = multiply_add(series, z.hi, 1.0 / 19.0);
  series = multiply_add(series, z.hi, 1.0 / 17.0);
  series = multiply_add(series, z.hi, 1.0 / 15.0);
  series = multiply_add(series, z.hi, 1.0 / 13.0);
  series = multiply_add(series, z.hi, 1.0 / 11.0);
  series = multiply_add(series, z.hi, 1.0 / 9.0);
  series = multiply_add(series, z.hi, 1.0 / 7.0);
  series = multiply_add(series, z.hi, 1.0 / 5.0);
  const DoubleDouble third = {0x1.5555555555555p-2, 0x1.5555555555555p-56};
  const DoubleDouble tail = add_smaller(third, two_product(z.hi, series));
  const DoubleDouble twice_s = {2.0 * s.hi, 2.0 * s.lo};
  const DoubleDouble mantissa_part = add_smaller(twice_s, multiply(twice_s, multiply(z, tail)));
  const DoubleDouble exponent_part = {exponent * kLn2High, exponent * kLn2Low};
  return exponent == 0.0 ? mantissa_part : add_smaller(exponent_part, mantissa_part);
}

// e^x.
FS_HD_CALL double exponential(double x) { return exponential_of_sum(x, 0.0); }

// ln x; -inf at 0, NaN below.
FS_HD_CALL double logarithm(double x) {
  if (!(x > 0.0)) return x == 0.0 ? -infinity() : not_a_number();
  return x == infinity() ? x : logarithm_parts(x).hi;
}

// x^y with C99's special values. Exact wherever the result is a double: power(0.5, n), power(3, 5).
FS_HD_CALL double power(double x, double y) {
  if (y == 0.0 || x == 1.0) return 1.0;
  if (y == 1.0) return x;
  if (x != x || y != y) return not_a_number();
  const double base = magnitude(x);
  if (magnitude(y) == infinity()) {
    if (base == 1.0) return 1.0;
    return (base > 1.0) == (y > 0.0) ? infinity() : 0.0;
  }
  const bool whole = floor(y) == y;
  const bool odd = whole && floor(0.5 * y) != 0.5 * y;
  const bool negative = sign_bit(x) && odd;
  if (base == 0.0 || base == infinity()) {
    const double result = (base == 0.0) == (y > 0.0) ? 0.0 : infinity();
    return negative ? -result : result;
  }
  if (x < 0.0 && !whole) return not_a_number();
  const DoubleDouble log_base = logarithm_parts(base);
  const DoubleDouble product = two_product(y, log_base.hi);
  double result;
  if (magnitude(product.hi) > 800.0) {  // the low part may be a NaN here
    result = product.hi > 0.0 ? infinity() : 0.0;
  } else {
    const DoubleDouble exponent = fast_two_sum(product.hi, multiply_add(y, log_base.lo, product.lo));
    result = exponential_of_sum(exponent.hi, exponent.lo);
  }
  return negative ? -result : result;
}

// cos(pi x). Exactly 0 at halves and +-1 at whole numbers; every reduction below is exact, so a cosine keeps
// its digits after any number of periods (cos(M_PI * x) has lost five of them at x = 1e5).
FS_HD_CALL double cos_pi(double x) {
  double a = magnitude(x);
  a -= 2.0 * floor(0.5 * a);  // [0, 2); NaN for infinities
  if (a > 1.0) a = 2.0 - a;
  const bool negative = a > 0.5;
  if (negative) a = 1.0 - a;
  const bool use_sine = a > 0.25;
  if (use_sine) a = 0.5 - a;
  // [0, 1/4]: angle = pi a <= 0.7854, where the first dropped terms, angle^20 / 20! and angle^18 / 19!
  // relative to the sine, are below 2^-62.
  const double angle = kPiHigh * a;
  const double angle_low = multiply_add(kPiHigh, a, -angle) + kPiLow * a;
  const double z = angle * angle;
  double result;
  if (use_sine) {
    double series = 1.0 / 355687428096000.0;  // 1/17!
    series = multiply_add(series, z, -1.0 / 1307674368000.0);
    series = multiply_add(series, z, 1.0 / 6227020800.0);
    series = multiply_add(series, z, -1.0 / 39916800.0);
    series = multiply_add(series, z, 1.0 / 362880.0);
    series = multiply_add(series, z, -1.0 / 5040.0);
    series = multiply_add(series, z, 1.0 / 120.0);
    series = multiply_add(series, z, -1.0 / 6.0);
    result = angle + (angle * z * series + angle_low * (1.0 - 0.5 * z));
  } else {
    double series = -1.0 / 6402373705728000.0;  // -1/18!
    series = multiply_add(series, z, 1.0 / 20922789888000.0);
    series = multiply_add(series, z, -1.0 / 87178291200.0);
    series = multiply_add(series, z, 1.0 / 479001600.0);
    series = multiply_add(series, z, -1.0 / 3628800.0);
    series = multiply_add(series, z, 1.0 / 40320.0);
    series = multiply_add(series, z, -1.0 / 720.0);
    series = multiply_add(series, z, 1.0 / 24.0);
    const DoubleDouble leading = fast_two_sum(1.0, -0.5 * z);
    result = leading.hi + (leading.lo + (z * z * series - angle * angle_low));
  }
  return negative ? -result : result;
}

// tanh x = (e^2x - 1) / (e^2x + 1), with e^2x - 1 taken before the 1 was added, so that small x keep their
// digits.
FS_HD_CALL double hyperbolic_tangent(double x) {
  const double a = magnitude(x);
  if (!(a < 22.0)) return x != x ? x : (x > 0.0 ? 1.0 : -1.0);  // 1 - tanh(22) = 2^-62
  if (a < 0x1p-28) return x;                                    // x - x^3/3
  const ExponentialParts parts = exponential_parts(2.0 * a, 0.0);
  const double scale = power_of_two(parts.exponent);
  const double excess = (scale - 1.0 + scale * parts.fraction.hi) + scale * parts.fraction.lo;
  const double result = excess / (excess + 2.0);
  return x < 0.0 ? -result : result;
}

FS_NAMESPACE_END
