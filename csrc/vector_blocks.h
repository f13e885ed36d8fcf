// Loops over one block of 256 tokens, as vector code. Lanes are explicit, so that every vector unit
// sums in one order.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstring>
#include <limits>

#include "reverse_step.h"

// One build runs everywhere: the loader picks AVX-512, AVX2 or plain x86-64 by what the processor
// has.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__) && \
    !defined(CADD_NO_CLONES)
#define CADD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
inline const char* vector_code() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("x86-64-v4")   ? "AVX-512"
         : __builtin_cpu_supports("x86-64-v3") ? "AVX2"
                                               : "SSE2";
}
#else
#define CADD_CLONES
inline const char* vector_code() { return "the compiler's default"; }
#endif

namespace cadd {

constexpr int kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Written as vectors: as loops over 16 floats the compiler takes nine times as long for the
// maximum.
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

// out = logits / tau for `count` tokens, minus infinity for the rest of the block. Returns the
// largest, or NaN where a logit is NaN or plus infinity.
template <typename L>
CADD_HD float load(const L* __restrict logits, int64_t count, float inv_tau,
                   float* __restrict out) {
  if (count == kBlock) {
    for (int i = 0; i < kBlock; ++i) out[i] = static_cast<float>(logits[i]) * inv_tau;
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(logits[i]) * inv_tau;
    for (int64_t i = count; i < kBlock; ++i) out[i] = -kInfinity;
  }
  Floats high = Floats{} - kInfinity;
  Ints good = ~Ints{};
  for (int i = 0; i < kBlock; i += kLanes) {
    Floats v;
    std::memcpy(&v, out + i, sizeof v);
    high = v > high ? v : high;
    good &= v < kInfinity;
  }
  for (int width = kLanes / 2; width; width /= 2)
    for (int j = 0; j < width; ++j)
      high[j] = high[j + width] > high[j] ? high[j + width] : high[j], good[j] &= good[j + width];
  return good[0] ? high[0] : std::numeric_limits<float>::quiet_NaN();
}

CADD_CLONES inline float load_block(const float* logits, int64_t count, float inv_tau, float* out) {
  return load(logits, count, inv_tau, out);
}
CADD_CLONES inline float load_block(const c10::BFloat16* logits, int64_t count, float inv_tau,
                                    float* out) {
  return load(logits, count, inv_tau, out);
}
CADD_CLONES inline float load_block(const c10::Half* logits, int64_t count, float inv_tau,
                                    float* out) {
  return load(logits, count, inv_tau, out);
}

// Sum of exp(v - top) over a block.
CADD_CLONES inline float sum_exp(const float* v, float top) {
  float sum[kLanes] = {};
  for (int i = 0; i < kBlock; i += kLanes)
    for (int j = 0; j < kLanes; ++j) sum[j] += exp_nonpositive(v[i + j] - top);
  for (int width = kLanes / 2; width; width /= 2)
    for (int j = 0; j < width; ++j) sum[j] += sum[j + width];
  return sum[0];
}

// p += weight exp(v - top).
CADD_CLONES inline void add_exp(const float* __restrict v, float top, float weight,
                                float* __restrict p) {
  for (int i = 0; i < kBlock; ++i) p[i] += weight * exp_nonpositive(v[i] - top);
}

// Noise of one token's latent of `dim` elements: out has room for 4 * quarter_of(dim).
CADD_CLONES inline void fill_normals(Stream s, uint64_t position, int64_t dim,
                                     float* __restrict out) {
  const int64_t n = quarter_of(dim);
  float *second = out + n, *third = out + 2 * n, *fourth = out + 3 * n;
#pragma GCC ivdep
  for (int64_t block = 0; block < n; ++block) {
    float eps[4];
    four_normals(s, position, static_cast<uint32_t>(block), eps);
    out[block] = eps[0];
    second[block] = eps[1];
    third[block] = eps[2];
    fourth[block] = eps[3];
  }
}

}  // namespace cadd
