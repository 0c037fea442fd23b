// Asking for memory that will be read and written soon.
#pragma once

#include <stdint.h>

#include "core/platform.h"

FS_NAMESPACE_BEGIN

// g++ 12 takes a function that does nothing but prefetch to have no effect, and removes its calls unless it inlines
// them: so this, and every function that does nothing else, is FS_HD (tests/test_cpu_code.py).
FS_HD void prefetch(const void* begin, int64_t bytes) {
  const char* const first = static_cast<const char*>(begin);
  for (int64_t offset = 0; offset < bytes; offset += 64) __builtin_prefetch(first + offset, 1, 3);
}

FS_NAMESPACE_END
