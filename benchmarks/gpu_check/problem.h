// What the self-test works on: tensors with their state, clock, rates and norm, once in the host's memory and once in
// the device's.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "step.h"

extern "C" {
int oracle_norm(fs_call* call, char* error);
int oracle_clock(fs_call* call, char* error);
int oracle_update(fs_call* call, char* error);
int device_norm(fs_call* call, char* error);
int device_clock(fs_call* call, char* error);
int device_update(fs_call* call, char* error);
const char* device_name();
void* device_allocate(size_t bytes);
void device_free(void* memory);
void device_write(void* to, const void* from, size_t bytes);
void device_read(void* to, const void* from, size_t bytes);
void device_synchronize();
void device_profile(int on);
}

namespace fused_sched {

enum Side { kOracle, kDevice };

// Memory of the same contents on both sides, of exactly this many bytes: what lies behind is somebody else's.
class Buffer {
 public:
  explicit Buffer(size_t bytes, size_t shift = 0)
      : shift_(shift),
        host_(bytes + shift),
        device_(static_cast<uint8_t*>(device_allocate(std::max<size_t>(bytes + shift, 1)))) {
    upload();
  }
  Buffer(Buffer&& other) noexcept : shift_(other.shift_), host_(std::move(other.host_)), device_(other.device_) {
    other.device_ = nullptr;
  }
  ~Buffer() {
    if (device_ != nullptr) device_free(device_);
  }

  uint64_t at(Side side) const { return reinterpret_cast<uint64_t>(side == kOracle ? host_.data() : device_) + shift_; }
  uint8_t* host() { return host_.data() + shift_; }
  size_t size() const { return host_.size() - shift_; }
  void upload() {
    if (size() > 0) device_write(device_ + shift_, host(), size());
  }

  // The first byte that differs, or -1.
  long long difference() {
    std::vector<uint8_t> found(size());
    if (size() > 0) device_read(found.data(), device_ + shift_, size());
    if (size() == 0 || memcmp(found.data(), host(), size()) == 0) return -1;
    for (size_t i = 0; i < size(); ++i) {
      if (found[i] != host()[i]) return static_cast<long long>(i);
    }
    return -1;
  }

 private:
  size_t shift_;
  std::vector<uint8_t> host_;
  uint8_t* device_;
};

struct Formats {
  int param;
  int grad;
  int master;
  int moments;
  bool amsgrad;
};

class Random {
 public:
  uint32_t bits() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<uint32_t>(state_ >> 16);
  }
  // Signed, of magnitudes between 2^-20 and 1.
  double value() {
    const double magnitude = std::ldexp(1.0 + bits() * 0x1p-32, -1 - static_cast<int>(bits() % 20));
    return bits() % 2 == 0 ? magnitude : -magnitude;
  }

 private:
  uint64_t state_ = 88172645463325252ull;
};

inline Random random_numbers;

inline void store(uint8_t* memory, int64_t index, int format, double value) {
  switch (format) {
#define FS_CASE(identifier, tag, name, Codec)                                             \
  case identifier: {                                                                      \
    const Codec::Storage stored = Codec::encode(static_cast<Codec::Compute>(value));      \
    memcpy(memory + index * static_cast<int64_t>(sizeof stored), &stored, sizeof stored); \
    break;                                                                                \
  }
    FS_FORMATS(FS_CASE)
#undef FS_CASE
  }
}

// Drawing is slow: of larger tensors so many elements, which then repeat.
constexpr int64_t kDrawn = 1 << 17;

inline void repeat(Buffer& buffer, int64_t numel, int element_bytes) {
  const size_t drawn = static_cast<size_t>(kDrawn * element_bytes), all = static_cast<size_t>(numel * element_bytes);
  for (size_t at = drawn; at < all; at += drawn) {
    memcpy(buffer.host() + at, buffer.host(), std::min(drawn, all - at));
  }
}

struct Tensor {
  int64_t numel;
  Buffer param;
  Buffer grad;
  std::vector<Buffer> slots;
  Buffer step;
};

