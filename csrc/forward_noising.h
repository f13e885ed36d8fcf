// Proposition 1 for one token: x_t and z_t from x_0, its latent, and the token's own random words.
#pragma once

#include "normal.h"

namespace cadd {

// The clock of one sequence at its time t: P(still unmasked), and the factors of z_0 and of the
// noise in z_t.
struct Clock {
  double alpha, signal, noise;
};

CADD_HD bool masked(Stream s, uint64_t position, double alpha) {
  const Words w = draw_words(s, position, kTokenBlock);
  return uniform(w.x, w.y) >= alpha;
}

template <typename F>
CADD_HD F mix(F z_0, F eps, F signal, F noise) {
  return signal * z_0 + noise * eps;
}

// Element e of a latent of dim elements takes its noise from word e / quarter of block e % quarter:
// neighbouring blocks write neighbouring elements, which suits vector units and warps alike.
CADD_HD int64_t quarter_of(int64_t dim) { return (dim + 3) / 4; }

CADD_HD void four_normals(Stream s, uint64_t position, uint32_t block, float (&eps)[4]) {
  const Words w = draw_words(s, position, block);
  normal_pair(w.x, w.y, eps[0], eps[1]);
  normal_pair(w.z, w.w, eps[2], eps[3]);
}

}  // namespace cadd
