// The functions of csrc/step.h under names of their own, so that one program can hold two backends: the objects they
// are linked with hide theirs. With FS_DEVICE also the memory of the device: a GPU's, or with FS_ON_CPU the host's.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "step.h"

#define FS_VISIBLE extern "C" __attribute__((visibility("default")))

#if !defined(FS_DEVICE)

FS_VISIBLE int oracle_norm(fs_call* call, char* error) { return fs_norm(call, error); }
FS_VISIBLE int oracle_clock(fs_call* call, char* error) { return fs_clock(call, error); }
FS_VISIBLE int oracle_update(fs_call* call, char* error) { return fs_update(call, error); }

#else

#if defined(FS_SHOWN_CALLS)  // a test of what is profiled
#define FS_SHOW(name) puts(name)
#else
#define FS_SHOW(name) static_cast<void>(0)
#endif

FS_VISIBLE int device_norm(fs_call* call, char* error) {
  FS_SHOW("norm");
  return fs_norm(call, error);
}
FS_VISIBLE int device_clock(fs_call* call, char* error) {
  FS_SHOW("clock");
  return fs_clock(call, error);
}
FS_VISIBLE int device_update(fs_call* call, char* error) {
  FS_SHOW("update");
  const int status = fs_update(call, error);
#if defined(FS_PLANTED_ERROR)  // a test of the self-test: one bit of one parameter
  *reinterpret_cast<uint8_t*>(call->tensors[0].param) ^= 1;
#endif
  return status;
}

#if defined(FS_ON_CPU)

FS_VISIBLE const char* device_name() { return "CPU, in place of a GPU"; }
FS_VISIBLE void* device_allocate(size_t bytes) { return aligned_alloc(256, (bytes + 255) / 256 * 256); }
FS_VISIBLE void device_free(void* memory) { free(memory); }
FS_VISIBLE void device_write(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
FS_VISIBLE void device_read(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
FS_VISIBLE void device_synchronize() {}
FS_VISIBLE void device_profile(int on) { FS_SHOW(on != 0 ? "profile" : "no more"); }

#else

#include <cuda_profiler_api.h>
#include <cuda_runtime_api.h>

static void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  printf("FAILED %s: %s\n", what, cudaGetErrorString(status));
  exit(2);
}

FS_VISIBLE const char* device_name() {
  static cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  return properties.name;
}
FS_VISIBLE void* device_allocate(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "cudaMalloc");
  return memory;
}
FS_VISIBLE void device_free(void* memory) { check(cudaFree(memory), "cudaFree"); }
FS_VISIBLE void device_write(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copy to the device");
}
FS_VISIBLE void device_read(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "copy from the device");
}
FS_VISIBLE void device_synchronize() { check(cudaDeviceSynchronize(), "cudaDeviceSynchronize"); }
// For a profiler that waits for it: ncu --profile-from-start off.
FS_VISIBLE void device_profile(int on) {
  if (on != 0) {
    cudaProfilerStart();
  } else {
    cudaProfilerStop();
  }
}

#endif
#endif
