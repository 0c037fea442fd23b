// The update of a thread's elements where all of them are ordinary numbers, as nearly all are: without a branch from
// loading to storing, beside 8-bit moments in three fifths of the instructions (docs/measured.md), with the same bits.
#pragma once

#include "ordinary.cuh"
#include "update_instance.cuh"

namespace fused_sched {

// What Ordinary asks of a step's scalars. Denominators stay below 2^125 (1 / sqrt(1 - beta2^t) is at most 2^27 in
// double, or infinite). A step size divided by 2^64 is a float with all its digits; and a subnormal direction, below
// 2^-126, moves a weight by less than 2^-96.
FS_DEVICE bool is_ordinary(const StepScalars<float>& s) {
  const float step = fabsf(s.step_size);
  return s.eps >= 0.0f && s.eps < 0x1p100f && s.inv_sqrt_bias2 >= 1.0f && s.inv_sqrt_bias2 < 0x1p60f &&
         (step == 0.0f || (step >= 0x1p-62f && step < 0x1p30f));
}

template <class Instance>
FS_DEVICE Ordinary decode_ordinary_weight(const Stored<Instance>& stored, int i) {
  typename Instance::Master::Storage kept = {};
  if constexpr (Instance::kHasMaster) kept = stored.kept.element[i];
  return {decode_or_nan<typename Instance::Param, typename Instance::Master>(stored.param.element[i], kept)};
}

// Whether the codes could be decoded: not those of NaNs, nor of scales that no ordinary number has.
template <class Instance>
FS_DEVICE bool decode_ordinary_moments(const Stored<Instance>& stored, float (&exp_avg)[Instance::kCount],
                                       float (&exp_avg_sq)[Instance::kCount]) {
  if constexpr (Instance::kHasScales) {
    const uint32_t larger_scale = larger(stored.exp_avg_scale, stored.exp_avg_sq_scale);
    if (stored.exp_avg.has_nan() | stored.exp_avg_sq.has_nan() | (larger_scale > kMaxUnitScale)) return false;
    stored.exp_avg.decode(stored.exp_avg_scale, exp_avg);
    stored.exp_avg_sq.decode(stored.exp_avg_sq_scale, exp_avg_sq);
  } else {
    const typename Instance::First::Scale unscaled(0);
#pragma unroll
    for (int i = 0; i < Instance::kCount; ++i) {
      exp_avg[i] = Instance::First::decode(stored.exp_avg.element[i], unscaled);
      exp_avg_sq[i] = Instance::Second::decode(stored.exp_avg_sq.element[i], unscaled);
    }
  }
  return true;
}

// Two neighbours' bits from one hash. Elements of a thread differ in bits below 2^16 that are zero in the first.
template <class Instance>
FS_DEVICE void random_bits_of(RandomKey key, uint32_t first_element, uint32_t (&random)[Instance::kCount / 2]) {
  const uint32_t begun = begin_random_bits(key, first_element);
#pragma unroll
  for (int i = 0; i < Instance::kCount / 2; ++i) {
    random[i] = finish_random_bits(key, begun ^ static_cast<uint32_t>(offset_of<Instance>(2 * i)));
  }
}
FS_DEVICE uint32_t random_of_pair(uint32_t random, int i) { return i % 2 == 0 ? random : exchange_halves(random); }

// Finite ones.
template <class Instance>
FS_DEVICE void encode_ordinary_moments(const float (&exp_avg)[Instance::kCount],
                                       const float (&exp_avg_sq)[Instance::kCount], RandomKey key,
                                       uint32_t first_element, Stored<Instance>& stored) {
  constexpr int kCount = Instance::kCount;
  uint32_t random[kCount / 2] = {};
  if constexpr (!Instance::kExactMoments) random_bits_of<Instance>(key, first_element, random);
  if constexpr (Instance::kHasScales) {
    stored.exp_avg.encode(exp_avg, stored.exp_avg_scale, random);
    stored.exp_avg_sq.encode(exp_avg_sq, stored.exp_avg_sq_scale, random);
  } else {
    const typename Instance::First::Scale unscaled(0);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      FS_ASSUME(!is_nan_bits(bits_of(exp_avg[i])));
      FS_ASSUME(!is_nan_bits(bits_of(exp_avg_sq[i])));
      const uint32_t bits = random_of_pair(random[i / 2], i);
      stored.exp_avg.element[i] = Instance::First::encode(exp_avg[i], unscaled, bits);
      stored.exp_avg_sq.element[i] = Instance::Second::encode(exp_avg_sq[i], unscaled, bits);
    }
  }
}

