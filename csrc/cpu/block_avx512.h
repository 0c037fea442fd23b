// The update of 64 elements in AVX-512 registers: the whole blocks of runs in which something is to be decoded. The
// loops of update_tile.cpp leave that to the compiler, which spends 175 vector instructions on 16 elements of split8 +
// 8bit; here it is some 90, because
//   - a vector holds every second element, so that 16-bit streams widen and narrow with shifts and masks,
//   - 8-bit codes are decoded as fp16, whose subnormals are the codes', times a power of two,
//   - one hash serves two vectors (random_bits), and one tree of maxima both moments' scales,
//   - NaNs and infinities are not handled: a block with one is not stored, and the tile loop does it over.
// The bits are those of core/'s codecs: tests/test_cpu_blocks.py compares. Included by update_tile.cpp.
#pragma once

#include <type_traits>

#include "update_tile.h"
#include "weight_avx512.h"

FS_NAMESPACE_BEGIN
namespace {

// ---- moments ---------------------------------------------------------------------------------------

// bits + draw, but at least `least` for what is not zero.
FS_HD __m512i add_draw(__m512i bits, __m512i draw, __mmask16 not_zero, __m512i least) {
  const __m512i drawn = _mm512_add_epi32(bits, draw);
  return _mm512_mask_max_epu32(drawn, not_zero, drawn, least);
}

template <class MomentsCodec>
struct BlockMoments;

template <>
struct BlockMoments<MomentsFloat32> {
  struct Encoded {
    Floats first, second;
  };

  static FS_HD bool load(const fs_run& run, int64_t at, Floats& first, Floats& second) {
    load_floats(static_cast<const float*>(run.exp_avg) + at, first);
    load_floats(static_cast<const float*>(run.exp_avg_sq) + at, second);
    return true;
  }

  // Whatever they are, they are stored as they are.
  static FS_HD bool encode(const Floats& first, const Floats& second, const Bits&, Encoded& out) {
    out = {first, second};
    return true;
  }

  static FS_HD void store(const fs_run& run, int64_t at, const Encoded& encoded) {
    store_floats(static_cast<float*>(run.exp_avg) + at, encoded.first);
    store_floats(static_cast<float*>(run.exp_avg_sq) + at, encoded.second);
  }
};

template <>
struct BlockMoments<MomentsBfloat16> {
  static FS_HD bool load(const fs_run& run, int64_t at, Floats& first, Floats& second) {
    load_words(static_cast<const uint16_t*>(run.exp_avg) + at, first);
    load_words(static_cast<const uint16_t*>(run.exp_avg_sq) + at, second);
    return true;
  }

  struct Encoded {
    Bits first, second;  // in the upper halves
  };

  // Always: an infinite second moment rounds to itself, and what else is not finite shows in the weight.
  static FS_HD bool encode(const Floats& first, const Floats& second, const Bits& random, Encoded& out) {
    for (int i = 0; i < kVectors; ++i) {
      out.first.lane[i] = to_nearest_even(first.lane[i]);
      const __m512i bits = as_bits(second.lane[i]);
      out.second.lane[i] =
          add_draw(bits, _mm512_srli_epi32(random.lane[i], 16), _mm512_test_epi32_mask(bits, bits), all<0x10000u>());
    }
    return true;
  }

  static FS_HD void store(const fs_run& run, int64_t at, const Encoded& encoded) {
    store_words(static_cast<uint16_t*>(run.exp_avg) + at, encoded.first);
    store_words(static_cast<uint16_t*>(run.exp_avg_sq) + at, encoded.second);
  }
};

// Both moments' numbers of the block's four groups, one group per 128-bit lane: first, second, first, second.
struct GroupNumbers {
  __m512i all_groups;

  // out[half]: the first half's or the second half's two groups, each in the lanes of its elements.
  template <bool kSecond>
  FS_HD void spread(__m512i out[2]) const {
    const __m512i one_moment = _mm512_shuffle_epi32(all_groups, kSecond ? _MM_PERM_DDBB : _MM_PERM_CCAA);
    out[0] = _mm512_shuffle_i32x4(one_moment, one_moment, 0x50);
    out[1] = _mm512_shuffle_i32x4(one_moment, one_moment, 0xfa);
  }
};

// In every 128-bit lane, the four largest numbers of one group's quarters.
FS_HD __m512i largest_of_quarters(const Bits& in) {
  const __m512i first = _mm512_max_epu32(in.lane[0], in.lane[1]);
  const __m512i second = _mm512_max_epu32(in.lane[2], in.lane[3]);
  return _mm512_max_epu32(_mm512_shuffle_i32x4(first, second, 0x88), _mm512_shuffle_i32x4(first, second, 0xdd));
}

FS_HD GroupNumbers largest_of_groups(const Bits& first, const Bits& second) {
  const __m512i a = largest_of_quarters(first);
  const __m512i b = largest_of_quarters(second);
  const __m512i both = _mm512_max_epu32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  return {_mm512_max_epu32(both, _mm512_shuffle_epi32(both, _MM_PERM_BADC))};
}

template <>
struct BlockMoments<Moments8bit> {
  using First = Moments8bit::First<float>;
  using Second = Moments8bit::Second<float>;

