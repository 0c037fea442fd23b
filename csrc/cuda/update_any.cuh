// The update of any numbers, as core/ has it: in double, and of floats those that update_ordinary.cuh leaves.
#pragma once

#include "update_instance.cuh"

namespace fused_sched {

// One element after the other, from memory and to memory, so that this rare way costs the usual one no register. With
// scales: its moments, which the scales wait for, then moments again and weights.
template <class Instance>
FS_DEVICE void update_any(const UpdateTable& table, const ThreadElements<Instance>& at,
                          const StepScalars<float>& scalars, RandomKey key) {
  using Param = typename Instance::Param;
  using Master = typename Instance::Master;
  using First = typename Instance::First;
  using Second = typename Instance::Second;
  const typename First::Scale old_first_scale(Instance::kHasScales ? *at.exp_avg_scale : 0u);
  const typename Second::Scale old_second_scale(Instance::kHasScales ? *at.exp_avg_sq_scale : 0u);
  float weight, exp_avg, exp_avg_sq, largest_exp_avg_sq = 0.0f;
  typename Master::Storage kept = {};
  const auto update_moments_of = [&](int place) {
    if constexpr (Instance::kHasMaster) kept = at.kept[place];
    if constexpr (Instance::kHasMax) largest_exp_avg_sq = at.max_exp_avg_sq[place];
    weight = Master::template decode<Param>(at.param[place], kept);
    exp_avg = First::decode(at.exp_avg[place], old_first_scale);
    exp_avg_sq = Second::decode(at.exp_avg_sq[place], old_second_scale);
    const float grad = load_one_grad(table, at.grad, at.first + place);
    update_moments<Instance::kHasMax>(weight, exp_avg, exp_avg_sq, largest_exp_avg_sq, grad, scalars);
  };
  uint32_t first_scale = 0;
  uint32_t second_scale = 0;
  if constexpr (Instance::kHasScales) {
    uint32_t largest_first = 0;
    uint32_t largest_second = 0;
#pragma unroll 1
    for (int i = 0; i < Instance::kCount && offset_of<Instance>(i) < at.count; ++i) {
      update_moments_of(offset_of<Instance>(i));
      largest_first = larger(largest_first, finite_magnitude(exp_avg));
      largest_second = larger(largest_second, finite_magnitude(exp_avg_sq));
    }
    first_scale = First::scale_for(largest_first);
    second_scale = Second::scale_for(largest_second);
    *at.exp_avg_scale = static_cast<uint8_t>(first_scale);
    *at.exp_avg_sq_scale = static_cast<uint8_t>(second_scale);
  }
#pragma unroll 1
  for (int i = 0; i < Instance::kCount && offset_of<Instance>(i) < at.count; ++i) {
    const int place = offset_of<Instance>(i);
    const uint32_t element = static_cast<uint32_t>(at.first) + static_cast<uint32_t>(place);
    update_moments_of(place);
    update_weight(weight, exp_avg, Instance::kHasMax ? largest_exp_avg_sq : exp_avg_sq, scalars);
    const uint32_t random = Instance::kExactMoments ? 0u : random_bits(key, element);
    using FirstStorage = typename First::Storage;
    using SecondStorage = typename Second::Storage;
    at.exp_avg[place] = static_cast<FirstStorage>(First::encode(exp_avg, typename First::Scale(first_scale), random));
    at.exp_avg_sq[place] =
        static_cast<SecondStorage>(Second::encode(exp_avg_sq, typename Second::Scale(second_scale), random));
    if constexpr (Instance::kHasMax) at.max_exp_avg_sq[place] = largest_exp_avg_sq;
    const uint32_t weight_random = Master::kDraws ? random_bits(key_of_parameter(key), element) : 0u;
    Master::template encode<Param>(weight, weight_random, at.param[place], kept);
    if constexpr (Instance::kHasMaster) at.kept[place] = kept;
  }
}

template <class Instance>
FS_DEVICE void update_doubles(Stored<Instance>& stored, const Elements<Instance>& grad,
                              const StepScalars<double>& scalars) {
#pragma unroll
  for (int i = 0; i < Instance::kCount; ++i) {
    double unused = 0.0;
    double* max_exp_avg_sq = &unused;
    if constexpr (Instance::kHasMax) max_exp_avg_sq = &stored.max_exp_avg_sq.element[i];
    adam_update<Instance::kHasMax>(stored.param.element[i], stored.exp_avg.element[i], stored.exp_avg_sq.element[i],
                                   *max_exp_avg_sq, grad.element[i], scalars);
  }
}

}  // namespace fused_sched
