// The scheduler behind cuda_on_cpu.h, and what the tests set and ask of it. Compiled without sanitizers: they
// watch the kernels, and the scheduler's own bookkeeping would look like races.
#include "cuda_on_cpu.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#if defined(FS_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
#endif

namespace cuda_on_cpu {
namespace {

// What the tests can set: the pretended machine, the order of execution, and a runtime call that fails.
struct Settings {
  int num_devices = 2;
  int num_sms = 2;
  int blocks_per_sm = 2;
  unsigned seed = 0;  // not 0: blocks, and threads between barriers, run in random order
  std::string failing_call;
};

// What the tests can ask.
struct Observed {
  int current_device = 0;
  int launch_device = -1;
  int num_blocks = 0;
  cudaStream_t stream = nullptr;
  bool capture_was_relaxed = false;  // when a kernel was last loaded
};

enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Fiber {
  ucontext_t context;
  State state;
  int line;  // of the barrier or shuffle it waits at
  int distance;
  double shuffled;  // what it passed, then what it got
  void* tsan;
};

constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned kWarpThreads = 32;

Settings settings;
Observed observed;
cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

std::mutex launch_mutex;  // one launch at a time: the rest is plain data
std::vector<Fiber*> fibers;
ucontext_t scheduler;
void* scheduler_tsan = nullptr;
unsigned current_thread = 0;
unsigned current_block = 0;
unsigned num_threads_of_block = 0;
unsigned num_blocks_of_grid = 0;
const std::function<void()>* current_kernel = nullptr;

// ThreadSanitizer takes each fiber for a thread. A switch orders nothing: only the launch, the barriers and
// the end do, as on a GPU.
char launch_order, barrier_order, end_order;
#if defined(FS_THREAD_SANITIZER)
void* create_tsan_fiber() { return __tsan_create_fiber(0); }
void* current_tsan_fiber() { return __tsan_get_current_fiber(); }
void switch_tsan_fiber(void* fiber) { __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync); }
void acquire(char* order) { __tsan_acquire(order); }
void release(char* order) { __tsan_release(order); }
#else
void* create_tsan_fiber() { return nullptr; }
void* current_tsan_fiber() { return nullptr; }
void switch_tsan_fiber(void*) {}
void acquire(char*) {}
void release(char*) {}
#endif

[[noreturn]] void stop(const char* what) {
  fprintf(stderr, "cuda_on_cpu: %s (block %u, thread %u)\n", what, current_block, current_thread);
  abort();
}

void resume(unsigned thread) {
  current_thread = thread;
  switch_tsan_fiber(fibers[thread]->tsan);
  swapcontext(&scheduler, &fibers[thread]->context);
}

void suspend(State state) {
  Fiber& self = *fibers[current_thread];
  self.state = state;
  switch_tsan_fiber(scheduler_tsan);
  swapcontext(&self.context, &scheduler);
}

// A fiber serves one thread index of all blocks, one after the other.
void run_fiber() {
  for (;;) {
    acquire(&launch_order);
    (*current_kernel)();
    release(&end_order);
    suspend(State::kDone);
  }
}

Fiber* create_fiber() {
  Fiber* fiber = new Fiber;
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stack == MAP_FAILED) stop("no memory for a stack");
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = stack;
  fiber->context.uc_stack.ss_size = kStackBytes;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, run_fiber, 0);
  fiber->tsan = create_tsan_fiber();
  return fiber;
}

std::vector<unsigned> execution_order(unsigned count, unsigned salt) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = i;
  if (settings.seed != 0) std::shuffle(order.begin(), order.end(), std::minstd_rand(settings.seed + salt));
  return order;
}

// Lets a barrier through, or says why it cannot be.
void release_barrier() {
  int line = -1;
  for (unsigned i = 0; i < num_threads_of_block; ++i) {
    if (fibers[i]->state == State::kDone) stop("deadlock: a thread has returned, others wait at __syncthreads");
    if (line >= 0 && fibers[i]->line != line) stop("divergence: threads wait at different __syncthreads");
    line = fibers[i]->line;
  }
  for (unsigned i = 0; i < num_threads_of_block; ++i) fibers[i]->state = State::kReady;
}

// Exchanges the values of the warps whose lanes have all arrived at a shuffle; whether any did.
bool release_shuffles() {
  bool released = false;
  for (unsigned first = 0; first < num_threads_of_block; first += kWarpThreads) {
    double passed[kWarpThreads];
    unsigned arrived = 0;
    for (unsigned lane = 0; lane < kWarpThreads && first + lane < num_threads_of_block; ++lane) {
      const Fiber& fiber = *fibers[first + lane];
      if (fiber.state != State::kAtShuffle) continue;
      if (arrived > 0 && fiber.line != fibers[first]->line) stop("divergence: lanes of a warp at different shuffles");
      passed[lane] = fiber.shuffled;
      ++arrived;
    }
    if (arrived == 0) continue;
    if (arrived != kWarpThreads) stop("deadlock: lanes of a warp wait at a shuffle that others do not reach");
    for (unsigned lane = 0; lane < kWarpThreads; ++lane) {
      Fiber& fiber = *fibers[first + lane];
      const unsigned source = lane + static_cast<unsigned>(fiber.distance);
      if (source < kWarpThreads) fiber.shuffled = passed[source];
      fiber.state = State::kReady;
    }
    released = true;
  }
  return released;
}