inline Tensor make_tensor(const Formats& formats, int64_t numel, int64_t misaligned) {
  const size_t padded = static_cast<size_t>((numel + kPadding - 1) / kPadding * kPadding);
  const size_t moment = formats.param == kFloat64 ? 8 : static_cast<size_t>(kMomentBytes[formats.moments]);
  const size_t scales = kScaleGroup[formats.moments] != 0 ? padded / kScaleGroup[formats.moments] : 0;
  const size_t sizes[kNumSlots] = {padded * moment,
                                   padded * moment,
                                   formats.amsgrad ? padded * moment : 0,
                                   padded * static_cast<size_t>(kMasterBytes[formats.master]),
                                   scales,
                                   scales};
  const auto bytes = [&](int format) { return static_cast<size_t>(numel * kFormatBytes[format]); };
  const auto shift = [&](int format) { return static_cast<size_t>(misaligned * kFormatBytes[format]); };
  Tensor tensor = {numel,
                   Buffer(bytes(formats.param), shift(formats.param)),
                   Buffer(bytes(formats.grad), shift(formats.grad)),
                   {},
                   Buffer(sizeof(StepRecord))};
  for (const size_t size : sizes) tensor.slots.emplace_back(size);
  for (int64_t i = 0; i < std::min(numel, kDrawn); ++i) {
    const double value = random_numbers.value();
    store(tensor.param.host(), i, formats.param, value);
    uint8_t* const master = tensor.slots[kMasterWeight].host();
    if (formats.master == kMasterFloat32) {
      store(master, i, kFloat32, value);
    } else if (kMasterBytes[formats.master] != 0) {
      const uint32_t remainder = random_numbers.bits();
      memcpy(master + i * kMasterBytes[formats.master], &remainder, static_cast<size_t>(kMasterBytes[formats.master]));
    }
  }
  repeat(tensor.param, numel, kFormatBytes[formats.param]);
  repeat(tensor.slots[kMasterWeight], numel, kMasterBytes[formats.master]);
  tensor.param.upload();
  tensor.slots[kMasterWeight].upload();
  return tensor;
}

// Of the first of the two groups; the other has eps, too.
struct Options {
  double beta1 = 0.9;
  double eps = 1e-8;
};

class Problem {
 public:
  // schedule: of the rate, which is 1 and 2 in the two groups without one.
  Problem(const Formats& formats, const std::vector<int64_t>& sizes, int64_t misaligned, const std::string& schedule,
          const Options& options = {})
      : formats_(formats),
        options_(options),
        clock_(sizeof(Clock)),
        program_(schedule.size()),
        values_(kNumGroups * sizeof(GroupValues)),
        scalars_(sizes.size() * sizeof(ScalarSlot)),
        norm_(sizeof(NormState)) {
    for (const int64_t numel : sizes) tensors_.push_back(make_tensor(formats, numel, misaligned));
    memcpy(program_.host(), schedule.data(), schedule.size());
    program_.upload();
    NormState norm = {};
    norm.max_norm = 1.0;
    norm.grad_divisor = 2.0;
    norm.skip_nonfinite = 1;
    memcpy(norm_.host(), &norm, sizeof norm);
    norm_.upload();
    for (const Side side : {kOracle, kDevice}) groups_.push_back(make_groups(side));
    int64_t num_chunks = 0;
    for (const int64_t numel : sizes) num_chunks += norm_tiles(numel);
    chunk_sums_.emplace_back(static_cast<size_t>(num_chunks) * sizeof(SquareSum));
  }

  void clear_weights() {
    for (Tensor& tensor : tensors_) {
      for (Buffer* const buffer : {&tensor.param, &tensor.slots[kMasterWeight]}) {
        if (buffer->size() == 0) continue;
        memset(buffer->host(), 0, buffer->size());
        buffer->upload();
      }
    }
  }

  // value: of the gradient of an element of a tensor.
  template <class Value>
  void set_grads(const Value& value) {
    for (size_t t = 0; t < tensors_.size(); ++t) {
      Tensor& tensor = tensors_[t];
      for (int64_t i = 0; i < tensor.numel; ++i) store(tensor.grad.host(), i, formats_.grad, value(t, i));
      tensor.grad.upload();
    }
  }

  void draw_grads(bool with_infinity) {
    for (Tensor& tensor : tensors_) {
      for (int64_t i = 0; i < std::min(tensor.numel, kDrawn); ++i) {
        store(tensor.grad.host(), i, formats_.grad, random_numbers.value());
      }
      repeat(tensor.grad, tensor.numel, kFormatBytes[formats_.grad]);
    }
    Tensor& last = tensors_.back();
    if (with_infinity && last.numel > 0) store(last.grad.host(), last.numel - 1, formats_.grad, INFINITY);
    for (Tensor& tensor : tensors_) tensor.grad.upload();
  }

