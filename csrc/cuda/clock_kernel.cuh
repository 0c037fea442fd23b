// The clock: one block advances T, evaluates every group's hyperparameters, then advances each tensor's step
// and derives its scalars.
#pragma once

#include "tensor_table.cuh"

namespace fused_sched {

FS_DEVICE const Hyperparameter& hyperparameter_of(const GroupRecord& group, int index) {
  switch (index) {
    case 0: return group.lr;
    case 1: return group.beta1;
    case 2: return group.beta2;
    default: return group.weight_decay;
  }
}

FS_DEVICE double& value_of(GroupValues& values, int index) {
  switch (index) {
    case 0: return values.lr;
    case 1: return values.beta1;
    case 2: return values.beta2;
    default: return values.weight_decay;
  }
}

FS_DEVICE ScalarSlot skipped_slot(bool computes_in_double) {
  ScalarSlot slot;
  if (computes_in_double) {
    slot.f64 = skipped_scalars<double>();
  } else {
    slot.f32 = skipped_scalars<float>();
  }
  return slot;
}

FS_DEVICE void begin_call(const ClockTable& table) {
  constexpr int kHyperparameters = 4;
  if (threadIdx.x == 0) advance_clock(*table.clock, table.tick, table.found_inf);
  __syncthreads();
  if (!table.clock->skipped) {
    for (int i = threadIdx.x; i < table.num_groups * kHyperparameters; i += kClockThreads) {
      const int group = i / kHyperparameters;
      const int index = i % kHyperparameters;
      value_of(table.values[group], index) =
          hyperparameter_value(hyperparameter_of(table.groups[group], index), table.clock->step);
    }
  }
  __syncthreads();
}

// Each thread takes consecutive rows, because neighbours share group and step more often than not, and then
// their scalars, which cost two powers.
FS_DEVICE void advance_rows(const ClockTable& table) {
  const int rows_per_thread = (table.num_rows + kClockThreads - 1) / kClockThreads;
  const int first = static_cast<int>(threadIdx.x) * rows_per_thread;
  const int end = first + rows_per_thread < table.num_rows ? first + rows_per_thread : table.num_rows;
  const bool skipped = table.clock->skipped != 0;
  const double grad_scale = table.grad_scale != nullptr ? static_cast<double>(*table.grad_scale) : 1.0;

  ScalarSlot slot;
  int64_t slot_step = 0;
  for (int row = first; row < end; ++row) {
    const bool wide = table.computes_in_double[row] != 0;
    if (skipped) {
      table.scalars[row] = skipped_slot(wide);
      continue;
    }
    const int group = table.group[row];
    const int64_t step = advance_step(*reinterpret_cast<StepRecord*>(table.step[row]));
    const bool same_as_previous = row > first && step == slot_step && group == table.group[row - 1] &&
                                  wide == (table.computes_in_double[row - 1] != 0);
    if (!same_as_previous) {
      if (wide) {
        slot.f64 = step_scalars<double>(table.groups[group], table.values[group], step, grad_scale);
      } else {
        slot.f32 = step_scalars<float>(table.groups[group], table.values[group], step, grad_scale);
      }
      slot_step = step;
    }
    slot.random = random_key(table.seed, table.clock->step, table.ordinal[row]);
    table.scalars[row] = slot;
  }
}

__global__ void __launch_bounds__(kClockThreads) clock_kernel(FS_KERNEL_TABLE(ClockTable) table) {
  if (table.begins_call) begin_call(table);
  advance_rows(table);
}

}  // namespace fused_sched
