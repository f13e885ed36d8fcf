// Standard normals from Philox words by Box and Muller (1958), in arithmetic that host and device
// share.
//
// Written out instead of calling logf, sinf and cosf: a loop over it becomes vector code, and every
// backend rounds alike (to an ulp or two, where one fuses a multiply and an add and another does
// not).
#pragma once

#include <cmath>
#include <cstring>

#include "philox.h"

namespace cadd {

CADD_HD float bits_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}

CADD_HD uint32_t float_to_bits(float f) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(f);
#else
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
#endif
}

// ln(x) for normal x > 0, to 1e-7: x = m 2^e with m in [sqrt(1/2), sqrt(2)), ln m = 2 atanh((m - 1)
// / (m + 1)).
CADD_HD float log_positive(float x) {
  const uint32_t bits = float_to_bits(x), half = 0x3F3504F3u;  // sqrt(1/2)
  const int32_t e = static_cast<int32_t>(bits - half) >> 23;
  const float m = bits_to_float(bits - (static_cast<uint32_t>(e) << 23));
  const float r = (m - 1.0f) / (m + 1.0f), r2 = r * r;
  const float series = r2 * (0.33333333f + r2 * (0.2f + r2 * (0.14285714f + r2 * 0.11111111f)));
  return static_cast<float>(e) * 0.69314718f + 2.0f * (r + r * series);
}

// Two normals of two words: radius sqrt(-2 ln u), u = (a / 2 + 1/4) 2^-31 with a / 2 rounded down,
// and angle 2 pi b 2^-32. The angle's quarter is in b's top bits, exactly; what is left, in [-1/8,
// 1/8] turns, goes through Taylor series.
CADD_HD void normal_pair(uint32_t a, uint32_t b, float& first, float& second) {
  const float u = static_cast<float>(static_cast<int32_t>(a >> 1)) * 0x1p-31f + 0x1p-33f;
  const float radius = sqrtf(-2.0f * log_positive(u));
  const uint32_t quarter = (b + 0x20000000u) >> 30;
  const float angle =
      static_cast<float>(static_cast<int32_t>(b - (quarter << 30))) * (6.28318531f * 0x1p-32f);
  const float a2 = angle * angle;
  const float sine =
      angle * (1.0f + a2 * (-1.6666667e-1f +
                            a2 * (8.3333333e-3f + a2 * (-1.9841270e-4f + a2 * 2.7557319e-6f))));
  const float cosine =
      1.0f + a2 * (-0.5f + a2 * (4.1666667e-2f + a2 * (-1.3888889e-3f + a2 * 2.4801587e-5f)));
  const bool swap = quarter & 1;
  const float c = swap ? sine : cosine, s = swap ? cosine : sine;
  first = radius * (((quarter + 1) & 2) ? -c : c);
  second = radius * ((quarter & 2) ? -s : s);
}

}  // namespace cadd
