// Checks of a call that every backend makes before it changes anything: tags, indices and addresses that would
// otherwise be followed out of bounds.
#pragma once

#include "failure.h"

namespace fused_sched {

#define FS_NAME(identifier, tag, name, ...) name,
constexpr const char* kFormatNames[] = {FS_FORMATS(FS_NAME)};
constexpr const char* kMasterNames[] = {FS_MASTERS(FS_NAME)};
constexpr const char* kMomentsNames[] = {FS_MOMENTS(FS_NAME)};
#undef FS_NAME
constexpr int kNumFormats = sizeof(kFormatNames) / sizeof(kFormatNames[0]);
constexpr int kNumMasters = sizeof(kMasterNames) / sizeof(kMasterNames[0]);
constexpr int kNumMoments = sizeof(kMomentsNames) / sizeof(kMomentsNames[0]);

// Elements of one tensor. A CUDA launch numbers the tiles of its tensors with 30 bits, and the smallest tile
// (fp64) has 2^9 elements.
constexpr int64_t kMaxElements = int64_t{1} << 39;

// supported: whether the backend has code for a tensor's combination of formats, all of which are known.
template <class Supported>
void check_formats(const fs_tensor& tensor, int64_t index, Supported supported) {
  const long long i = index;
  if (tensor.param_format >= kNumFormats || tensor.grad_format >= kNumFormats || tensor.master >= kNumMasters ||
      tensor.moments >= kNumMoments) {
    fail("tensor %lld: unknown tag among parameter %d, gradient %d, master %d, moments %d", i, tensor.param_format,
         tensor.grad_format, tensor.master, tensor.moments);
  }
  if (!supported(tensor)) {
    fail(
        "tensor %lld: no update for %s parameters with %s gradients, master \"%s\" and moments \"%s\"%s: on CUDA fp64 "
        "goes with fp64 alone; only bf16 parameters have split or stochastic masters, and fp16 ones fp32 masters; "
        "fp64 and amsgrad need fp32 moments",
        i, kFormatNames[tensor.param_format], kFormatNames[tensor.grad_format], kMasterNames[tensor.master],
        kMomentsNames[tensor.moments], tensor.amsgrad ? " with amsgrad" : "");
  }
}

inline void check_placement(const fs_call& call, int64_t index) {
  const fs_tensor& tensor = call.tensors[index];
  const long long i = index;
  if (tensor.group < 0 || tensor.group >= call.num_groups) {
    fail("tensor %lld: group must be in [0, %lld), got %d", i, static_cast<long long>(call.num_groups), tensor.group);
  }
  if (tensor.numel == 0) return;  // has no state
  if (tensor.arena < 0 || tensor.arena >= call.num_arenas) {
    fail("tensor %lld: arena must be in [0, %lld), got %d", i, static_cast<long long>(call.num_arenas), tensor.arena);
  }
  const fs_arena& arena = call.arenas[tensor.arena];
  const bool has_scales = kScaleGroup[tensor.moments] != 0;
  const bool needed[kNumSlots] = {true,       true,      tensor.amsgrad != 0, kMasterBytes[tensor.master] != 0,
                                  has_scales, has_scales};
  for (int slot = 0; slot < kNumSlots; ++slot) {
    if (needed[slot] && (arena.slot[slot] == 0 || arena.slot[slot] % 16 != 0)) {
      fail("tensor %lld: slot %d of arena %d must be a 16-byte aligned address, got 0x%llx", i, slot, tensor.arena,
           static_cast<unsigned long long>(arena.slot[slot]));
    }
  }
  if (tensor.state_offset < 0 || tensor.state_offset % kPadding != 0 || tensor.state_offset / kPadding > UINT32_MAX) {
    fail("tensor %lld: state_offset must be a multiple of %d in [0, 2^40), got %lld", i, static_cast<int>(kPadding),
         static_cast<long long>(tensor.state_offset));
  }
  if (tensor.numel < 0 || tensor.numel >= kMaxElements) {
    fail("tensor %lld: numel must be in [0, 2^39), got %lld", i, static_cast<long long>(tensor.numel));
  }
}

template <class Supported>
void check_call(const fs_call& call, Supported supported) {
  for (int64_t i = 0; i < call.num_tensors; ++i) {
    check_formats(call.tensors[i], i, supported);
    check_placement(call, i);
  }
}

}  // namespace fused_sched
