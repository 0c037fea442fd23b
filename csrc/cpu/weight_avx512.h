// Gradients, parameters and masters of a block of 64 elements: from memory to vectors of floats, and back. Included by
// block_avx512.h.
#pragma once

#include "lanes_avx512.h"

#include "../core/codec.h"

FS_NAMESPACE_BEGIN
namespace {

// ---- gradients -------------------------------------------------------------------------------------

FS_HD void load_grad(int32_t format, const void* from, Floats& grad) {
  switch (format) {
    case kFloat32: load_floats(static_cast<const float*>(from), grad); break;
    case kBfloat16: load_words(static_cast<const uint16_t*>(from), grad); break;
    default: load_halves(static_cast<const uint16_t*>(from), grad);
  }
}

// ---- bf16 and fp32 parameters, and what is kept beside them ----------------------------------------

FS_HD __m512i to_nearest_even(__m512 value) {
  const __m512i bits = as_bits(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), all<1u>());
  return _mm512_add_epi32(_mm512_add_epi32(bits, all<0x7fffu>()), odd);
}

FS_HD __m512i to_nearest_away(__m512i bits) { return _mm512_add_epi32(bits, all<0x8000u>()); }

FS_HD void load_weight(int32_t format, int32_t master, const void* param, const void* kept, Floats& weight) {
  if (format == kFloat32) return load_floats(static_cast<const float*>(param), weight);
  const uint16_t* const words = static_cast<const uint16_t*>(param);
  if (master == kMasterSplit16 || master == kMasterSplit8) {
    for (int half = 0; half < 2; ++half) {
      __m512i lower, carry, even, odd;
      if (master == kMasterSplit16) {
        lower = load_512(static_cast<const int16_t*>(kept) + 32 * half);
        carry = _mm512_srai_epi16(lower, 15);
      } else {
        const __m512i remainder = _mm512_cvtepi8_epi16(load_256(static_cast<const int8_t*>(kept) + 32 * half));
        lower = _mm512_slli_epi16(remainder, 8);
        carry = _mm512_srai_epi16(remainder, 15);
      }
      join_words(_mm512_add_epi16(load_512(words + 32 * half), carry), lower, even, odd);
      weight.lane[2 * half] = as_float(even);
      weight.lane[2 * half + 1] = as_float(odd);
    }
    return;
  }
  load_words(words, weight);
  if (master != kMasterFloat32) return;
  Floats exact;
  load_floats(static_cast<const float*>(kept), exact);
  for (int i = 0; i < kVectors; ++i) {
    const __m512i rounded = _mm512_and_si512(to_nearest_away(as_bits(exact.lane[i])), all<0xffff0000u>());
    const __mmask16 matches = _mm512_cmpeq_epi32_mask(rounded, as_bits(weight.lane[i]));
    weight.lane[i] = _mm512_mask_mov_ps(weight.lane[i], matches, exact.lane[i]);
  }
}

FS_HD void store_weight(int32_t format, int32_t master, const Floats& weight, RandomKey key, uint32_t first_element,
                        void* param, void* kept) {
  if (format == kFloat32) return store_floats(static_cast<float*>(param), weight);
  Bits rounded;
  switch (master) {
    case kMasterFloat32:
      store_floats(static_cast<float*>(kept), weight);
      for (int i = 0; i < kVectors; ++i) rounded.lane[i] = to_nearest_away(as_bits(weight.lane[i]));
      break;
    case kMasterSplit16:
      for (int i = 0; i < kVectors; ++i) rounded.lane[i] = to_nearest_away(as_bits(weight.lane[i]));
      for (int half = 0; half < 2; ++half)
        store_512(static_cast<int16_t*>(kept) + 32 * half,
                  lower_words(as_bits(weight.lane[2 * half]), as_bits(weight.lane[2 * half + 1])));
      break;
    case kMasterSplit8: {
      __m512i words[2];
      for (int half = 0; half < 2; ++half) {
        __m512i upper[2];  // rounded to the upper 24 bits, in place
        for (int i = 0; i < 2; ++i) {
          upper[i] = _mm512_add_epi32(as_bits(weight.lane[2 * half + i]), all<0x80u>());
          rounded.lane[2 * half + i] = to_nearest_away(upper[i]);
        }
        words[half] = _mm512_srli_epi16(lower_words(upper[0], upper[1]), 8);
      }
      store_512(static_cast<int8_t*>(kept), bytes_of_words(words[0], words[1]));
      break;
    }
    case kMasterStochastic: {
      Bits random;
      random_of_block(key_of_parameter(key), first_element, random);
      for (int i = 0; i < kVectors; ++i)
        rounded.lane[i] = _mm512_add_epi32(as_bits(weight.lane[i]), _mm512_srli_epi32(random.lane[i], 16));
      break;
    }
    default:
      for (int i = 0; i < kVectors; ++i) rounded.lane[i] = to_nearest_even(weight.lane[i]);
  }
  store_words(static_cast<uint16_t*>(param), rounded);
}

}  // namespace
FS_NAMESPACE_END
