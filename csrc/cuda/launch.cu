// The CUDA backend of step.h: packs tensors into tables and launches. Host code only; it neither allocates
// device memory nor waits for the device.
#include <memory>
#include <mutex>
#include <vector>

#include "../check_call.h"
#include "launch.h"
#include "metric_kernel.cuh"
#include "update_kernel.cuh"

namespace fused_sched {
namespace {

// Tiles of one launch: a block's tile index plus the grid's size stays within an int. A tensor of
// kMaxElements is that many of the smallest tiles.
constexpr int64_t kMaxTiles = int64_t{1} << 30;
static_assert(kMaxTiles * kUpdateThreads * kElementsPerThreadFloat64 >= kMaxElements, "");

// CUDA 12.1: parameters beyond 4 KB need its driver (R530), whatever the toolkit.
constexpr int kOldestDriver = 12010;

// Asks the runtime about a kernel, which loads it. Loading may be refused while a stream of this thread is
// being captured, unless the thread relaxes its own rule for the moment.
class RelaxedCapture {
 public:
  RelaxedCapture() { FS_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

int resident_blocks(const void* kernel, int num_threads, int device) {
  struct Answer {
    const void* kernel;
    int device;
    int blocks;
  };
  static std::mutex mutex;
  static std::vector<Answer> answers;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Answer& answer : answers) {
    if (answer.kernel == kernel && answer.device == device) return answer.blocks;
  }
  const RelaxedCapture relaxed;
  cudaFuncAttributes attributes;
  FS_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  int blocks_per_sm = 0;
  int num_sms = 0;
  FS_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, num_threads, 0));
  FS_CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  answers.push_back({kernel, device, blocks_per_sm * num_sms});
  return answers.back().blocks;
}

namespace {

SelectedUpdate select_update(const fs_tensor& tensor) {
  if ((tensor.param_format == kFloat64) != (tensor.grad_format == kFloat64)) return {nullptr, 0};
  const bool amsgrad = tensor.amsgrad != 0;
  switch (tensor.param_format) {
    case kFloat32: return select_update_fp32(tensor.master, tensor.moments, amsgrad);
    case kBfloat16: return select_update_bf16(tensor.master, tensor.moments, amsgrad);
    case kFloat16: return select_update_fp16(tensor.master, tensor.moments, amsgrad);
    case kFloat64: return select_update_fp64(tensor.master, tensor.moments, amsgrad);
    default: return {nullptr, 0};
  }
}

// An index of the formats that a launch's tensors share.
constexpr int kNumCombinations = kNumFormats * kNumFormats * kNumMasters * kNumMoments * 2;
int combination_of(const fs_tensor& tensor) {
  const int formats = tensor.param_format * kNumFormats + tensor.grad_format;
  return ((formats * kNumMasters + tensor.master) * kNumMoments + tensor.moments) * 2 + (tensor.amsgrad != 0);
}

// Everything is checked, and every kernel of the call loaded, before the first launch: a call that cannot be made
// has changed nothing, and the clock does not move ahead of an update that fails.
void check_and_load(const fs_call& call) {
  check_call(call, [](const fs_tensor& tensor) { return select_update(tensor).kernel != nullptr; });
  bool loaded[kNumCombinations] = {};
  for (int64_t i = 0; i < call.num_tensors; ++i) {
    bool& known = loaded[combination_of(call.tensors[i])];
    if (known) continue;
    known = true;
    const SelectedUpdate selected = select_update(call.tensors[i]);
    resident_blocks(reinterpret_cast<const void*>(selected.kernel), kUpdateThreads, call.device);
  }
}

// The update kernel's table under construction; launches when it is full.
class UpdateLauncher {
 public:
  UpdateLauncher(fs_call& call, const fs_tensor& tensor)
      : call_(call), selected_(select_update(tensor)), table_(new UpdateTable) {
    table_->scalars = call.scalars;
    table_->grad_format = tensor.grad_format;
    clear();
  }

