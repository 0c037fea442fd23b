// A small pool of threads that sleep between steps.
#pragma once

#include <stdint.h>

#include <functional>

namespace fused_sched {

void parallel_for_function(int64_t count, int num_threads, const std::function<void(int64_t)>& body);

// Calls body(i) for every i in [0, count), on at most num_threads threads, this one among them. The order is
// unspecified. Runs everything here while another thread of the process uses the pool, and after a fork. Every body
// finds the default floating-point environment.
template <class Body>
void parallel_for(int64_t count, int num_threads, const Body& body) {
  parallel_for_function(count, num_threads, std::cref(body));  // of a copy, std::function would allocate the captures
}

}  // namespace fused_sched
