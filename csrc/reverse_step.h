// Proposition 2 for one masked token, and the arithmetic of its probabilities.
#pragma once

#include "forward_noising.h"

namespace cadd {

// How z0_hat is made: the latent of the most probable token, the mean latent, or the latent of a
// token that is drawn.
enum class ZHat { hard, soft, sample };

// The coefficients of one step from t to s. A token flips with probability rho_flip. The latent of
// a token that stays masked becomes z_s = pull z0_hat + keep z_t + std eps.
struct ReverseCoefficients {
  double rho_flip;
  float pull, keep, std;
};

// The rows' coefficients, a tensor (4, C): rho_flip, pull, keep, std. All rows share one column, or
// each row has its own.
struct ReverseColumns {
  const double* first;
  int64_t columns;  // C, 1 or N

  CADD_HD ReverseCoefficients of(int64_t n) const {
    const double* own = first + (columns > 1 ? n : 0);
    return {own[0], static_cast<float>(own[columns]), static_cast<float>(own[2 * columns]),
            static_cast<float>(own[3 * columns])};
  }
};

// Compute one element of z_s for a token that stays masked.
CADD_HD float posterior(float z_hat, float z_t, float eps, ReverseCoefficients coefficients) {
  return coefficients.pull * z_hat + coefficients.keep * z_t + coefficients.std * eps;
}

// Compute exp(x) for x <= 0, to 3e-7, as 2^n e^r with |r| <= ln(2) / 2. Below -87 the result is 0,
// so that a token without probability is never drawn.
CADD_HD float exp_nonpositive(float x) {
  const float y = x > -87.0f ? x : -87.0f;
  const float shifted = y * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = (y - n * 0.693145752f) - n * 1.42860677e-6f;
  const float series =
      0.5f + r * (1.6666667e-1f + r * (4.1666667e-2f + r * (8.3333333e-3f + r * 1.3888889e-3f)));
  const float scale = bits_to_float((float_to_bits(shifted) - 0x4B400000u + 127u) << 23);
  return x > -87.0f ? (1.0f + r * (1.0f + r * series)) * scale : 0.0f;
}

// The uniforms of a masked token: `flip` decides whether it flips, `token` decides its new value.
struct Choices {
  double flip, token;
};

// Draw the two uniforms of a masked token.
CADD_HD Choices choices(RandomStream random, uint64_t position) {
  const Words words = draw_words(random, position, kTokenQuad);
  return {uniform(words.x, words.y), uniform(words.z, words.w)};
}

// Draw the uniform that chooses v ~ p for z0_hat = w[v]. Each latent has its own.
CADD_HD double hat_choice(RandomStream random, uint64_t position) {
  const Words words = draw_words(random, position, kHatQuad);
  return uniform(words.x, words.y);
}

}  // namespace cadd
