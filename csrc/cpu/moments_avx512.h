// Moments of a block of 64 elements: from memory to vectors of floats, and back. Included by block_avx512.h.
#pragma once

#include "update_tile.h"
#include "weight_avx512.h"

FS_NAMESPACE_BEGIN
namespace {

// load and encode say whether the block's numbers are their business: those that are not finite are the tile loop's.
template <class MomentsCodec>
struct BlockMoments;

template <>
struct BlockMoments<MomentsFloat32> {
  using Order = InOrder;

  struct Encoded {
    Floats first, second;
  };

  static FS_HD bool load(const fs_run& run, int64_t at, Floats& first, Floats& second) {
    load_floats<Order>(static_cast<const float*>(run.exp_avg) + at, first);
    load_floats<Order>(static_cast<const float*>(run.exp_avg_sq) + at, second);
    return true;
  }

  // Whatever they are, they are stored as they are.
  static FS_HD bool encode(const Floats& first, const Floats& second, const Bits&, Encoded& out) {
    out = {first, second};
    return true;
  }

  static FS_HD void store(const fs_run& run, int64_t at, const Encoded& encoded) {
    store_floats<Order>(static_cast<float*>(run.exp_avg) + at, encoded.first);
    store_floats<Order>(static_cast<float*>(run.exp_avg_sq) + at, encoded.second);
  }
};

template <>
struct BlockMoments<MomentsBfloat16> {
  using Order = InOrder;

  struct Encoded {
    Bits first, second;  // in the upper halves
  };

  static FS_HD bool load(const fs_run& run, int64_t at, Floats& first, Floats& second) {
    load_words<Order>(static_cast<const uint16_t*>(run.exp_avg) + at, first);
    load_words<Order>(static_cast<const uint16_t*>(run.exp_avg_sq) + at, second);
    return true;
  }

  // Always: an infinite second moment rounds to itself, and what else is not finite shows in the weight.
  static FS_HD bool encode(const Floats& first, const Floats& second, const Bits& random, Encoded& out) {
    for (int i = 0; i < kVectors; ++i) {
      out.first.lane[i] = to_nearest_even(first.lane[i]);
      const __m512i bits = as_bits(second.lane[i]);
      const __m512i drawn = _mm512_add_epi32(bits, _mm512_srli_epi32(random.lane[i], 16));
      const __mmask16 not_zero = _mm512_test_epi32_mask(bits, bits);
      out.second.lane[i] = _mm512_mask_max_epu32(drawn, not_zero, drawn, all<0x10000u>());
    }
    return true;
  }

  static FS_HD void store(const fs_run& run, int64_t at, const Encoded& encoded) {
    store_words<Order>(static_cast<uint16_t*>(run.exp_avg) + at, encoded.first);
    store_words<Order>(static_cast<uint16_t*>(run.exp_avg_sq) + at, encoded.second);
  }
};

// A code is a small float's exponent and significand; in a float's place, its position (Float8 in core/moments.h). The
// first moment's positions, with its signs, are floats themselves: its values times 2^-scale. One multiplication
// decodes and one encodes, the processor rounding subnormals as Float8 does. Products that are subnormal are slow (124
// cycles and more on Intel's up to Haswell: Agner Fog, "The microarchitecture of Intel, AMD and VIA CPUs"), but few:
// below 2^-14 of a group's largest value. Of a second moment, a square, that is 2^-7 of a gradient, which a sixth of
// all vectors has after squares of one normal sample (simulated): so it is computed like Float8, with sums
// (docs/measured.md).
template <>
struct BlockMoments<Moments8bit> {
  using Order = ByGroup;
  using First = Moments8bit::First<float>;
  using Second = Moments8bit::Second<float>;

  static constexpr uint32_t kOne = 127u << 23;  // bits of 1.0

  // Blocks with larger ones are the tile loop's: 2^-scale is to be a normal float (so first moments are at most 1.75 *
  // 2^14), and the largest second moment, rounded up, finite. In every lane, for the first moment and the second.
  static FS_HD __m512i largest_scales() { return _mm512_set1_epi64(int64_t{239} << 55 | int64_t{126} << 23); }

  // The four groups' scales, four times each.
  static FS_HD __m512i scale_bytes(const uint8_t* from) {
    int32_t bytes;
    memcpy(&bytes, from, sizeof bytes);
    return _mm512_set1_epi32(bytes);
  }

  // Each group's scale in its lane, where a float has its exponent.
  static FS_HD __m512i load_scales(const uint8_t* from) {
    const __m512i to_top = _mm512_set_epi32(0x03808080, 0x03808080, 0x03808080, 0x03808080, 0x02808080, 0x02808080,
                                            0x02808080, 0x02808080, 0x01808080, 0x01808080, 0x01808080, 0x01808080,
                                            0x00808080, 0x00808080, 0x00808080, 0x00808080);
    return _mm512_srli_epi32(_mm512_shuffle_epi8(scale_bytes(from), to_top), 1);
  }

