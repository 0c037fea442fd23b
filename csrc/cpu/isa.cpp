#include "isa.h"

#include <string.h>

#include <atomic>

namespace fused_sched {
namespace {

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

std::atomic<const InstructionSet*> chosen{nullptr};

}  // namespace

const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {"avx512", fs_update_run_avx512, fs_sum_squares_avx512, has_avx512},
    {"avx2", fs_update_run_avx2, fs_sum_squares_avx2, has_avx2},
#endif
    {"baseline", fs_update_run_baseline, fs_sum_squares_baseline, always},
};
const int kNumInstructionSets = sizeof kInstructionSets / sizeof kInstructionSets[0];

const InstructionSet& instruction_set() {
  if (const InstructionSet* set = chosen.load(std::memory_order_relaxed)) return *set;
  const InstructionSet* set = kInstructionSets;
  while (!set->supported()) ++set;
  chosen.store(set, std::memory_order_relaxed);
  return *set;
}

bool set_instruction_set(const char* name) {
  for (const InstructionSet& set : kInstructionSets) {
    if (strcmp(set.name, name) == 0 && set.supported()) {
      chosen.store(&set, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace fused_sched
