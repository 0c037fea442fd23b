// The CPU loops over elements: decode, update, encode, in tiles that stay in the first-level cache. Compiled
// once per instruction set (FS_ISA); the compiler vectorises. Staging makes formats add up instead of
// multiply: a new one is one decode and one encode loop, not a copy of the update for each partner.
#include "update_tile.h"

#include <type_traits>

#include "../core/adam.h"
#include "../core/codec.h"

FS_NAMESPACE_BEGIN
namespace {

// Two staged floats per element and up to three streams of state: 4 * 1024 * 5 = 20 KB of a 32 KB cache.
constexpr int64_t kTile = 1024;

template <class Codec, class T>
void decode_tile(const void* source, int64_t first, int64_t count, T* out) {
  const typename Codec::Storage* stored = static_cast<const typename Codec::Storage*>(source) + first;
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(Codec::decode(stored[i]));
}

template <class T>
constexpr int32_t format_of() {
  return sizeof(T) == sizeof(double) ? kFloat64 : kFloat32;
}

// Elements as T: in place where they are stored as T, else decoded into the tile.
template <class T>
const T* as_compute(const void* source, int32_t format, int64_t first, int64_t count, T* tile) {
  if (format == format_of<T>()) return static_cast<const T*>(source) + first;
  switch (format) {
#define FS_DECODE(identifier, tag, name, Codec) \
  case identifier: decode_tile<Codec, T>(source, first, count, tile); break;
    FS_FORMATS(FS_DECODE)
#undef FS_DECODE
  }
  return tile;
}

template <class Codec>
void encode_tile(const float* value, void* target, int64_t first, int64_t count) {
  typename Codec::Storage* stored = static_cast<typename Codec::Storage*>(target) + first;
  for (int64_t i = 0; i < count; ++i) stored[i] = Codec::encode(value[i]);
}

template <class Codec>
void encode_tile_beside_master(const float* master, void* target, int64_t first, int64_t count) {
  typename Codec::Storage* stored = static_cast<typename Codec::Storage*>(target) + first;
  for (int64_t i = 0; i < count; ++i) stored[i] = Codec::encode_beside_master(master[i]);
}

template <class Codec>
void reconcile_tile(float* master, const void* source, int64_t first, int64_t count) {
  const typename Codec::Storage* stored = static_cast<const typename Codec::Storage*>(source) + first;
  for (int64_t i = 0; i < count; ++i) master[i] = reconcile_master<Codec>(master[i], stored[i]);
}

constexpr int kAnyFlags = -1;

// kFlags known at compile time removes the selects of the three usual steps; kAnyFlags keeps them.
template <bool kAmsgrad, int kFlags, class T>
void update_elements(T* __restrict weight, const T* __restrict grad, T* __restrict exp_avg, T* __restrict exp_avg_sq,
                     T* __restrict max_exp_avg_sq, int64_t count, StepScalars<T> scalars) {
  if (kFlags != kAnyFlags) scalars.flags = kFlags;
  T unused = 0;
  for (int64_t i = 0; i < count; ++i) {
    adam_update<kAmsgrad>(weight[i], exp_avg[i], exp_avg_sq[i], kAmsgrad ? max_exp_avg_sq[i] : unused, grad[i],
                          scalars);
  }
}

template <class T>
struct State {
  T* exp_avg;
  T* exp_avg_sq;
  T* max_exp_avg_sq;
};

template <bool kAmsgrad, class T>
void update_tile(T* weight, const T* grad, const State<T>& state, int64_t first, int64_t count,
                 const StepScalars<T>& scalars) {
  T* const exp_avg = state.exp_avg + first;
  T* const exp_avg_sq = state.exp_avg_sq + first;
  T* const max_exp_avg_sq = kAmsgrad ? state.max_exp_avg_sq + first : nullptr;
#define FS_UPDATE(flags) \
  update_elements<kAmsgrad, flags>(weight, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, count, scalars)
  switch (scalars.flags) {
    case 0: return FS_UPDATE(0);
    case kDecoupledDecay: return FS_UPDATE(kDecoupledDecay);
    case kL2Decay: return FS_UPDATE(kL2Decay);
    default: return FS_UPDATE(kAnyFlags);
  }
#undef FS_UPDATE
}

// Parameters stored as they are computed with: updated in place.
template <bool kAmsgrad, class T>
void update_wide(const fs_run& run, const State<T>& state, const StepScalars<T>& scalars) {
  alignas(64) T grad_tile[kTile];
  for (int64_t first = 0; first < run.count; first += kTile) {
    const int64_t count = run.count - first < kTile ? run.count - first : kTile;
    const T* grad = as_compute(run.grad, run.grad_format, first, count, grad_tile);
    update_tile<kAmsgrad>(static_cast<T*>(run.param) + first, grad, state, first, count, scalars);
  }
}

// 16-bit parameters, with or without an fp32 master.
template <class Codec, bool kAmsgrad>
void update_narrow(const fs_run& run, const State<float>& state, const StepScalars<float>& scalars) {
  alignas(64) float grad_tile[kTile];
  alignas(64) float weight_tile[kTile];
  for (int64_t first = 0; first < run.count; first += kTile) {
    const int64_t count = run.count - first < kTile ? run.count - first : kTile;
    const float* grad = as_compute(run.grad, run.grad_format, first, count, grad_tile);
    if (run.master != nullptr) {
      float* const master = run.master + first;
      reconcile_tile<Codec>(master, run.param, first, count);
      update_tile<kAmsgrad>(master, grad, state, first, count, scalars);
      encode_tile_beside_master<Codec>(master, run.param, first, count);
    } else {
      decode_tile<Codec, float>(run.param, first, count, weight_tile);
      update_tile<kAmsgrad>(weight_tile, grad, state, first, count, scalars);
      encode_tile<Codec>(weight_tile, run.param, first, count);
    }
  }
}

template <class T>
State<T> state_of(const fs_run& run) {
  return {static_cast<T*>(run.exp_avg), static_cast<T*>(run.exp_avg_sq), static_cast<T*>(run.max_exp_avg_sq)};
}

// Which of the two a format needs follows from its row; a new row brings its loop.
template <class Codec, bool kAmsgrad>
void update_format(const fs_run& run) {
  using T = typename Codec::Compute;
  const StepScalars<T>& scalars = *static_cast<const StepScalars<T>*>(run.scalars);
  if constexpr (std::is_same<typename Codec::Storage, T>::value) {
    update_wide<kAmsgrad>(run, state_of<T>(run), scalars);
  } else {
    update_narrow<Codec, kAmsgrad>(run, state_of<T>(run), scalars);
  }
}

template <bool kAmsgrad>
void update_run(const fs_run& run) {
  switch (run.param_format) {
#define FS_UPDATE_FORMAT(identifier, tag, name, Codec) \
  case identifier: return update_format<Codec, kAmsgrad>(run);
    FS_FORMATS(FS_UPDATE_FORMAT)
#undef FS_UPDATE_FORMAT
  }
}

}  // namespace
FS_NAMESPACE_END

#define FS_JOIN(prefix, isa) prefix##isa
#define FS_ENTRY(isa) FS_JOIN(fs_update_run_, isa)

extern "C" void FS_ENTRY(FS_ISA)(const fs_run* run) {
  if (run->max_exp_avg_sq != nullptr) {
    fused_sched::update_run<true>(*run);
  } else {
    fused_sched::update_run<false>(*run);
  }
}
