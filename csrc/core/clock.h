// The once-per-step part: advance the schedule clock, evaluate the scheduled hyperparameters of every group,
// advance each tensor's step count and derive the scalars its elements share. In double throughout.
#pragma once

#include "adam.h"
#include "codec.h"
#include "schedule.h"

FS_NAMESPACE_BEGIN

// The schedule clock T: how many updates were applied. A host-side tick marks the start of a round; the first
// call of the round that is not skipped moves T, so that an overflow in the first sub-group of a ZeRO round
// does not lose the tick, nor a second sub-group add one.
struct Clock {
  int64_t step;          // T
  int32_t tick_pending;  // a round has begun and none of its calls was applied yet
  int32_t skipped;       // the latest call changed nothing
};

// One parameter's count of updates. torch keeps it as a 0-d float32 tensor (`state[p]["step"]`), which stops
// counting at 2^24; `count` is the truth and `mirror` what torch's users see. Whoever writes the mirror wins.
struct StepRecord {
  int64_t count;
  float mirror;
  int32_t reserved;
};

// A hyperparameter: scale, times the value of a 0-d device tensor or of a schedule program where one is set.
struct Hyperparameter {
  double scale;
  uint64_t program;       // address of a schedule program on this device; 0: none
  uint64_t tensor;        // address of a 0-d tensor on this device; 0: none
  int32_t tensor_format;  // Format
  int32_t reserved;
};

enum GroupFlags : int32_t { kGroupDecoupled = 1, kGroupMaximize = 2 };

struct GroupRecord {
  Hyperparameter lr;
  Hyperparameter beta1;
  Hyperparameter beta2;
  Hyperparameter weight_decay;
  double eps;
  double grad_divisor;
  int32_t flags;
  int32_t reserved;
};

// What the latest applied step used; `lr_tensor` is a view of the first column.
struct GroupValues {
  double lr;
  double beta1;
  double beta2;
  double weight_decay;
};

// One slot per tensor of the call: scalars in float or double, as its parameter computes.
struct ScalarSlot {
  union {
    StepScalars<float> f32;
    StepScalars<double> f64;
  };
  RandomKey random;
};

// Decides whether this call is applied and moves T. One thread runs it, before anything reads `skipped`.
FS_HD_CALL void advance_clock(Clock& clock, bool tick, const float* found_inf) {
  if (tick) clock.tick_pending = 1;
  // Not `== 1`: GradScaler sums found_inf over devices, and a NaN means trouble as well.
  clock.skipped = found_inf != nullptr && !(*found_inf == 0.0f);
  if (clock.skipped || !clock.tick_pending) return;
  clock.step += 1;
  clock.tick_pending = 0;
}

FS_HD_CALL double read_scalar(uint64_t address, int32_t format) {
  switch (format) {
    case kFloat32: return Float32::decode(*reinterpret_cast<const float*>(address));
    case kBfloat16: return Bfloat16::decode(*reinterpret_cast<const uint16_t*>(address));
    case kFloat16: return Float16::decode(*reinterpret_cast<const uint16_t*>(address));
    default: return *reinterpret_cast<const double*>(address);
  }
}

// Update number T (1-based) uses the schedule at index T-1.
FS_HD_CALL double hyperparameter_value(const Hyperparameter& h, int64_t clock_step) {
  if (h.tensor != 0) return h.scale * read_scalar(h.tensor, h.tensor_format);
  if (h.program == 0) return h.scale;
  const int64_t index = clock_step > 0 ? clock_step - 1 : 0;
  return h.scale * evaluate(reinterpret_cast<const unsigned char*>(h.program), static_cast<double>(index));
}

FS_HD_CALL GroupValues group_values(const GroupRecord& group, int64_t clock_step) {
  GroupValues values;
  values.lr = hyperparameter_value(group.lr, clock_step);
  values.beta1 = hyperparameter_value(group.beta1, clock_step);
  values.beta2 = hyperparameter_value(group.beta2, clock_step);
  values.weight_decay = hyperparameter_value(group.weight_decay, clock_step);
  return values;
}

// Advances one tensor's count and returns it: the t of bias correction.
FS_HD_CALL int64_t advance_step(StepRecord& record) {
  // Somebody wrote state[p]["step"]: take it. (float)count == mirror holds for every value we wrote. What is no
  // count (negative, NaN, beyond int64) is not taken: converting it would be undefined.
  const bool written = static_cast<float>(record.count) != record.mirror;
  if (written && record.mirror >= 0.0f && record.mirror < 9.0e18f) record.count = static_cast<int64_t>(record.mirror);
  record.count += 1;
  record.mirror = static_cast<float>(record.count);
  return record.count;
}

template <class T>
FS_HD_CALL StepScalars<T> skipped_scalars() {
  StepScalars<T> scalars = {};
  scalars.flags = kSkip;
  return scalars;
}

// grad_scale: GradScaler's factor, by which gradients are divided together with grad_divisor.
template <class T>
FS_HD_CALL StepScalars<T> step_scalars(const GroupRecord& group, const GroupValues& values, int64_t step,
                                       double grad_scale) {
  const double t = static_cast<double>(step);
  const double bias1 = 1.0 - power(values.beta1, t);
  const double bias2 = 1.0 - power(values.beta2, t);
  const bool decoupled = (group.flags & kGroupDecoupled) != 0;
  const bool first_from_grad = values.beta1 < 0.5;
  const bool second_from_grad = values.beta2 < 0.5;
  const double grad_factor = 1.0 / (grad_scale * group.grad_divisor);
  StepScalars<T> scalars;
  scalars.grad_factor = static_cast<T>((group.flags & kGroupMaximize) ? -grad_factor : grad_factor);
  scalars.decay = static_cast<T>(decoupled ? values.lr * values.weight_decay : values.weight_decay);
  scalars.first_rate = static_cast<T>(first_from_grad ? -values.beta1 : 1.0 - values.beta1);
  scalars.second_rate = static_cast<T>(second_from_grad ? -values.beta2 : 1.0 - values.beta2);
  scalars.step_size = static_cast<T>(values.lr / bias1);
  scalars.inv_sqrt_bias2 = static_cast<T>(1.0 / sqrt(bias2));
  scalars.eps = static_cast<T>(group.eps);
  scalars.flags = (first_from_grad ? kFirstFromGrad : 0) | (second_from_grad ? kSecondFromGrad : 0);
  if (values.weight_decay != 0.0) scalars.flags |= decoupled ? kDecoupledDecay : kL2Decay;
  return scalars;
}

FS_NAMESPACE_END
