// How the tensors of a call are cut into units of parallel work: parts of large ones, and rows of small ones, each of
// which would cost less than handing it to a thread.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

#include "../prefetch.h"
#include "../step.h"

namespace fused_sched {

// Elements [first, first + count) of one tensor, or all elements of several.
struct WorkUnit {
  int64_t begin;  // tensors [begin, end)
  int64_t end;
  int64_t first;
  int64_t count;  // of all tensors together
  int64_t chunk;  // number of chunks before it
};

struct WorkUnits {
  std::vector<WorkUnit> units;
  int64_t num_chunks = 0;
};

// unit_length(before): about how many elements a unit has that begins after so many of the call (one of several tensors
// ends where it would have more than one that begins there), a multiple of chunk_length. A tensor begins a new chunk;
// empty ones have none. The units are the calling thread's, until its next call: a steady step allocates nothing.
template <class UnitLength>
const WorkUnits& work_units(const fs_call& call, const UnitLength& unit_length, int64_t chunk_length) {
  thread_local WorkUnits work;
  std::vector<WorkUnit>& units = work.units;
  units.clear();
  int64_t before = 0;
  int64_t chunk = 0;
  bool extends = false;  // whether the last unit takes further tensors
  for (int64_t i = 0; i < call.num_tensors; ++i) {
    const int64_t numel = call.tensors[i].numel;
    int64_t length = unit_length(before);
    if (extends && units.back().count + numel <= length) {
      units.back().end = i + 1;
      units.back().count += numel;
    } else {
      extends = 0 < numel && numel <= length;
      for (int64_t first = 0; first < numel; first += length) {
        length = unit_length(before + first);
        units.push_back({i, i + 1, first, std::min(length, numel - first), chunk + first / chunk_length});
      }
    }
    before += numel;
    chunk += numel <= chunk_length ? numel > 0 : (numel + chunk_length - 1) / chunk_length;
  }
  work.num_chunks = chunk;
  return work;
}

// Asks for the beginning of a stream that will be read soon: tensors lie anywhere, where the processor's own prefetcher
// cannot know of them.
FS_HD void prefetch_stream(uint64_t address, int64_t bytes) {
  constexpr int64_t kBytes = 512;
  prefetch(reinterpret_cast<const void*>(address), std::min(bytes, kBytes));
}

}  // namespace fused_sched
