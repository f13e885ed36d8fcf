// Proposition 2 for one masked token, and the arithmetic of its probabilities.
#pragma once

#include "forward_noising.h"

namespace cadd {

enum class ZHat { hard, soft, sample };

// One step from t to s: P(flip), and z_s = pull z0_hat + keep z_t + std eps for a token that stays
// masked.
struct Step {
  double rho_flip;
  float pull, keep, std;
};

CADD_HD float posterior(float z_hat, float z_t, float eps, Step step) {
  return step.pull * z_hat + step.keep * z_t + step.std * eps;
}

// exp(x) for x <= 0, to 3e-7: 2^n e^r with |r| <= ln(2)/2. Below -87 it is 0, so what has no
// probability is never drawn.
CADD_HD float exp_nonpositive(float x) {
  const float y = x > -87.0f ? x : -87.0f;
  const float shifted = y * 1.44269504f + 12582912.0f,
              n = shifted - 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const float r = (y - n * 0.693145752f) - n * 1.42860677e-6f;
  const float series =
      0.5f + r * (1.6666667e-1f + r * (4.1666667e-2f + r * (8.3333333e-3f + r * 1.3888889e-3f)));
  const float scale = bits_to_float((float_to_bits(shifted) - 0x4B400000u + 127u) << 23);
  return x > -87.0f ? (1.0f + r * (1.0f + r * series)) * scale : 0.0f;
}

struct Choices {
  double flip, token;
};

// The two uniforms of a masked token: whether it flips, and what it becomes.
CADD_HD Choices choices(Stream s, uint64_t position) {
  const Words w = draw_words(s, position, kTokenBlock);
  return {uniform(w.x, w.y), uniform(w.z, w.w)};
}

// The uniform of z0_hat = w[v], v ~ p, of one latent.
CADD_HD double hat_choice(Stream s, uint64_t position) {
  const Words w = draw_words(s, position, kHatBlock);
  return uniform(w.x, w.y);
}

constexpr int kBlock =
    256;  // tokens whose probabilities are summed before a draw looks at them one by one

}  // namespace cadd
