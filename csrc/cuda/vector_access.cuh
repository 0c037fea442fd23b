// Moving a thread's elements between memory and registers, 16 bytes at a time.
#pragma once

#include "runtime.h"

namespace fused_sched {

template <class T, int kCount>
struct Vector {
  static_assert(kCount * sizeof(T) % 16 == 0, "a vector is whole 16-byte accesses");
  T element[kCount];
};

FS_DEVICE bool is_vector_aligned(uint64_t address) { return address % 16 == 0; }

// Every stream of the update is touched once per step: .cs (evict first) leaves the L2 cache to others.
template <class T, int kCount>
FS_DEVICE Vector<T, kCount> load_vector(const T* address) {
  constexpr int kAccesses = kCount * static_cast<int>(sizeof(T)) / 16;
  uint4 access[kAccesses];
#pragma unroll
  for (int i = 0; i < kAccesses; ++i) access[i] = __ldcs(reinterpret_cast<const uint4*>(address) + i);
  Vector<T, kCount> vector;
  memcpy(&vector, access, sizeof vector);
  return vector;
}

template <class T, int kCount>
FS_DEVICE void store_vector(T* address, const Vector<T, kCount>& vector) {
  constexpr int kAccesses = kCount * static_cast<int>(sizeof(T)) / 16;
  uint4 access[kAccesses];
  memcpy(access, &vector, sizeof vector);
#pragma unroll
  for (int i = 0; i < kAccesses; ++i) __stcs(reinterpret_cast<uint4*>(address) + i, access[i]);
}

// Parameters and gradients may be misaligned or end inside the vector: `whole` says that neither is so, else
// the first `count` elements move one by one and the rest read as zero.
template <class T, int kCount>
FS_DEVICE Vector<T, kCount> load_elements(const T* address, int count, bool whole) {
  if (whole) return load_vector<T, kCount>(address);
  Vector<T, kCount> vector;
#pragma unroll
  for (int i = 0; i < kCount; ++i) vector.element[i] = i < count ? __ldcs(address + i) : T(0);
  return vector;
}

template <class T, int kCount>
FS_DEVICE void store_elements(T* address, const Vector<T, kCount>& vector, int count, bool whole) {
  if (whole) {
    store_vector(address, vector);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < count) __stcs(address + i, vector.element[i]);
  }
}

}  // namespace fused_sched
