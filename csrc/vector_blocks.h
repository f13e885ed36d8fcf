// Vector code of the CPU kernels, for blocks of 256 tokens and for the noise of one latent.
//
// One build holds code for AVX-512, AVX2 and plain x86-64, and the loader picks by the processor.
// The lanes of a sum are explicit, so that every vector unit adds in the same order.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstring>
#include <limits>

#include "reverse_step.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__) && \
    !defined(CADD_NO_CLONES)
#define CADD_HAS_CLONES 1
#define CADD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CADD_HAS_CLONES 0
#define CADD_CLONES
#endif

namespace cadd {

// Name the vector unit whose code the loader picks on this processor.
inline const char* vector_code() {
#if CADD_HAS_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "AVX-512";
  return __builtin_cpu_supports("x86-64-v3") ? "AVX2" : "SSE2";
#else
  return "the compiler's default";
#endif
}

constexpr int kBlock = 256;  // tokens that share one sum of probabilities
constexpr int kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// These types write vectors out: a loop over 16 floats takes nine times as long for the maximum.
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

// Find the largest value of a block. Return NaN if a value is NaN or plus infinity.
CADD_HD float block_max(const float* __restrict values) {
  Floats largest = Floats{} - kInfinity;
  Ints valid = ~Ints{};
  for (int i = 0; i < kBlock; i += kLanes) {
    Floats lanes;
    std::memcpy(&lanes, values + i, sizeof lanes);
    largest = lanes > largest ? lanes : largest;
    valid &= lanes < kInfinity;
  }
  for (int width = kLanes / 2; width; width /= 2) {
    for (int j = 0; j < width; ++j) {
      largest[j] = largest[j + width] > largest[j] ? largest[j + width] : largest[j];
      valid[j] &= valid[j + width];
    }
  }
  return valid[0] ? largest[0] : std::numeric_limits<float>::quiet_NaN();
}

// Write `count` logits over the temperature to a block, and minus infinity behind them. Return the
// largest, or NaN if a logit is NaN or plus infinity.
template <typename Logit>
CADD_HD float load(const Logit* __restrict logits, int64_t count, float inv_temperature,
                   float* __restrict out) {
  if (count == kBlock) {
    for (int i = 0; i < kBlock; ++i) out[i] = static_cast<float>(logits[i]) * inv_temperature;
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(logits[i]) * inv_temperature;
    for (int64_t i = count; i < kBlock; ++i) out[i] = -kInfinity;
  }
  return block_max(out);
}

// Load a block as above, with clones for each type of logits.
CADD_CLONES inline float load_block(const float* logits, int64_t count, float inv_temperature,
                                    float* out) {
  return load(logits, count, inv_temperature, out);
}
CADD_CLONES inline float load_block(const c10::BFloat16* logits, int64_t count,
                                    float inv_temperature, float* out) {
  return load(logits, count, inv_temperature, out);
}
CADD_CLONES inline float load_block(const c10::Half* logits, int64_t count, float inv_temperature,
                                    float* out) {
  return load(logits, count, inv_temperature, out);
}

// Sum exp(logit - largest) over a block.
CADD_CLONES inline float sum_exp(const float* logits, float largest) {
  float sum[kLanes] = {};
  for (int i = 0; i < kBlock; i += kLanes)
    for (int j = 0; j < kLanes; ++j) sum[j] += exp_nonpositive(logits[i + j] - largest);
  for (int width = kLanes / 2; width; width /= 2)
    for (int j = 0; j < width; ++j) sum[j] += sum[j + width];
  return sum[0];
}

// Add factor * exp(logit - largest) to the probabilities of a block.
CADD_CLONES inline void add_exp(const float* __restrict logits, float largest, float factor,
                                float* __restrict probabilities) {
  for (int i = 0; i < kBlock; ++i)
    probabilities[i] += factor * exp_nonpositive(logits[i] - largest);
}

// Draw the noise of one latent of `dim` elements. `out` has room for 4 * quarter_of(dim).
CADD_CLONES inline void fill_normals(RandomStream random, uint64_t position, int64_t dim,
                                     float* __restrict out) {
  const int64_t quarter = quarter_of(dim);
  float *second = out + quarter, *third = out + 2 * quarter, *fourth = out + 3 * quarter;
#pragma GCC ivdep
  for (int64_t quad = 0; quad < quarter; ++quad) {
    float eps[4];
    four_normals(random, position, static_cast<uint32_t>(quad), eps);
    out[quad] = eps[0];
    second[quad] = eps[1];
    third[quad] = eps[2];
    fourth[quad] = eps[3];
  }
}

}  // namespace cadd
