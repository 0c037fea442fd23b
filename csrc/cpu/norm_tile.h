// The seam between the CPU dispatcher and the loops of the norm, as update_tile.h is for those of the update.
#pragma once

#include <stdint.h>

extern "C" {

// Three sums of squares, laid out as the core's SquareSum.
struct fs_square_sum {
  double middle;
  double large;
  double small;
};

typedef void (*fs_sum_squares)(const void* elements, int64_t count, int32_t format, struct fs_square_sum* sum);

void fs_sum_squares_avx512(const void* elements, int64_t count, int32_t format, struct fs_square_sum* sum);
void fs_sum_squares_avx2(const void* elements, int64_t count, int32_t format, struct fs_square_sum* sum);
void fs_sum_squares_baseline(const void* elements, int64_t count, int32_t format, struct fs_square_sum* sum);
}
