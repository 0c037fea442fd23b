// Update kernels of fp64 parameters, whose gradients and moments are fp64 as well.
#include "update_kernel.cuh"

namespace fused_sched {

SelectedUpdate select_update_fp64(int grad_format, int master, bool amsgrad) {
  if (grad_format != kFloat64 || master != kMasterNone) return {nullptr, 0};
  return select_amsgrad<Float64, Float64, kMasterNone>(amsgrad);
}

}  // namespace fused_sched
