// One thread's part of an update: which elements, how many, in which formats, and the way to memory and back.
#pragma once

#include <type_traits>

#include "tensor_table.cuh"
#include "vector_access.cuh"

namespace fused_sched {

// One combination of formats. The gradient's is not among them: it is looked up when the kernel runs, in one branch
// per vector that all threads of a launch take alike, which divides the number of kernels by three.
template <class ParamFormat, class MasterCodec, class MomentsCodec, bool kAmsgrad>
struct UpdateInstance {
  using Param = ParamFormat;
  using Master = MasterCodec;
  using Compute = typename Param::Compute;
  using First = typename MomentsCodec::template First<Compute>;
  using Second = typename MomentsCodec::template Second<Compute>;
  static constexpr bool kHasMaster = Master::kStores;
  static constexpr bool kHasMax = kAmsgrad;
  static constexpr bool kExactMoments = MomentsCodec::kExact;
  static constexpr bool kHasScales = MomentsCodec::kGroup > 1;
  static constexpr bool kWide = std::is_same<Compute, double>::value;
  static constexpr bool kHasBytes =
      sizeof(typename First::Storage) == 1 || (kHasMaster && sizeof(typename Master::Storage) == 1);
  // 16 bytes of the narrowest stream.
  static constexpr int kCount = kWide ? 2 : kHasBytes ? 16 : 8;
  // Elements in flight between decoding and encoding, as floats.
  static constexpr int kChunk = kCount < 8 ? kCount : 8;
  static constexpr int kTile = kUpdateThreads * kCount;
  static_assert(!kHasScales || MomentsCodec::kGroup == kCount, "a thread has whole groups");
  // With a master and a third moment a thread holds 40 to 44 registers of data; at 64 these instances spill 8 to 24
  // bytes, on every architecture from sm_75 to sm_120. With 16 elements it holds 64 and more: at 80 registers, three
  // blocks, half of these instances spill, up to 300 bytes. Two blocks still have 50 KB of reads in flight per SM.
  static constexpr int kBlocksPerSm = kCount == kMaxElementsPerThread             ? kUpdateBlocksPerSm - 2
                                      : kHasMax && (kHasMaster || Master::kDraws) ? kUpdateBlocksPerSm - 1
                                                                                  : kUpdateBlocksPerSm;
};

// Where a tile's elements are, for the calling thread; a slot the instance lacks stays null.
template <class Instance>
struct ThreadElements {
  typename Instance::Param::Storage* param;
  typename Instance::Master::Storage* kept;
  typename Instance::First::Storage* exp_avg;
  typename Instance::Second::Storage* exp_avg_sq;
  typename Instance::Compute* max_exp_avg_sq;
  uint8_t* exp_avg_scale;
  uint8_t* exp_avg_sq_scale;
  int64_t first;  // index of the first element in its tensor
  int count;      // elements of the tile from here on; <= 0: none
  bool whole_param;
};

template <class T>
FS_DEVICE T* at_address(uint64_t base, int64_t element) {
  return reinterpret_cast<T*>(base) + element;
}

template <class Instance>
FS_DEVICE ThreadElements<Instance> locate(const UpdateTable& table, int tensor, int tile) {
  const int tile_of_tensor = tile - (tensor > 0 ? table.tile_end[tensor - 1] : 0);
  const bool is_last = tile + 1 == table.tile_end[tensor];
  const int length = is_last ? table.last_tile_length[tensor] : Instance::kTile;
  const int first_in_tile = static_cast<int>(threadIdx.x) * Instance::kCount;
  const int64_t first = static_cast<int64_t>(tile_of_tensor) * Instance::kTile + first_in_tile;
  const int64_t state = static_cast<int64_t>(table.state_block[tensor]) * kPadding + first;
  const fs_arena& arena = table.arena[table.arena_index[tensor]];
  ThreadElements<Instance> at = {};
  at.param = at_address<typename Instance::Param::Storage>(table.param[tensor], first);
  at.exp_avg = at_address<typename Instance::First::Storage>(arena.slot[kExpAvg], state);
  at.exp_avg_sq = at_address<typename Instance::Second::Storage>(arena.slot[kExpAvgSq], state);
  if (Instance::kHasMax) at.max_exp_avg_sq = at_address<typename Instance::Compute>(arena.slot[kMaxExpAvgSq], state);
  if (Instance::kHasMaster) at.kept = at_address<typename Instance::Master::Storage>(arena.slot[kMasterWeight], state);
  if (Instance::kHasScales) {
    at.exp_avg_scale = at_address<uint8_t>(arena.slot[kExpAvgScale], state / Instance::kCount);
    at.exp_avg_sq_scale = at_address<uint8_t>(arena.slot[kExpAvgSqScale], state / Instance::kCount);
  }
  at.first = first;
  at.count = length - first_in_tile;
  at.whole_param = at.count >= Instance::kCount && is_vector_aligned(table.param[tensor]);
  return at;
}

template <class Grad, class T, int kCount>
FS_DEVICE Vector<T, kCount> load_grad(uint64_t base, int64_t first, int count) {
  using Storage = typename Grad::Storage;
  const bool whole = count >= kCount && is_vector_aligned(base);
  const auto stored = load_elements<Storage, kCount>(at_address<const Storage>(base, first), count, whole);
  Vector<T, kCount> grad;
#pragma unroll
  for (int i = 0; i < kCount; ++i) grad.element[i] = static_cast<T>(Grad::decode(stored.element[i]));
  return grad;
}

template <class Instance>
FS_DEVICE Vector<typename Instance::Compute, Instance::kCount> load_grad(const UpdateTable& table, int tensor,
                                                                         int64_t first, int count) {
  using Compute = typename Instance::Compute;
  const uint64_t base = table.grad[tensor];
  if constexpr (Instance::kWide) {
    return load_grad<Float64, Compute, Instance::kCount>(base, first, count);
  } else {
    switch (table.grad_format) {
      case kFloat32: return load_grad<Float32, Compute, Instance::kCount>(base, first, count);
      case kBfloat16: return load_grad<Bfloat16, Compute, Instance::kCount>(base, first, count);
      default: return load_grad<Float16, Compute, Instance::kCount>(base, first, count);
    }
  }
}

// State past the end of a tensor stays zero whatever the arithmetic gave there: with eps = 0 it is 0/0.
template <class T, int kCount>
FS_DEVICE void clear_padding(Vector<T, kCount>& state, int count) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i >= count) state.element[i] = T(0);
  }
}

