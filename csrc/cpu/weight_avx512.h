// Gradients, parameters and masters of a block of 64 elements: from memory to vectors of floats, and back. Included by
// block_avx512.h.
#pragma once

#include "lanes_avx512.h"

#include "../core/codec.h"

FS_NAMESPACE_BEGIN
namespace {

// ---- gradients -------------------------------------------------------------------------------------

template <class Order>
FS_HD void load_grad(int32_t format, const void* from, Floats& grad) {
  switch (format) {
    case kFloat32: load_floats<Order>(from, grad); break;
    case kBfloat16: load_words<Order>(from, grad); break;
    default: load_halves<Order>(from, grad);
  }
}

// ---- bf16 and fp32 parameters, and what is kept beside them ----------------------------------------

FS_HD __m512i to_nearest_even(__m512 value) {
  const __m512i bits = as_bits(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), all<1u>());
  return _mm512_add_epi32(_mm512_add_epi32(bits, all<0x7fffu>()), odd);
}

FS_HD __m512i to_nearest_away(__m512i bits) { return _mm512_add_epi32(bits, all<0x8000u>()); }

// A remainder r is signed: the exact value's bits are those of the parameter, as a float, plus r. With its sign bit
// flipped it is r + 0x8000, and the parameter's word above it what to_nearest_away makes of the exact value.
FS_HD __m512i flip_sign(__m512i words) { return _mm512_xor_si512(words, all<0x80008000u>()); }

template <class Order>
FS_HD void load_remainders(int32_t master, const void* kept, __m512i half[2]) {
  if (master == kMasterSplit16) {
    Order::load_words(kept, half);
  } else {
    words_of_bytes(Order::load_bytes(kept), half);
  }
}

template <class Order>
FS_HD void load_weight(int32_t format, int32_t master, const void* param, const void* kept, Floats& weight) {
  if (format == kFloat32) return load_floats<Order>(param, weight);
  if (master == kMasterSplit16 || master == kMasterSplit8) {
    __m512i words[2], remainders[2], first, second;
    Order::load_words(param, words);
    load_remainders<Order>(master, kept, remainders);
    for (int half = 0; half < 2; ++half) {
      widen(flip_sign(remainders[half]), words[half], first, second);
      weight.lane[2 * half] = as_float(_mm512_sub_epi32(first, all<0x8000u>()));
      weight.lane[2 * half + 1] = as_float(_mm512_sub_epi32(second, all<0x8000u>()));
    }
    return;
  }
  load_words<Order>(param, weight);
  if (master != kMasterFloat32) return;
  Floats exact;
  load_floats<Order>(kept, exact);
  for (int i = 0; i < kVectors; ++i) {
    const __m512i rounded = _mm512_and_si512(to_nearest_away(as_bits(exact.lane[i])), all<0xffff0000u>());
    const __mmask16 matches = _mm512_cmpeq_epi32_mask(rounded, as_bits(weight.lane[i]));
    weight.lane[i] = _mm512_mask_mov_ps(weight.lane[i], matches, exact.lane[i]);
  }
}

template <class Order>
FS_HD void store_weight(int32_t format, int32_t master, const Floats& weight, RandomKey key, uint32_t first_element,
                        void* param, void* kept) {
  if (format == kFloat32) return store_floats<Order>(param, weight);
  Bits rounded;
  switch (master) {
    case kMasterFloat32:
      store_floats<Order>(kept, weight);
      for (int i = 0; i < kVectors; ++i) rounded.lane[i] = to_nearest_away(as_bits(weight.lane[i]));
      break;
    case kMasterSplit16: {
      for (int i = 0; i < kVectors; ++i) rounded.lane[i] = to_nearest_away(as_bits(weight.lane[i]));
      const __m512i words[2] = {flip_sign(lower_words(rounded.lane[0], rounded.lane[1])),
                                flip_sign(lower_words(rounded.lane[2], rounded.lane[3]))};
      Order::store_words(kept, words);
      break;
    }
    case kMasterSplit8: {
      // To nearest at 24 bits, then at 16: the remainder is in the word's upper byte.
      for (int i = 0; i < kVectors; ++i) rounded.lane[i] = _mm512_add_epi32(as_bits(weight.lane[i]), all<0x8080u>());
      const __m512i bytes = bytes_of_words(_mm512_srli_epi16(lower_words(rounded.lane[0], rounded.lane[1]), 8),
                                           _mm512_srli_epi16(lower_words(rounded.lane[2], rounded.lane[3]), 8));
      Order::store_bytes(kept, _mm512_xor_si512(bytes, all<0x80808080u>()));
      break;
    }
    case kMasterStochastic: {
      Bits random;
      random_of_block<Order>(key_of_parameter(key), first_element, random);
      for (int i = 0; i < kVectors; ++i)
        rounded.lane[i] = _mm512_add_epi32(as_bits(weight.lane[i]), _mm512_srli_epi32(random.lane[i], 16));
      break;
    }
    default:
      for (int i = 0; i < kVectors; ++i) rounded.lane[i] = to_nearest_even(weight.lane[i]);
  }
  store_words<Order>(param, rounded);
}

}  // namespace
FS_NAMESPACE_END
