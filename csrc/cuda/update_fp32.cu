// Update kernels of fp32 parameters.
#include "update_kernel.cuh"

namespace fused_sched {

SelectedUpdate select_update_fp32(int grad_format, int master, bool amsgrad) {
  if (master != kMasterNone) return {nullptr, 0};
  return select_grad<Float32, kMasterNone>(grad_format, amsgrad);
}

}  // namespace fused_sched