  // Of codes read as fp16, whose smallest normal value is 2^-14: the powers of two that make a group's values of
  // them. That of scale 240 is infinite, and the block of such a group left to the tile loop; as are those of larger
  // scales, which no group has but in a damaged state.
  static FS_HD GroupNumbers factors(const uint8_t* first_scale, const uint8_t* second_scale) {
    int first, second;
    memcpy(&first, first_scale, sizeof first);
    memcpy(&second, second_scale, sizeof second);
    __m128i scales = _mm_unpacklo_epi8(_mm_cvtsi32_si128(first), _mm_cvtsi32_si128(second));
    scales = _mm_min_epu8(scales, _mm_set1_epi8(static_cast<char>(240)));
    const __m128i twice = _mm_unpacklo_epi16(scales, scales);  // first, second, first, second of each group
    return {_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtepu8_epi32(twice), all<127 - 112>()), 23)};
  }

  // Even and odd elements of both halves, 16 bytes each.
  static FS_HD void load_codes(const uint8_t* from, uint8_t ordered[64]) {
    const __m512i within_lanes =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    const __m512i separated = _mm512_shuffle_epi8(load_512(from), within_lanes);
    store_512(ordered, _mm512_permutex_epi64(separated, 0xd8));
  }

  static FS_HD bool load(const fs_run& run, int64_t at, Floats& first, Floats& second) {
    const uint8_t* const first_codes = static_cast<const uint8_t*>(run.exp_avg) + at;
    const uint8_t* const second_codes = static_cast<const uint8_t*>(run.exp_avg_sq) + at;
    alignas(64) uint8_t first_ordered[64], second_ordered[64];
    load_codes(first_codes, first_ordered);
    load_codes(second_codes, second_ordered);
    const GroupNumbers factor = factors(run.exp_avg_scale + at / 16, run.exp_avg_sq_scale + at / 16);
    __m512i first_factor[2], second_factor[2];
    factor.spread<false>(first_factor);
    factor.spread<true>(second_factor);
    for (int i = 0; i < kVectors; ++i) {
      const __m128i first_bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(first_ordered + 16 * i));
      const __m256i with_sign = _mm256_slli_epi16(_mm256_cvtepi8_epi16(first_bytes), 7);
      const __m256i first_half = _mm256_and_si256(with_sign, _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
      first.lane[i] = _mm512_mul_ps(_mm512_cvtph_ps(first_half), as_float(first_factor[i / 2]));

      const __m128i second_bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(second_ordered + 16 * i));
      const __m256i second_half = _mm256_slli_epi16(_mm256_cvtepu8_epi16(second_bytes), 6);
      second.lane[i] = _mm512_mul_ps(_mm512_cvtph_ps(second_half), as_float(second_factor[i / 2]));
    }
    const __m512i magnitude = _mm512_and_si512(load_512(first_codes), _mm512_set1_epi8(0x7f));
    const __mmask64 nan =
        _mm512_cmpeq_epi8_mask(magnitude, _mm512_set1_epi8(static_cast<char>(First::kNan))) |
        _mm512_cmpeq_epi8_mask(load_512(second_codes), _mm512_set1_epi8(static_cast<char>(Second::kNan)));
    return nan == 0;
  }

  // Float8::encode before the shift and without the draw: the code stands above kDropped.
  static FS_HD __m512i position(__m512i magnitude, __m512i smallest_normal) {
    const __m512i subnormal = as_bits(_mm512_add_ps(as_float(magnitude), as_float(smallest_normal)));
    const __m512i normal = _mm512_add_epi32(magnitude, all<kBinade>());
    return _mm512_sub_epi32(_mm512_max_epi32(subnormal, normal), smallest_normal);
  }

  static FS_HD void store_scales(__m512i scales, uint8_t* first, uint8_t* second) {
    const __m128i bytes = _mm512_cvtepi32_epi8(scales);  // each group's twice, alternating
    const __m128i ordered = _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 0, 4, 8, 12, 1, 5, 9, 13));
    const int64_t both = _mm_cvtsi128_si64(ordered);
    const int32_t of_first = static_cast<int32_t>(both), of_second = static_cast<int32_t>(both >> 32);
    memcpy(first, &of_first, sizeof of_first);
    memcpy(second, &of_second, sizeof of_second);
  }

  struct Encoded {
    __m512i scales;
    __m512i first_words[2], second_words[2];
  };

  // Whether all are finite: the scales of others are the tile loop's business.
  static FS_HD bool encode(const Floats& first, const Floats& second, const Bits& random, Encoded& out) {
    Bits magnitude, value;
    for (int i = 0; i < kVectors; ++i) {
      magnitude.lane[i] = _mm512_and_si512(as_bits(first.lane[i]), all<kMagnitudeMask>());
      value.lane[i] = as_bits(second.lane[i]);
    }
    const GroupNumbers largest = largest_of_groups(magnitude, value);

    constexpr int64_t kFirstUp = (2u << First::kDropped) - 1u, kSecondUp = (2u << Second::kDropped) - 1u;
    const __m512i up = _mm512_set1_epi64(kSecondUp << 32 | kFirstUp);
    const __m512i exponent =
        _mm512_max_epu32(_mm512_srli_epi32(_mm512_add_epi32(largest.all_groups, up), 23), all<15u>());
    out.scales = _mm512_sub_epi32(exponent, all<15u>());
    const GroupNumbers smallest = {_mm512_slli_epi32(_mm512_sub_epi32(exponent, all<14u>()), 23)};
    __m512i smallest_first[2], smallest_second[2];
    smallest.spread<false>(smallest_first);
    smallest.spread<true>(smallest_second);

    for (int half = 0; half < 2; ++half) {
      __m512i first_code[2], second_code[2];
      for (int i = 0; i < 2; ++i) {
        const int lane = 2 * half + i;
        const __m512i first_draw = _mm512_and_si512(random.lane[lane], all<(1u << First::kDropped) - 1u>());
        const __m512i drawn = _mm512_add_epi32(position(magnitude.lane[lane], smallest_first[half]), first_draw);
        first_code[i] = select(all<kMagnitudeMask>(), drawn, as_bits(first.lane[lane]));

        const __m512i bits = value.lane[lane];
        const __m512i second_draw = _mm512_srli_epi32(random.lane[lane], 32 - Second::kDropped);
        second_code[i] = add_draw(position(bits, smallest_second[half]), second_draw,
                                  _mm512_test_epi32_mask(bits, bits), all<(1u << Second::kDropped)>());
      }
      const __m512i word = upper_words(first_code[0], first_code[1]);  // sign, 4 zeros, 7 bits of code, 4 of the draw
      out.first_words[half] =
          select(_mm512_set1_epi16(0x7f), _mm512_srli_epi16(word, First::kDropped - 16), _mm512_srli_epi16(word, 8));
      out.second_words[half] = _mm512_srli_epi16(upper_words(second_code[0], second_code[1]), Second::kDropped - 16);
    }
    return _mm512_cmpge_epu32_mask(largest.all_groups, all<kInfinityBits>()) == 0;
  }

  static FS_HD void store(const fs_run& run, int64_t at, const Encoded& encoded) {
    store_scales(encoded.scales, run.exp_avg_scale + at / 16, run.exp_avg_sq_scale + at / 16);
    store_512(static_cast<uint8_t*>(run.exp_avg) + at, bytes_of_words(encoded.first_words[0], encoded.first_words[1]));
    store_512(static_cast<uint8_t*>(run.exp_avg_sq) + at,
              bytes_of_words(encoded.second_words[0], encoded.second_words[1]));
  }
};

