// The sum of squares of one chunk, compiled once per instruction set (FS_ISA). The accumulators are the same in
// every build, and stay in the first-level cache: at most 2 KB.
#include "norm_tile.h"

#include "../core/norm.h"

FS_NAMESPACE_BEGIN
namespace {

// Adds the upper half of the accumulators to the lower until one is left. Those past `used` are still zero, and adding
// zero changes nothing: a tensor of a few elements costs a few additions. Every length is known to the compiler, for
// which the short sums are a few instructions then.
template <int kCount>
void fold(double* accumulators, int64_t used) {
  constexpr int kHalf = kCount / 2;
  if constexpr (kHalf > 0) {
    if (kHalf < used) {
      for (int i = 0; i < kHalf; ++i) accumulators[i] += accumulators[i + kHalf];
    }
    fold<kHalf>(accumulators, used);
  }
}

// Between rows of accumulators: keeps g++ from working on several rows at once (unroll and jam), whose streams, a row
// apart, make it four times slower from memory.
inline void end_row() { asm volatile("" ::: "memory"); }

template <class Codec>
void add_row(const typename Codec::Storage* stored, int count, double* middle) {
  for (int i = 0; i < count; ++i) add_square(middle[i], static_cast<double>(Codec::decode(stored[i])));
  end_row();
}

template <class Codec>
void sum_squares(const typename Codec::Storage* stored, int64_t count, fs_square_sum& sum) {
  constexpr int kCount = kNormAccumulators<Codec>;
  alignas(64) double middle[kCount] = {};
  int64_t first = 0;
  for (; first + kCount <= count; first += kCount) add_row<Codec>(stored + first, kCount, middle);
  add_row<Codec>(stored + first, static_cast<int>(count - first), middle);
  fold<kCount>(middle, count);
  sum = {middle[0], 0.0, 0.0};
}

// Rows without an extreme element, which are nearly all, add to one sum: to the others they would add zeros.
void add_row(const double* __restrict stored, int count, double* __restrict middle, double* __restrict large,
             double* __restrict small) {
  int64_t extremes = 0;
  for (int i = 0; i < count; ++i) extremes |= static_cast<int64_t>(is_extreme(stored[i]));
  if (extremes == 0) {
    for (int i = 0; i < count; ++i) middle[i] += stored[i] * stored[i];
    end_row();
    return;
  }
  for (int i = 0; i < count; ++i) {
    middle[i] += middle_square(stored[i]);
    large[i] += large_square(stored[i]);
    small[i] += small_square(stored[i]);
  }
  end_row();
}

template <>
void sum_squares<Float64>(const double* stored, int64_t count, fs_square_sum& sum) {
  constexpr int kCount = kNormAccumulators<Float64>;
  alignas(64) double middle[kCount] = {};
  alignas(64) double large[kCount] = {};
  alignas(64) double small[kCount] = {};
  int64_t first = 0;
  for (; first + kCount <= count; first += kCount) add_row(stored + first, kCount, middle, large, small);
  add_row(stored + first, static_cast<int>(count - first), middle, large, small);
  fold<kCount>(middle, count);
  fold<kCount>(large, count);
  fold<kCount>(small, count);
  sum = {middle[0], large[0], small[0]};
}

}  // namespace
FS_NAMESPACE_END

#define FS_JOIN(prefix, isa) prefix##isa
#define FS_ENTRY(isa) FS_JOIN(fs_sum_squares_, isa)

extern "C" void FS_ENTRY(FS_ISA)(const void* elements, int64_t count, int32_t format, fs_square_sum* sum) {
  using namespace fused_sched;
  switch (format) {
#define FS_SUM(identifier, tag, name, Codec) \
  case identifier: return sum_squares<Codec>(static_cast<const Codec::Storage*>(elements), count, *sum);
    FS_FORMATS(FS_SUM)
#undef FS_SUM
  }
}
