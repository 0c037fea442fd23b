// What the clock and the norm are told: one table for both, because the last block of the norm does the clock's work.
#pragma once

#include "runtime.h"
#include "tuning.h"

namespace fused_sched {

// 16 bytes, either of a tensor's gradient or of a run of consecutive tensors that share their group and compute type and
// whose step records follow one another in memory, as those of one arena do. Runs keep the clock's part of the table
// short: a thousand tensors of three groups are three.
struct CallEntry {
  uint64_t address;  // gradient; first StepRecord
  int32_t end;       // chunks of this and all earlier gradients of the launch; index of the first tensor past the run
  uint32_t detail;   // elements of the last chunk * 4 + Format; group * 2 + whether it computes in double
};
static_assert(sizeof(CallEntry) == 16, "");

struct CallTable {
  static constexpr int kHeaderBytes = 128;
  static constexpr int kCapacity = (kMaxParameterBytes - kHeaderBytes) / static_cast<int>(sizeof(CallEntry));

  Clock* clock;
  const GroupRecord* groups;
  GroupValues* values;
  ScalarSlot* scalars;  // of the call's first tensor
  const float* found_inf;
  const float* grad_scale;
  NormState* norm;        // null: neither clip nor check
  SquareSum* chunk_sums;  // of the whole call
  History* history;       // null: record nothing
  int64_t chunk_length;   // elements
  int32_t num_groups;
  int32_t first_tensor;  // of the first run, as index of the call
  int32_t num_grads;     // entries of gradients, which come first
  int32_t num_runs;      // entries of runs, which follow
  int32_t first_chunk;   // of this launch, as index of the call
  int32_t num_chunks;    // of the call
  bool begins_call;      // decides whether the call is applied; other launches only derive scalars
  bool ends_norm;        // all chunks are summed when this launch ends; its last block adds them
  bool norm_is_reduced;  // the clock comes in a launch of its own, after the sum was replaced
  bool tick;
  CallEntry entry[kCapacity];
};
static_assert(sizeof(CallTable) <= kMaxParameterBytes, "");

// The first of `count` entries whose end is beyond a position.
FS_DEVICE int find_entry(const CallEntry* entries, int count, int position) {
  int first = 0;
  int last = count - 1;
  while (first < last) {
    const int middle = (first + last) / 2;
    if (position < entries[middle].end) {
      last = middle;
    } else {
      first = middle + 1;
    }
  }
  return first;
}

}  // namespace fused_sched
