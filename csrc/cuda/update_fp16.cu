// Update kernels of fp16 parameters.
#include "update_kernel.cuh"

namespace fused_sched {

SelectedUpdate select_update_fp16(int grad_format, int master, bool amsgrad) {
  switch (master) {
    case kMasterNone: return select_grad<Float16, kMasterNone>(grad_format, amsgrad);
    case kMasterFloat32: return select_grad<Float16, kMasterFloat32>(grad_format, amsgrad);
    default: return {nullptr, 0};
  }
}

}  // namespace fused_sched
