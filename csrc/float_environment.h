// The floating-point environment of everything computed on the host.
#pragma once

#include <fenv.h>

namespace fused_sched {

// torch.set_flush_denormal(True) changes the caller's floating-point environment, which threads inherit or
// not; subnormals count here whatever it says, on every thread alike.
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

}  // namespace fused_sched