// What a thread has loaded of its elements, as stored.
template <class Instance>
struct Stored {
  static constexpr int kCount = Instance::kCount;
  template <class T, bool kPresent>
  using VectorIf = typename std::conditional<kPresent, Vector<T, kCount>, Nothing>::type;
  Vector<typename Instance::Param::Storage, kCount> param;
  Vector<typename Instance::First::Storage, kCount> exp_avg;
  Vector<typename Instance::Second::Storage, kCount> exp_avg_sq;
  VectorIf<typename Instance::Compute, Instance::kHasMax> max_exp_avg_sq;
  VectorIf<typename Instance::Master::Storage, Instance::kHasMaster> kept;
  uint8_t exp_avg_scale;
  uint8_t exp_avg_sq_scale;
};

template <class Instance>
FS_DEVICE Stored<Instance> load(const ThreadElements<Instance>& at) {
  constexpr int kCount = Instance::kCount;
  Stored<Instance> stored;
  stored.param = load_elements<typename Instance::Param::Storage, kCount>(at.param, at.count, at.whole_param);
  stored.exp_avg = load_vector<typename Instance::First::Storage, kCount>(at.exp_avg);
  stored.exp_avg_sq = load_vector<typename Instance::Second::Storage, kCount>(at.exp_avg_sq);
  if constexpr (Instance::kHasMax) {
    stored.max_exp_avg_sq = load_vector<typename Instance::Compute, kCount>(at.max_exp_avg_sq);
  }
  if constexpr (Instance::kHasMaster) stored.kept = load_vector<typename Instance::Master::Storage, kCount>(at.kept);
  stored.exp_avg_scale = Instance::kHasScales ? __ldcs(at.exp_avg_scale) : 0;
  stored.exp_avg_sq_scale = Instance::kHasScales ? __ldcs(at.exp_avg_sq_scale) : 0;
  return stored;
}

template <class Instance>
FS_DEVICE void store(const ThreadElements<Instance>& at, Stored<Instance>& stored) {
  if (at.count < Instance::kCount) {
    clear_padding(stored.exp_avg, at.count);
    clear_padding(stored.exp_avg_sq, at.count);
    if constexpr (Instance::kHasMax) clear_padding(stored.max_exp_avg_sq, at.count);
    if constexpr (Instance::kHasMaster) clear_padding(stored.kept, at.count);
  }
  store_elements(at.param, stored.param, at.count, at.whole_param);
  store_vector(at.exp_avg, stored.exp_avg);
  store_vector(at.exp_avg_sq, stored.exp_avg_sq);
  if constexpr (Instance::kHasMax) store_vector(at.max_exp_avg_sq, stored.max_exp_avg_sq);
  if constexpr (Instance::kHasMaster) store_vector(at.kept, stored.kept);
  if constexpr (Instance::kHasScales) {
    __stcs(at.exp_avg_scale, stored.exp_avg_scale);
    __stcs(at.exp_avg_sq_scale, stored.exp_avg_sq_scale);
  }
}

}  // namespace fused_sched
