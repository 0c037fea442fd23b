// The norm of all gradients: each warp sums the squares of whole chunks, and the last block to finish adds the chunks
// and does the clock's work. The order of every addition is that of core/norm.h, whatever the grid.
#pragma once

#include "clock_kernel.cuh"
#include "vector_access.cuh"

namespace fused_sched {

constexpr unsigned kFullWarp = 0xffffffffu;
static_assert(kNormFinalAccumulators == kNormThreads, "one accumulator for each thread of the last block");

template <class T, int kCount>
struct alignas(16) NormVector {
  static_assert(kCount * sizeof(T) == 16, "");
  T element[kCount];
};

// A plain load: unlike the update's, it should leave the gradient in the L2 cache, for the update to find it there.
template <class T, int kCount>
FS_DEVICE NormVector<T, kCount> load_plain(const T* address) {
  const uint4 access = *reinterpret_cast<const uint4*>(address);
  NormVector<T, kCount> vector;
  memcpy(&vector, &access, sizeof vector);
  return vector;
}

// One lane's accumulators: number lane * kCount + j is accumulator j of the lane.
template <class Codec>
struct LaneSums {
  static constexpr int kCount = kNormAccumulators<Codec> / kWarpThreads;
  double sum[kCount] = {};

  FS_DEVICE void add(int j, typename Codec::Storage stored) {
    add_square(sum[j], static_cast<double>(Codec::decode(stored)));
  }
  FS_DEVICE SquareSum fold();
};

template <>
struct LaneSums<Float64> {
  static constexpr int kCount = kNormAccumulators<Float64> / kWarpThreads;
  SquareSum sum[kCount] = {};

  FS_DEVICE void add(int j, double stored) { add_square(sum[j], stored); }
  FS_DEVICE SquareSum fold();
};

// Adds the upper half of the accumulators to the lower until one is left: half the lanes while there are lanes, then
// within the first, which has the result.
template <int kCount>
FS_DEVICE double fold_lanes(double (&sum)[kCount]) {
#pragma unroll
  for (int half = kWarpThreads / 2; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) sum[j] += __shfl_down_sync(kFullWarp, sum[j], half);
  }
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) sum[j] += sum[j + half];
  }
  return sum[0];
}

template <class Codec>
FS_DEVICE SquareSum LaneSums<Codec>::fold() {
  return {fold_lanes(sum), 0.0, 0.0};
}

FS_DEVICE SquareSum LaneSums<Float64>::fold() {
  double middle[kCount], large[kCount], small[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    middle[j] = sum[j].middle;
    large[j] = sum[j].large;
    small[j] = sum[j].small;
  }
  SquareSum folded;
  folded.middle = fold_lanes(middle);
  folded.large = fold_lanes(large);
  folded.small = fold_lanes(small);
  return folded;
}

// One warp, one chunk of `count` elements; the first lane has the result.
template <class Codec>
FS_DEVICE SquareSum sum_chunk(const typename Codec::Storage* stored, int64_t count) {
  using Storage = typename Codec::Storage;
  constexpr int kCount = LaneSums<Codec>::kCount;
  constexpr int kStride = kCount * kWarpThreads;
  LaneSums<Codec> sums;
  const int lane_first = static_cast<int>(threadIdx.x) % kWarpThreads * kCount;
  int64_t first = lane_first;
  if (reinterpret_cast<uint64_t>(stored) % 16 == 0) {
    // All loads of a round before the first sum: left to `#pragma unroll`, each would wait for the one before, because
    // of the question in between.
    for (; first + (kNormLoads - 1) * kStride + kCount <= count; first += kNormLoads * kStride) {
      NormVector<Storage, kCount> vector[kNormLoads];
#pragma unroll
      for (int i = 0; i < kNormLoads; ++i) vector[i] = load_plain<Storage, kCount>(stored + first + i * kStride);
#pragma unroll
      for (int i = 0; i < kNormLoads; ++i) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) sums.add(j, vector[i].element[j]);
      }
    }
