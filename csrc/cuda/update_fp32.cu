// Update kernels of fp32 parameters.
#include "update_kernel.cuh"

namespace fused_sched {

SelectedUpdate select_update_fp32(int master, int moments, bool amsgrad) {
  return select_update<Float32>(master, moments, amsgrad);
}

}  // namespace fused_sched
