// The GPU's kernels against the CPU build, without torch: after every step each byte of parameters, state, step counts,
// clock, rates and norm must be the same.
//
//     selftest check|small|roots|once|time SCHEDULE [elements]
//
// check: every combination of formats, aligned and misaligned, many tensors, a skipped step; and roots. small: a few of
// them, for compute-sanitizer. roots: the GPU's roots and quotients, which begin with its approximate instructions, for
// gradients of every mantissa. once: updates of three formats, of which a profiler sees the last. time: how long steps
// take. SCHEDULE: a file with a schedule program.
#include <chrono>

#include "problem.h"

using namespace fused_sched;

namespace {

#define FS_NAME(identifier, tag, name, ...) name,
const char* const kFormatName[] = {FS_FORMATS(FS_NAME)};
const char* const kMasterName[] = {FS_MASTERS(FS_NAME)};
const char* const kMomentsName[] = {FS_MOMENTS(FS_NAME)};
#undef FS_NAME

constexpr int kSteps = 5, kSkippedStep = 2;
constexpr int64_t kFloatsFrom1To4 = 1 << 24, kRandomFloats = 1 << 20;
// A GPU that has been idle raises its clocks within some milliseconds of work.
constexpr int kWarmSteps = 20, kTimedSteps = 50;

bool check(const Formats& formats, const std::vector<int64_t>& sizes, int64_t misaligned, const std::string& schedule) {
  Problem problem(formats, sizes, misaligned, schedule);
  bool good = true;
  for (int step = 0; step < kSteps && good; ++step) {
    const bool with_norm = step % 2 == 0;
    problem.draw_grads(step == kSkippedStep);
    good = problem.step(kOracle, with_norm) && problem.step(kDevice, with_norm);
    device_synchronize();
    good = good && problem.agrees();
  }
  if (good && problem.clock() != kSteps - 1) {
    printf("FAILED clock: %lld updates, expected %d\n", static_cast<long long>(problem.clock()), kSteps - 1);
    good = false;
  }
  printf("%s %zu tensors: %s parameters, %s gradients, %s + %s%s%s\n", good ? "ok    " : "FAILED", sizes.size(),
         kFormatName[formats.param], kFormatName[formats.grad], kMasterName[formats.master],
         kMomentsName[formats.moments], formats.amsgrad ? ", amsgrad" : "", misaligned != 0 ? ", misaligned" : "");
  fflush(stdout);
  return good;
}

float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Gradients are all floats from 1 to 4, the two binades that a root tells apart. The first step of a zero weight
// divides nearly equal numbers; in the second, quotients differ. A tensor of magnitudes from subnormal to 2^63 stands
// beside it.
bool check_roots(const Formats& formats, int64_t count) {
  Problem problem(formats, {count, std::min(count, kRandomFloats)}, 0, "");
  problem.clear_weights();
  const int64_t stride = kFloatsFrom1To4 / count;
  bool good = true;
  for (int step = 0; step < 2 && good; ++step) {
    problem.set_grads([&](size_t tensor, int64_t i) {
      if (tensor == 0) return float_of(0x3f800000u + static_cast<uint32_t>((step == 0 ? i : count - 1 - i) * stride));
      const uint32_t bits = random_numbers.bits(), exponent = random_numbers.bits() % 190;
      return float_of((bits & 0x807fffffu) | exponent << 23);
    });
    good = problem.step(kOracle, false) && problem.step(kDevice, false);
    device_synchronize();
    good = good && problem.agrees();
  }
  printf("%s roots and quotients of %lld floats: %s parameters, %s + %s\n", good ? "ok    " : "FAILED",
         static_cast<long long>(count), kFormatName[formats.param], kMasterName[formats.master],
         kMomentsName[formats.moments]);
  fflush(stdout);
  return good;
}

// The hardest quotients have denominators just below a power of two. Squares of these gradients are zero, so that eps
// is the denominator, and the numerators, half of them, have every mantissa.
bool check_quotients(const Formats& formats, uint32_t denominator, int64_t count) {
  Problem problem(formats, {count}, 0, "", {0.5, float_of(denominator) * 0x1p-30});
  problem.clear_weights();
  const int64_t stride = (int64_t{1} << 23) / count;
  problem.set_grads(
      [&](size_t, int64_t i) { return float_of(0x3f800000u + static_cast<uint32_t>(i * stride)) * 0x1p-80; });
  bool good = problem.step(kOracle, false) && problem.step(kDevice, false);
  device_synchronize();
  good = good && problem.agrees();
  printf("%s quotients of %lld floats by %a: %s parameters, %s + %s\n", good ? "ok    " : "FAILED",
         static_cast<long long>(count), static_cast<double>(float_of(denominator)), kFormatName[formats.param],
         kMasterName[formats.master], kMomentsName[formats.moments]);
  fflush(stdout);
  return good;
}

bool check_roots(int64_t count) {
  bool good = check_roots({kFloat32, kFloat32, kMasterNone, kMoments8bit, false}, count);
  good &= check_roots({kFloat32, kFloat32, kMasterNone, kMomentsFloat32, false}, count);
  good &= check_roots({kBfloat16, kFloat32, kMasterSplit16, kMomentsBfloat16, false}, count);
  for (const uint32_t denominator : {0x3fffffffu, 0x3ffffffdu, 0x3ffffffbu}) {
    good &= check_quotients({kFloat32, kFloat32, kMasterNone, kMomentsFloat32, false}, denominator, count / 2);
  }
  return good;
}

// The last step of either kind, with the norm and without, is for the profiler.
bool run_once(const Formats& formats, int64_t count, const std::string& schedule) {
  Problem problem(formats, {count}, 0, schedule);
  problem.draw_grads(false);
  bool good = true;
  for (int step = 0; step < kWarmSteps; ++step) good = good && problem.step(kDevice, step % 2 == 0);
  device_synchronize();
  device_profile(1);
  good = good && problem.step(kDevice, true) && problem.step(kDevice, false);
  device_synchronize();
  device_profile(0);
  return good;
}

// What the CUDA backend has kernels for.
std::vector<Formats> all_formats() {
  std::vector<Formats> found;
  for (int param = kFloat32; param <= kFloat64; ++param) {
    for (int grad = kFloat32; grad <= kFloat64; ++grad) {
      for (int master = kMasterNone; master <= kMasterStochastic; ++master) {
        for (int moments = kMomentsFloat32; moments <= kMoments8bit; ++moments) {
          for (const bool amsgrad : {false, true}) {
            const bool is_mixed = (param == kFloat64) != (grad == kFloat64);
            if (!is_mixed && go_together(param, master, moments, amsgrad)) {
              found.push_back({param, grad, master, moments, amsgrad});
            }
          }
        }
      }
    }
  }
  return found;
}

const Formats kFew[] = {{kFloat32, kFloat32, kMasterNone, kMomentsFloat32, false},
                        {kBfloat16, kBfloat16, kMasterSplit16, kMomentsBfloat16, false},
                        {kBfloat16, kBfloat16, kMasterSplit8, kMoments8bit, false}};

const Formats kTimed[] = {{kFloat32, kFloat32, kMasterNone, kMomentsFloat32, false},
                          {kBfloat16, kBfloat16, kMasterSplit16, kMomentsFloat32, false},
                          {kBfloat16, kBfloat16, kMasterSplit16, kMomentsBfloat16, false},
                          {kBfloat16, kBfloat16, kMasterSplit8, kMoments8bit, false}};

// Steps of the device, one behind the other, milliseconds each.
bool time_steps(const Formats& formats, int64_t count, const std::string& schedule) {
  using Clock = std::chrono::steady_clock;
  Problem problem(formats, {count}, 0, schedule);
  problem.draw_grads(false);
  bool good = true;
  for (const bool with_norm : {false, true}) {
    for (int step = 0; step < kWarmSteps; ++step) good = good && problem.step(kDevice, with_norm);
    device_synchronize();
    const Clock::time_point begin = Clock::now();
    for (int step = 0; step < kTimedSteps; ++step) good = good && problem.step(kDevice, with_norm);
    device_synchronize();
    const std::chrono::duration<double, std::milli> passed = Clock::now() - begin;
    printf("time %s + %s%s: %.5f ms\n", kMasterName[formats.master], kMomentsName[formats.moments],
           with_norm ? ", norm" : "", passed.count() / kTimedSteps);
    fflush(stdout);
  }
  return good;
}

int run(const std::string& mode, const std::string& schedule, int64_t elements) {
  bool good = true;
  if (mode == "check") {
    for (const Formats& formats : all_formats()) {
      for (const int64_t misaligned : {0, 1}) {
        good &= check(formats, {1, 7, 255, 256, 257, 2048, 2049, 4097, 70001, 0, 33}, misaligned, schedule);
      }
    }
    for (const Formats& formats : kFew) good &= check(formats, std::vector<int64_t>(2500, 33), 0, schedule);
    good &= check(kFew[0], {3 << 20}, 1, schedule);  // more tiles than blocks
    good &= check_roots(kFloatsFrom1To4);
  } else if (mode == "roots") {
    good = check_roots(elements);
  } else if (mode == "small") {
    for (const Formats& formats : kFew) {
      for (const int64_t misaligned : {0, 1}) good &= check(formats, {1, 257, 2049, 5000}, misaligned, schedule);
    }
  } else if (mode == "time") {
    for (const Formats& formats : kTimed) good &= time_steps(formats, elements, schedule);
  } else {
    for (const Formats& formats : kFew) good &= run_once(formats, elements, schedule);
  }
  return good ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string mode = count > 2 ? arguments[1] : "";
  if (mode != "check" && mode != "small" && mode != "roots" && mode != "once" && mode != "time") {
    printf("selftest check|small|roots|once|time SCHEDULE [elements]\n");
    return 64;
  }
  std::string schedule;
  FILE* const file = fopen(arguments[2], "rb");
  if (file == nullptr) {
    printf("FAILED to open %s\n", arguments[2]);
    return 2;
  }
  for (int byte = fgetc(file); byte != EOF; byte = fgetc(file)) schedule.push_back(static_cast<char>(byte));
  fclose(file);
  printf("%s\n", device_name());
  const int status = run(mode, schedule, count > 3 ? atoll(arguments[3]) : 1 << 16);
  printf("%s: %s\n", mode.c_str(),
         status != 0                        ? "FAILED"
         : mode == "once" || mode == "time" ? "done"
                                            : "every byte equal");
  return status;
}
