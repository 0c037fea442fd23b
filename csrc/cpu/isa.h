// Which build of the element loops runs here.
#pragma once

#include "norm_tile.h"
#include "update_tile.h"

namespace fused_sched {

struct InstructionSet {
  const char* name;
  fs_update_run update_run;
  fs_sum_squares sum_squares;
  bool (*supported)();
};

// Fastest first; the last one runs everywhere.
extern const InstructionSet kInstructionSets[];
extern const int kNumInstructionSets;

const InstructionSet& instruction_set();

// For tests and measurements. False if there is none of that name or this machine lacks it.
bool set_instruction_set(const char* name);

}  // namespace fused_sched
