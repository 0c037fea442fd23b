// The norm of a call's gradients on the CPU.
#pragma once

#include "../step.h"

namespace fused_sched {

// Leaves the sum of squares in call.norm.
void sum_norm(const fs_call& call);

}  // namespace fused_sched
