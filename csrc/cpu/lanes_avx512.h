// Vectors of 16 lanes for block_avx512.h: adam.h's operations on them, the way between a block's order and that of
// memory, and random bits.
#pragma once

// g++ 12 warns of the undefined vectors within its own intrinsics.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "../core/platform.h"

FS_NAMESPACE_BEGIN

// Before adam.h, whose templates only find overloads for vectors that are declared earlier.
FS_HD __m512 multiply_add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
FS_HD __m512 multiply_add(float a, __m512 b, __m512 c) { return _mm512_fmadd_ps(_mm512_set1_ps(a), b, c); }
FS_HD __m512 multiply_add(__m512 a, float b, float c) {
  return _mm512_fmadd_ps(a, _mm512_set1_ps(b), _mm512_set1_ps(c));
}
FS_HD __m512 square_root(__m512 value) { return _mm512_sqrt_ps(value); }

FS_NAMESPACE_END

#include "../core/adam.h"
#include "../core/rounding.h"

FS_NAMESPACE_BEGIN
namespace {

constexpr int64_t kBlock = 64;
constexpr int kVectors = 4;

struct Floats {
  __m512 lane[kVectors];
};
struct Bits {
  __m512i lane[kVectors];
};

// g++ would build such a constant anew at each use, by way of a general register; a load is cheaper.
template <uint32_t kBits>
FS_HD __m512i all() {
  static const uint32_t bits = kBits;
  __m512i out;
  asm("vpbroadcastd %1, %0" : "=v"(out) : "m"(bits));
  return out;
}

FS_HD __m512 as_float(__m512i bits) { return _mm512_castsi512_ps(bits); }
FS_HD __m512i as_bits(__m512 value) { return _mm512_castps_si512(value); }

FS_HD __m512i load_512(const void* from) { return _mm512_loadu_si512(from); }
FS_HD void store_512(void* to, __m512i value) { _mm512_storeu_si512(to, value); }

// Bit by bit: where the mask is 1, the first.
FS_HD __m512i select(__m512i mask, __m512i first, __m512i second) {
  return _mm512_ternarylogic_epi32(mask, first, second, 0xca);
}

// ---- between 8, 16 and 32 bits ---------------------------------------------------------------------

// 32 words become two vectors, and those 32 words, within lanes of 128 bits: the first vector has the first four words
// of every lane, the second the last four. Widening takes an instruction a vector, narrowing one for both.
FS_HD void widen(__m512i lower, __m512i upper, __m512i& first, __m512i& second) {
  first = _mm512_unpacklo_epi16(lower, upper);
  second = _mm512_unpackhi_epi16(lower, upper);
}

template <bool kUpper>
FS_HD __m512i narrow(__m512i first, __m512i second) {
  // In every lane words 0, 2, 4 and 6 of the first vector, then of the second, whose words count from 32.
  const __m512i lower =
      _mm512_set_epi64(0x003e003c003a0038, 0x001e001c001a0018, 0x0036003400320030, 0x0016001400120010,
                       0x002e002c002a0028, 0x000e000c000a0008, 0x0026002400220020, 0x0006000400020000);
  const __m512i words = kUpper ? _mm512_add_epi16(lower, _mm512_set1_epi16(1)) : lower;
  return _mm512_permutex2var_epi16(first, words, second);
}
FS_HD __m512i upper_words(__m512i first, __m512i second) { return narrow<true>(first, second); }
FS_HD __m512i lower_words(__m512i first, __m512i second) { return narrow<false>(first, second); }

// 64 bytes as the upper ones of 64 words, zeros below. Back: words below 256.
FS_HD void words_of_bytes(__m512i bytes, __m512i half[2]) {
  half[0] = _mm512_unpacklo_epi8(_mm512_setzero_si512(), bytes);
  half[1] = _mm512_unpackhi_epi8(_mm512_setzero_si512(), bytes);
}
FS_HD __m512i bytes_of_words(__m512i first, __m512i second) { return _mm512_packus_epi16(first, second); }

// 128-bit lanes 0 and 1 of both, alternating, then lanes 2 and 3; undoes _mm512_shuffle_i64x2 by 0x88 and 0xdd.
FS_HD void alternate_lanes(__m512i& first, __m512i& second) {
  const __m512i lower = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i upper = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  const __m512i before = first;
  first = _mm512_permutex2var_epi64(before, lower, second);
  second = _mm512_permutex2var_epi64(before, upper, second);
}

// ---- orders ----------------------------------------------------------------------------------------

// A block's 64 elements are two halves of 32 words, and each half, widened, two vectors. An order says which elements a
// half has; streams are loaded and stored in it.
//   load_words, store_words       128 bytes: its halves
//   load_bytes, store_bytes       64 bytes: such that words_of_bytes gives its halves
//   arrange, restore              four vectors in memory's order and its own
//   even_elements                 a half's; of the four in a 128-bit lane, two are the first vector's

// The first half has the first 32 elements. Least work where elements share nothing.
struct InOrder {
  static FS_HD void load_words(const void* from, __m512i half[2]) {
    half[0] = load_512(from);
    half[1] = load_512(static_cast<const char*>(from) + 64);
  }
  static FS_HD void store_words(void* to, const __m512i half[2]) {
    store_512(to, half[0]);
    store_512(static_cast<char*>(to) + 64, half[1]);
  }

