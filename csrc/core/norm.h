// The norm of all gradients, and what is made of it: the factor that clips them, and whether they are finite.
//
// The result does not depend on how many threads or blocks sum, nor on the tables the tensors travel in: each
// tensor is cut into chunks of one length, a function of the tensors' sizes alone; a chunk's square number i is
// added to accumulator i % n, in order; the n accumulators are folded in halves; chunks are added the same way, in
// parameter order.
//
// Squares are kept in double, where those of the narrower formats are exact and neither overflow nor vanish: 1e38
// has a square of 1e76. Those of doubles are kept by magnitude in three sums (Blue 1978, "A portable Fortran program
// to find the Euclidean norm of a vector"), of which only the scaling differs.
#pragma once

#include "codec.h"

FS_NAMESPACE_BEGIN

struct SquareSum {
  double middle;
  double large;  // of elements beyond kLargeElement, times kShrink^2
  double small;  // of elements below kSmallElement, times kEnlarge^2
};

// The squares of 2^39 elements (kMaxElements) stay below 2^1024 in each sum, and none of them is subnormal.
constexpr double kLargeElement = 0x1p480;
constexpr double kSmallElement = 0x1p-480;
constexpr double kShrink = 0x1p-600;
constexpr double kEnlarge = 0x1p600;

// Settings and results of one device. Settings are written in place, so that captured graphs follow.
struct NormState {
  double max_norm;      // infinite: do not clip
  double grad_divisor;  // of the group records
  double squares;       // sum over all gradients as they are; a hook may replace it by the sum over all processes
  double sum_root;      // its root, which may be finite where `squares` is not
  double norm;          // of the gradients after unscaling
  double clip;          // factor that clips them; 1: within max_norm
  int32_t skip_nonfinite;
  uint32_t blocks_done;  // of the launch that is running; 0 between launches
};

// Units of work. 16,384 chunks are four for each warp an H200 runs at once; kNormTile keeps short chunks from costing
// more in folding than in reading.
constexpr int64_t kNormChunks = 16384;
constexpr int64_t kNormTile = 4096;

FS_HD_CALL int64_t norm_tiles(int64_t numel) { return (numel + kNormTile - 1) / kNormTile; }

// Elements of a chunk, from the number of tiles of all tensors of the call. There are then at most kNormChunks chunks
// and one more for each tensor.
FS_HD_CALL int64_t norm_chunk_length(int64_t num_tiles) {
  return num_tiles <= kNormChunks ? kNormTile : (num_tiles + kNormChunks - 1) / kNormChunks * kNormTile;
}

// Accumulators of a chunk: what 32 threads read at once, 16 bytes each.
template <class Codec>
constexpr int kNormAccumulators = 512 / static_cast<int>(sizeof(typename Codec::Storage));

// Accumulators of the sum over chunks.
constexpr int kNormFinalAccumulators = 256;

// An element of a narrower format, whose square is exact in double: fused or not, the sum has the same bits.
FS_HD void add_square(double& middle, double element) {
#if defined(__CUDA_ARCH__) || defined(__FMA__)
  middle = multiply_add(element, element, middle);
#else
  middle += element * element;
#endif
}

// What a double adds to each of the three sums; a NaN compares false and goes to the middle.
FS_HD bool is_extreme(double element) { return (fabs(element) > kLargeElement) | (fabs(element) < kSmallElement); }

FS_HD double middle_square(double element) { return is_extreme(element) ? 0.0 : element * element; }

FS_HD double large_square(double element) {
  const double shrunk = fabs(element) > kLargeElement ? element * kShrink : 0.0;
  return shrunk * shrunk;
}

FS_HD double small_square(double element) {
  const double enlarged = fabs(element) < kSmallElement ? element * kEnlarge : 0.0;
  return enlarged * enlarged;
}

FS_HD void add_square(SquareSum& sum, double element) {
  sum.middle += middle_square(element);
  sum.large += large_square(element);
  sum.small += small_square(element);
}

FS_HD void add(SquareSum& sum, const SquareSum& other) {
  sum.middle += other.middle;
  sum.large += other.large;
  sum.small += other.small;
}

// Infinite or NaN exactly when an element is, or when the root itself is beyond the range of double.
FS_HD_CALL double root(const SquareSum& sum) {
  if (sum.large > 0.0) return sqrt(sum.large + sum.middle * kShrink * kShrink) * kEnlarge;
  if (sum.middle != 0.0) return sqrt(sum.middle + sum.small * kShrink * kShrink);
  return sqrt(sum.small) * kShrink;
}

FS_HD_CALL double total(const SquareSum& sum) {
  return sum.large * kEnlarge * kEnlarge + sum.middle + sum.small * kShrink * kShrink;
}

// torch.nn.utils.clip_grad_norm_: max_norm / (norm + 1e-6), at most 1. An infinite norm gives 0, a NaN stays: with
// error_if_nonfinite=False torch then multiplies the gradients by it, and so do we. Without a limit the factor is 1.
FS_HD_CALL double clip_factor(double norm, double max_norm) {
  if (max_norm == INFINITY) return 1.0;
  const double factor = max_norm / (norm + 1e-6);
  return factor > 1.0 ? 1.0 : factor;
}

FS_HD_CALL void store_sum(NormState& state, const SquareSum& sum) {
  state.squares = total(sum);
  state.sum_root = root(sum);
}

// From the sum to norm and factor. was_reduced: `squares` was replaced since.
FS_HD_CALL void finish_norm(NormState& state, bool was_reduced, double grad_scale) {
  const double sum_root = was_reduced ? sqrt(state.squares) : state.sum_root;
  state.norm = sum_root / (grad_scale * state.grad_divisor);
  state.clip = clip_factor(state.norm, state.max_norm);
}

// Whether the step is to be skipped for what the norm is.
FS_HD_CALL bool refuses_step(const NormState& state) {
  return state.skip_nonfinite != 0 && !(fabs(state.norm) < INFINITY);
}

FS_NAMESPACE_END