  bool step(Side side, bool with_norm) {
    fs_call call = call_of(side);
    if (with_norm) {
      call.norm = reinterpret_cast<NormState*>(norm_.at(side));
      call.chunk_sums = reinterpret_cast<SquareSum*>(chunk_sums_[0].at(side));
    }
    char error[kErrorSize] = "";
    const auto begin =
        side == kOracle ? (with_norm ? oracle_norm : oracle_clock) : (with_norm ? device_norm : device_clock);
    const auto update = side == kOracle ? oracle_update : device_update;
    if (begin(&call, error) == 0 && update(&call, error) == 0) return true;
    printf("FAILED call: %s\n", error);
    return false;
  }

  bool agrees() {
    bool same = true;
    for (size_t t = 0; t < tensors_.size(); ++t) {
      Tensor& tensor = tensors_[t];
      same &= equal(tensor.param, "param", t) && equal(tensor.step, "step", t);
      for (Buffer& slot : tensor.slots) same &= equal(slot, "state", t);
    }
    return same && equal(clock_, "clock", 0) && equal(values_, "rates", 0) && equal(norm_, "norm", 0);
  }

  int64_t clock() {
    Clock clock;
    memcpy(&clock, clock_.host(), sizeof clock);
    return clock.step;
  }

 private:
  static constexpr int kNumGroups = 2;

  static bool equal(Buffer& buffer, const char* what, size_t tensor) {
    const long long at = buffer.difference();
    if (at >= 0) printf("FAILED %s of tensor %zu: byte %lld of %zu differs\n", what, tensor, at, buffer.size());
    return at < 0;
  }

  // With the addresses of one side; the other half of the buffer is not used.
  Buffer make_groups(Side side) {
    GroupRecord groups[kNumGroups] = {};
    for (int g = 0; g < kNumGroups; ++g) {
      GroupRecord& group = groups[g];
      group.lr.scale = 1.0 + g;
      group.lr.program = program_.size() > 0 ? program_.at(side) : 0;
      group.beta1.scale = g == 0 ? options_.beta1 : 0.3;
      group.beta2.scale = 0.999;
      group.weight_decay.scale = 0.1;
      group.eps = options_.eps;
      group.grad_divisor = 2.0;
      group.flags = g == 0 ? kGroupDecoupled : kGroupMaximize;
    }
    Buffer buffer(sizeof groups);
    memcpy(buffer.host(), groups, sizeof groups);
    buffer.upload();
    return buffer;
  }

  fs_call call_of(Side side) {
    rows_.assign(tensors_.size(), fs_tensor{});
    arenas_.assign(tensors_.size(), fs_arena{});
    for (size_t t = 0; t < tensors_.size(); ++t) {
      const Tensor& tensor = tensors_[t];
      fs_tensor& row = rows_[t];
      row.param = tensor.param.at(side);
      row.grad = tensor.grad.at(side);
      row.step = tensor.step.at(side);
      row.numel = tensor.numel;
      row.arena = static_cast<int32_t>(t);
      row.group = static_cast<int32_t>(t % kNumGroups);
      row.ordinal = static_cast<uint32_t>(t);
      row.param_format = static_cast<uint8_t>(formats_.param);
      row.grad_format = static_cast<uint8_t>(formats_.grad);
      row.master = static_cast<uint8_t>(formats_.master);
      row.moments = static_cast<uint8_t>(formats_.moments);
      row.amsgrad = formats_.amsgrad;
      for (int slot = 0; slot < kNumSlots; ++slot) {
        const Buffer& buffer = tensor.slots[static_cast<size_t>(slot)];
        arenas_[t].slot[slot] = buffer.size() > 0 ? buffer.at(side) : 0;
      }
    }
    fs_call call = {};
    call.tensors = rows_.data();
    call.num_tensors = static_cast<int64_t>(rows_.size());
    call.arenas = arenas_.data();
    call.num_arenas = static_cast<int64_t>(arenas_.size());
    call.clock = reinterpret_cast<Clock*>(clock_.at(side));
    call.groups = reinterpret_cast<GroupRecord*>(groups_[static_cast<size_t>(side)].at(side));
    call.values = reinterpret_cast<GroupValues*>(values_.at(side));
    call.num_groups = kNumGroups;
    call.scalars = reinterpret_cast<ScalarSlot*>(scalars_.at(side));
    call.seed = 5;
    call.tick = 1;
    call.num_threads = 2;
    return call;
  }

  Formats formats_;
  Options options_;
  std::vector<Tensor> tensors_;
  Buffer clock_, program_, values_, scalars_, norm_;
  std::vector<Buffer> groups_, chunk_sums_;
  std::vector<fs_tensor> rows_;
  std::vector<fs_arena> arenas_;
};

}  // namespace fused_sched
