// What the files that launch kernels share.
#pragma once

#include "runtime.h"

namespace fused_sched {

// How many blocks of a kernel the current device runs at once; asked once per kernel and device. Asking loads the
// kernel.
int resident_blocks(const void* kernel, int num_threads, int device);

inline cudaStream_t stream_of(const fs_call& call) { return reinterpret_cast<cudaStream_t>(call.stream); }

// Loads the kernels of the clock and, for a call with a norm, of that.
void load_clock(const fs_call& call);

void launch_clock(fs_call& call);
void launch_norm(fs_call& call);

}  // namespace fused_sched
