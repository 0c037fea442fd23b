#include "norm.h"

#include <algorithm>
#include <vector>

#include "../check_call.h"
#include "../float_environment.h"
#include "isa.h"
#include "parallel.h"

namespace fused_sched {
namespace {

static_assert(sizeof(fs_square_sum) == sizeof(SquareSum), "the seam of norm_tile.h");

// A chunk of 4,096 elements takes about 1 us in cache, waking a thread about 10 us.
constexpr int64_t kMinChunksPerThread = 16;

// Chunks that one thread takes at a time, so that it reads some 256 KB in a row.
constexpr int64_t kElementsPerRun = 65536;

SquareSum add_chunks(const SquareSum* chunks, int64_t count) {
  std::vector<SquareSum> accumulators(kNormFinalAccumulators, SquareSum{});
  for (int64_t i = 0; i < count; ++i) {
    add(accumulators[static_cast<size_t>(i % kNormFinalAccumulators)], chunks[i]);
  }
  for (size_t half = kNormFinalAccumulators / 2; half > 0; half /= 2) {
    for (size_t i = 0; i < half; ++i) add(accumulators[i], accumulators[i + half]);
  }
  return accumulators[0];
}

}  // namespace

void sum_norm(const fs_call& call) {
  const int64_t length = norm_chunk_length(call);
  std::vector<int64_t> chunk_end(static_cast<size_t>(call.num_tensors));  // running number of chunks per tensor
  int64_t num_chunks = 0;
  for (int64_t i = 0; i < call.num_tensors; ++i) {
    num_chunks += num_norm_chunks(call.tensors[i], length);
    chunk_end[static_cast<size_t>(i)] = num_chunks;
  }
  const fs_sum_squares sum_squares = instruction_set().sum_squares;
  const int64_t chunks_per_run = std::max<int64_t>(1, kElementsPerRun / length);
  const int64_t num_runs = (num_chunks + chunks_per_run - 1) / chunks_per_run;
  const int num_threads = static_cast<int>(std::min<int64_t>(call.num_threads, num_chunks / kMinChunksPerThread));
  parallel_for(num_runs, num_threads, [&](int64_t run) {
    const DefaultFloatEnvironment environment;
    const int64_t first_chunk = run * chunks_per_run;
    const int64_t last_chunk = std::min(first_chunk + chunks_per_run, num_chunks);
    size_t index =
        static_cast<size_t>(std::upper_bound(chunk_end.begin(), chunk_end.end(), first_chunk) - chunk_end.begin());
    for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
      while (chunk >= chunk_end[index]) ++index;  // past the end of this tensor; empty ones have no chunk
      const fs_tensor& tensor = call.tensors[index];
      const int64_t first = (chunk - (index > 0 ? chunk_end[index - 1] : 0)) * length;
      const uint64_t bytes = static_cast<uint64_t>(first * kFormatBytes[tensor.grad_format]);
      fs_square_sum sum;
      sum_squares(reinterpret_cast<const void*>(tensor.grad + bytes), std::min(length, tensor.numel - first),
                  tensor.grad_format, &sum);
      call.chunk_sums[chunk] = {sum.middle, sum.large, sum.small};
    }
  });
  store_sum(*call.norm, add_chunks(call.chunk_sums, num_chunks));
}

}  // namespace fused_sched