  static FS_HD void load_first(const uint8_t* codes, const uint8_t* scales, Floats& first) {
    // 2^scale; where that is no float, a NaN or an infinity: a sum of words stops at 0x7fff.
    const __m512 by = as_float(_mm512_adds_epi16(load_scales(scales), all<kOne>()));
    __m512i half[2], low, high;
    words_of_bytes(Order::load_bytes(codes), half);
    for (int h = 0; h < 2; ++h) {
      const __m512i words = _mm512_and_si512(_mm512_srai_epi16(half[h], 4), all<0x87f087f0u>());
      widen(_mm512_setzero_si512(), words, low, high);
      first.lane[2 * h] = _mm512_mul_ps(as_float(low), by);
      first.lane[2 * h + 1] = _mm512_mul_ps(as_float(high), by);
    }
  }

  // Of the two values that a position may stand for, a subnormal's and a normal one's, the smaller. For scales up to
  // 240: above, the former may be a NaN.
  static FS_HD __m512 second_at(__m512i position, __m512i base) {
    const __m512i smallest_normal = _mm512_add_epi32(base, all<kBinade>());
    const __m512 above = as_float(_mm512_add_epi32(position, smallest_normal));
    const __m512i subnormal = as_bits(_mm512_sub_ps(above, as_float(smallest_normal)));
    return as_float(_mm512_min_epu32(_mm512_add_epi32(position, base), subnormal));
  }

  static FS_HD void load_second(const uint8_t* codes, const uint8_t* scales, Floats& second) {
    const __m512i base = load_scales(scales);
    __m512i half[2], low, high;
    words_of_bytes(Order::load_bytes(codes), half);
    for (int h = 0; h < 2; ++h) {
      widen(_mm512_setzero_si512(), _mm512_srli_epi16(half[h], 8 - (Second::kDropped - 16)), low, high);
      second.lane[2 * h] = second_at(low, base);
      second.lane[2 * h + 1] = second_at(high, base);
    }
  }

  static FS_HD bool load(const fs_run& run, int64_t at, Floats& first, Floats& second) {
    const uint8_t* const first_codes = static_cast<const uint8_t*>(run.exp_avg) + at;
    const uint8_t* const second_codes = static_cast<const uint8_t*>(run.exp_avg_sq) + at;
    load_first(first_codes, run.exp_avg_scale + at / 16, first);
    load_second(second_codes, run.exp_avg_sq_scale + at / 16, second);
    // All ones are: a second moment's NaN, a first one's with its sign set, and here what no encoder writes, the second
    // moments' scales above 240.
    const __m512i signed_first = _mm512_or_si512(load_512(first_codes), all<0x80808080u>());
    const __m512i scales = _mm512_adds_epu8(scale_bytes(run.exp_avg_sq_scale + at / 16), all<0x0e0e0e0eu>());
    const __m512i largest = _mm512_max_epu8(_mm512_max_epu8(signed_first, load_512(second_codes)), scales);
    return _mm512_cmpeq_epi8_mask(largest, all<0xffffffffu>()) == 0;
  }

  // In every lane: the group's largest first and second moment, twice. Not a NaN among first moments, which the weight
  // will show.
  static FS_HD __m512i largest_of_groups(const Floats& first, const Floats& second) {
    constexpr int kMagnitudes = 0b1011;
    const __m512 first_01 = _mm512_range_ps(first.lane[0], first.lane[1], kMagnitudes);
    const __m512 first_23 = _mm512_range_ps(first.lane[2], first.lane[3], kMagnitudes);
    const __m512i a = as_bits(_mm512_range_ps(first_01, first_23, kMagnitudes));
    const __m512i second_01 = _mm512_max_epu32(as_bits(second.lane[0]), as_bits(second.lane[1]));
    const __m512i second_23 = _mm512_max_epu32(as_bits(second.lane[2]), as_bits(second.lane[3]));
    const __m512i b = _mm512_max_epu32(second_01, second_23);
    const __m512i both = _mm512_max_epu32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    return _mm512_max_epu32(both, _mm512_shuffle_epi32(both, _MM_PERM_BADC));
  }
  static FS_HD __m512i of_first(__m512i both) { return _mm512_shuffle_epi32(both, _MM_PERM_CCAA); }
  static FS_HD __m512i of_second(__m512i both) { return _mm512_shuffle_epi32(both, _MM_PERM_DDBB); }

