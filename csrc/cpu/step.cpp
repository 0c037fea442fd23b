// The CPU backend of step.h.
#include "../step.h"

#include <algorithm>
#include <vector>

#include "../check_call.h"
#include "../float_environment.h"
#include "isa.h"
#include "norm.h"
#include "parallel.h"
#include "work_units.h"

using namespace fused_sched;

namespace {

// Elements per unit of parallel work: large enough that the counter the threads share costs nothing (128 KB of
// fp32 parameters take about 30 us), small enough to balance a model of many small tensors.
constexpr int64_t kUnitLength = 32768;

// What comes from memory goes in longer ones, up to 2^21 elements.
constexpr int64_t kMostUnitsInOne = 64;

// A thread is woken for no fewer units than this: waking takes some 10 us, two units in cache 20 us.
constexpr int64_t kMinUnitsPerThread = 2;

// Elements of a call from which on its streams are taken to come from memory: 43 MB in the narrowest format, where the
// last level of cache holds some 32. Asking ahead makes blocks (block_avx512.h) up to a fifth faster there, and up to
// two fifths slower in caches; at 2^21 elements it does the one for some formats and the other for others.
constexpr int64_t kFromMemory = int64_t{1} << 22;

// Tensors between the one that is updated and the one whose memory is asked for.
constexpr int64_t kAhead = 2;

template <class Pointer>
Pointer address(uint64_t base, int64_t bytes) {
  return base == 0 ? nullptr : reinterpret_cast<Pointer>(base + static_cast<uint64_t>(bytes));
}

fs_run make_run(const fs_call& call, int64_t index, int64_t first, int64_t count, bool from_memory) {
  const fs_tensor& tensor = call.tensors[index];
  const fs_arena& arena = call.arenas[tensor.arena];
  const int64_t state = tensor.state_offset + first;
  const int64_t moment_bytes = tensor.param_format == kFloat64 ? 8 : kMomentBytes[tensor.moments];
  const int64_t scale_group = kScaleGroup[tensor.moments];
  fs_run run = {};
  run.param = address<void*>(tensor.param, first * kFormatBytes[tensor.param_format]);
  run.grad = address<const void*>(tensor.grad, first * kFormatBytes[tensor.grad_format]);
  run.exp_avg = address<void*>(arena.slot[kExpAvg], state * moment_bytes);
  run.exp_avg_sq = address<void*>(arena.slot[kExpAvgSq], state * moment_bytes);
  if (tensor.amsgrad) run.max_exp_avg_sq = address<void*>(arena.slot[kMaxExpAvgSq], state * moment_bytes);
  run.master = address<void*>(arena.slot[kMasterWeight], state * kMasterBytes[tensor.master]);
  if (scale_group != 0) {
    run.exp_avg_scale = address<uint8_t*>(arena.slot[kExpAvgScale], state / scale_group);
    run.exp_avg_sq_scale = address<uint8_t*>(arena.slot[kExpAvgSqScale], state / scale_group);
  }
  const ScalarSlot& slot = call.scalars[index];
  run.scalars = &slot;
  const RandomKey random = key_from(slot.random, first);
  run.random_key[0] = random.first;
  run.random_key[1] = random.second;
  run.first = static_cast<uint32_t>(first);
  run.count = count;
  run.param_format = tensor.param_format;
  run.grad_format = tensor.grad_format;
  run.master_format = tensor.master;
  run.moments_format = tensor.moments;
  run.from_memory = from_memory;
  return run;
}

// What a tensor that is updated soon will read.
FS_HD void prefetch_tensor(const fs_call& call, const fs_tensor& tensor) {
  const fs_arena& arena = call.arenas[tensor.arena];
  const int64_t moment_bytes = tensor.param_format == kFloat64 ? 8 : kMomentBytes[tensor.moments];
  const uint64_t state = static_cast<uint64_t>(tensor.state_offset * moment_bytes);
  prefetch_stream(tensor.param, tensor.numel * kFormatBytes[tensor.param_format]);
  prefetch_stream(tensor.grad, tensor.numel * kFormatBytes[tensor.grad_format]);
  prefetch_stream(arena.slot[kExpAvg] + state, tensor.numel * moment_bytes);
  prefetch_stream(arena.slot[kExpAvgSq] + state, tensor.numel * moment_bytes);
}

void advance_tensor(const fs_call& call, int64_t index, double grad_scale, double clip) {
  const fs_tensor& tensor = call.tensors[index];
  ScalarSlot& slot = call.scalars[index];
  const bool wide = tensor.param_format == kFloat64;
  if (call.clock->skipped) {
    if (wide) {
      slot.f64 = skipped_scalars<double>();
    } else {
      slot.f32 = skipped_scalars<float>();
    }
    return;
  }
  StepRecord& record = *reinterpret_cast<StepRecord*>(tensor.step);
  const int64_t step = advance_step(record);
  slot.random = random_key(call.seed, call.clock->step, tensor.ordinal);
  // Most tensors share group and step with the one before: its scalars, and two powers, are theirs.
  if (index > 0 && call.tensors[index - 1].group == tensor.group &&
      (call.tensors[index - 1].param_format == kFloat64) == wide &&
      reinterpret_cast<const StepRecord*>(call.tensors[index - 1].step)->count == step) {
    const RandomKey random = slot.random;
    slot = call.scalars[index - 1];
    slot.random = random;
    return;
  }
  const GroupRecord& group = call.groups[tensor.group];
  const GroupValues& values = call.values[tensor.group];
  if (wide) {
    slot.f64 = step_scalars<double>(group, values, step, grad_scale, clip);
  } else {
    slot.f32 = step_scalars<float>(group, values, step, grad_scale, clip);
  }
}

// Gradients of every format have a loop.
bool supported(const fs_tensor& tensor) {
  return go_together(tensor.param_format, tensor.master, tensor.moments, tensor.amsgrad != 0);
}

void check(const fs_call& call) { check_call(call, supported); }

void clock(fs_call& call) {
  const double grad_scale = call.grad_scale != nullptr ? static_cast<double>(*call.grad_scale) : 1.0;
  if (call.norm != nullptr) finish_norm(*call.norm, call.norm_is_reduced != 0, grad_scale);
  const double clip = call.norm != nullptr ? call.norm->clip : 1.0;
  advance_clock(*call.clock, call.tick != 0, call.found_inf, call.norm != nullptr && refuses_step(*call.norm));
  const bool skipped = call.clock->skipped != 0;
  if (!skipped) {
    for (int64_t i = 0; i < call.num_groups; ++i) call.values[i] = group_values(call.groups[i], call.clock->step);
  }
  if (call.history != nullptr) {
    const double norm = call.norm != nullptr ? call.norm->norm : NAN;
    begin_record(*call.history, call.tick != 0, call.clock->step, skipped, norm, clip);
    for (int64_t i = 0; i < call.history->num_groups; ++i) {
      const bool used = !skipped && i < call.num_groups;
      record_group(*call.history, i, used, used ? call.values[i].lr : 0.0, used ? call.values[i].weight_decay : 0.0);
    }
  }
  for (int64_t i = 0; i < call.num_tensors; ++i) advance_tensor(call, i, grad_scale, clip);
}

// Where a unit begins, nothing has been asked for ahead, so from memory units are long: half of each thread's share of
// the elements that are left. The last ones are short, so that no thread waits long for another (docs/measured.md).
int64_t length_from_memory(int64_t num_left, int32_t num_threads) {
  const int64_t units = num_left / (2 * int64_t{std::max(num_threads, 1)}) / kUnitLength;
  return kUnitLength * std::clamp<int64_t>(units, 1, kMostUnitsInOne);
}

void update(fs_call& call) {
  int64_t num_elements = 0;
  for (int64_t i = 0; i < call.num_tensors; ++i) num_elements += call.tensors[i].numel;
  const bool from_memory = num_elements >= kFromMemory;
  const auto unit_length = [&](int64_t before) {
    return from_memory ? length_from_memory(num_elements - before, call.num_threads) : kUnitLength;
  };
  const std::vector<WorkUnit>& units = work_units(call, unit_length, kUnitLength).units;
  const int64_t num_units = static_cast<int64_t>(units.size());
  const fs_update_run update_run = instruction_set().update_run;
  const int num_threads = static_cast<int>(std::min<int64_t>(call.num_threads, num_units / kMinUnitsPerThread));
  parallel_for(num_units, num_threads, [&](int64_t unit_index) {
    const WorkUnit& unit = units[static_cast<size_t>(unit_index)];
    for (int64_t i = unit.begin; i < unit.end; ++i) {
      if (i + kAhead < unit.end) prefetch_tensor(call, call.tensors[i + kAhead]);
      const int64_t count = unit.end - unit.begin > 1 ? call.tensors[i].numel : unit.count;
      if (count == 0) continue;
      const fs_run run = make_run(call, i, unit.first, count, from_memory);
      update_run(&run);
    }
  });
}

}  // namespace

int fs_norm(fs_call* call, char* error) {
  return report_failure(error, [&] {
    check(*call);
    check_norm(*call);
    const DefaultFloatEnvironment environment;
    sum_norm(*call);
    if (!call->norm_is_reduced) clock(*call);
    call->launches += 1;
  });
}

int fs_clock(fs_call* call, char* error) {
  return report_failure(error, [&] {
    check(*call);
    const DefaultFloatEnvironment environment;
    clock(*call);
    call->launches += 1;
  });
}

int fs_update(fs_call* call, char* error) {
  return report_failure(error, [&] {
    check(*call);
    if (call->clock->skipped) return;
    update(*call);
    call->launches += 1;
  });
}

int fs_report_metric(const fs_report* report, char* error) {
  return report_failure(error, [&] {
    const DefaultFloatEnvironment environment;
    for (int64_t i = 0; i < report->num_records; ++i) report_metric(report->records[i], *report->metric);
  });
}

int fs_device_count(int* count, char*) {
  *count = 1;
  return 0;
}
