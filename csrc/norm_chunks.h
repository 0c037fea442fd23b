// The chunks into which the gradients of a call are cut for their norm (core/norm.h).
#pragma once

#include "step.h"

namespace fused_sched {

inline int64_t norm_chunk_length(const fs_call& call) {
  int64_t num_tiles = 0;
  for (int64_t i = 0; i < call.num_tensors; ++i) num_tiles += norm_tiles(call.tensors[i].numel);
  return norm_chunk_length(num_tiles);
}

inline int64_t num_norm_chunks(const fs_tensor& tensor, int64_t chunk_length) {
  return (tensor.numel + chunk_length - 1) / chunk_length;
}

inline int64_t num_norm_chunks(const fs_call& call) {
  const int64_t chunk_length = norm_chunk_length(call);
  int64_t num_chunks = 0;
  for (int64_t i = 0; i < call.num_tensors; ++i) num_chunks += num_norm_chunks(call.tensors[i], chunk_length);
  return num_chunks;
}

}  // namespace fused_sched
