// Launches of the clock and the norm: packs a call into tables of gradients and runs.
#include <algorithm>
#include <memory>
#include <vector>

#include "../check_call.h"
#include "launch.h"
#include "norm_kernel.cuh"

namespace fused_sched {
namespace {

constexpr Kernel<CallTable> kClockKernel = clock_kernel;
constexpr Kernel<CallTable> kNormKernel = norm_kernel;

static_assert(kNumFormats <= 4, "two bits of CallGrad::detail");

std::unique_ptr<CallTable> make_table(const fs_call& call) {
  std::unique_ptr<CallTable> table(new CallTable{});
  table->clock = call.clock;
  table->groups = call.groups;
  table->values = call.values;
  table->scalars = call.scalars;
  table->found_inf = call.found_inf;
  table->grad_scale = call.grad_scale;
  table->norm = call.norm;
  table->chunk_sums = call.chunk_sums;
  table->history = call.history;
  table->seed = call.seed;
  table->num_groups = static_cast<int32_t>(call.num_groups);
  table->norm_is_reduced = call.norm_is_reduced != 0;
  table->tick = call.tick != 0;
  return table;
}

// Tensors by what the clock needs to know of them.
std::vector<CallRun> make_runs(const fs_call& call) {
  std::vector<CallRun> runs;
  uint64_t next = 0;  // where the run's next step record would be
  uint32_t next_ordinal = 0;
  for (int64_t i = 0; i < call.num_tensors; ++i) {
    const fs_tensor& tensor = call.tensors[i];
    const uint32_t detail = static_cast<uint32_t>(tensor.group) * 2 + (tensor.param_format == kFloat64);
    if (runs.empty() || tensor.step != next || detail != runs.back().detail || tensor.ordinal != next_ordinal) {
      runs.push_back({tensor.step, 0, detail, tensor.ordinal, 0});
    }
    runs.back().end = static_cast<int32_t>(i + 1);
    next = tensor.step + sizeof(StepRecord);
    next_ordinal = tensor.ordinal + 1;
  }
  return runs;
}

// Gradients with elements, in order; `end` counts from the first of them until the table is known.
std::vector<CallGrad> make_grads(const fs_call& call, int64_t chunk_length) {
  std::vector<CallGrad> grads;
  int64_t end = 0;
  for (int64_t i = 0; i < call.num_tensors; ++i) {
    const fs_tensor& tensor = call.tensors[i];
    if (tensor.numel == 0) continue;
    const int64_t num_chunks = num_norm_chunks(tensor, chunk_length);
    const int64_t last_length = tensor.numel - (num_chunks - 1) * chunk_length;
    end += num_chunks;
    grads.push_back(
        {tensor.grad, static_cast<int32_t>(end), static_cast<uint32_t>(last_length * 4) + tensor.grad_format});
  }
  return grads;
}

void start(fs_call& call, Kernel<CallTable> kernel, int num_blocks, int num_threads, const CallTable& table) {
  FS_CUDA_CHECK(launch_kernel<CallTable>(kernel, num_blocks, num_threads, stream_of(call), table));
  ++call.launches;
}

// Fills the table's pool.
void pack(CallTable& table, const CallGrad* grads, size_t num_grads, const CallRun* runs, size_t num_runs) {
  table.num_grads = static_cast<int32_t>(num_grads);
  table.num_runs = static_cast<int32_t>(num_runs);
  unsigned char* const pool = reinterpret_cast<unsigned char*>(table.pool);
  if (num_grads > 0) memcpy(pool, grads, num_grads * sizeof(CallGrad));
  if (num_runs > 0) memcpy(pool + num_grads * sizeof(CallGrad), runs, num_runs * sizeof(CallRun));
}

constexpr size_t kMaxGrads = CallTable::kPoolBytes / sizeof(CallGrad);
constexpr size_t kMaxRuns = CallTable::kPoolBytes / sizeof(CallRun);

// Clock launches for the runs from `first` on; the first of them begins the call, unless the norm has.
void launch_runs(fs_call& call, CallTable& table, const std::vector<CallRun>& runs, size_t first, bool begins_call) {
  do {
    const size_t count = std::min(runs.size() - first, kMaxRuns);
    table.begins_call = begins_call;
    table.first_tensor = first > 0 ? runs[first - 1].end : 0;
    pack(table, nullptr, 0, runs.data() + first, count);
    start(call, kClockKernel, 1, kClockThreads, table);
    begins_call = false;
    first += count;
  } while (first < runs.size());
}

}  // namespace

void load_clock(const fs_call& call) {
  resident_blocks(reinterpret_cast<const void*>(kClockKernel), kClockThreads, call.device);
  if (call.norm != nullptr) resident_blocks(reinterpret_cast<const void*>(kNormKernel), kNormThreads, call.device);
}

void launch_clock(fs_call& call) { launch_runs(call, *make_table(call), make_runs(call), 0, true); }

// Launches of gradients; the last of them holds the runs as well, as far as they fit, and does the clock's work.
void launch_norm(fs_call& call) {
  const std::unique_ptr<CallTable> table = make_table(call);
  const int resident = resident_blocks(reinterpret_cast<const void*>(kNormKernel), kNormThreads, call.device);
  constexpr int kWarps = kNormThreads / 32;
  table->chunk_length = norm_chunk_length(call);
  std::vector<CallGrad> grads = make_grads(call, table->chunk_length);
  table->num_chunks = grads.empty() ? 0 : grads.back().end;
  for (const CallGrad& grad : grads) table->has_doubles |= (grad.detail & 3u) == kFloat64;
  const std::vector<CallRun> runs = call.norm_is_reduced ? std::vector<CallRun>() : make_runs(call);
  const size_t num_runs = std::min(runs.size(), kMaxRuns);
  size_t first = 0;
  while (!table->ends_norm) {
    const size_t left = grads.size() - first;
    const bool is_last = left * sizeof(CallGrad) + num_runs * sizeof(CallRun) <= CallTable::kPoolBytes;
    const size_t count = std::min(left, kMaxGrads);
    const int32_t end = count > 0 ? grads[first + count - 1].end : table->first_chunk;
    const int num_chunks = end - table->first_chunk;
    for (size_t i = first; i < first + count; ++i) grads[i].end -= table->first_chunk;
    table->ends_norm = is_last;
    table->begins_call = is_last && !call.norm_is_reduced;
    pack(*table, grads.data() + first, count, runs.data(), is_last ? num_runs : 0);
    start(call, kNormKernel, std::max(1, std::min((num_chunks + kWarps - 1) / kWarps, resident)), kNormThreads, *table);
    table->first_chunk = end;
    first += count;
  }
  if (num_runs < runs.size()) launch_runs(call, *table, runs, num_runs, false);
}

}  // namespace fused_sched