// ---- the block -------------------------------------------------------------------------------------

// The processor's own prefetcher begins anew at every page of every stream, and not early enough: from memory, asking
// makes steps of 16.8M elements up to a fifth shorter (docs/measured.md).
constexpr int64_t kAhead = 1024;  // elements: 512 and 2048 gain less, 4096 nothing

FS_HD void ask_ahead(const void* stream, int64_t at, int64_t element_bytes) {
  const char* const block = static_cast<const char*>(stream) + (at + kAhead) * element_bytes;
  for (int64_t line = 0; line < kBlock * element_bytes; line += 64) __builtin_prefetch(block + line, 1, 3);
}

FS_HD void ask_ahead(const fs_run& run, int64_t at) {
  const int64_t moment = kMomentBytes[run.moments_format];
  ask_ahead(run.param, at, kFormatBytes[run.param_format]);
  ask_ahead(run.grad, at, kFormatBytes[run.grad_format]);
  ask_ahead(run.exp_avg, at, moment);
  ask_ahead(run.exp_avg_sq, at, moment);
  ask_ahead(run.master, at, kMasterBytes[run.master_format]);
}

// Whether the block was updated; if not, nothing was written.
template <class MomentsCodec>
FS_HD bool update_block(const fs_run& run, int64_t at, const StepScalars<float>& scalars) {
  using Moments = BlockMoments<MomentsCodec>;
  void* const param = static_cast<char*>(run.param) + at * kFormatBytes[run.param_format];
  void* const kept = static_cast<char*>(run.master) + at * kMasterBytes[run.master_format];
  const RandomKey key = {run.random_key[0], run.random_key[1]};
  const uint32_t first_element = run.first + static_cast<uint32_t>(at);
  Bits random;
  random_of_block(key, first_element, random);
  Floats grad, weight, first, second, along;
  load_grad(run.grad_format, static_cast<const char*>(run.grad) + at * kFormatBytes[run.grad_format], grad);
  load_weight(run.param_format, run.master_format, param, kept, weight);
  if (!Moments::load(run, at, first, second)) return false;
  for (int i = 0; i < kVectors; ++i) {
    __m512 unused = _mm512_setzero_ps();
    update_moments<false>(weight.lane[i], first.lane[i], second.lane[i], unused, grad.lane[i], scalars);
    along.lane[i] = direction(first.lane[i], second.lane[i], scalars);
  }
  typename Moments::Encoded moments;
  const bool encoded = Moments::encode(first, second, random, moments);
  __m512 zero = _mm512_setzero_ps();  // NaN after a weight that is not finite; a first moment makes its weight so
  for (int i = 0; i < kVectors; ++i) {
    weight.lane[i] = moved_weight(weight.lane[i], along.lane[i], scalars);
    zero = _mm512_fmadd_ps(weight.lane[i], _mm512_setzero_ps(), zero);
  }
  if (!encoded || _mm512_cmp_ps_mask(zero, zero, _CMP_UNORD_Q)) return false;
  Moments::store(run, at, moments);
  store_weight(run.param_format, run.master_format, weight, key, first_element, param, kept);
  return true;
}

