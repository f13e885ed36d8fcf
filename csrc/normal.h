// Standard normals from Philox words by Box and Muller (1958), in arithmetic that host and device
// share.
//
// The arithmetic replaces logf, sinf and cosf: a loop over it becomes vector code, and every
// backend rounds alike. Results differ by an ulp or two where a backend fuses a multiply and an
// add.
#pragma once

#include <cmath>
#include <cstring>

#include "philox.h"

namespace cadd {

// Reinterpret the bits of an integer as a float.
CADD_HD float bits_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

// Reinterpret the bits of a float as an integer.
CADD_HD uint32_t float_to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
#endif
}

// Compute ln(x) for normal x > 0, to 1e-7. With x = m 2^e and m in [sqrt(1/2), sqrt(2)),
// ln m = 2 atanh(r) for r = (m - 1) / (m + 1).
CADD_HD float log_positive(float x) {
  const uint32_t bits = float_to_bits(x), sqrt_half = 0x3F3504F3u;
  const int32_t e = static_cast<int32_t>(bits - sqrt_half) >> 23;
  const float m = bits_to_float(bits - (static_cast<uint32_t>(e) << 23));
  const float r = (m - 1.0f) / (m + 1.0f), r2 = r * r;
  const float series = r2 * (0.33333333f + r2 * (0.2f + r2 * (0.14285714f + r2 * 0.11111111f)));
  return static_cast<float>(e) * 0.69314718f + 2.0f * (r + r * series);
}

// Turn two words a and b into two normals.
//
// The radius is sqrt(-2 ln u) for u = (a / 2 + 1/4) 2^-31, where a / 2 is rounded down. The angle
// is 2 pi b 2^-32. The top bits of b hold the quarter of the turn exactly. The rest of the angle,
// in [-1/8, 1/8] turns, goes through Taylor series.
CADD_HD void normal_pair(uint32_t a, uint32_t b, float& first, float& second) {
  const float u = static_cast<float>(static_cast<int32_t>(a >> 1)) * 0x1p-31f + 0x1p-33f;
  const float radius = sqrtf(-2.0f * log_positive(u));
  const uint32_t quarter = (b + 0x20000000u) >> 30;
  const int32_t rest = static_cast<int32_t>(b - (quarter << 30));
  const float angle = static_cast<float>(rest) * (6.28318531f * 0x1p-32f);
  const float a2 = angle * angle;
  const float sine =
      angle * (1.0f + a2 * (-1.6666667e-1f +
                            a2 * (8.3333333e-3f + a2 * (-1.9841270e-4f + a2 * 2.7557319e-6f))));
  const float cosine =
      1.0f + a2 * (-0.5f + a2 * (4.1666667e-2f + a2 * (-1.3888889e-3f + a2 * 2.4801587e-5f)));
  const bool swap = quarter & 1;
  const float unsigned_cosine = swap ? sine : cosine, unsigned_sine = swap ? cosine : sine;
  first = radius * (((quarter + 1) & 2) ? -unsigned_cosine : unsigned_cosine);
  second = radius * ((quarter & 2) ? -unsigned_sine : unsigned_sine);
}

}  // namespace cadd
