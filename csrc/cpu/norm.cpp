#include "norm.h"

#include <algorithm>

#include "../check_call.h"
#include "isa.h"
#include "parallel.h"
#include "work_units.h"

namespace fused_sched {
namespace {

static_assert(sizeof(fs_square_sum) == sizeof(SquareSum), "the seam of norm_tile.h");

// Elements that one thread takes at a time: some 256 KB in a row, 16 us in cache. Waking a thread takes about 10 us.
constexpr int64_t kUnitLength = 65536;
static_assert(kUnitLength % kNormTile == 0, "a unit begins with a chunk");

SquareSum add_chunks(const SquareSum* chunks, int64_t count) {
  SquareSum accumulators[kNormFinalAccumulators] = {};
  for (int64_t i = 0; i < count; ++i) {
    add(accumulators[i % kNormFinalAccumulators], chunks[i]);
  }
  for (int half = kNormFinalAccumulators / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) add(accumulators[i], accumulators[i + half]);
  }
  return accumulators[0];
}

// Tensors between the one that is read and the one whose memory is asked for.
constexpr int64_t kAhead = 4;

FS_HD void prefetch_grad(const fs_tensor& tensor) {
  prefetch_stream(tensor.grad, tensor.numel * kFormatBytes[tensor.grad_format]);
}

}  // namespace

void sum_norm(const fs_call& call) {
  const int64_t length = norm_chunk_length(call);
  const int64_t unit_length = std::max(length, kUnitLength / length * length);
  const WorkUnits& work = work_units(call, [=](int64_t) { return unit_length; }, length);
  const fs_sum_squares sum_squares = instruction_set().sum_squares;
  parallel_for(static_cast<int64_t>(work.units.size()), call.num_threads, [&](int64_t index) {
    const WorkUnit& unit = work.units[static_cast<size_t>(index)];
    int64_t chunk = unit.chunk;
    for (int64_t i = unit.begin; i < unit.end; ++i) {
      if (i + kAhead < unit.end) prefetch_grad(call.tensors[i + kAhead]);
      const fs_tensor& tensor = call.tensors[i];
      const int64_t last = unit.end - unit.begin > 1 ? tensor.numel : unit.first + unit.count;
      for (int64_t first = unit.first; first < last; first += length) {
        const uint64_t bytes = static_cast<uint64_t>(first * kFormatBytes[tensor.grad_format]);
        fs_square_sum sum;
        sum_squares(reinterpret_cast<const void*>(tensor.grad + bytes), std::min(length, last - first),
                    tensor.grad_format, &sum);
        call.chunk_sums[chunk++] = {sum.middle, sum.large, sum.small};
      }
    }
  });
  store_sum(*call.norm, add_chunks(call.chunk_sums, work.num_chunks));
}

}  // namespace fused_sched
