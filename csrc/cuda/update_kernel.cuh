// The update: blocks walk over the tiles of all tensors of a launch, one template for all formats.
#pragma once

#include <type_traits>

#include "tensor_table.cuh"
#include "vector_access.cuh"

namespace fused_sched {

// One combination of formats.
template <class ParamFormat, class GradFormat, Master kMaster, bool kAmsgrad>
struct UpdateInstance {
  using Param = ParamFormat;
  using Grad = GradFormat;
  using Compute = typename Param::Compute;  // also the storage of the moments
  static constexpr bool kHasMaster = kMaster == kMasterFloat32;
  static constexpr bool kHasMax = kAmsgrad;
  static constexpr bool kWide = std::is_same<Compute, double>::value;
  static constexpr int kCount = kWide ? kElementsPerThreadFloat64 : kElementsPerThread;
  static constexpr int kTile = kUpdateThreads * kCount;
  // With a master and a third moment a thread holds 40 to 44 registers of data; at 64 these instances spill 8 to 24
  // bytes, on every architecture from sm_75 to sm_120.
  static constexpr int kBlocksPerSm = kHasMaster && kHasMax ? kUpdateBlocksPerSm - 1 : kUpdateBlocksPerSm;
};

// Where a tile's elements are, for the calling thread; a slot the instance lacks stays null.
template <class Instance>
struct ThreadElements {
  typename Instance::Param::Storage* param;
  const typename Instance::Grad::Storage* grad;
  typename Instance::Compute* exp_avg;
  typename Instance::Compute* exp_avg_sq;
  typename Instance::Compute* max_exp_avg_sq;
  float* master;
  int count;  // elements of the tile from here on; <= 0: none
  bool whole_param;
  bool whole_grad;
};

template <class Instance>
FS_DEVICE ThreadElements<Instance> locate(const UpdateTable& table, int tensor, int tile) {
  using Compute = typename Instance::Compute;
  const int tile_of_tensor = tile - (tensor > 0 ? table.tile_end[tensor - 1] : 0);
  const bool is_last = tile + 1 == table.tile_end[tensor];
  const int length = is_last ? table.last_tile_length[tensor] : Instance::kTile;
  const int first_in_tile = static_cast<int>(threadIdx.x) * Instance::kCount;
  const int64_t first = static_cast<int64_t>(tile_of_tensor) * Instance::kTile + first_in_tile;
  const int64_t state = static_cast<int64_t>(table.state_block[tensor]) * kPadding + first;
  const fs_arena& arena = table.arena[table.arena_index[tensor]];
  ThreadElements<Instance> at = {};
  at.param = reinterpret_cast<typename Instance::Param::Storage*>(table.param[tensor]) + first;
  at.grad = reinterpret_cast<const typename Instance::Grad::Storage*>(table.grad[tensor]) + first;
  at.exp_avg = reinterpret_cast<Compute*>(arena.slot[kExpAvg]) + state;
  at.exp_avg_sq = reinterpret_cast<Compute*>(arena.slot[kExpAvgSq]) + state;
  if (Instance::kHasMax) at.max_exp_avg_sq = reinterpret_cast<Compute*>(arena.slot[kMaxExpAvgSq]) + state;
  if (Instance::kHasMaster) at.master = reinterpret_cast<float*>(arena.slot[kMasterWeight]) + state;
  at.count = length - first_in_tile;
  at.whole_param = at.count >= Instance::kCount && is_vector_aligned(table.param[tensor]);
  at.whole_grad = at.count >= Instance::kCount && is_vector_aligned(table.grad[tensor]);
  return at;
}

// State past the end of a tensor stays zero whatever the arithmetic gave there: with eps = 0 it is 0/0.
template <class T, int kCount>
FS_DEVICE void clear_padding(Vector<T, kCount>& state, int count) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i >= count) state.element[i] = T(0);
  }
}

