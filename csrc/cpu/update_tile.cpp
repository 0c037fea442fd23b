// The CPU loops over elements: decode, update, encode, in tiles that stay in the first-level cache. Compiled
// once per instruction set (FS_ISA); the compiler vectorises. Staging makes formats add up instead of
// multiply: a new one is one decode and one encode loop, not a copy of the update for each partner.
#include "update_tile.h"

#include <type_traits>

#include "../core/adam.h"
#include "../core/codec.h"

FS_NAMESPACE_BEGIN
namespace {

// Up to four staged floats per element and the streams they come from: 16 KB and about 10 of a 32 KB cache.
constexpr int64_t kTile = 1024;

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

template <class T>
struct Tile {
  alignas(64) T grad[kTile];
  alignas(64) T weight[kTile];
  alignas(64) T exp_avg[kTile];
  alignas(64) T exp_avg_sq[kTile];
};

// Where the update finds a tile's elements: in the tile, or where they are stored if that is as T.
template <class T>
struct Elements {
  const T* grad;
  T* weight;
  T* exp_avg;
  T* exp_avg_sq;
  T* max_exp_avg_sq;
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

// ---- moments ---------------------------------------------------------------------------------------

// Whole groups: past the last element state is zero, and stays so.
template <class MomentsCodec>
int64_t num_groups(const Place& place) {
  return (place.count + MomentsCodec::kGroup - 1) / MomentsCodec::kGroup;
}

template <class MomentsCodec, class Codec>
void decode_moment(const Place& place, const void* stream, const uint8_t* scales, float* __restrict out) {
  constexpr int kGroup = MomentsCodec::kGroup;
  const typename Codec::Storage* __restrict stored = place.at<typename Codec::Storage>(stream);
  if constexpr (kGroup == 1) {
    for (int64_t i = 0; i < place.count; ++i) out[i] = Codec::decode(stored[i], typename Codec::Scale(0));
  } else {
    const uint8_t* __restrict scale_of_group = scales + place.first / kGroup;
    for (int64_t group = 0; group < num_groups<MomentsCodec>(place); ++group) {
      const typename Codec::Scale scale(scale_of_group[group]);
      for (int i = 0; i < kGroup; ++i) out[group * kGroup + i] = Codec::decode(stored[group * kGroup + i], scale);
    }
  }
}

template <class First, class Second>
void encode_moments(const Place& place, const float* __restrict exp_avg, const float* __restrict exp_avg_sq) {
  typename First::Storage* __restrict first = place.at<typename First::Storage>(place.run.exp_avg);
  typename Second::Storage* __restrict second = place.at<typename Second::Storage>(place.run.exp_avg_sq);
  const RandomKey key = place.random_key();
  const uint32_t first_element = place.first_element();
  for (int64_t i = 0; i < place.count; ++i) {
    const uint32_t random = random_bits(key, first_element + static_cast<uint32_t>(i));
    first[i] = First::encode(exp_avg[i], typename First::Scale(0), draw_of_first(random));
    second[i] = Second::encode(exp_avg_sq[i], typename Second::Scale(0), draw_of_second(random));
  }
}

template <class Codec, int kGroup>
uint8_t scale_of(const float* __restrict value) {
  uint32_t largest = 0;
  for (int i = 0; i < kGroup; ++i) largest = larger_finite(largest, value[i]);
  return Codec::scale_for(largest);
}

template <class First, class Second, int kGroup>
void encode_groups(const Place& place, int64_t num_groups, const float* __restrict exp_avg,
                   const float* __restrict exp_avg_sq) {
  typename First::Storage* __restrict first = place.at<typename First::Storage>(place.run.exp_avg);
  typename Second::Storage* __restrict second = place.at<typename Second::Storage>(place.run.exp_avg_sq);
  uint8_t* __restrict first_scale = place.run.exp_avg_scale + place.first / kGroup;
  uint8_t* __restrict second_scale = place.run.exp_avg_sq_scale + place.first / kGroup;
  const RandomKey key = place.random_key();
  for (int64_t group = 0; group < num_groups; ++group) {
    const int64_t begin = group * kGroup;
    first_scale[group] = scale_of<First, kGroup>(exp_avg + begin);
    second_scale[group] = scale_of<Second, kGroup>(exp_avg_sq + begin);
    const typename First::Scale scale_of_first(first_scale[group]);
    const typename Second::Scale scale_of_second(second_scale[group]);
    const uint32_t first_element = place.first_element() + static_cast<uint32_t>(begin);
    for (int i = 0; i < kGroup; ++i) {
      const uint32_t random = random_bits(key, first_element + static_cast<uint32_t>(i));
      first[begin + i] = First::encode(exp_avg[begin + i], scale_of_first, draw_of_first(random));
      second[begin + i] = Second::encode(exp_avg_sq[begin + i], scale_of_second, draw_of_second(random));
    }
  }
}

template <class T>
void stage_moments(const Place& place, Tile<T>& tile, Elements<T>& elements) {
  const fs_run& run = place.run;
  elements.max_exp_avg_sq = run.max_exp_avg_sq == nullptr ? nullptr : place.at<T>(run.max_exp_avg_sq);
  switch (run.moments_format) {
#define FS_CASE(identifier, tag, name, Codec)                                                               \
  case identifier:                                                                                          \
    if constexpr (Codec::kExact) {                                                                          \
      elements.exp_avg = place.at<T>(run.exp_avg);                                                          \
      elements.exp_avg_sq = place.at<T>(run.exp_avg_sq);                                                    \
    } else if constexpr (std::is_same<T, float>::value) {                                                   \
      decode_moment<Codec, Codec::First<T>>(place, run.exp_avg, run.exp_avg_scale, tile.exp_avg);           \
      decode_moment<Codec, Codec::Second<T>>(place, run.exp_avg_sq, run.exp_avg_sq_scale, tile.exp_avg_sq); \
      elements.exp_avg = tile.exp_avg;                                                                      \
      elements.exp_avg_sq = tile.exp_avg_sq;                                                                \
    }                                                                                                       \
    break;
    FS_MOMENTS(FS_CASE)
#undef FS_CASE
  }
}

template <class T>
void store_moments(const Place& place, const Elements<T>& elements) {
  switch (place.run.moments_format) {
#define FS_CASE(identifier, tag, name, Codec)                                                                   \
  case identifier:                                                                                              \
    if constexpr (!Codec::kExact && std::is_same<T, float>::value) {                                            \
      if constexpr (Codec::kGroup == 1) {                                                                       \
        encode_moments<Codec::First<T>, Codec::Second<T>>(place, elements.exp_avg, elements.exp_avg_sq);        \
      } else {                                                                                                  \
        encode_groups<Codec::First<T>, Codec::Second<T>, Codec::kGroup>(place, num_groups<Codec>(place),        \
                                                                        elements.exp_avg, elements.exp_avg_sq); \
      }                                                                                                         \
    }                                                                                                           \
    break;
    FS_MOMENTS(FS_CASE)
#undef FS_CASE
  }
}

// ---- the update ------------------------------------------------------------------------------------

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

template <bool kAmsgrad, class T>
void update_tile(const Elements<T>& at, int64_t count, const StepScalars<T>& scalars) {
#define FS_UPDATE(flags) \
  update_elements<kAmsgrad, flags>(at.weight, at.grad, at.exp_avg, at.exp_avg_sq, at.max_exp_avg_sq, count, scalars)
  switch (scalars.flags) {
    case 0: return FS_UPDATE(0);
    case kDecoupledDecay: return FS_UPDATE(kDecoupledDecay);
    case kL2Decay: return FS_UPDATE(kL2Decay);
    default: return FS_UPDATE(kAnyFlags);
  }
#undef FS_UPDATE
}

template <class Param>
void update_run(const fs_run& run) {
  using T = typename Param::Compute;
  const StepScalars<T>& scalars = *static_cast<const StepScalars<T>*>(run.scalars);
  Tile<T> tile;
  for (int64_t first = 0; first < run.count; first += kTile) {
    const Place place = {run, first, run.count - first < kTile ? run.count - first : kTile};
    Elements<T> elements = {};
    elements.grad = stage_grad(place, tile.grad);
    elements.weight = stage_weight<Param>(place, tile.weight);
    stage_moments(place, tile, elements);
    if (elements.max_exp_avg_sq != nullptr) {
      update_tile<true>(elements, place.count, scalars);
    } else {
      update_tile<false>(elements, place.count, scalars);
    }
    store_moments(place, elements);
    store_weight<Param>(place, elements.weight);
  }
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