#pragma unroll 1
    for (; first + kCount <= count; first += kStride) {
      const NormVector<Storage, kCount> vector = load_plain<Storage, kCount>(stored + first);
#pragma unroll
      for (int j = 0; j < kCount; ++j) sums.add(j, vector.element[j]);
    }
  }
  // A misaligned gradient, and the elements that end inside a vector.
  for (; first < count; first += kStride) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (first + j < count) sums.add(j, stored[first + j]);
    }
  }
  return sums.fold();
}

FS_DEVICE SquareSum sum_chunk_of(const CallTable& table, int chunk) {
  const CallGrad* const grads = table.grads();
  const int index = find_entry(grads, table.num_grads, chunk);
  const CallGrad& grad = grads[index];
  const int64_t first = static_cast<int64_t>(chunk - (index > 0 ? grads[index - 1].end : 0)) * table.chunk_length;
  const int64_t count = chunk + 1 == grad.end ? static_cast<int64_t>(grad.detail >> 2) : table.chunk_length;
  switch (grad.detail & 3u) {
#define FS_SUM(identifier, tag, name, Codec) \
  case identifier: return sum_chunk<Codec>(reinterpret_cast<const Codec::Storage*>(grad.address) + first, count);
    FS_FORMATS(FS_SUM)
#undef FS_SUM
  }
  return {};
}

// Whether this block is the last one of the launch to arrive; then it sees what all of them wrote.
FS_DEVICE bool is_last_block(NormState& norm) {
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(&norm.blocks_done, 1u) + 1 == gridDim.x;
    if (is_last) norm.blocks_done = 0;
  }
  __syncthreads();
  if (is_last) __threadfence();
  return is_last;
}

// Past the first-level cache, which does not see other blocks' writes.
FS_DEVICE SquareSum load_chunk_sum(const SquareSum& sum, bool has_doubles) {
  return {__ldcg(&sum.middle), has_doubles ? __ldcg(&sum.large) : 0.0, has_doubles ? __ldcg(&sum.small) : 0.0};
}

// Of one thread, in order; kLoads at once, because the whole GPU waits.
template <int kLoads>
FS_DEVICE void add_chunks_of_thread(const CallTable& table, SquareSum& sum, int& chunk) {
  for (; chunk + (kLoads - 1) * kNormFinalAccumulators < table.num_chunks; chunk += kLoads * kNormFinalAccumulators) {
    SquareSum other[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      other[i] = load_chunk_sum(table.chunk_sums[chunk + i * kNormFinalAccumulators], table.has_doubles);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) add(sum, other[i]);
  }
}

FS_DEVICE void add_chunks(const CallTable& table) {
  __shared__ SquareSum sums[kNormFinalAccumulators];
  const int thread = static_cast<int>(threadIdx.x);
  SquareSum sum = {};
  int chunk = thread;
  add_chunks_of_thread<kNormLoads>(table, sum, chunk);
  add_chunks_of_thread<1>(table, sum, chunk);
  sums[thread] = sum;
  for (int half = kNormFinalAccumulators / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) add(sums[thread], sums[thread + half]);
  }
  if (thread == 0) store_sum(*table.norm, sums[0]);
}

__global__ void __launch_bounds__(kNormThreads, kNormBlocksPerSm) norm_kernel(FS_KERNEL_TABLE(CallTable) table) {
  constexpr int kWarps = kNormThreads / kWarpThreads;
  const int end = table.num_grads > 0 ? table.grads()[table.num_grads - 1].end : 0;
  const int warp = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarpThreads;
  for (int chunk = warp; chunk < end; chunk += static_cast<int>(gridDim.x) * kWarps) {
    const SquareSum sum = sum_chunk_of(table, chunk);
    if (threadIdx.x % kWarpThreads == 0) table.chunk_sums[table.first_chunk + chunk] = sum;
  }
  if (!table.ends_norm || !is_last_block(*table.norm)) return;
  add_chunks(table);
  if (!table.begins_call) return;
  begin_call(table);
  advance_tensors<kNormThreads>(table);
}

}  // namespace fused_sched
