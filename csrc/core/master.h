// Masters: where the exact value of a 16-bit parameter is kept, if it is. Each says which parameters it serves,
// what it stores beside one, and how weight and storage become each other.
//
//   master      kept per element  exact value after rounding w                          |error| for normal w
//   none        nothing           the parameter: to nearest, ties to even               <= 2^-8 |w| (bf16)
//   stochastic  nothing           the parameter: unbiased                                < 2^-7 |w|
//   fp32        4 bytes           w                                                     0
//   split16     2 bytes           w                                                     0
//   split8      1 byte            w to 16 significant bits, ties away from zero         <= 2^-16 |w|
#pragma once

#include <type_traits>

#include "element.h"

FS_NAMESPACE_BEGIN

struct Nothing {};

template <class Param>
constexpr bool kIsNarrow = sizeof(typename Param::Storage) == 2;

struct MasterNone {
  using Storage = Nothing;
  static constexpr bool kStores = false;
  static constexpr bool kDraws = false;
  template <class Param>
  static constexpr bool kServes = true;

  template <class Param>
  static FS_HD typename Param::Compute decode(typename Param::Storage param, Storage) {
    return Param::decode(param);
  }
  template <class Param>
  static FS_HD void encode(typename Param::Compute weight, uint32_t, typename Param::Storage& param, Storage&) {
    param = Param::encode(weight);
  }
};

struct MasterStochastic {
  using Storage = Nothing;
  static constexpr bool kStores = false;
  static constexpr bool kDraws = true;
  // Not fp16: its subnormals begin at 6e-5, and there is a loss-scaling run behind every such parameter, which
  // wants an fp32 master.
  template <class Param>
  static constexpr bool kServes = std::is_same<Param, Bfloat16>::value;

  template <class Param>
  static FS_HD float decode(typename Param::Storage param, Storage) {
    return Param::decode(param);
  }
  template <class Param>
  static FS_HD void encode(float weight, uint32_t random, typename Param::Storage& param, Storage&) {
    param = round_stochastically(weight, random >> 16);
  }
};

struct MasterFloat32 {
  using Storage = float;
  static constexpr bool kStores = true;
  static constexpr bool kDraws = false;
  template <class Param>
  static constexpr bool kServes = kIsNarrow<Param>;

  // The master of a parameter that was edited outside (weights loaded, EMA swapped in) no longer rounds to it:
  // the parameter wins.
  template <class Param>
  static FS_HD float decode(typename Param::Storage param, Storage kept) {
    return Param::encode_beside_master(kept) == param ? kept : Param::decode(param);
  }
  template <class Param>
  static FS_HD void encode(float weight, uint32_t, typename Param::Storage& param, Storage& kept) {
    param = Param::encode_beside_master(weight);
    kept = weight;
  }
};

// A bf16 parameter rounded half away from zero and the low bits of the float it was rounded from, read as a
// signed number: where rounding carried into the upper half, that number is negative and takes the carry back.
// So parameter * 2^16 + remainder, on the bits, is the float again, infinities and subnormals included; a float
// that rounds to infinity comes back finite.
//
// A parameter edited outside keeps its remainder, at most half of its last place. Only a zero or an infinity
// can meet a remainder that no float leaves beside it; the sum is then the bits of a NaN, and the parameter wins.
FS_HD uint32_t joined_bits(uint16_t param, int32_t remainder) {
  return (static_cast<uint32_t>(param) << 16) + static_cast<uint32_t>(remainder);
}
FS_HD float join_halves(uint16_t param, int32_t remainder) {
  const uint32_t bits = joined_bits(param, remainder);
  return float_of(is_nan_bits(bits) ? joined_bits(param, 0) : bits);
}

struct MasterSplit16 {
  using Storage = int16_t;
  static constexpr int32_t kUnit = 1;  // of a remainder, in the float's last places
  static constexpr bool kStores = true;
  static constexpr bool kDraws = false;
  template <class Param>
  static constexpr bool kServes = std::is_same<Param, Bfloat16>::value;

  template <class Param>
  static FS_HD float decode(typename Param::Storage param, Storage kept) {
    return join_halves(param, kept * kUnit);
  }
  template <class Param>
  static FS_HD void encode(float weight, uint32_t, typename Param::Storage& param, Storage& kept) {
    const uint32_t bits = bits_of(weight);
    param = round_away(weight);
    kept = static_cast<Storage>(is_nan_bits(bits) ? 0u : bits);
  }
};

// split16 of the weight rounded to the 24 upper bits of a float, ties away from zero: sign, exponent and 16
// significant digits, 15 of them stored. Subnormal weights: an absolute error of at most 2^-142.
struct MasterSplit8 {
  using Storage = int8_t;
  static constexpr int32_t kUnit = 256;
  static constexpr bool kStores = true;
  static constexpr bool kDraws = false;
  template <class Param>
  static constexpr bool kServes = std::is_same<Param, Bfloat16>::value;

  template <class Param>
  static FS_HD float decode(typename Param::Storage param, Storage kept) {
    return join_halves(param, kept * kUnit);
  }
  template <class Param>
  static FS_HD void encode(float weight, uint32_t, typename Param::Storage& param, Storage& kept) {
    const uint32_t bits = bits_of(weight);
    const uint32_t upper = (bits + 0x80u) >> 8;
    const bool nan = is_nan_bits(bits);
    param = static_cast<typename Param::Storage>(nan ? kBfloat16Nan : (upper + 0x80u) >> 8);
    kept = static_cast<Storage>(nan ? 0u : upper);
  }
};

template <class Master>
constexpr bool kIsSplit = std::is_same<Master, MasterSplit16>::value || std::is_same<Master, MasterSplit8>::value;

// decode without join_halves' last question, for those who look for NaNs later: where the parameter wins, a NaN.
template <class Param, class Master>
FS_HD float decode_or_nan(typename Param::Storage param, typename Master::Storage kept) {
  if constexpr (kIsSplit<Master>) {
    return float_of(joined_bits(param, kept * Master::kUnit));
  } else {
    return Master::template decode<Param>(param, kept);
  }
}

FS_NAMESPACE_END
