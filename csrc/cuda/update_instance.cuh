// One thread's part of an update: which elements, how many, in which formats, and the way to memory and back.
#pragma once

#include <type_traits>

#include "packed_codes.cuh"
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
  static constexpr bool kHasFloats = sizeof(typename Param::Storage) == 4 || sizeof(typename First::Storage) == 4 ||
                                     (kHasMaster && sizeof(typename Master::Storage) == 4);
  // A piece is 16 bytes of the widest stream that is written; 8-bit moments are whole groups in one thread.
  static constexpr int kPiece = kWide ? 2 : kHasScales ? 16 : kHasFloats ? 4 : 8;
  static constexpr int kCount = kWide ? 2 : kHasScales ? 16 : 8;
  static constexpr int kTile = kUpdateThreads * kCount;
  static_assert(!kHasScales || MomentsCodec::kGroup == kCount, "a thread has whole groups");
  static_assert(kCount == kPiece || kWarpThreads * kCount <= kPadding,
                "where a thread has an element, its tensor's state goes on for all of its pieces");
  // Where 64 registers, those of four blocks, would spill.
  static constexpr int kBlocksPerSm = kHasScales || (kHasMax && kHasMaster)     ? kUpdateBlocksPerSm - 2
                                      : kHasMax || kHasMaster || Master::kDraws ? kUpdateBlocksPerSm - 1
                                                                                : kUpdateBlocksPerSm;
};

template <class Instance>
using Elements = Vector<typename Instance::Compute, Instance::kCount>;

// The place of the i-th of a thread's elements, from its first.
template <class Instance>
FS_DEVICE constexpr int offset_of(int i) {
  return piece_offset<Instance::kPiece>(i);
}

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
  uint64_t grad;  // address of the tensor's
  int64_t first;  // index of the first element in its tensor
  int count;      // elements of the tile from here on; <= 0: none

  FS_DEVICE bool has_all() const { return count > offset_of<Instance>(Instance::kCount - 1); }
  FS_DEVICE bool has_aligned_param() const {
    return is_vector_aligned<typename Instance::Param::Storage, Instance::kPiece>(reinterpret_cast<uint64_t>(param));
  }
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
  const int thread = static_cast<int>(threadIdx.x);
  const int first_of_warp = thread / kWarpThreads * kWarpThreads * Instance::kCount;
  const int first_in_tile = first_of_warp + thread % kWarpThreads * Instance::kPiece;
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
  at.grad = table.grad[tensor];
  at.first = first;
  at.count = length - first_in_tile;
  return at;
}

// ---- one element -----------------------------------------------------------------------------------

// By its place in its tensor; not in double.
FS_DEVICE float load_one_grad(const UpdateTable& table, uint64_t base, int64_t element) {
  switch (table.grad_format) {
    case kFloat32: return *at_address<const float>(base, element);
    case kBfloat16: return Bfloat16::decode(*at_address<const uint16_t>(base, element));
    default: return Float16::decode(*at_address<const uint16_t>(base, element));
  }
}

// ---- all of a thread's -----------------------------------------------------------------------------

// State past the end of a tensor stays zero.
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
  template <class Codec>
  using Moments = typename std::conditional<Instance::kHasScales, PackedCodes<Codec>,
                                            Vector<typename Codec::Storage, kCount>>::type;
  Vector<typename Instance::Param::Storage, kCount> param;
  Moments<typename Instance::First> exp_avg;
  Moments<typename Instance::Second> exp_avg_sq;
  VectorIf<typename Instance::Compute, Instance::kHasMax> max_exp_avg_sq;
  VectorIf<typename Instance::Master::Storage, Instance::kHasMaster> kept;
  uint8_t exp_avg_scale;
  uint8_t exp_avg_sq_scale;
};

