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

// Four vectors of 16: the even and the odd elements of the block's first half, then those of its second.
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

template <class T>
FS_HD __m512i load_512(const T* from) {
  return _mm512_loadu_si512(from);
}
template <class T>
FS_HD void store_512(T* to, __m512i value) {
  _mm512_storeu_si512(to, value);
}
template <class T>
FS_HD __m256i load_256(const T* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

// Bit by bit: where the mask is 1, the first.
FS_HD __m512i select(__m512i mask, __m512i first, __m512i second) {
  return _mm512_ternarylogic_epi32(mask, first, second, 0xca);
}

// ---- between the block's order and that of memory --------------------------------------------------

// 32 words: as the upper halves of the even and the odd vector.
FS_HD void upper_of_words(__m512i words, __m512i& even, __m512i& odd) {
  even = _mm512_slli_epi32(words, 16);
  odd = _mm512_and_si512(words, all<0xffff0000u>());
}

FS_HD void join_words(__m512i upper, __m512i lower, __m512i& even, __m512i& odd) {
  even = select(all<0xffff0000u>(), _mm512_slli_epi32(upper, 16), lower);
  odd = select(all<0xffff0000u>(), upper, _mm512_srli_epi32(lower, 16));
}

FS_HD __m512i upper_words(__m512i even, __m512i odd) {
  return select(all<0xffff0000u>(), odd, _mm512_srli_epi32(even, 16));
}

FS_HD __m512i lower_words(__m512i even, __m512i odd) {
  return select(all<0xffff0000u>(), _mm512_slli_epi32(odd, 16), even);
}

// 64 words below 256, in order. The pack works within 128-bit lanes; the permutation puts those in order.
FS_HD __m512i bytes_of_words(__m512i first, __m512i second) {
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  return _mm512_permutexvar_epi64(order, _mm512_packus_epi16(first, second));
}

FS_HD void load_words(const uint16_t* from, Floats& out) {
  for (int half = 0; half < 2; ++half) {
    __m512i even, odd;
    upper_of_words(load_512(from + 32 * half), even, odd);
    out.lane[2 * half] = as_float(even);
    out.lane[2 * half + 1] = as_float(odd);
  }
}

FS_HD void store_words(uint16_t* to, const Bits& from) {
  for (int half = 0; half < 2; ++half)
    store_512(to + 32 * half, upper_words(from.lane[2 * half], from.lane[2 * half + 1]));
}

FS_HD void separate(__m512 first, __m512 second, __m512& even, __m512& odd) {
  const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odds = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  even = _mm512_permutex2var_ps(first, evens, second);
  odd = _mm512_permutex2var_ps(first, odds, second);
}

FS_HD void interleave(__m512 even, __m512 odd, __m512& first, __m512& second) {
  const __m512i firsts = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i seconds = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  first = _mm512_permutex2var_ps(even, firsts, odd);
  second = _mm512_permutex2var_ps(even, seconds, odd);
}

FS_HD void load_floats(const float* from, Floats& out) {
  for (int half = 0; half < 2; ++half)
    separate(_mm512_loadu_ps(from + 32 * half), _mm512_loadu_ps(from + 32 * half + 16), out.lane[2 * half],
             out.lane[2 * half + 1]);
}

FS_HD void store_floats(float* to, const Floats& from) {
  for (int half = 0; half < 2; ++half) {
    __m512 first, second;
    interleave(from.lane[2 * half], from.lane[2 * half + 1], first, second);
    _mm512_storeu_ps(to + 32 * half, first);
    _mm512_storeu_ps(to + 32 * half + 16, second);
  }
}

FS_HD void load_halves(const uint16_t* from, Floats& out) {
  for (int half = 0; half < 2; ++half)
    separate(_mm512_cvtph_ps(load_256(from + 32 * half)), _mm512_cvtph_ps(load_256(from + 32 * half + 16)),
             out.lane[2 * half], out.lane[2 * half + 1]);
}

// ---- random bits -----------------------------------------------------------------------------------

FS_HD void random_of_block(RandomKey key, uint32_t first_element, Bits& out) {
  const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  for (int half = 0; half < 2; ++half) {
    const int first = static_cast<int>(first_element) + 32 * half;
    __m512i x = _mm512_add_epi32(_mm512_set1_epi32(first), evens);
    x = _mm512_xor_si512(x, _mm512_set1_epi32(static_cast<int>(key.first)));
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), all<0x7feb352du>());
    x = _mm512_ternarylogic_epi32(x, _mm512_srli_epi32(x, 15), _mm512_set1_epi32(static_cast<int>(key.second)), 0x96);
    x = _mm512_mullo_epi32(x, all<0x846ca68bu>());
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
    out.lane[2 * half] = x;
    out.lane[2 * half + 1] = _mm512_rol_epi32(x, 16);
  }
}

}  // namespace
FS_NAMESPACE_END
