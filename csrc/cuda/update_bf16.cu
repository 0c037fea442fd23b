// Update kernels of bf16 parameters.
#include "update_kernel.cuh"

namespace fused_sched {

SelectedUpdate select_update_bf16(int master, int moments, bool amsgrad) {
  return select_update<Bfloat16>(master, moments, amsgrad);
}

}  // namespace fused_sched