  void add(int64_t index) {
    const fs_tensor& tensor = call_.tensors[index];
    const int64_t num_tiles = (tensor.numel + selected_.tile - 1) / selected_.tile;
    if (table_->num_tensors == UpdateTable::kCapacity || num_tiles > kMaxTiles - table_->num_tiles) launch();
    int arena = find_arena(tensor.arena);
    if (arena == kMaxArenas) {
      launch();
      arena = 0;
    }
    if (arena == num_arenas_) {
      arena_indices_[num_arenas_++] = tensor.arena;
      table_->arena[arena] = call_.arenas[tensor.arena];
    }
    const int row = table_->num_tensors++;
    table_->num_tiles += static_cast<int32_t>(num_tiles);
    table_->param[row] = tensor.param;
    table_->grad[row] = tensor.grad;
    table_->state_block[row] = static_cast<uint32_t>(tensor.state_offset / kPadding);
    table_->tile_end[row] = table_->num_tiles;
    table_->row[row] = static_cast<int32_t>(index);
    table_->last_tile_length[row] = static_cast<uint16_t>(tensor.numel - (num_tiles - 1) * selected_.tile);
    table_->arena_index[row] = static_cast<uint8_t>(arena);
  }

  void launch() {
    if (table_->num_tensors == 0) return;
    const int resident = resident_blocks(reinterpret_cast<const void*>(selected_.kernel), kUpdateThreads, call_.device);
    const int num_blocks = table_->num_tiles < resident ? table_->num_tiles : resident;
    FS_CUDA_CHECK(launch_kernel(selected_.kernel, num_blocks, kUpdateThreads, stream_of(call_), *table_));
    ++call_.launches;
    clear();
  }

 private:
  void clear() {
    table_->num_tensors = 0;
    table_->num_tiles = 0;
    num_arenas_ = 0;
  }

  // The arena's place in the table, or the first free place; kMaxArenas: neither.
  int find_arena(int32_t index) const {
    int place = 0;
    while (place < num_arenas_ && arena_indices_[place] != index) ++place;
    return place;
  }

  fs_call& call_;
  const SelectedUpdate selected_;
  const std::unique_ptr<UpdateTable> table_;
  int32_t arena_indices_[kMaxArenas];  // of the call, by place in the table
  int num_arenas_ = 0;
};

void update(fs_call& call) {
  // One launcher per combination of formats that occurs, in order of first occurrence; tensors keep their
  // order.
  std::unique_ptr<UpdateLauncher> launchers[kNumCombinations];
  std::vector<UpdateLauncher*> used;
  for (int64_t i = 0; i < call.num_tensors; ++i) {
    const fs_tensor& tensor = call.tensors[i];
    if (tensor.numel == 0) continue;
    std::unique_ptr<UpdateLauncher>& launcher = launchers[combination_of(tensor)];
    if (!launcher) {
      launcher.reset(new UpdateLauncher(call, tensor));
      used.push_back(launcher.get());
    }
    launcher->add(i);
  }
  for (UpdateLauncher* launcher : used) launcher->launch();
}

}  // namespace
}  // namespace fused_sched

using namespace fused_sched;

int fs_norm(fs_call* call, char* error) {
  return report_failure(error, [&] {
    const DeviceGuard guard(call->device);
    check_and_load(*call);
    check_norm(*call);
    load_clock(*call);
    launch_norm(*call);
  });
}

int fs_clock(fs_call* call, char* error) {
  return report_failure(error, [&] {
    const DeviceGuard guard(call->device);
    check_and_load(*call);
    load_clock(*call);
    launch_clock(*call);
  });
}

int fs_update(fs_call* call, char* error) {
  return report_failure(error, [&] {
    const DeviceGuard guard(call->device);
    check_and_load(*call);
    update(*call);
  });
}

int fs_report_metric(const fs_report* report, char* error) {
  return report_failure(error, [&] {
    const DeviceGuard guard(report->device);
    const Kernel<MetricTable> kernel = metric_kernel;
    resident_blocks(reinterpret_cast<const void*>(kernel), kMetricThreads, report->device);
    const MetricTable table = {report->metric, report->records, report->num_records};
    FS_CUDA_CHECK(launch_kernel(kernel, 1, kMetricThreads, reinterpret_cast<cudaStream_t>(report->stream), table));
  });
}

int fs_device_count(int* count, char* error) {
  *count = 0;
  return report_failure(error, [&] {
    int driver = 0;  // stays 0 where there is none, which the count then says
    FS_CUDA_CHECK(cudaDriverGetVersion(&driver));
    // With an older one that takes this build otherwise (any 12.x runs on R525) only the launches would fail.
    if (driver != 0 && driver < kOldestDriver) {
      fail(
          "the NVIDIA driver is of CUDA %d.%d, which passes kernels up to 4 KB of parameters, and these take 32 KB; "
          "install a driver of CUDA 12.1 (R530) or newer",
          driver / 1000, driver % 1000 / 10);
    }
    FS_CUDA_CHECK(cudaGetDeviceCount(count));
  });
}