  static FS_HD __m512i load_bytes(const void* from) {
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), load_512(from));
  }
  static FS_HD void store_bytes(void* to, __m512i bytes) {
    store_512(to, _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), bytes));
  }

  static FS_HD void arrange(Floats& block) {
    for (int i = 0; i < kVectors; i += 2) {
      const __m512 first = block.lane[i], second = block.lane[i + 1];
      block.lane[i] = _mm512_shuffle_f32x4(first, second, 0x88);
      block.lane[i + 1] = _mm512_shuffle_f32x4(first, second, 0xdd);
    }
  }
  static FS_HD void restore(Floats& block) {
    for (int i = 0; i < kVectors; i += 2) {
      __m512i first = as_bits(block.lane[i]), second = as_bits(block.lane[i + 1]);
      alternate_lanes(first, second);
      block.lane[i] = as_float(first);
      block.lane[i + 1] = as_float(second);
    }
  }

  static FS_HD __m512i even_elements(int half) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return half == 0 ? evens : _mm512_add_epi32(evens, _mm512_set1_epi32(32));
  }
};

// Lane L of either half, and so of every vector, has elements of the block's group L: of its 16, the first half has the
// first eight. What a group shares is in its lane.
struct ByGroup {
  static FS_HD void load_words(const void* from, __m512i half[2]) {
    const __m512i first = load_512(from), second = load_512(static_cast<const char*>(from) + 64);
    half[0] = _mm512_shuffle_i64x2(first, second, 0x88);
    half[1] = _mm512_shuffle_i64x2(first, second, 0xdd);
  }
  static FS_HD void store_words(void* to, const __m512i half[2]) {
    __m512i first = half[0], second = half[1];
    alternate_lanes(first, second);
    store_512(to, first);
    store_512(static_cast<char*>(to) + 64, second);
  }

  static FS_HD __m512i load_bytes(const void* from) { return load_512(from); }
  static FS_HD void store_bytes(void* to, __m512i bytes) { store_512(to, bytes); }

