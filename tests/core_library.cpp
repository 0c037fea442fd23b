// The core's mathematics and evaluator behind a C ABI, for tests that call them over ctypes.
#include "core/schedule.h"

using namespace fused_sched;

extern "C" {

void unary(const char* name, const double* x, double* out, int64_t count) {
  double (*function)(double) = nullptr;
  if (strcmp(name, "cos_pi") == 0) function = cos_pi;
  if (strcmp(name, "exponential") == 0) function = exponential;
  if (strcmp(name, "logarithm") == 0) function = logarithm;
  if (strcmp(name, "hyperbolic_tangent") == 0) function = hyperbolic_tangent;
  for (int64_t i = 0; i < count; ++i) out[i] = function(x[i]);
}

void powers(const double* x, const double* y, double* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = power(x[i], y[i]);
}

const char* validate(const unsigned char* program, int64_t size) { return validate_program(program, size); }

void evaluate_at(const unsigned char* program, const double* times, double* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = evaluate(program, times[i]);
}
}