void run_block(unsigned block) {
  current_block = block;
  for (unsigned i = 0; i < num_threads_of_block; ++i) fibers[i]->state = State::kReady;
  for (unsigned phase = 0;; ++phase) {
    bool waiting = false;
    for (unsigned thread : execution_order(num_threads_of_block, block * 31 + phase)) {
      if (fibers[thread]->state == State::kReady) resume(thread);
      waiting |= fibers[thread]->state == State::kAtBarrier;
    }
    // Warps that shuffle go on, until every thread has returned or waits at a barrier.
    if (release_shuffles()) continue;
    if (!waiting) return;
    release_barrier();
  }
}

cudaError_t status_of(const char* call) { return settings.failing_call == call ? cudaErrorInvalidValue : cudaSuccess; }

}  // namespace

cudaError_t launch(int num_blocks, int num_threads, cudaStream_t stream, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  if (num_blocks <= 0 || num_threads <= 0) return cudaErrorInvalidValue;
  if (status_of("launch") != cudaSuccess) return status_of("launch");
  observed.launch_device = observed.current_device;
  observed.num_blocks = num_blocks;
  observed.stream = stream;
  num_blocks_of_grid = static_cast<unsigned>(num_blocks);
  num_threads_of_block = static_cast<unsigned>(num_threads);
  current_kernel = &kernel;
  while (fibers.size() < num_threads_of_block) fibers.push_back(create_fiber());
  scheduler_tsan = current_tsan_fiber();
  release(&launch_order);
  for (unsigned block : execution_order(num_blocks_of_grid, 0)) run_block(block);
  acquire(&end_order);
  return cudaSuccess;
}

dim3 thread_index() { return {current_thread, 0, 0}; }
dim3 block_index() { return {current_block, 0, 0}; }
dim3 block_size() { return {num_threads_of_block, 1, 1}; }
dim3 grid_size() { return {num_blocks_of_grid, 1, 1}; }

void synchronize_block(int line) {
  fibers[current_thread]->line = line;
  release(&barrier_order);
  suspend(State::kAtBarrier);
  acquire(&barrier_order);
}

double shuffle_down(unsigned mask, double value, int distance, int line) {
  if (mask != 0xffffffffu) stop("only shuffles of whole warps are modelled");
  Fiber& self = *fibers[current_thread];
  self.line = line;
  self.distance = distance;
  self.shuffled = value;
  suspend(State::kAtShuffle);  // orders no memory, as on a GPU
  return self.shuffled;
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

cudaError_t cudaGetDeviceCount(int* count) {
  *count = settings.num_devices;
  return status_of("cudaGetDeviceCount");
}

cudaError_t cudaGetDevice(int* device) {
  *device = observed.current_device;
  return status_of("cudaGetDevice");
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= settings.num_devices) return cudaErrorInvalidDevice;
  if (status_of("cudaSetDevice") != cudaSuccess) return status_of("cudaSetDevice");
  observed.current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = settings.num_sms;
  return status_of("cudaDeviceGetAttribute");
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->numRegs = 0;
  observed.capture_was_relaxed = capture_mode == cudaStreamCaptureModeRelaxed;
  return status_of("cudaFuncGetAttributes");
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = settings.blocks_per_sm;
  return status_of("cudaOccupancyMaxActiveBlocksPerMultiprocessor");
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  if (status_of("cudaThreadExchangeStreamCaptureMode") != cudaSuccess) return cudaErrorInvalidValue;
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "cudaErrorInvalidDevice" : "cudaErrorInvalidValue";
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid argument";
}

namespace {
int driver_version = 13000;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver_version;
  return status_of("cudaDriverGetVersion");
}

// ---- for the tests, through ctypes ----

extern "C" {

void cuda_on_cpu_set_machine(int num_devices, int num_sms, int blocks_per_sm) {
  settings.num_devices = num_devices;
  settings.num_sms = num_sms;
  settings.blocks_per_sm = blocks_per_sm;
}
void cuda_on_cpu_set_seed(unsigned seed) { settings.seed = seed; }
void cuda_on_cpu_fail(const char* call) { settings.failing_call = call; }
int cuda_on_cpu_current_device() { return observed.current_device; }
int cuda_on_cpu_launch_device() { return observed.launch_device; }
int cuda_on_cpu_num_blocks() { return observed.num_blocks; }
uint64_t cuda_on_cpu_stream() { return reinterpret_cast<uint64_t>(observed.stream); }
int cuda_on_cpu_capture_was_relaxed() { return observed.capture_was_relaxed; }
int cuda_on_cpu_capture_mode() { return capture_mode; }
void cuda_on_cpu_set_driver(int version) { driver_version = version; }
}