template <class Instance>
FS_DEVICE void load_state(const ThreadElements<Instance>& at, Stored<Instance>& stored) {
  constexpr int kPiece = Instance::kPiece;
  stored.exp_avg = load_vector<decltype(stored.exp_avg), kPiece>(at.exp_avg);
  stored.exp_avg_sq = load_vector<decltype(stored.exp_avg_sq), kPiece>(at.exp_avg_sq);
  if constexpr (Instance::kHasMax) {
    stored.max_exp_avg_sq = load_vector<decltype(stored.max_exp_avg_sq), kPiece>(at.max_exp_avg_sq);
  }
  if constexpr (Instance::kHasMaster) stored.kept = load_vector<decltype(stored.kept), kPiece>(at.kept);
  stored.exp_avg_scale = Instance::kHasScales ? __ldcs(at.exp_avg_scale) : 0;
  stored.exp_avg_sq_scale = Instance::kHasScales ? __ldcs(at.exp_avg_sq_scale) : 0;
}

// The usual case is one stretch without a branch, so that all loads are on their way before the first value is used:
// where ways meet, ptxas unpacks what is narrow, and waits for it.
template <class Grad, class Instance>
FS_DEVICE Elements<Instance> load_with(const ThreadElements<Instance>& at, Stored<Instance>& stored) {
  constexpr int kCount = Instance::kCount;
  constexpr int kPiece = Instance::kPiece;
  using Storage = typename Grad::Storage;
  const Storage* const grad = at_address<const Storage>(at.grad, at.first);
  const bool grad_aligned = is_vector_aligned<Storage, kPiece>(at.grad);
  Vector<Storage, kCount> raw;
  if (at.has_all() && at.has_aligned_param() && grad_aligned) {
    load_state(at, stored);
    stored.param = load_vector<decltype(stored.param), kPiece>(at.param);
    raw = load_vector<decltype(raw), kPiece>(grad);
  } else {
    load_state(at, stored);
    stored.param = load_elements<typename Instance::Param::Storage, kCount, kPiece>(at.param, at.count);
    raw = load_elements<Storage, kCount, kPiece>(grad, at.count);
  }
  Elements<Instance> decoded;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    decoded.element[i] = static_cast<typename Instance::Compute>(Grad::decode(raw.element[i]));
  }
  return decoded;
}

template <class Instance>
FS_DEVICE Elements<Instance> load(const UpdateTable& table, const ThreadElements<Instance>& at,
                                  Stored<Instance>& stored) {
  if constexpr (Instance::kWide) {
    return load_with<Float64>(at, stored);
  } else {
    switch (table.grad_format) {
      case kFloat32: return load_with<Float32>(at, stored);
      case kBfloat16: return load_with<Bfloat16>(at, stored);
      default: return load_with<Float16>(at, stored);
    }
  }
}

template <class Instance>
FS_DEVICE void store(const ThreadElements<Instance>& at, Stored<Instance>& stored) {
  constexpr int kPiece = Instance::kPiece;
  // Ordinary numbers leave zeros zeros (of either sign, with a negative beta1, which a tensor may hold). With an
  // infinite grad_factor a zero becomes a NaN, in double.
  if constexpr (Instance::kWide) {
    clear_padding(stored.exp_avg, at.count);
    clear_padding(stored.exp_avg_sq, at.count);
    if constexpr (Instance::kHasMax) clear_padding(stored.max_exp_avg_sq, at.count);
  }
  if (at.has_all() && at.has_aligned_param()) {
    store_vector<kPiece>(at.param, stored.param);
  } else {
    store_elements<kPiece>(at.param, stored.param, at.count);
  }
  store_vector<kPiece>(at.exp_avg, stored.exp_avg);
  store_vector<kPiece>(at.exp_avg_sq, stored.exp_avg_sq);
  if constexpr (Instance::kHasMax) store_vector<kPiece>(at.max_exp_avg_sq, stored.max_exp_avg_sq);
  if constexpr (Instance::kHasMaster) store_vector<kPiece>(at.kept, stored.kept);
  if constexpr (Instance::kHasScales) {
    __stcs(at.exp_avg_scale, stored.exp_avg_scale);
    __stcs(at.exp_avg_sq_scale, stored.exp_avg_sq_scale);
  }
}

}  // namespace fused_sched
