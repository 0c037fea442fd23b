// Runs the CUDA kernels of csrc/cuda on the CPU: included in place of <cuda_runtime.h> when the sources are
// compiled by g++ with -DFS_CUDA_ON_CPU. Each CUDA thread is a fiber, so barriers are real, and the
// sanitizers see every access: AddressSanitizer those out of bounds, UndefinedBehaviorSanitizer misaligned
// vectors, ThreadSanitizer races between CUDA threads.
//
// Offered is what the kernels use: one-dimensional grids, __syncthreads, shuffles of whole warps, static shared memory,
// an atomic add, 16-byte and streaming accesses, and the runtime calls of the launcher. Blocks run one after another,
// so fences do nothing and a missing one goes unnoticed. Not modelled: several streams.
#pragma once

#include <stddef.h>
#include <string.h>

#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// The alignment is what a 16-byte access demands; may_alias because it is made on memory of other types.
struct __attribute__((may_alias, aligned(16))) uint4 {
  unsigned x, y, z, w;
};
struct __attribute__((may_alias, aligned(8))) uint2 {
  unsigned x, y;
};

template <class T>
__forceinline__ T __ldcs(const T* address) {
  return *address;
}
template <class T>
__forceinline__ void __stcs(T* address, T value) {
  *address = value;
}

template <class T>
__forceinline__ T __ldcg(const T* address) {
  return *address;
}
// Each digit of the selector: a byte of the eight, or with 8 added its sign, eight times.
__forceinline__ unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned digit = selector >> (4 * i) & 15u;
    const unsigned byte = static_cast<unsigned>(bytes >> (8 * (digit & 7u))) & 255u;
    result |= (digit < 8 ? byte : (byte >> 7) * 255u) << (8 * i);
  }
  return result;
}
__forceinline__ unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}
__forceinline__ void __threadfence() {}

// ---- the runtime: one function per call the launcher makes; each can be told to fail (see the .cpp) ----

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal = 0, cudaStreamCaptureModeRelaxed = 2 };
using cudaStream_t = struct Stream*;
struct cudaFuncAttributes {
  int numRegs;
};

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int num_threads,
                                                          size_t shared_bytes);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);

namespace cuda_on_cpu {

// Runs kernel() once per CUDA thread, block after block.
cudaError_t launch(int num_blocks, int num_threads, cudaStream_t stream, const std::function<void()>& kernel);

dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
void synchronize_block(int line);

// The value that the lane `distance` further on in the warp passed, or one's own where there is none.
double shuffle_down(unsigned mask, double value, int distance, int line);

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::thread_index())
#define blockIdx (cuda_on_cpu::block_index())
#define blockDim (cuda_on_cpu::block_size())
#define gridDim (cuda_on_cpu::grid_size())
#define __syncthreads() cuda_on_cpu::synchronize_block(__LINE__)
#define __shfl_down_sync(mask, value, distance) cuda_on_cpu::shuffle_down(mask, value, distance, __LINE__)

// The driver's, as in 12010 for CUDA 12.1.
cudaError_t cudaDriverGetVersion(int* version);
