// What the clock and the norm are told: one table for both, because the last block of the norm does the clock's work.
#pragma once

#include "runtime.h"
#include "tuning.h"

namespace fused_sched {

// A gradient with elements.
struct CallGrad {
  uint64_t address;
  int32_t end;      // chunks of this and all earlier gradients of the launch
  uint32_t detail;  // elements of the last chunk * 4 + Format
};

// Consecutive tensors that share group and compute type, whose ordinals are consecutive, and whose step records follow
// one another in memory, as those of one arena do. Runs keep the clock's part of the table short: a thousand tensors of
// three groups are three.
struct CallRun {
  uint64_t step;    // address of the first one's StepRecord
  int32_t end;      // index of the first tensor past the run
  uint32_t detail;  // group * 2 + whether they compute in double
  uint32_t first_ordinal;
  uint32_t reserved;
};

struct CallTable {
  static constexpr int kHeaderBytes = 128;
  static constexpr int kPoolBytes = (kMaxParameterBytes - kHeaderBytes) / 8 * 8;

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
  uint64_t seed;
  int32_t num_groups;
  int32_t first_tensor;  // of the first run, as index of the call
  int32_t num_grads;
  int32_t num_runs;
  int32_t first_chunk;   // of this launch, as index of the call
  int32_t num_chunks;    // of the call
  bool begins_call;      // decides whether the call is applied; other launches only derive scalars
  bool ends_norm;        // all chunks are summed when this launch ends; its last block adds them
  bool norm_is_reduced;  // the clock comes in a launch of its own, after the sum was replaced
  bool has_doubles;      // among the gradients
  bool tick;
  uint64_t pool[kPoolBytes / 8];  // gradients, then runs

  FS_HD const CallGrad* grads() const { return reinterpret_cast<const CallGrad*>(pool); }
  FS_HD const CallRun* runs() const { return reinterpret_cast<const CallRun*>(grads() + num_grads); }
};
static_assert(sizeof(CallTable) <= kMaxParameterBytes, "");

// The first of `count` entries whose end is beyond a position.
template <class Entry>
FS_DEVICE int find_entry(const Entry* entries, int count, int position) {
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
