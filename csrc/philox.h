// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), for host
// and device.
//
// A counter-based generator has no state: a draw is a function of its key and its counter. Here the
// key is the seed, and the counter says which draw of which token of which step it is. So the same
// seed gives the same bits whatever the thread count, the grid or the backend, and nothing has to
// be stored for the backward pass.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CADD_HD __host__ __device__ __forceinline__
#else
#define CADD_HD inline __attribute__((always_inline))
#endif

namespace cadd {

struct Words {
  uint32_t x, y, z, w;
};

CADD_HD Words philox(uint64_t key, Words c) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c.x, b = uint64_t{0xCD9E8D57u} * c.z;
    c = {static_cast<uint32_t>(b >> 32) ^ c.y ^ k0, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ c.w ^ k1, static_cast<uint32_t>(a)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// Who draws: seed and offset are the caller's (a run, a step); position is a token's place in (K,
// B, L).
struct Stream {
  uint64_t seed;
  uint32_t offset;
};

// Blocks of four words for one position: 0, 1, ... are the noise of elements 0-3, 4-7, ...; the
// last two are uniforms.
constexpr uint32_t kTokenBlock = 0xFFFFFFFFu, kHatBlock = 0xFFFFFFFEu;

CADD_HD Words draw_words(Stream s, uint64_t position, uint32_t block) {
  return philox(s.seed, {block, static_cast<uint32_t>(position),
                         static_cast<uint32_t>(position >> 32), s.offset});
}

// 53 bits of two words, in [0, 1).
CADD_HD double uniform(uint32_t high, uint32_t low) {
  return static_cast<double>((uint64_t{high} << 32 | low) >> 11) * 0x1p-53;
}

}  // namespace cadd
