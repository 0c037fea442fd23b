// The update of 64 elements in AVX-512 registers: the whole blocks of runs in which something is to be decoded. The
// loops of update_tile.cpp leave that to the compiler, which spends 175 vector instructions on 16 elements of split8 +
// 8bit; here it is some 65, because
//   - streams widen and narrow within 128-bit lanes, and what 16 elements share is in the lane that has them,
//   - 8-bit codes become floats, and floats codes, without a case for subnormals,
//   - one hash serves two elements (random_bits), and one tree of maxima both moments' scales,
//   - NaNs and infinities are not handled: a block with one is not stored, and the tile loop does it over. That is
//     asked once, at the end: with a branch wherever it may turn out, 8-bit blocks take an eighth longer.
// The bits are those of core/'s codecs: tests/test_cpu_blocks.py compares. Included by update_tile.cpp.
#pragma once

#include <type_traits>

#include "../prefetch.h"
#include "moments_avx512.h"

FS_NAMESPACE_BEGIN
namespace {

// ---- the block -------------------------------------------------------------------------------------

// The processor's own prefetcher begins anew at every page of every stream, and not early enough: from memory, asking
// makes steps of 16.8M elements up to a fifth shorter (docs/measured.md).
constexpr int64_t kAhead = 1024;  // elements: 512 and 2048 gain less, 4096 nothing

FS_HD void ask_ahead(const void* stream, int64_t at, int64_t element_bytes) {
  prefetch(static_cast<const char*>(stream) + (at + kAhead) * element_bytes, kBlock * element_bytes);
}

FS_HD void ask_ahead(const fs_run& run, int64_t at) {
  const int64_t moment = kMomentBytes[run.moments_format];
  ask_ahead(run.param, at, kFormatBytes[run.param_format]);
  ask_ahead(run.grad, at, kFormatBytes[run.grad_format]);
  ask_ahead(run.exp_avg, at, moment);
  ask_ahead(run.exp_avg_sq, at, moment);
  ask_ahead(run.master, at, kMasterBytes[run.master_format]);
}

// False for some that are finite, too, those whose sum overflows: the tile loop does them over for nothing.
FS_HD bool all_finite(const Floats& values) {
  constexpr int kNanOrInfinite = 0x99;
  const __m512 first = _mm512_add_ps(values.lane[0], values.lane[1]);
  const __m512 second = _mm512_add_ps(values.lane[2], values.lane[3]);
  return _mm512_fpclass_ps_mask(_mm512_add_ps(first, second), kNanOrInfinite) == 0;
}

// Whether the block was updated; if not, nothing was written.
template <class MomentsCodec>
FS_HD bool update_block(const fs_run& run, int64_t at, const StepScalars<float>& scalars) {
  using Moments = BlockMoments<MomentsCodec>;
  using Order = typename Moments::Order;
  void* const param = static_cast<char*>(run.param) + at * kFormatBytes[run.param_format];
  void* const kept = static_cast<char*>(run.master) + at * kMasterBytes[run.master_format];
  const RandomKey key = {run.random_key[0], run.random_key[1]};
  const uint32_t first_element = run.first + static_cast<uint32_t>(at);
  Bits random;
  random_of_block<Order>(key, first_element, random);
  Floats grad, weight, first, second, along;
  load_grad<Order>(run.grad_format, static_cast<const char*>(run.grad) + at * kFormatBytes[run.grad_format], grad);
  load_weight<Order>(run.param_format, run.master_format, param, kept, weight);
  const bool loaded = Moments::load(run, at, first, second);
  for (int i = 0; i < kVectors; ++i) {
    __m512 unused = _mm512_setzero_ps();
    update_moments<false>(weight.lane[i], first.lane[i], second.lane[i], unused, grad.lane[i], scalars);
    along.lane[i] = direction(first.lane[i], second.lane[i], scalars);
  }
  typename Moments::Encoded moments;
  const bool encoded = Moments::encode(first, second, random, moments);
  for (int i = 0; i < kVectors; ++i) weight.lane[i] = moved_weight(weight.lane[i], along.lane[i], scalars);
  const bool finite = all_finite(weight);  // which a first moment that is not would keep its weight from being
  if (!(loaded & encoded & finite)) return false;
  Moments::store(run, at, moments);
  store_weight<Order>(run.param_format, run.master_format, weight, key, first_element, param, kept);
  return true;
}

template <class Param>
constexpr bool kHasBlocks = std::is_same<Param, Float32>::value || std::is_same<Param, Bfloat16>::value;

// Also not steps with beta1 or beta2 below 0.5 (GANs with beta1 = 0).
inline bool has_blocks(const fs_run& run) {
  if (run.param_format == kFloat32 && run.moments_format == kMomentsFloat32) return false;  // nothing to decode
  if (run.max_exp_avg_sq != nullptr || run.grad_format == kFloat64) return false;
  return (static_cast<const StepScalars<float>*>(run.scalars)->flags & ~(kDecoupledDecay | kL2Decay)) == 0;
}

template <class MomentsCodec, class Redo>
void update_blocks(const fs_run& shared_run, int64_t end, Redo redo) {
  // Copies, which stores cannot change: their members stay in registers.
  const fs_run run = shared_run;
  StepScalars<float> scalars = *static_cast<const StepScalars<float>*>(run.scalars);
  scalars.flags &= kDecoupledDecay | kL2Decay;
  const int64_t asking_ends = run.from_memory ? end - kAhead : 0;
  for (int64_t at = 0; at < end; at += kBlock) {
    if (at < asking_ends) ask_ahead(run, at);
    if (!update_block<MomentsCodec>(run, at, scalars)) redo(at);
  }
}

// The number of elements that whole blocks have updated. redo(first): the tile loop on the block that begins there.
template <class Redo>
int64_t update_blocks(const fs_run& run, Redo redo) {
  const int64_t end = run.count / kBlock * kBlock;
  switch (run.moments_format) {
    case kMomentsFloat32: update_blocks<MomentsFloat32>(run, end, redo); break;
    case kMomentsBfloat16: update_blocks<MomentsBfloat16>(run, end, redo); break;
    default: update_blocks<Moments8bit>(run, end, redo);
  }
  return end;
}

}  // namespace
FS_NAMESPACE_END
