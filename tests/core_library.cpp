// The core's mathematics, evaluator and storage formats behind a C ABI, for tests that call them over ctypes.
#include "core/codec.h"
#include "core/schedule.h"

using namespace fused_sched;

namespace {

template <class MasterCodec>
void encode_with(const float* weight, const uint32_t* random, int64_t count, uint16_t* param, int32_t* kept) {
  for (int64_t i = 0; i < count; ++i) {
    typename MasterCodec::Storage stored{};
    MasterCodec::template encode<Bfloat16>(weight[i], random[i], param[i], stored);
    if constexpr (MasterCodec::kStores) kept[i] = static_cast<int32_t>(stored);
  }
}

template <class MasterCodec>
void decode_with(const uint16_t* param, const int32_t* kept, int64_t count, float* weight) {
  using Kept = typename MasterCodec::Storage;
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (MasterCodec::kStores) {
      weight[i] = MasterCodec::template decode<Bfloat16>(param[i], static_cast<Kept>(kept[i]));
    } else {
      weight[i] = MasterCodec::template decode<Bfloat16>(param[i], Kept());
    }
  }
}

template <class Codec>
void encode_groups(const float* value, const uint32_t* random, int64_t count, uint8_t* code, uint8_t* scale) {
  for (int64_t begin = 0; begin < count; begin += 16) {
    const int64_t end = begin + 16 < count ? begin + 16 : count;
    uint32_t largest = 0;
    for (int64_t i = begin; i < end; ++i) largest = larger(largest, finite_magnitude(value[i]));
    scale[begin / 16] = static_cast<uint8_t>(Codec::scale_for(largest));
    const typename Codec::Scale of_group(scale[begin / 16]);
    for (int64_t i = begin; i < end; ++i) code[i] = static_cast<uint8_t>(Codec::encode(value[i], of_group, random[i]));
  }
}

template <class Codec>
void decode_groups(const uint8_t* code, const uint8_t* scale, int64_t count, float* value) {
  for (int64_t i = 0; i < count; ++i) value[i] = Codec::decode(code[i], typename Codec::Scale(scale[i / 16]));
}

}  // namespace

extern "C" {

// Of bf16 parameters. tag: "split16" or "split8"; everything else is "stochastic". kept: what is stored, as a number.
void encode_master(const char* tag, const float* weight, const uint32_t* random, int64_t count, uint16_t* param,
                   int32_t* kept) {
  if (strcmp(tag, "split16") == 0) return encode_with<MasterSplit16>(weight, random, count, param, kept);
  if (strcmp(tag, "split8") == 0) return encode_with<MasterSplit8>(weight, random, count, param, kept);
  encode_with<MasterStochastic>(weight, random, count, param, kept);
}

void decode_master(const char* tag, const uint16_t* param, const int32_t* kept, int64_t count, float* weight) {
  if (strcmp(tag, "split16") == 0) return decode_with<MasterSplit16>(param, kept, count, weight);
  if (strcmp(tag, "split8") == 0) return decode_with<MasterSplit8>(param, kept, count, weight);
  decode_with<MasterStochastic>(param, kept, count, weight);
}

// 8-bit moments: first is not zero for exp_avg, zero for exp_avg_sq. random: 32 bits each.
void encode_8bit(int32_t first, const float* value, const uint32_t* random, int64_t count, uint8_t* code,
                 uint8_t* scale) {
  if (first) return encode_groups<Moments8bit::First<float>>(value, random, count, code, scale);
  encode_groups<Moments8bit::Second<float>>(value, random, count, code, scale);
}

void decode_8bit(int32_t first, const uint8_t* code, const uint8_t* scale, int64_t count, float* value) {
  if (first) return decode_groups<Moments8bit::First<float>>(code, scale, count, value);
  decode_groups<Moments8bit::Second<float>>(code, scale, count, value);
}

void encode_second_bf16(const float* value, const uint32_t* random, int64_t count, uint16_t* stored) {
  for (int64_t i = 0; i < count; ++i) {
    stored[i] = static_cast<uint16_t>(Bfloat16Second::encode(value[i], Unscaled(0), random[i]));
  }
}

void random_of(uint64_t seed, int64_t clock_step, uint32_t ordinal, int64_t first, int64_t count, uint32_t* out) {
  const RandomKey key = random_key(seed, clock_step, ordinal);
  for (int64_t i = 0; i < count; ++i) out[i] = random_bits(key_from(key, first + i), static_cast<uint32_t>(first + i));
}

void unary(const char* name, const double* x, double* out, int64_t count) {
  double (*function)(double) = nullptr;
  if (strcmp(name, "cos_pi") == 0) function = cos_pi;
  if (strcmp(name, "exponential") == 0) function = exponential;
  if (strcmp(name, "logarithm") == 0) function = logarithm;
  if (strcmp(name, "hyperbolic_tangent") == 0) function = hyperbolic_tangent;
  for (int64_t i = 0; i < count; ++i) out[i] = function(x[i]);
}

void powers(const double* x, const double* y, double* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = power(x[i], y[i]);
}

const char* validate(const unsigned char* program, int64_t size) { return validate_program(program, size); }

void evaluate_at(const unsigned char* program, const double* times, double* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = evaluate(program, times[i]);
}
}