  // Float8::scale_for, where a float has its exponent.
  static FS_HD __m512i scales_for(__m512i largest) {
    constexpr int64_t kFirstUp = (2u << First::kDropped) - 1u, kSecondUp = (2u << Second::kDropped) - 1u;
    const __m512i rounded_up = _mm512_add_epi32(largest, _mm512_set1_epi64(kSecondUp << 32 | kFirstUp));
    const __m512i exponent = _mm512_and_si512(rounded_up, all<kInfinityBits>());
    return _mm512_sub_epi32(_mm512_max_epu32(exponent, all<15u << 23>()), all<15u << 23>());
  }

  static FS_HD __m512i encode_first(const Floats& first, __m512i inverse, const Bits& random) {
    Bits drawn;
    for (int i = 0; i < kVectors; ++i) {
      const __m512i position = as_bits(_mm512_mul_ps(first.lane[i], as_float(inverse)));
      const __m512i draw = _mm512_and_si512(random.lane[i], all<(1u << First::kDropped) - 1u>());
      drawn.lane[i] = _mm512_add_epi32(position, draw);
    }
    __m512i half[2];
    for (int h = 0; h < 2; ++h) {
      const __m512i words =
          upper_words(drawn.lane[2 * h], drawn.lane[2 * h + 1]);  // sign, 0000, code, 4 bits of the draw
      half[h] = select(all<0x007f007fu>(), _mm512_srli_epi16(words, First::kDropped - 16), _mm512_srli_epi16(words, 8));
    }
    return bytes_of_words(half[0], half[1]);
  }

  // Positions are counted from the bits of 1.0 here, where the smallest normal value is to lie, and from 0 in the
  // words.
  static FS_HD __m512i encode_second(const Floats& second, __m512i inverse, const Bits& random) {
    const __m512 to_one = as_float(_mm512_add_epi32(inverse, all<126u << 23>()));
    Bits drawn;
    for (int i = 0; i < kVectors; ++i) {
      const __m512i bits = as_bits(second.lane[i]);
      const __m512i subnormal = as_bits(_mm512_fmadd_ps(second.lane[i], to_one, as_float(all<kOne>())));
      const __m512i position = _mm512_max_epi32(subnormal, _mm512_add_epi32(bits, inverse));
      drawn.lane[i] = _mm512_add_epi32(position, _mm512_srli_epi32(random.lane[i], 32 - Second::kDropped));
    }
    __m512i half[2];
    for (int h = 0; h < 2; ++h) {
      const __m512i words = upper_words(drawn.lane[2 * h], drawn.lane[2 * h + 1]);
      half[h] = _mm512_srli_epi16(_mm512_sub_epi16(words, all<(kOne >> 16) * 0x10001u>()), Second::kDropped - 16);
    }
    // What is not zero gets a code that is not. Packs saturate, so that a number other than zero stays one.
    const __m512i not_zero = bytes_of_words(_mm512_packs_epi32(as_bits(second.lane[0]), as_bits(second.lane[1])),
                                            _mm512_packs_epi32(as_bits(second.lane[2]), as_bits(second.lane[3])));
    return _mm512_max_epu8(bytes_of_words(half[0], half[1]), _mm512_min_epu8(not_zero, all<0x01010101u>()));
  }

  struct Encoded {
    __m512i scales;  // where a float has its exponent; in every lane, the first moment's and the second's
    __m512i first, second;
  };

  static FS_HD bool encode(const Floats& first, const Floats& second, const Bits& random, Encoded& out) {
    out.scales = scales_for(largest_of_groups(first, second));
    const __m512i inverse = _mm512_sub_epi32(all<kOne>(), out.scales);  // bits of 2^-scale
    out.first = encode_first(first, of_first(inverse), random);
    out.second = encode_second(second, of_second(inverse), random);
    return _mm512_cmpgt_epu32_mask(out.scales, largest_scales()) == 0;
  }

  static FS_HD void store(const fs_run& run, int64_t at, const Encoded& encoded) {
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_srli_epi32(encoded.scales, 23));  // each twice, alternating
    const __m128i ordered = _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 0, 4, 8, 12, 1, 5, 9, 13));
    const int64_t both = _mm_cvtsi128_si64(ordered);
    const int32_t first = static_cast<int32_t>(both), second = static_cast<int32_t>(both >> 32);
    memcpy(run.exp_avg_scale + at / 16, &first, sizeof first);
    memcpy(run.exp_avg_sq_scale + at / 16, &second, sizeof second);
    Order::store_bytes(static_cast<uint8_t*>(run.exp_avg) + at, encoded.first);
    Order::store_bytes(static_cast<uint8_t*>(run.exp_avg_sq) + at, encoded.second);
  }
};

}  // namespace
FS_NAMESPACE_END
