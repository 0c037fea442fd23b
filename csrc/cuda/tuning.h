// The numbers of the CUDA path. tests/test_sass.py reads from the compiled code that they hold. None was measured on a
// GPU yet: they follow from registers, spills and bytes in flight (docs/measured.md), and the last stage of `make
// gpu-check` (benchmarks/gpu_check/tune.py) is to settle them. Left out, and to be measured: programmatic dependent
// launch of the update behind the clock (sm_90 on), which would hide the start of one launch, some microseconds of a
// step, and have blocks hold an SM while the clock runs.
#pragma once

namespace fused_sched {

// Four blocks of 256 threads per SM cap a thread at 64 registers: 128 KB of reads in flight per SM for fp32,
// where an H200's bandwidth times latency asks for about 12 KB.
constexpr int kUpdateThreads = 256;
constexpr int kUpdateBlocksPerSm = 4;

// Elements per thread: 8, but 16 of 8-bit moments, which share a scale, and 2 in double.
constexpr int kMaxElementsPerThread = 16;
constexpr int kElementsPerThreadFloat64 = 2;

// One block runs the clock. Each of its warps pays for two double-precision powers, which consumer GPUs
// compute at 1/64 of their float rate, so that more warps would cost them time: one warp per scheduler of an
// SM.
constexpr int kClockThreads = 128;

// 32 warps per SM, each with four 16-byte loads per thread in flight: 64 KB, where reading alone asks for about 24. The
// last block runs the clock, whose evaluator needs the 64 registers that four blocks leave.
constexpr int kNormThreads = 256;
constexpr int kNormBlocksPerSm = 4;
constexpr int kNormLoads = 4;

// Limit of a kernel's parameters since CUDA 12.1 (sm_70 and later).
constexpr int kMaxParameterBytes = 32764;

// Arenas one launch can address. An optimizer has one per batch of parameters and precision.
constexpr int kMaxArenas = 16;

}  // namespace fused_sched
