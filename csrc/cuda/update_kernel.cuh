// The update: blocks walk over the tiles of all tensors of a launch, one template for all formats.
#pragma once

#include "update_any.cuh"
#include "update_ordinary.cuh"

namespace fused_sched {

// Hides a value from the optimiser: what is derived from it again is computed again, instead of being kept.
FS_DEVICE int recompute(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// False: the call is skipped, as a whole. Asked where the scalars are read, the compiler would load the others only
// after the flags.
template <class Instance>
FS_DEVICE bool update_elements(const UpdateTable& table, int tensor, int tile,
                               const StepScalars<typename Instance::Compute>& scalars, RandomKey key) {
  ThreadElements<Instance> at = locate<Instance>(table, tensor, tile);
  if (at.count <= 0) return true;
  Stored<Instance> stored;
  const Elements<Instance> grad = load(table, at, stored);
  if (scalars.flags & kSkip) return false;
  key = key_from(key, at.first);
  bool updated = true;
  if constexpr (Instance::kWide) {
    update_doubles(stored, grad, scalars);
  } else {
    const uint32_t first_element = static_cast<uint32_t>(at.first);
    updated = is_ordinary(scalars) && update_ordinary(stored, grad, scalars, key, first_element);
  }
  // Ten registers of addresses, looked up a second time rather than kept across the arithmetic: kept, instances
  // with amsgrad spill 8 to 48 bytes on sm_100 and sm_120.
  at = locate<Instance>(table, recompute(tensor), tile);
  if (updated) {
    store(at, stored);
  } else if constexpr (!Instance::kWide) {
    update_any(table, at, scalars, key);
  }
  return true;
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
    }
    if (!update_elements<Instance>(table, tensor, tile, scalars, key)) return;
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
