// Update kernels of fp16 parameters.
#include "update_kernel.cuh"

namespace fused_sched {

SelectedUpdate select_update_fp16(int master, int moments, bool amsgrad) {
  return select_update<Float16>(master, moments, amsgrad);
}

}  // namespace fused_sched
