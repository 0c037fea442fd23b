// The CPU loops over elements: decode, update, encode, in tiles that stay in the first-level cache. Compiled
// once per instruction set (FS_ISA); the compiler vectorises. Staging makes formats add up instead of
// multiply: a new one is one decode and one encode loop, not a copy of the update for each partner.
#include "update_tile.h"

#include <type_traits>

#if defined(__AVX512BW__)
#include "block_avx512.h"
#endif
#include "../core/adam.h"
#include "../core/codec.h"

FS_NAMESPACE_BEGIN
namespace {

// Up to four staged floats per element, 4 KB, and the streams they come from stay in a 32 KB cache. With AVX2,
// 128 elements take 4 to 5% longer, 512 up to 3%, 1,024 a quarter; fp32 does not care. Asking for tiles ahead gains
// nothing (docs/measured.md).
constexpr int64_t kTile = 256;

// A run from one of its elements on, for one tile.
struct Place {
  const fs_run& run;
  int64_t first;
  int64_t count;

  template <class T>
  T* at(void* stream) const {
    return static_cast<T*>(stream) + first;
  }
  template <class T>
  const T* at(const void* stream) const {
    return static_cast<const T*>(stream) + first;
  }
  RandomKey random_key() const { return {run.random_key[0], run.random_key[1]}; }
  uint32_t first_element() const { return run.first + static_cast<uint32_t>(first); }
};

// What is staged of a tile. Moments that are stored as T are updated where they are; codes are widened to the width
// of a float here, so that the loop of the update works on whole registers: of mixed widths g++ 12 vectorises a
// quarter of the register, or with masks of bytes.
template <class T>
struct Tile {
  alignas(64) T grad[kTile];
  alignas(64) T weight[kTile];
  alignas(64) uint32_t exp_avg[kTile];
  alignas(64) uint32_t exp_avg_sq[kTile];
};

// ---- gradients -------------------------------------------------------------------------------------

template <class Codec, class T>
const T* decode_grad(const Place& place, T* __restrict out) {
  using Storage = typename Codec::Storage;
  const Storage* __restrict stored = place.at<Storage>(place.run.grad);
  if constexpr (std::is_same<Storage, T>::value) {
    return stored;
  } else {
    for (int64_t i = 0; i < place.count; ++i) out[i] = static_cast<T>(Codec::decode(stored[i]));
    return out;
  }
}

template <class T>
const T* stage_grad(const Place& place, T* out) {
  switch (place.run.grad_format) {
#define FS_CASE(identifier, tag, name, Codec) \
  case identifier: return decode_grad<Codec, T>(place, out);
    FS_FORMATS(FS_CASE)
#undef FS_CASE
    default: return out;
  }
}

// ---- parameters and their masters ------------------------------------------------------------------

template <class Param, class MasterCodec>
void decode_weight(const Place& place, float* __restrict out) {
  using Kept = typename MasterCodec::Storage;
  const typename Param::Storage* __restrict param = place.at<typename Param::Storage>(place.run.param);
  if constexpr (MasterCodec::kStores) {
    const Kept* __restrict kept = place.at<Kept>(place.run.master);
    for (int64_t i = 0; i < place.count; ++i) out[i] = MasterCodec::template decode<Param>(param[i], kept[i]);
  } else {
    for (int64_t i = 0; i < place.count; ++i) out[i] = MasterCodec::template decode<Param>(param[i], Kept());
  }
}

template <class Param, class MasterCodec>
void encode_weight(const Place& place, const float* __restrict weight) {
  using Kept = typename MasterCodec::Storage;
  typename Param::Storage* __restrict param = place.at<typename Param::Storage>(place.run.param);
  if constexpr (MasterCodec::kStores) {
    Kept* __restrict kept = place.at<Kept>(place.run.master);
    for (int64_t i = 0; i < place.count; ++i) MasterCodec::template encode<Param>(weight[i], 0, param[i], kept[i]);
  } else {
    const RandomKey key = key_of_parameter(place.random_key());
    const uint32_t first = place.first_element();
    Kept nothing;
    for (int64_t i = 0; i < place.count; ++i) {
      const uint32_t random = MasterCodec::kDraws ? random_bits(key, first + static_cast<uint32_t>(i)) : 0u;
      MasterCodec::template encode<Param>(weight[i], random, param[i], nothing);
    }
  }
}

template <class Param, class T>
T* stage_weight(const Place& place, T* out) {
  if constexpr (std::is_same<typename Param::Storage, T>::value) {
    return place.at<T>(place.run.param);
  } else {
    switch (place.run.master_format) {
#define FS_CASE(identifier, tag, name, Codec)                                     \
  case identifier:                                                                \
    if constexpr (Codec::kServes<Param>) decode_weight<Param, Codec>(place, out); \
    break;
      FS_MASTERS(FS_CASE)
#undef FS_CASE
    }
    return out;
  }
}

template <class Param, class T>
void store_weight(const Place& place, const T* weight) {
  if constexpr (!std::is_same<typename Param::Storage, T>::value) {
    switch (place.run.master_format) {
#define FS_CASE(identifier, tag, name, Codec)                                        \
  case identifier:                                                                   \
    if constexpr (Codec::kServes<Param>) encode_weight<Param, Codec>(place, weight); \
    break;
      FS_MASTERS(FS_CASE)
#undef FS_CASE
    }
  }
}

// ---- codes of moments ------------------------------------------------------------------------------

template <class Narrow>
void widen(const Narrow* __restrict stored, int64_t count, uint32_t* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = stored[i];
}

template <class Narrow>
void narrow(const uint32_t* __restrict codes, int64_t count, Narrow* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Narrow>(codes[i]);
}

// ---- the update ------------------------------------------------------------------------------------

constexpr int kAnyFlags = -1;

template <int kFlags, class T>
StepScalars<T> with_flags(StepScalars<T> scalars) {
  if (kFlags != kAnyFlags) scalars.flags = kFlags;
  return scalars;
}

// kFlags known at compile time removes the selects of the three usual steps; kAnyFlags keeps them.
template <bool kAmsgrad, int kFlags, class T>
void update_exact(T* __restrict weight, const T* __restrict grad, T* __restrict exp_avg, T* __restrict exp_avg_sq,
                  T* __restrict max_exp_avg_sq, int64_t count, const StepScalars<T>& any_scalars) {
  const StepScalars<T> scalars = with_flags<kFlags>(any_scalars);
  T unused = 0;
  for (int64_t i = 0; i < count; ++i) {
    adam_update<kAmsgrad>(weight[i], exp_avg[i], exp_avg_sq[i], kAmsgrad ? max_exp_avg_sq[i] : unused, grad[i],
                          scalars);
  }
}

// Codes are decoded, updated and encoded in one loop: the divider, which takes half of the update's time, then works
// beside the integer units.
template <class First, class Second, int kFlags>
void update_coded(float* __restrict weight, const float* __restrict grad, uint32_t* __restrict exp_avg,
                  uint32_t* __restrict exp_avg_sq, int64_t count, const StepScalars<float>& any_scalars, RandomKey key,
                  uint32_t first_element) {
  const StepScalars<float> scalars = with_flags<kFlags>(any_scalars);
  const typename First::Scale none(0u);
  for (uint32_t i = 0; i < static_cast<uint32_t>(count); ++i) {
    float first = First::decode(exp_avg[i], none);
    float second = Second::decode(exp_avg_sq[i], none);
    float unused = 0.0f;
    adam_update<false>(weight[i], first, second, unused, grad[i], scalars);
    const uint32_t random = random_bits(key, first_element + i);
    exp_avg[i] = First::encode(first, none, random);
    exp_avg_sq[i] = Second::encode(second, none, random);
  }
}

// Halves a row by taking the larger of each pair.
FS_HD void keep_larger(const uint32_t* __restrict row, int64_t pairs, uint32_t* __restrict out) {
  for (int64_t i = 0; i < pairs; ++i) out[i] = larger(row[2 * i], row[2 * i + 1]);
}

template <class Codec, int kGroup>
void choose_scales(const float* __restrict value, int64_t num_groups, uint8_t* __restrict scale) {
  static_assert(kGroup == 16, "four halvings");
  alignas(64) uint32_t row[kTile / 2];
  alignas(64) uint32_t half[kTile / 4];
  const int64_t pairs = num_groups * (kGroup / 2);
  for (int64_t i = 0; i < pairs; ++i)
    row[i] = larger(finite_magnitude(value[2 * i]), finite_magnitude(value[2 * i + 1]));
  keep_larger(row, num_groups * 4, half);
  keep_larger(half, num_groups * 2, row);
  keep_larger(row, num_groups, half);
  for (int64_t group = 0; group < num_groups; ++group)
    scale[group] = static_cast<uint8_t>(Codec::scale_for(half[group]));
}

// Codes with scales: the moments of all groups, then their scales, then codes and weights, for the same reason. Whole
// groups: past the last element state is zero, and stays so. An inner loop is one vector of floats (two or four in
// narrower sets); unrolled earlier than that, g++ 12 would not vectorise it.
template <class First, class Second, int kGroup, int kFlags>
void update_groups(float* __restrict weight, const float* __restrict grad, uint32_t* __restrict exp_avg,
                   uint32_t* __restrict exp_avg_sq, uint8_t* __restrict scale_of_first,
                   uint8_t* __restrict scale_of_second, int64_t num_groups, const StepScalars<float>& any_scalars,
                   RandomKey key, uint32_t first_element) {
  const StepScalars<float> scalars = with_flags<kFlags>(any_scalars);
  alignas(64) float first[kTile];
  alignas(64) float second[kTile];
  first[0] = second[0] = 0.0f;  // or g++ warns that they might be read before they are written
  for (int64_t group = 0; group < num_groups; ++group) {
    const typename First::Scale first_scale(scale_of_first[group]);
    const typename Second::Scale second_scale(scale_of_second[group]);
    const int64_t begin = group * kGroup;
#pragma GCC unroll 1
    for (uint32_t i = 0; i < kGroup; ++i) {
      float exp_avg_now = First::decode(exp_avg[begin + i], first_scale);
      float exp_avg_sq_now = Second::decode(exp_avg_sq[begin + i], second_scale);
      float unused = 0.0f;
      update_moments<false>(weight[begin + i], exp_avg_now, exp_avg_sq_now, unused, grad[begin + i], scalars);
      first[begin + i] = exp_avg_now;
      second[begin + i] = exp_avg_sq_now;
    }
  }
  choose_scales<First, kGroup>(first, num_groups, scale_of_first);
  choose_scales<Second, kGroup>(second, num_groups, scale_of_second);
  for (int64_t group = 0; group < num_groups; ++group) {
    const typename First::Scale first_scale(scale_of_first[group]);
    const typename Second::Scale second_scale(scale_of_second[group]);
    const int64_t begin = group * kGroup;
    const uint32_t first_of_group = first_element + static_cast<uint32_t>(begin);
#pragma GCC unroll 1
    for (uint32_t i = 0; i < kGroup; ++i) {
      const uint32_t random = random_bits(key, first_of_group + i);
      update_weight(weight[begin + i], first[begin + i], second[begin + i], scalars);
      exp_avg[begin + i] = First::encode(first[begin + i], first_scale, random);
      exp_avg_sq[begin + i] = Second::encode(second[begin + i], second_scale, random);
    }
  }
}

template <class MomentsCodec, int kFlags, class T>
void update_tile(const Place& place, T* weight, const T* grad, Tile<T>& tile) {
  const fs_run& run = place.run;
  const StepScalars<T>& scalars = *static_cast<const StepScalars<T>*>(run.scalars);
  if constexpr (MomentsCodec::kExact) {
    T* const exp_avg = place.at<T>(run.exp_avg);
    T* const exp_avg_sq = place.at<T>(run.exp_avg_sq);
    if (run.max_exp_avg_sq != nullptr) {
      T* const max_exp_avg_sq = place.at<T>(run.max_exp_avg_sq);
      update_exact<true, kFlags>(weight, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, place.count, scalars);
    } else {
      update_exact<false, kFlags, T>(weight, grad, exp_avg, exp_avg_sq, nullptr, place.count, scalars);
    }
  } else if constexpr (std::is_same<T, float>::value) {
    using First = typename MomentsCodec::template First<T>;
    using Second = typename MomentsCodec::template Second<T>;
    constexpr int kGroup = MomentsCodec::kGroup;
    const int64_t num_groups = (place.count + kGroup - 1) / kGroup;
    const int64_t count = num_groups * kGroup;
    typename First::Storage* const first = place.at<typename First::Storage>(run.exp_avg);
    typename Second::Storage* const second = place.at<typename Second::Storage>(run.exp_avg_sq);
    widen(first, count, tile.exp_avg);
    widen(second, count, tile.exp_avg_sq);
    if constexpr (kGroup > 1) {
      const int64_t first_group = place.first / kGroup;
      // The last group may be longer than the tensor: what lies behind the tensor is not ours to read or write.
      const bool has_tail = count > place.count;
      if (has_tail && grad != tile.grad) memcpy(tile.grad, grad, sizeof(T) * static_cast<size_t>(place.count));
      if (has_tail && weight != tile.weight) memcpy(tile.weight, weight, sizeof(T) * static_cast<size_t>(place.count));
      for (int64_t i = place.count; i < count; ++i) tile.grad[i] = tile.weight[i] = 0;
      update_groups<First, Second, kGroup, kFlags>(has_tail ? tile.weight : weight, has_tail ? tile.grad : grad,
                                                   tile.exp_avg, tile.exp_avg_sq, run.exp_avg_scale + first_group,
                                                   run.exp_avg_sq_scale + first_group, num_groups, scalars,
                                                   place.random_key(), place.first_element());
      // With an infinite grad_factor zeros became NaNs.
      for (int64_t i = place.count; i < count; ++i) tile.exp_avg[i] = tile.exp_avg_sq[i] = 0;
      if (has_tail && weight != tile.weight) memcpy(weight, tile.weight, sizeof(T) * static_cast<size_t>(place.count));
    } else {
      update_coded<First, Second, kFlags>(weight, grad, tile.exp_avg, tile.exp_avg_sq, count, scalars,
                                          place.random_key(), place.first_element());
    }
    narrow(tile.exp_avg, count, first);
    narrow(tile.exp_avg_sq, count, second);
  }
}

template <class MomentsCodec, class T>
void update_tile(const Place& place, T* weight, const T* grad, Tile<T>& tile) {
  switch (static_cast<const StepScalars<T>*>(place.run.scalars)->flags) {
    case 0: return update_tile<MomentsCodec, 0>(place, weight, grad, tile);
    case kDecoupledDecay: return update_tile<MomentsCodec, kDecoupledDecay>(place, weight, grad, tile);
    case kL2Decay: return update_tile<MomentsCodec, kL2Decay>(place, weight, grad, tile);
    default: return update_tile<MomentsCodec, kAnyFlags>(place, weight, grad, tile);
  }
}

template <class Param>
void update_tiles(const fs_run& run, int64_t begin, int64_t end) {
  using T = typename Param::Compute;
  Tile<T> tile;
  for (int64_t first = begin; first < end; first += kTile) {
    const Place place = {run, first, end - first < kTile ? end - first : kTile};
    const T* const grad = stage_grad(place, tile.grad);
    T* const weight = stage_weight<Param>(place, tile.weight);
    switch (run.moments_format) {
#define FS_CASE(identifier, tag, name, Codec) \
  case identifier: update_tile<Codec>(place, weight, grad, tile); break;
      FS_MOMENTS(FS_CASE)
#undef FS_CASE
    }
    store_weight<Param>(place, weight);
  }
}

template <class Param>
void update_run(const fs_run& run) {
  int64_t first = 0;
#if defined(__AVX512BW__)
  if constexpr (kHasBlocks<Param>) {
    if (has_blocks(run)) {
      first = update_blocks(run, [&run](int64_t begin) { update_tiles<Param>(run, begin, begin + kBlock); });
    }
  }
#endif
  update_tiles<Param>(run, first, run.count);
}

}  // namespace
FS_NAMESPACE_END

#define FS_JOIN(prefix, isa) prefix##isa
#define FS_ENTRY(isa) FS_JOIN(fs_update_run_, isa)

extern "C" void FS_ENTRY(FS_ISA)(const fs_run* run) {
  switch (run->param_format) {
#define FS_CASE(identifier, tag, name, Codec) \
  case fused_sched::identifier: return fused_sched::update_run<fused_sched::Codec>(*run);
    FS_FORMATS(FS_CASE)
#undef FS_CASE
  }
}
