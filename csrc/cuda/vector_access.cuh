// Moving a thread's elements between memory and registers, in the widest accesses that leave no sector half used.
#pragma once

#include <type_traits>

#include "runtime.h"

namespace fused_sched {

constexpr int kWarpThreads = 32;

// A thread has pieces of kPiece consecutive elements. Those of a warp lie one behind the other, and its next pieces
// behind them, so that an access of a warp covers whole sectors of 32 bytes: with eight consecutive floats a thread,
// two accesses would each store half of every sector.
template <int kPiece>
FS_HD constexpr int piece_offset(int i) {
  return i / kPiece * kPiece * kWarpThreads + i % kPiece;
}

template <class T, int kCount>
struct Vector {
  T element[kCount];
};

template <int kBytes>
using Access =
    typename std::conditional<kBytes >= 16, uint4, typename std::conditional<kBytes == 8, uint2, uint32_t>::type>::type;

template <class T, int kPiece>
FS_DEVICE bool is_vector_aligned(uint64_t address) {
  return address % sizeof(Access<kPiece * sizeof(T)>) == 0;
}

// Every stream of the update is touched once per step: .cs (evict first) leaves the L2 cache to others.
// Whole: a Vector of T, or codes packed in words. address: of the first piece.
template <class Whole, int kPiece, class T>
FS_DEVICE Whole load_vector(const T* address) {
  using Access = fused_sched::Access<kPiece * sizeof(T)>;
  constexpr int kPerPiece = kPiece * sizeof(T) / sizeof(Access);
  constexpr int kAccesses = sizeof(Whole) / sizeof(Access);
  Access access[kAccesses];
#pragma unroll
  for (int i = 0; i < kAccesses; ++i) {
    const T* const piece = address + piece_offset<kPiece>(i / kPerPiece * kPiece);
    access[i] = __ldcs(reinterpret_cast<const Access*>(piece) + i % kPerPiece);
  }
  Whole vector;
  memcpy(&vector, access, sizeof vector);
  return vector;
}

template <int kPiece, class T, class Whole>
FS_DEVICE void store_vector(T* address, const Whole& vector) {
  using Access = fused_sched::Access<kPiece * sizeof(T)>;
  constexpr int kPerPiece = kPiece * sizeof(T) / sizeof(Access);
  constexpr int kAccesses = sizeof(Whole) / sizeof(Access);
  Access access[kAccesses];
  memcpy(access, &vector, sizeof vector);
#pragma unroll
  for (int i = 0; i < kAccesses; ++i) {
    T* const piece = address + piece_offset<kPiece>(i / kPerPiece * kPiece);
    __stcs(reinterpret_cast<Access*>(piece) + i % kPerPiece, access[i]);
  }
}

// Parameters and gradients may be misaligned or end inside a piece: the elements below `count`, one by one, and zeros.
template <class T, int kCount, int kPiece>
FS_DEVICE Vector<T, kCount> load_elements(const T* address, int count) {
  Vector<T, kCount> vector;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int place = piece_offset<kPiece>(i);
    vector.element[i] = place < count ? __ldcs(address + place) : T(0);
  }
  return vector;
}

template <int kPiece, class T, int kCount>
FS_DEVICE void store_elements(T* address, const Vector<T, kCount>& vector, int count) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int place = piece_offset<kPiece>(i);
    if (place < count) __stcs(address + place, vector.element[i]);
  }
}

}  // namespace fused_sched
