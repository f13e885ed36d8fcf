// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), for host
// and device.
//
// A counter-based generator has no state: a draw is a function of its key and its counter. The key
// is the seed. The counter names the step, the position of a token, and the draw at this position.
// The same seed gives the same bits on every backend, for every thread count and every grid. The
// backward pass needs no stored noise.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CADD_HD __host__ __device__ __forceinline__
#else
#define CADD_HD inline __attribute__((always_inline))
#endif

namespace cadd {

// A quad of 32-bit words: Philox turns a counter of four words into four random words.
struct Words {
  uint32_t x, y, z, w;
};

// Turn a counter into four random words by ten rounds.
CADD_HD Words philox(uint64_t key, Words counter) {
  uint32_t key_low = static_cast<uint32_t>(key), key_high = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product_x = uint64_t{0xD2511F53u} * counter.x;
    const uint64_t product_z = uint64_t{0xCD9E8D57u} * counter.z;
    counter = {static_cast<uint32_t>(product_z >> 32) ^ counter.y ^ key_low,
               static_cast<uint32_t>(product_z),
               static_cast<uint32_t>(product_x >> 32) ^ counter.w ^ key_high,
               static_cast<uint32_t>(product_x)};
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  return counter;
}

// The random numbers of one step of one run.
struct RandomStream {
  uint64_t seed;    // of the run
  uint32_t offset;  // of the step
};

// Read the stream from the (2,) seed tensor: seed, offset.
CADD_HD RandomStream random_stream(const int64_t* seed) {
  return {static_cast<uint64_t>(seed[0]), static_cast<uint32_t>(seed[1])};
}

// Every position has 2^32 quads of words. Quads 0, 1, ... are the noise of its latent, and the last
// two quads are its uniforms: for the token, and for z0_hat.
constexpr uint32_t kTokenQuad = 0xFFFFFFFFu, kHatQuad = 0xFFFFFFFEu;

// Draw one quad of words. `position` is the place of a token in (K, B, L).
CADD_HD Words draw_words(RandomStream random, uint64_t position, uint32_t quad) {
  const uint32_t low = static_cast<uint32_t>(position),
                 high = static_cast<uint32_t>(position >> 32);
  return philox(random.seed, {quad, low, high, random.offset});
}

// Turn two words into a number in [0, 1) of 53 random bits.
CADD_HD double uniform(uint32_t high, uint32_t low) {
  return static_cast<double>((uint64_t{high} << 32 | low) >> 11) * 0x1p-53;
}

}  // namespace cadd
