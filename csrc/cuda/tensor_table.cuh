// What a launch is told: tables that travel in the kernel's parameters.
#pragma once

#include "runtime.h"
#include "tuning.h"

namespace fused_sched {

// The tensors of one launch of the update kernel, all of one combination of formats, cut into tiles of
// kUpdateThreads * (elements per thread) elements. 31 bytes a tensor.
struct UpdateTable {
  static constexpr int kBytesPerTensor = 31;
  static constexpr int kHeaderBytes = kMaxArenas * sizeof(fs_arena) + 24;
  static constexpr int kCapacity = (kMaxParameterBytes - kHeaderBytes) / kBytesPerTensor / 8 * 8;

  fs_arena arena[kMaxArenas];
  const ScalarSlot* scalars;
  int32_t num_tensors;
  int32_t num_tiles;
  int32_t grad_format;  // Format
  uint64_t param[kCapacity];
  uint64_t grad[kCapacity];
  uint32_t state_block[kCapacity];       // offset into the arena, in units of kPadding elements
  int32_t tile_end[kCapacity];           // tiles of this and all earlier tensors
  int32_t row[kCapacity];                // index of its ScalarSlot
  uint16_t last_tile_length[kCapacity];  // elements of its last tile: 1 .. tile
  uint8_t arena_index[kCapacity];
};
static_assert(sizeof(UpdateTable) <= kMaxParameterBytes, "");
static_assert(kUpdateThreads * kMaxElementsPerThread <= UINT16_MAX, "last_tile_length");

// The index of the tensor that holds a tile; `first` is known not to be past it.
FS_DEVICE int find_tensor(const UpdateTable& table, int tile, int first) {
  int last = table.num_tensors - 1;
  while (first < last) {
    const int middle = (first + last) / 2;
    if (tile < table.tile_end[middle]) {
      last = middle;
    } else {
      first = middle + 1;
    }
  }
  return first;
}

// The tensors of one launch of the clock kernel. 17 bytes a tensor; more than kCapacity take further
// launches, which only advance steps and derive scalars (begins_call is false).
struct ClockTable {
  static constexpr int kBytesPerTensor = 17;
  static constexpr int kHeaderBytes = 88;
  static constexpr int kCapacity = (kMaxParameterBytes - kHeaderBytes) / kBytesPerTensor / 8 * 8;

  Clock* clock;
  const GroupRecord* groups;
  GroupValues* values;
  ScalarSlot* scalars;  // of the first row of this launch
  const float* found_inf;
  const float* grad_scale;
  uint64_t seed;
  int32_t num_groups;
  int32_t num_rows;
  bool begins_call;
  bool tick;
  uint64_t step[kCapacity];  // address of a StepRecord
  int32_t group[kCapacity];
  uint32_t ordinal[kCapacity];
  uint8_t computes_in_double[kCapacity];
};
static_assert(sizeof(ClockTable) <= kMaxParameterBytes, "");

}  // namespace fused_sched