// Hides a value from the optimiser: what is derived from it again is computed again, instead of being kept.
FS_DEVICE int recompute(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Decode, update, encode, each for the whole vector: interleaved per element, instances with masters need more than
// 64 registers and spill 4 to 16 bytes.
template <class Instance>
FS_DEVICE void update_elements(const UpdateTable& table, int tensor, int tile,
                               const StepScalars<typename Instance::Compute>& scalars) {
  using Param = typename Instance::Param;
  using Grad = typename Instance::Grad;
  using Compute = typename Instance::Compute;
  constexpr int kCount = Instance::kCount;
  ThreadElements<Instance> at = locate<Instance>(table, tensor, tile);
  if (at.count <= 0) return;

  auto stored_param = load_elements<typename Param::Storage, kCount>(at.param, at.count, at.whole_param);
  const auto stored_grad = load_elements<typename Grad::Storage, kCount>(at.grad, at.count, at.whole_grad);
  auto exp_avg = load_vector<Compute, kCount>(at.exp_avg);
  auto exp_avg_sq = load_vector<Compute, kCount>(at.exp_avg_sq);
  Vector<Compute, kCount> max_exp_avg_sq = {};
  if constexpr (Instance::kHasMax) max_exp_avg_sq = load_vector<Compute, kCount>(at.max_exp_avg_sq);
  Vector<Compute, kCount> weight = {};
  if constexpr (Instance::kHasMaster) weight = load_vector<Compute, kCount>(at.master);
  Vector<Compute, kCount> grad;

#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    grad.element[i] = static_cast<Compute>(Grad::decode(stored_grad.element[i]));
    if constexpr (Instance::kHasMaster) {
      weight.element[i] = reconcile_master<Param>(weight.element[i], stored_param.element[i]);
    } else {
      weight.element[i] = Param::decode(stored_param.element[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    adam_update<Instance::kHasMax>(weight.element[i], exp_avg.element[i], exp_avg_sq.element[i],
                                   max_exp_avg_sq.element[i], grad.element[i], scalars);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    stored_param.element[i] =
        Instance::kHasMaster ? Param::encode_beside_master(weight.element[i]) : Param::encode(weight.element[i]);
  }

  // Ten registers of addresses, looked up a second time rather than kept across the arithmetic: kept, instances
  // with amsgrad spill 8 to 48 bytes on sm_100 and sm_120.
  at = locate<Instance>(table, recompute(tensor), tile);
  if (at.count < kCount) {
    clear_padding(exp_avg, at.count);
    clear_padding(exp_avg_sq, at.count);
    clear_padding(max_exp_avg_sq, at.count);
    clear_padding(weight, at.count);
  }
  store_elements(at.param, stored_param, at.count, at.whole_param);
  store_vector(at.exp_avg, exp_avg);
  store_vector(at.exp_avg_sq, exp_avg_sq);
  if constexpr (Instance::kHasMax) store_vector(at.max_exp_avg_sq, max_exp_avg_sq);
  if constexpr (Instance::kHasMaster) store_vector(at.master, weight);
}

FS_DEVICE void read_scalars(StepScalars<float>& scalars, const ScalarSlot& slot) { scalars = slot.f32; }
FS_DEVICE void read_scalars(StepScalars<double>& scalars, const ScalarSlot& slot) { scalars = slot.f64; }

template <class Param, class Grad, Master kMaster, bool kAmsgrad>
__global__ void __launch_bounds__(kUpdateThreads, UpdateInstance<Param, Grad, kMaster, kAmsgrad>::kBlocksPerSm)
    update_kernel(FS_KERNEL_TABLE(UpdateTable) table) {
  using Instance = UpdateInstance<Param, Grad, kMaster, kAmsgrad>;
  StepScalars<typename Instance::Compute> scalars = {};
  int tensor = 0;
  int tile_end = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < table.num_tiles; tile += static_cast<int>(gridDim.x)) {
    if (tile >= tile_end) {
      tensor = find_tensor(table, tile, tensor);
      tile_end = table.tile_end[tensor];
      read_scalars(scalars, table.scalars[table.row[tensor]]);
      if (scalars.flags & kSkip) return;  // a call is skipped as a whole
    }
    update_elements<Instance>(table, tensor, tile, scalars);
  }
}

// A compiled instance; no kernel: this combination has none.
struct SelectedUpdate {
  Kernel<UpdateTable> kernel;
  int tile;  // elements
};

template <class Param, class Grad, Master kMaster>
SelectedUpdate select_amsgrad(bool amsgrad) {
  constexpr int tile = UpdateInstance<Param, Grad, kMaster, false>::kTile;
  return amsgrad ? SelectedUpdate{update_kernel<Param, Grad, kMaster, true>, tile}
                 : SelectedUpdate{update_kernel<Param, Grad, kMaster, false>, tile};
}

template <class Param, Master kMaster>
SelectedUpdate select_grad(int grad_format, bool amsgrad) {
  switch (grad_format) {
    case kFloat32: return select_amsgrad<Param, Float32, kMaster>(amsgrad);
    case kBfloat16: return select_amsgrad<Param, Bfloat16, kMaster>(amsgrad);
    case kFloat16: return select_amsgrad<Param, Float16, kMaster>(amsgrad);
    default: return {nullptr, 0};
  }
}

// The instances of one parameter format; each is defined in a file of its own, to be compiled in parallel.
SelectedUpdate select_update_fp32(int grad_format, int master, bool amsgrad);
SelectedUpdate select_update_bf16(int grad_format, int master, bool amsgrad);
SelectedUpdate select_update_fp16(int grad_format, int master, bool amsgrad);
SelectedUpdate select_update_fp64(int grad_format, int master, bool amsgrad);

}  // namespace fused_sched
