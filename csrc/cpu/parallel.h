// A small pool of threads that sleep between steps.
#pragma once

#include <stdint.h>

#include <functional>

namespace fused_sched {

// Calls body(i) for every i in [0, count), on at most num_threads threads, this one among them. The order is
// unspecified. Runs everything here while another thread of the process uses the pool, and after a fork. Every body
// finds the default floating-point environment, which is set once per thread: setting it costs what updating a
// tensor of 64 elements does.
void parallel_for(int64_t count, int num_threads, const std::function<void(int64_t)>& body);

}  // namespace fused_sched
