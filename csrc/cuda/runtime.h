// The CUDA runtime as this directory uses it: the same sources compile with nvcc and, in the tests, with g++
// against a stand-in that runs kernels on the CPU (FS_CUDA_ON_CPU).
#pragma once

#include <stdio.h>
#include <string.h>

#if defined(FS_CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
#endif

#include "../failure.h"

#define FS_DEVICE __device__ __forceinline__

// What the compiler may rely on; on the CPU a mistake ends the test.
#if defined(__CUDA_ARCH__)
#define FS_ASSUME(condition) __builtin_assume(condition)
#elif defined(FS_CUDA_ON_CPU)
#define FS_ASSUME(condition)            \
  do {                                  \
    if (!(condition)) __builtin_trap(); \
  } while (false)
#else
#define FS_ASSUME(condition) static_cast<void>(0)
#endif

// A kernel's only parameter is a table of up to kMaxParameterBytes in constant memory: no upload, and a graph
// capture freezes its contents.
#if defined(FS_CUDA_ON_CPU)
#define FS_KERNEL_TABLE(Table) const Table&
#else
#define FS_KERNEL_TABLE(Table) const __grid_constant__ Table
#endif

namespace fused_sched {

#if defined(FS_CUDA_ON_CPU)
template <class Table>
using Kernel = void (*)(const Table&);

template <class Table>
cudaError_t launch_kernel(Kernel<Table> kernel, int num_blocks, int num_threads, cudaStream_t stream,
                          const Table& table) {
  return cuda_on_cpu::launch(num_blocks, num_threads, stream, [&] { kernel(table); });
}
#else
template <class Table>
using Kernel = void (*)(const Table);

template <class Table>
cudaError_t launch_kernel(Kernel<Table> kernel, int num_blocks, int num_threads, cudaStream_t stream,
                          const Table& table) {
  void* arguments[] = {const_cast<Table*>(&table)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(num_blocks)),
                          dim3(static_cast<unsigned>(num_threads)), arguments, 0, stream);
}
#endif

// FS_CUDA_CHECK(call): on an error throws "call failed at file:line: name: description".
inline void check_cuda(cudaError_t status, const char* call, const char* file, int line) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report this error again
  const char* slash = strrchr(file, '/');
  Failure failure;
  snprintf(failure.text, sizeof failure.text, "%s failed at %s:%d: %s: %s", call, slash ? slash + 1 : file, line,
           cudaGetErrorName(status), cudaGetErrorString(status));
  throw failure;
}
#define FS_CUDA_CHECK(call) ::fused_sched::check_cuda(call, #call, __FILE__, __LINE__)

// Makes a device current for a scope. The runtime is linked statically, so torch's idea of the current device
// is not known to be ours.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    FS_CUDA_CHECK(cudaGetDevice(&previous_));
    changed_ = previous_ != device;
    if (changed_) FS_CUDA_CHECK(cudaSetDevice(device));
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace fused_sched
