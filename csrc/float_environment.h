// The floating-point environment of everything computed on the host.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#else
#include <fenv.h>
#endif

namespace fused_sched {

// torch.set_flush_denormal(True) changes the caller's floating-point environment, which threads inherit or
// not; subnormals count here whatever it says, on every thread alike.
#if defined(__SSE2__)
// The register that SSE and AVX obey. fesetenv() also loads the x87's, which nothing here uses: 0.1 us each time, four
// times a step.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() : saved_(_mm_getcsr()) { set(kDefault); }
  ~DefaultFloatEnvironment() { set(saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  static constexpr unsigned kDefault = 0x1f80;  // all exceptions masked, to nearest, subnormals kept

  // The compiler moves no access to memory across this, hence nothing that is computed from what is loaded afterwards.
  static void set(unsigned state) {
    asm volatile("" ::: "memory");
    _mm_setcsr(state);
    asm volatile("" ::: "memory");
  }

  unsigned saved_;
};
#else
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    fegetenv(&saved_);
    fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { fesetenv(&saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  fenv_t saved_;
};
#endif

}  // namespace fused_sched
