// The seam between the CPU dispatcher and the loops, which are compiled once per instruction set. Plain data
// only: a type of the core has another name in each of those builds.
#pragma once

#include <stdint.h>

extern "C" {

// A run of consecutive elements of one tensor, beginning at a multiple of kPadding. Addresses are those of the
// run's first element; state that a tensor does not have is null.
struct fs_run {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;
  void* master;
  uint8_t* exp_avg_scale;
  uint8_t* exp_avg_sq_scale;
  const void* scalars;  // StepScalars of the type the parameter computes in
  uint32_t random_key[2];
  uint32_t first;  // lower 32 bits of the first element's index; all of the run have the same upper ones
  int64_t count;
  int32_t param_format;
  int32_t grad_format;
  int32_t master_format;
  int32_t moments_format;
  int32_t from_memory;  // its streams are more than caches hold: they are asked for ahead
};

typedef void (*fs_update_run)(const struct fs_run* run);

void fs_update_run_avx512(const struct fs_run* run);
void fs_update_run_avx2(const struct fs_run* run);
void fs_update_run_baseline(const struct fs_run* run);
}
