// The update: blocks walk over the tiles of all tensors of a launch, one template for all formats.
#pragma once

#include "update_instance.cuh"

namespace fused_sched {

template <class Instance>
FS_DEVICE typename Instance::Compute decode_weight(const Stored<Instance>& stored, int i) {
  if constexpr (Instance::kHasMaster) {
    return Instance::Master::template decode<typename Instance::Param>(stored.param.element[i], stored.kept.element[i]);
  } else {
    return Instance::Master::template decode<typename Instance::Param>(stored.param.element[i], Nothing());
  }
}

// `element`: of its tensor, the lower 32 bits.
template <class Instance>
FS_DEVICE void encode_weight(Stored<Instance>& stored, int i, typename Instance::Compute weight, RandomKey key,
                             uint32_t element) {
  using Param = typename Instance::Param;
  const uint32_t random = Instance::Master::kDraws ? random_bits(key_of_parameter(key), element) : 0u;
  if constexpr (Instance::kHasMaster) {
    Instance::Master::template encode<Param>(weight, random, stored.param.element[i], stored.kept.element[i]);
  } else {
    Nothing nothing;
    Instance::Master::template encode<Param>(weight, random, stored.param.element[i], nothing);
  }
}

// With the scales that `stored` holds.
template <class Instance>
FS_DEVICE void encode_moments(Stored<Instance>& stored, int i, typename Instance::Compute exp_avg,
                              typename Instance::Compute exp_avg_sq, RandomKey key, uint32_t element) {
  using First = typename Instance::First;
  using Second = typename Instance::Second;
  const uint32_t random = Instance::kExactMoments ? 0u : random_bits(key, element);
  stored.exp_avg.element[i] = First::encode(exp_avg, typename First::Scale(stored.exp_avg_scale), random);
  stored.exp_avg_sq.element[i] = Second::encode(exp_avg_sq, typename Second::Scale(stored.exp_avg_sq_scale), random);
}

template <class Instance>
using Elements = Vector<typename Instance::Compute, Instance::kCount>;

// Decode, update, encode, each for a whole chunk: interleaved per element, instances with masters need more than
// 64 registers and spill 4 to 16 bytes.
template <class Instance, int kBegin>
FS_DEVICE void update_chunk(Stored<Instance>& stored, const Elements<Instance>& grad,
                            const StepScalars<typename Instance::Compute>& scalars, RandomKey key,
                            uint32_t first_element) {
  using Compute = typename Instance::Compute;
  constexpr int kChunk = Instance::kChunk;
  const typename Instance::First::Scale unscaled(0);
  Compute weight[kChunk];
  Compute exp_avg[kChunk];
  Compute exp_avg_sq[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    weight[i] = decode_weight(stored, kBegin + i);
    exp_avg[i] = Instance::First::decode(stored.exp_avg.element[kBegin + i], unscaled);
    exp_avg_sq[i] = Instance::Second::decode(stored.exp_avg_sq.element[kBegin + i], unscaled);
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    Compute unused = 0;
    Compute* max_exp_avg_sq = &unused;
    if constexpr (Instance::kHasMax) max_exp_avg_sq = &stored.max_exp_avg_sq.element[kBegin + i];
    adam_update<Instance::kHasMax>(weight[i], exp_avg[i], exp_avg_sq[i], *max_exp_avg_sq, grad.element[kBegin + i],
                                   scalars);
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const uint32_t element = first_element + static_cast<uint32_t>(kBegin + i);
    encode_weight(stored, kBegin + i, weight[i], key, element);
    encode_moments(stored, kBegin + i, exp_avg[i], exp_avg_sq[i], key, element);
  }
}

// Moments that share a scale: those of the group first, which the scale waits for, then its weights. The weight is
// decoded twice (with L2 decay the moments need it, too), because holding 16 of them spills.
template <class Instance>
FS_DEVICE void update_group(Stored<Instance>& stored, const Elements<Instance>& grad,
                            const StepScalars<typename Instance::Compute>& scalars, RandomKey key,
                            uint32_t first_element) {
  using First = typename Instance::First;
  using Second = typename Instance::Second;
  const typename First::Scale scale_of_first(stored.exp_avg_scale);
  const typename Second::Scale scale_of_second(stored.exp_avg_sq_scale);
  Elements<Instance> exp_avg;
  Elements<Instance> exp_avg_sq;
  uint32_t largest_first = 0;
  uint32_t largest_second = 0;
  typename Instance::Compute unused = 0;
#pragma unroll
  for (int i = 0; i < Instance::kCount; ++i) {
    exp_avg.element[i] = First::decode(stored.exp_avg.element[i], scale_of_first);
    exp_avg_sq.element[i] = Second::decode(stored.exp_avg_sq.element[i], scale_of_second);
    update_moments<false>(decode_weight(stored, i), exp_avg.element[i], exp_avg_sq.element[i], unused, grad.element[i],
                          scalars);
    // Past the end of the tensor they are 0 or NaN, which have no say in the scale.
    largest_first = larger(largest_first, finite_magnitude(exp_avg.element[i]));
    largest_second = larger(largest_second, finite_magnitude(exp_avg_sq.element[i]));
  }
  stored.exp_avg_scale = First::scale_for(largest_first);
  stored.exp_avg_sq_scale = Second::scale_for(largest_second);
#pragma unroll
  for (int i = 0; i < Instance::kCount; ++i) {
    const uint32_t element = first_element + static_cast<uint32_t>(i);
    typename Instance::Compute weight = decode_weight(stored, i);
    update_weight(weight, exp_avg.element[i], exp_avg_sq.element[i], scalars);
    encode_weight(stored, i, weight, key, element);
    encode_moments(stored, i, exp_avg.element[i], exp_avg_sq.element[i], key, element);
  }
}

// Hides a value from the optimiser: what is derived from it again is computed again, instead of being kept.
FS_DEVICE int recompute(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

template <class Instance>
FS_DEVICE void update_elements(const UpdateTable& table, int tensor, int tile,
                               const StepScalars<typename Instance::Compute>& scalars, RandomKey key) {
  ThreadElements<Instance> at = locate<Instance>(table, tensor, tile);
  if (at.count <= 0) return;
  Stored<Instance> stored = load(at);
  const Elements<Instance> grad = load_grad<Instance>(table, tensor, at.first, at.count);
  key = key_from(key, at.first);
  // Even already; said, so that neighbours share a hash.
  const uint32_t first_element = static_cast<uint32_t>(at.first) & ~1u;

  if constexpr (Instance::kHasScales) {
    update_group(stored, grad, scalars, key, first_element);
  } else {
    update_chunk<Instance, 0>(stored, grad, scalars, key, first_element);
    if constexpr (Instance::kCount > Instance::kChunk) {
      update_chunk<Instance, Instance::kChunk>(stored, grad, scalars, key, first_element);
    }
  }

  // Ten registers of addresses, looked up a second time rather than kept across the arithmetic: kept, instances
  // with amsgrad spill 8 to 48 bytes on sm_100 and sm_120.
  at = locate<Instance>(table, recompute(tensor), tile);
  store(at, stored);
}

FS_DEVICE void read_scalars(StepScalars<float>& scalars, const ScalarSlot& slot) { scalars = slot.f32; }
FS_DEVICE void read_scalars(StepScalars<double>& scalars, const ScalarSlot& slot) { scalars = slot.f64; }

template <class Param, class Master, class Moments, bool kAmsgrad>
__global__ void __launch_bounds__(kUpdateThreads, UpdateInstance<Param, Master, Moments, kAmsgrad>::kBlocksPerSm)
    update_kernel(FS_KERNEL_TABLE(UpdateTable) table) {
  using Instance = UpdateInstance<Param, Master, Moments, kAmsgrad>;
  StepScalars<typename Instance::Compute> scalars = {};
  RandomKey key = {};
  int tensor = 0;
  int tile_end = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < table.num_tiles; tile += static_cast<int>(gridDim.x)) {
    if (tile >= tile_end) {
      tensor = find_tensor(table, tile, tensor);
      tile_end = table.tile_end[tensor];
      const ScalarSlot& slot = table.scalars[table.row[tensor]];
      read_scalars(scalars, slot);
      key = slot.random;
      if (scalars.flags & kSkip) return;  // a call is skipped as a whole
    }
    update_elements<Instance>(table, tensor, tile, scalars, key);
  }
}

// A compiled instance; no kernel: this combination has none.
struct SelectedUpdate {
  Kernel<UpdateTable> kernel;
  int tile;  // elements
};

template <class Param, class Master, class Moments, bool kAmsgrad>
SelectedUpdate select_instance() {
  if constexpr (kGoTogether<Param, Master, Moments, kAmsgrad>) {
    return {update_kernel<Param, Master, Moments, kAmsgrad>, UpdateInstance<Param, Master, Moments, kAmsgrad>::kTile};
  } else {
    return {nullptr, 0};
  }
}

template <class Param, class Master>
SelectedUpdate select_moments(int moments, bool amsgrad) {
  switch (moments) {
#define FS_CASE(identifier, tag, name, Type) \
  case identifier:                           \
    return amsgrad ? select_instance<Param, Master, Type, true>() : select_instance<Param, Master, Type, false>();
    FS_MOMENTS(FS_CASE)
#undef FS_CASE
    default: return {nullptr, 0};
  }
}

// The instances of one parameter format.
template <class Param>
SelectedUpdate select_update(int master, int moments, bool amsgrad) {
  switch (master) {
#define FS_CASE(identifier, tag, name, Type) \
  case identifier: return select_moments<Param, Type>(moments, amsgrad);
    FS_MASTERS(FS_CASE)
#undef FS_CASE
    default: return {nullptr, 0};
  }
}

// Each parameter format's is defined in a file of its own, to be compiled in parallel.
SelectedUpdate select_update_fp32(int master, int moments, bool amsgrad);
SelectedUpdate select_update_bf16(int master, int moments, bool amsgrad);
SelectedUpdate select_update_fp16(int master, int moments, bool amsgrad);
SelectedUpdate select_update_fp64(int master, int moments, bool amsgrad);

}  // namespace fused_sched
