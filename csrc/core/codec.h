// The tables of storage formats. A row names a format and the type that implements it; loops, kernels and
// `fused_sched/codec.py` follow the rows. Tags are in checkpoints: never renumber one.
#pragma once

#include "element.h"
#include "master.h"
#include "moments.h"

// How parameters and gradients are stored: X(identifier, tag, name, type).
#define FS_FORMATS(X)               \
  X(kFloat32, 0, "fp32", Float32)   \
  X(kBfloat16, 1, "bf16", Bfloat16) \
  X(kFloat16, 2, "fp16", Float16)   \
  X(kFloat64, 3, "fp64", Float64)

// Where the exact value of a 16-bit parameter is kept: X(identifier, tag, name, type).
#define FS_MASTERS(X)                            \
  X(kMasterNone, 0, "none", MasterNone)          \
  X(kMasterFloat32, 1, "fp32", MasterFloat32)    \
  X(kMasterSplit16, 2, "split16", MasterSplit16) \
  X(kMasterSplit8, 3, "split8", MasterSplit8)    \
  X(kMasterStochastic, 4, "stochastic", MasterStochastic)

// How the two moments are kept: X(identifier, tag, name, type).
#define FS_MOMENTS(X)                             \
  X(kMomentsFloat32, 0, "fp32", MomentsFloat32)   \
  X(kMomentsBfloat16, 1, "bf16", MomentsBfloat16) \
  X(kMoments8bit, 2, "8bit", Moments8bit)

FS_NAMESPACE_BEGIN

#define FS_ENUMERATOR(identifier, tag, name, ...) identifier = tag,
enum Format : int32_t { FS_FORMATS(FS_ENUMERATOR) };
enum Master : int32_t { FS_MASTERS(FS_ENUMERATOR) };
enum Moments : int32_t { FS_MOMENTS(FS_ENUMERATOR) };
#undef FS_ENUMERATOR

// What a format keeps per element, in bytes, and how many elements share a byte of scale (0: none do).
#define FS_PARAM_BYTES(identifier, tag, name, Type) static_cast<int>(sizeof(Type::Storage)),
#define FS_MASTER_BYTES(identifier, tag, name, Type) Type::kStores ? static_cast<int>(sizeof(Type::Storage)) : 0,
#define FS_MOMENT_BYTES(identifier, tag, name, Type) static_cast<int>(sizeof(Type::First<float>::Storage)),
#define FS_SCALE_GROUP(identifier, tag, name, Type) Type::kGroup > 1 ? Type::kGroup : 0,
constexpr int kFormatBytes[] = {FS_FORMATS(FS_PARAM_BYTES)};
constexpr int kMasterBytes[] = {FS_MASTERS(FS_MASTER_BYTES)};
constexpr int kMomentBytes[] = {FS_MOMENTS(FS_MOMENT_BYTES)};
constexpr int kScaleGroup[] = {FS_MOMENTS(FS_SCALE_GROUP)};
#undef FS_PARAM_BYTES
#undef FS_MASTER_BYTES
#undef FS_MOMENT_BYTES
#undef FS_SCALE_GROUP

// Which formats go together. fp64 parameters have fp64 moments, and a third moment is not compressed.
template <class Param, class MasterType, class MomentsType, bool kAmsgrad>
constexpr bool kGoTogether =
    MasterType::template kServes<Param> &&
    (MomentsType::kExact || (!kAmsgrad && std::is_same<typename Param::Compute, float>::value));

// The same of tags, which are known to be in range.
template <class Param, class MasterType>
inline bool moments_go_with(int32_t moments, bool amsgrad) {
  switch (moments) {
#define FS_CASE(identifier, tag, name, Type) \
  case identifier:                           \
    return amsgrad ? kGoTogether<Param, MasterType, Type, true> : kGoTogether<Param, MasterType, Type, false>;
    FS_MOMENTS(FS_CASE)
#undef FS_CASE
    default: return false;
  }
}

template <class Param>
inline bool state_goes_with(int32_t master, int32_t moments, bool amsgrad) {
  switch (master) {
#define FS_CASE(identifier, tag, name, Type) \
  case identifier: return moments_go_with<Param, Type>(moments, amsgrad);
    FS_MASTERS(FS_CASE)
#undef FS_CASE
    default: return false;
  }
}

inline bool go_together(int32_t param_format, int32_t master, int32_t moments, bool amsgrad) {
  switch (param_format) {
#define FS_CASE(identifier, tag, name, Type) \
  case identifier: return state_goes_with<Type>(master, moments, amsgrad);
    FS_FORMATS(FS_CASE)
#undef FS_CASE
    default: return false;
  }
}

FS_NAMESPACE_END