template <class Instance>
FS_DEVICE void encode_ordinary_weights(const float (&weight)[Instance::kCount], RandomKey key, uint32_t first_element,
                                       Stored<Instance>& stored) {
  uint32_t random[Instance::kCount / 2] = {};
  if constexpr (Instance::Master::kDraws) random_bits_of<Instance>(key_of_parameter(key), first_element, random);
#pragma unroll
  for (int i = 0; i < Instance::kCount; ++i) {
    FS_ASSUME(!is_nan_bits(bits_of(weight[i])));
    typename Instance::Master::Storage kept = {};
    Instance::Master::template encode<typename Instance::Param>(weight[i], random_of_pair(random[i / 2], i),
                                                                stored.param.element[i], kept);
    if constexpr (Instance::kHasMaster) stored.kept.element[i] = kept;
  }
}

// False: some are not ordinary; what is stored is as it was, or of no use.
template <class Instance>
FS_DEVICE bool update_ordinary(Stored<Instance>& stored, const Elements<Instance>& grad,
                               const StepScalars<float>& scalars, RandomKey key, uint32_t first_element) {
  constexpr int kCount = Instance::kCount;
  float exp_avg[kCount];
  float exp_avg_sq[kCount];
  if (!decode_ordinary_moments(stored, exp_avg, exp_avg_sq)) return false;

  // Moments ask for no flag in most steps: then no weight is decoded for them.
  const auto update_all_moments = [&](auto any_flags) {
    StepScalars<float> of_moments = scalars;
    if (!any_flags.value) of_moments.flags = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      Ordinary first = {exp_avg[i]}, second = {exp_avg_sq[i]}, largest = {0.0f}, weight = {0.0f};
      if constexpr (Instance::kHasMax) largest = {stored.max_exp_avg_sq.element[i]};
      if (any_flags.value) weight = decode_ordinary_weight(stored, i);
      update_moments<Instance::kHasMax>(weight, first, second, largest, Ordinary{grad.element[i]}, of_moments);
      exp_avg[i] = first.value;
      exp_avg_sq[i] = second.value;
      if constexpr (Instance::kHasMax) stored.max_exp_avg_sq.element[i] = largest.value;
    }
  };
  if (scalars.flags & ~kDecoupledDecay) {
    update_all_moments(std::true_type());
  } else {
    update_all_moments(std::false_type());
  }
  const auto root_of = [&](int i) -> Ordinary {
    if constexpr (Instance::kHasMax) return {stored.max_exp_avg_sq.element[i]};
    return {exp_avg_sq[i]};
  };

  // Compared as bits, negative ones and NaNs are larger than any other. Of amsgrad's, NaNs and negative ones were
  // replaced, and roots of infinities are NaNs.
  uint32_t largest_second = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    largest_second = larger(largest_second, bits_of(exp_avg_sq[i]));
  }
  constexpr uint32_t kTooLarge = (127u + (Instance::kHasScales ? kLargestPackedLog2 : 60u)) << 23;
  if (largest_second >= kTooLarge) return false;

  float largest_first = 0.0f;
  if constexpr (Instance::kHasScales) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) largest_first = fmaxf(largest_first, fabsf(exp_avg[i]));
    if (bits_of(largest_first) >= kTooLarge) return false;
  }

  // Minus zero times a weight takes nothing away, not even a sign.
  StepScalars<float> of_weights = scalars;
  of_weights.decay = scalars.flags & kDecoupledDecay ? scalars.decay : -0.0f;
  of_weights.flags = kDecoupledDecay;
  float weight[kCount];
  float sum = 0.0f;
  uint32_t smallest_quotient = UINT32_MAX;  // twice the bits, less one: a zero's are the largest
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const ScaledQuotient along = direction(Ordinary{exp_avg[i]}, root_of(i), of_weights);
    smallest_quotient = smaller(smallest_quotient, bits_of(along.value) * 2u - 1u);
    weight[i] = moved_weight(decode_ordinary_weight(stored, i), along, of_weights).value;
    sum += weight[i];
  }
  // Weights that are not finite, or were a NaN in a split master; first moments and quotients that are not or too
  // large.
  if ((bits_of(sum) & kMagnitudeMask) >= kInfinityBits) return false;
  // A direction that is subnormal has fewer digits than its ScaledQuotient. That makes no difference to a weight of
  // 2^-64 or more: what it is moved by is less than half of its last place.
  constexpr uint32_t kSubnormalBelow = (127u - 62u) << 23;  // 2^64 times the smallest normal float
  if (smallest_quotient < kSubnormalBelow * 2u - 1u) {
    float smallest_weight = INFINITY;
#pragma unroll
    for (int i = 0; i < kCount; ++i) smallest_weight = fminf(smallest_weight, fabsf(weight[i]));
    if (smallest_weight < 0x1p-64f) return false;
  }

  if constexpr (Instance::kHasScales) {
    stored.exp_avg_scale = static_cast<uint8_t>(Instance::First::scale_for(bits_of(largest_first)));
    stored.exp_avg_sq_scale = static_cast<uint8_t>(Instance::Second::scale_for(largest_second));
  }
  encode_ordinary_weights(weight, key, first_element, stored);
  encode_ordinary_moments(exp_avg, exp_avg_sq, key, first_element, stored);
  return true;
}

}  // namespace fused_sched
