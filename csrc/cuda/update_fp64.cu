// Update kernels of fp64 parameters, whose gradients and moments are fp64 as well.
#include "update_kernel.cuh"

namespace fused_sched {

SelectedUpdate select_update_fp64(int master, int moments, bool amsgrad) {
  return select_update<Float64>(master, moments, amsgrad);
}

}  // namespace fused_sched