template <class Param>
constexpr bool kHasBlocks = std::is_same<Param, Float32>::value || std::is_same<Param, Bfloat16>::value;

// Also not steps with beta1 or beta2 below 0.5 (GANs with beta1 = 0).
inline bool has_blocks(const fs_run& run) {
  if (run.param_format == kFloat32 && run.moments_format == kMomentsFloat32) return false;  // nothing to decode
  if (run.max_exp_avg_sq != nullptr || run.grad_format == kFloat64) return false;
  return (static_cast<const StepScalars<float>*>(run.scalars)->flags & ~(kDecoupledDecay | kL2Decay)) == 0;
}

template <class MomentsCodec, class Redo>
void update_blocks(const fs_run& shared_run, int64_t end, Redo redo) {
  // Copies, which stores cannot change: their members stay in registers.
  const fs_run run = shared_run;
  StepScalars<float> scalars = *static_cast<const StepScalars<float>*>(run.scalars);
  scalars.flags &= kDecoupledDecay | kL2Decay;
  const int64_t asking_ends = run.from_memory ? end - kAhead : 0;
  for (int64_t at = 0; at < end; at += kBlock) {
    if (at < asking_ends) ask_ahead(run, at);
    if (!update_block<MomentsCodec>(run, at, scalars)) redo(at);
  }
}

// The number of elements that whole blocks have updated. redo(first): the tile loop on the block that begins there.
template <class Redo>
int64_t update_blocks(const fs_run& run, Redo redo) {
  const int64_t end = run.count / kBlock * kBlock;
  switch (run.moments_format) {
    case kMomentsFloat32: update_blocks<MomentsFloat32>(run, end, redo); break;
    case kMomentsBfloat16: update_blocks<MomentsBfloat16>(run, end, redo); break;
    default: update_blocks<Moments8bit>(run, end, redo);
  }
  return end;
}

}  // namespace
FS_NAMESPACE_END
