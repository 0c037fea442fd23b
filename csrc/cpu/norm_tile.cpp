// The sum of squares of one chunk, compiled once per instruction set (FS_ISA). The accumulators are the same in
// every build, and stay in the first-level cache: at most 2 KB.
#include "norm_tile.h"

#include "../core/norm.h"

FS_NAMESPACE_BEGIN
namespace {

// Adds the upper half of the accumulators to the lower until one is left. Those past `used` are still zero, and adding
// zero changes nothing: a tensor of a few elements costs a few additions.
void fold(double* accumulators, int count, int64_t used) {
  int half = count / 2;
  while (half >= used && half > 0) half /= 2;
  for (; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) accumulators[i] += accumulators[i + half];
  }
}

template <class Codec>
void sum_squares(const typename Codec::Storage* stored, int64_t count, fs_square_sum& sum) {
  constexpr int kCount = kNormAccumulators<Codec>;
  alignas(64) double middle[kCount] = {};
  int64_t first = 0;
  for (; first + kCount <= count; first += kCount) {
    for (int i = 0; i < kCount; ++i) add_square(middle[i], static_cast<double>(Codec::decode(stored[first + i])));
  }
  for (int64_t i = first; i < count; ++i) add_square(middle[i - first], static_cast<double>(Codec::decode(stored[i])));
  fold(middle, kCount, count);
  sum = {middle[0], 0.0, 0.0};
}

// Doubles have three sums, kept apart for the sake of vectors.
template <>
void sum_squares<Float64>(const double* stored, int64_t count, fs_square_sum& sum) {
  constexpr int kCount = kNormAccumulators<Float64>;
  alignas(64) double middle[kCount] = {};
  alignas(64) double large[kCount] = {};
  alignas(64) double small[kCount] = {};
  const auto add = [&](int64_t i, double element) {
    SquareSum partial = {middle[i], large[i], small[i]};
    add_square(partial, element);
    middle[i] = partial.middle;
    large[i] = partial.large;
    small[i] = partial.small;
  };
  int64_t first = 0;
  for (; first + kCount <= count; first += kCount) {
    for (int i = 0; i < kCount; ++i) add(i, stored[first + i]);
  }
  for (int64_t i = first; i < count; ++i) add(i - first, stored[i]);
  fold(middle, kCount, count);
  fold(large, kCount, count);
  fold(small, kCount, count);
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
