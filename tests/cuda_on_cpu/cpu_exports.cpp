// The choice of an instruction set as a C function, which ctypes finds.
#include "cpu/isa.h"

// 0 if this machine lacks it.
extern "C" int cpu_set_instruction_set(const char* name) { return fused_sched::set_instruction_set(name) ? 1 : 0; }
