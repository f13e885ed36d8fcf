// Proposition 1 for one token: x_t and z_t from x_0, its latent, and the random words of the token.
#pragma once

#include "normal.h"

namespace cadd {

// The coefficients of one sequence at its time t.
struct NoisingCoefficients {
  double alpha;   // probability that a token is not masked
  double signal;  // factor of z_0 in z_t
  double noise;   // factor of the noise in z_t
};

// Decide whether the token at `position` is masked, with probability 1 - alpha.
CADD_HD bool is_masked(RandomStream random, uint64_t position, double alpha) {
  const Words words = draw_words(random, position, kTokenQuad);
  return uniform(words.x, words.y) >= alpha;
}

// Mix one element of a masked token's latent with noise.
template <typename Float>
CADD_HD Float mix(Float z_0, Float eps, Float signal, Float noise) {
  return signal * z_0 + noise * eps;
}

// Return the number of quads of noise for a latent of `dim` elements.
//
// Element e is normal e / quarter of the four normals of quad e % quarter. So neighbouring quads
// write neighbouring elements, which suits vector units and warps alike.
CADD_HD int64_t quarter_of(int64_t dim) { return (dim + 3) / 4; }

// Draw the four normals of one quad.
CADD_HD void four_normals(RandomStream random, uint64_t position, uint32_t quad, float (&eps)[4]) {
  const Words words = draw_words(random, position, quad);
  normal_pair(words.x, words.y, eps[0], eps[1]);
  normal_pair(words.z, words.w, eps[2], eps[3]);
}

}  // namespace cadd