  // Four groups of four quarters become four quarters of four groups, and those groups.
  static FS_HD void arrange(Floats& block) {
    const __m512 even_01 = _mm512_shuffle_f32x4(block.lane[0], block.lane[1], 0x88);
    const __m512 odd_01 = _mm512_shuffle_f32x4(block.lane[0], block.lane[1], 0xdd);
    const __m512 even_23 = _mm512_shuffle_f32x4(block.lane[2], block.lane[3], 0x88);
    const __m512 odd_23 = _mm512_shuffle_f32x4(block.lane[2], block.lane[3], 0xdd);
    block.lane[0] = _mm512_shuffle_f32x4(even_01, even_23, 0x88);
    block.lane[1] = _mm512_shuffle_f32x4(odd_01, odd_23, 0x88);
    block.lane[2] = _mm512_shuffle_f32x4(even_01, even_23, 0xdd);
    block.lane[3] = _mm512_shuffle_f32x4(odd_01, odd_23, 0xdd);
  }
  static FS_HD void restore(Floats& block) { arrange(block); }

  static FS_HD __m512i even_elements(int half) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 16, 18, 20, 22, 32, 34, 36, 38, 48, 50, 52, 54);
    return half == 0 ? evens : _mm512_add_epi32(evens, _mm512_set1_epi32(8));
  }
};

// ---- streams as floats -----------------------------------------------------------------------------

template <class Order>
FS_HD void load_floats(const void* from, Floats& out) {
  for (int i = 0; i < kVectors; ++i) out.lane[i] = _mm512_loadu_ps(static_cast<const float*>(from) + 16 * i);
  Order::arrange(out);
}

template <class Order>
FS_HD void store_floats(void* to, const Floats& from) {
  Floats block = from;
  Order::restore(block);
  for (int i = 0; i < kVectors; ++i) _mm512_storeu_ps(static_cast<float*>(to) + 16 * i, block.lane[i]);
}

template <class Order>
FS_HD void load_halves(const void* from, Floats& out) {
  for (int i = 0; i < kVectors; ++i)
    out.lane[i] = _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from) + i));
  Order::arrange(out);
}

// The words are the floats' upper halves.
template <class Order>
FS_HD void load_words(const void* from, Floats& out) {
  __m512i half[2], first, second;
  Order::load_words(from, half);
  for (int h = 0; h < 2; ++h) {
    widen(_mm512_setzero_si512(), half[h], first, second);
    out.lane[2 * h] = as_float(first);
    out.lane[2 * h + 1] = as_float(second);
  }
}

template <class Order>
FS_HD void store_words(void* to, const Bits& from) {
  const __m512i half[2] = {upper_words(from.lane[0], from.lane[1]), upper_words(from.lane[2], from.lane[3])};
  Order::store_words(to, half);
}

// ---- random bits -----------------------------------------------------------------------------------

// first_element: a multiple of 64. So an element's place in the block is in the lower six bits alone, and the first
// step of random_bits_of_pair, x ^ (x >> 16), the same for all but for those.
template <class Order>
FS_HD void random_of_block(RandomKey key, uint32_t first_element, Bits& out) {
  // From the numbers of four pairs in every lane to those of the first or the last four elements: a pair's number, and
  // the same with its halves exchanged.
  const __m512i first_four = _mm512_broadcast_i32x4(_mm_setr_epi32(0x03020100, 0x01000302, 0x07060504, 0x05040706));
  const __m512i last_four = _mm512_broadcast_i32x4(_mm_setr_epi32(0x0b0a0908, 0x09080b0a, 0x0f0e0d0c, 0x0d0c0f0e));
  const uint32_t block = first_element ^ key.first;
  const __m512i begun = _mm512_set1_epi32(static_cast<int>(block ^ (block >> 16)));
  for (int half = 0; half < 2; ++half) {
    __m512i x = _mm512_mullo_epi32(_mm512_xor_si512(begun, Order::even_elements(half)), all<0x7feb352du>());
    x = _mm512_ternarylogic_epi32(x, _mm512_srli_epi32(x, 15), _mm512_set1_epi32(static_cast<int>(key.second)), 0x96);
    x = _mm512_mullo_epi32(x, all<0x846ca68bu>());
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
    out.lane[2 * half] = _mm512_shuffle_epi8(x, first_four);
    out.lane[2 * half + 1] = _mm512_shuffle_epi8(x, last_four);
  }
}

}  // namespace
FS_NAMESPACE_END
