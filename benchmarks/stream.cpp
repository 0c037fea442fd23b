// The memory's roof on a CPU: streams that are read and written in place beside one that is read, and next to no
// arithmetic. Compiled by roof.py for the machine it runs on; its loops know nothing of the optimizer's.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

// A cache line of floats, whatever vectors the machine has; the compiler would otherwise reload `read` after each
// store.
typedef float Line __attribute__((vector_size(64), aligned(4), may_alias));

constexpr int64_t kLine = 16;
// Between two visits to the counter that the threads share: one that is held up leaves its share to the others.
constexpr int64_t kChunk = 1 << 16;
// Of each stream, between two streams, where they are not walked side by side.
constexpr int64_t kTile = 1024;

Line& line(float* stream, int64_t first) { return *reinterpret_cast<Line*>(stream + first); }
const Line& line(const float* stream, int64_t first) { return *reinterpret_cast<const Line*>(stream + first); }

// All streams side by side. ahead: floats by which they are prefetched; 0: left to the processor.
template <int kStreams, int64_t kAhead>
void side_by_side(float* const* updated, const float* read, int64_t begin, int64_t end) {
  float* stream[kStreams];
  for (int s = 0; s < kStreams; ++s) stream[s] = updated[s];
  for (int64_t i = begin; i < end; i += kLine) {
    const Line addend = line(read, i);
    if (kAhead > 0) __builtin_prefetch(read + i + kAhead, 0, 3);
    for (int s = 0; s < kStreams; ++s) {
      line(stream[s], i) += addend;
      if (kAhead > 0) __builtin_prefetch(stream[s] + i + kAhead, 1, 3);
    }
  }
}

// Tile by tile, each stream for itself.
template <int kStreams>
void tile_by_tile(float* const* updated, const float* read, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t last = std::min(first + kTile, end);
    for (int s = 0; s < kStreams; ++s) {
      for (int64_t i = first; i < last; i += kLine) line(updated[s], i) += line(read, i);
    }
  }
}

template <int kStreams>
void walk(int way, float* const* updated, const float* read, int64_t begin, int64_t end) {
  switch (way) {
    case 0: return side_by_side<kStreams, 0>(updated, read, begin, end);
    case 1: return side_by_side<kStreams, 64>(updated, read, begin, end);
    case 2: return side_by_side<kStreams, 256>(updated, read, begin, end);
    default: return tile_by_tile<kStreams>(updated, read, begin, end);
  }
}

void walk(int num_updated, int way, float* const* updated, const float* read, int64_t begin, int64_t end) {
  switch (num_updated) {
    case 1: return walk<1>(way, updated, read, begin, end);
    case 2: return walk<2>(way, updated, read, begin, end);
    case 3: return walk<3>(way, updated, read, begin, end);
    case 4: return walk<4>(way, updated, read, begin, end);
    case 5: return walk<5>(way, updated, read, begin, end);
    default: return walk<6>(way, updated, read, begin, end);
  }
}

}  // namespace

// way: 0 to 2 side by side, prefetching 0, 64 or 256 floats ahead; 3 tile by tile. count: floats of each stream, a
// multiple of a cache line's.
extern "C" void stream(int num_updated, int way, float* const* updated, const float* read, int64_t count,
                       int num_threads) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t begin = next.fetch_add(kChunk); begin < count; begin = next.fetch_add(kChunk)) {
      walk(num_updated, way, updated, read, begin, std::min(begin + kChunk, count));
    }
  };
  std::vector<std::thread> others;
  for (int t = 1; t < num_threads; ++t) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}
