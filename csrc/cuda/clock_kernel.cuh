// The clock: one block advances T, evaluates every group's hyperparameters, then advances each tensor's step
// and derives its scalars.
#pragma once

#include "call_table.cuh"

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

FS_DEVICE double grad_scale_of(const CallTable& table) {
  return table.grad_scale != nullptr ? static_cast<double>(*table.grad_scale) : 1.0;
}

// One thread: is the call applied? Everything after depends on it.
FS_DEVICE void decide(const CallTable& table) {
  NormState* const norm = table.norm;
  if (norm != nullptr) finish_norm(*norm, table.norm_is_reduced, grad_scale_of(table));
  advance_clock(*table.clock, table.tick, table.found_inf, norm != nullptr && refuses_step(*norm));
  if (table.history == nullptr) return;
  begin_record(*table.history, table.tick, table.clock->step, table.clock->skipped != 0,
               norm != nullptr ? norm->norm : NAN, norm != nullptr ? norm->clip : 1.0);
}

FS_DEVICE void record_groups(const CallTable& table, bool skipped) {
  const History& history = *table.history;
  for (int64_t i = threadIdx.x; i < history.num_groups; i += kClockThreads) {
    const bool used = !skipped && i < table.num_groups;
    record_group(history, i, used, used ? table.values[i].lr : 0.0, used ? table.values[i].weight_decay : 0.0);
  }
}

// All threads of the block enter; the first kClockThreads work.
FS_DEVICE void begin_call(const CallTable& table) {
  constexpr int kHyperparameters = 4;
  const bool works = threadIdx.x < kClockThreads;
  if (threadIdx.x == 0) decide(table);
  __syncthreads();
  const bool skipped = table.clock->skipped != 0;
  if (!skipped && works) {
    for (int i = threadIdx.x; i < table.num_groups * kHyperparameters; i += kClockThreads) {
      const int group = i / kHyperparameters;
      const int index = i % kHyperparameters;
      value_of(table.values[group], index) =
          hyperparameter_value(hyperparameter_of(table.groups[group], index), table.clock->step);
    }
  }
  __syncthreads();
  if (table.history != nullptr && works) record_groups(table, skipped);
}

// Of a slot only what its tensor's update reads.
FS_DEVICE void write_slot(ScalarSlot& to, const ScalarSlot& slot, bool wide) {
  if (wide) {
    to.f64 = slot.f64;
  } else {
    to.f32 = slot.f32;
  }
  to.random = slot.random;
}

// The first kThreads threads take turns: then what they read and write at a time lies together. Most of a thread's
// tensors share group and step, and so their scalars, which cost two powers.
template <int kThreads>
FS_DEVICE void advance_tensors(const CallTable& table) {
  if (threadIdx.x >= kThreads || table.num_runs == 0) return;
  const CallRun* const runs = table.runs();
  const int end = runs[table.num_runs - 1].end;
  int tensor = table.first_tensor + static_cast<int>(threadIdx.x);
  if (tensor >= end) return;
  const bool skipped = table.clock->skipped != 0;
  const int64_t clock_step = table.clock->step;
  const double grad_scale = grad_scale_of(table);
  const double clip = table.norm != nullptr ? table.norm->clip : 1.0;

  ScalarSlot slot;
  int64_t slot_step = 0;
  uint32_t slot_detail = UINT32_MAX;  // of no run: groups are fewer
  int run = find_entry(runs, table.num_runs, tensor);
  for (; tensor < end; tensor += kThreads) {
    while (tensor >= runs[run].end) ++run;
    const uint32_t detail = runs[run].detail;
    const bool wide = (detail & 1u) != 0;
    if (skipped) {
      table.scalars[tensor] = skipped_slot(wide);
      continue;
    }
    const int begin = run > 0 ? runs[run - 1].end : table.first_tensor;
    const int64_t step = advance_step(reinterpret_cast<StepRecord*>(runs[run].step)[tensor - begin]);
    if (step != slot_step || detail != slot_detail) {
      const int group = static_cast<int>(detail >> 1);
      if (wide) {
        slot.f64 = step_scalars<double>(table.groups[group], table.values[group], step, grad_scale, clip);
      } else {
        slot.f32 = step_scalars<float>(table.groups[group], table.values[group], step, grad_scale, clip);
      }
      slot_step = step;
      slot_detail = detail;
    }
    slot.random = random_key(table.seed, clock_step, runs[run].first_ordinal + static_cast<uint32_t>(tensor - begin));
    write_slot(table.scalars[tensor], slot, wide);
  }
}

__global__ void __launch_bounds__(kClockThreads) clock_kernel(FS_KERNEL_TABLE(CallTable) table) {
  if (table.begins_call) begin_call(table);
  advance_tensors<kClockThreads>(table);
}

}  // namespace fused_sched
