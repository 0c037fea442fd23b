// The C ABI between the binding and a backend: plain data, raw addresses, a raw stream. `_cpu` and `_cuda`
// implement the same functions, so that one binding serves both.
#pragma once

#include <stdint.h>

#include "core/clock.h"
#include "core/metric.h"

extern "C" {

// The state of many tensors in few allocations. Every slot of a batch has the same layout in elements, so a
// tensor's state is one offset; 0 marks a slot this batch does not have. What a slot holds per element (a scale:
// per group of elements) is the format's: core/master.h, core/moments.h.
enum {
  kExpAvg = 0,
  kExpAvgSq = 1,
  kMaxExpAvgSq = 2,
  kMasterWeight = 3,
  kExpAvgScale = 4,
  kExpAvgSqScale = 5,
  kNumSlots = 6
};

struct fs_arena {
  uint64_t slot[kNumSlots];  // 16-byte aligned addresses
};

// One tensor of a call. Parameter and gradient have the same dense layout; only they may be misaligned or end
// inside a vector: state is padded to kPadding elements and each tensor starts at a multiple of it.
enum { kPadding = 256 };

struct fs_tensor {
  uint64_t param;
  uint64_t grad;
  uint64_t step;  // address of its StepRecord, on the device
  int64_t numel;
  int64_t state_offset;  // elements into the arena, a multiple of kPadding
  int32_t arena;
  int32_t group;
  uint32_t ordinal;      // place of the parameter among all of the optimizer's, of stochastic rounding
  uint8_t param_format;  // Format
  uint8_t grad_format;   // Format
  uint8_t master;        // Master
  uint8_t moments;       // Moments
  uint8_t amsgrad;
  uint8_t reserved[7];
};

// One call of the optimizer on one device. `tensors` and `arenas` are host memory, read before the call
// returns; everything else is memory of the device.
struct fs_call {
  const fs_tensor* tensors;
  int64_t num_tensors;
  const fs_arena* arenas;
  int64_t num_arenas;
  fused_sched::Clock* clock;
  const fused_sched::GroupRecord* groups;
  fused_sched::GroupValues* values;
  int64_t num_groups;
  fused_sched::ScalarSlot* scalars;  // num_tensors
  const float* found_inf;            // null: none
  const float* grad_scale;           // null: none
  uint64_t seed;                     // of stochastic rounding
  int32_t tick;
  int32_t device;
  uint64_t stream;
  int32_t num_threads;  // CPU only
  int32_t launches;     // out: kernels or parallel loops started
};

// One report of a metric to the rates that depend on it. All memory is the device's.
struct fs_report {
  const double* metric;
  const fused_sched::MetricRecord* records;
  int64_t num_records;
  uint64_t stream;
  int32_t device;
};

// Each returns 0, or non-zero after writing what failed, where, and CUDA's name for it into `error`.
enum { kErrorSize = 512 };
int fs_clock(fs_call* call, char* error);
int fs_update(fs_call* call, char* error);
int fs_report_metric(const fs_report* report, char* error);
int fs_device_count(int* count, char* error);
}
