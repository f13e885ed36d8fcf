// The CUDA kernel of the reverse step: one block of threads a row. Sums have a fixed order, so the
// same call gives the same bits.
//
// The ladder to this kernel. Its rungs have no figures: nothing was measured on a GPU yet.
//   a thread a row   neighbouring threads read V logits apart, softmax writes (N, V)
//   a block a row    neighbouring threads read neighbours; a pass for the maximum, then for the sum
//   one pass         maximum and sum together (online softmax), (N, V) for "soft" only
//   this kernel      a draw reads the row again: each warp sums a chunk, a warp searches a chunk
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cassert>

#include "launch.h"
#include "reverse_step.h"

namespace cadd {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr float kLowest = -INFINITY;

// A token and its value: a logit or a probability.
struct Best {
  float value;
  int64_t token;
};

// The shared memory of one thread block.
struct Scratch {
  double sums[kWarps];     // of block_sum
  float values[kWarps];    // of block_best
  int64_t tokens[kWarps];  // of block_best
  double chunks[kWarps];   // mass of the chunk of each warp
  int64_t drawn;           // the token of a draw
};

__device__ int lane_index() { return threadIdx.x % 32; }
__device__ int warp_index() { return threadIdx.x / 32; }

// Sum over a warp. Every lane gets the result.
__device__ double warp_sum(double value) {
  for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// Sum over the lanes up to this lane.
__device__ double warp_prefix_sum(double value) {
  for (int offset = 1; offset < 32; offset *= 2) {
    const double left = __shfl_up_sync(kAllLanes, value, offset);
    if (lane_index() >= offset) value += left;
  }
  return value;
}

// Sum over the thread block. Every thread gets the result.
__device__ double block_sum(double value, Scratch& scratch) {
  value = warp_sum(value);
  __syncthreads();
  if (lane_index() == 0) scratch.sums[warp_index()] = value;
  __syncthreads();
  value = scratch.sums[0];
  for (int warp = 1; warp < kWarps; ++warp) value += scratch.sums[warp];
  return value;
}

// Choose the larger value, the first token of equals.
__device__ Best better(Best a, Best b) {
  return b.value > a.value || (b.value == a.value && b.token < a.token) ? b : a;
}

// Choose the best over the thread block. Every thread gets the result.
__device__ Best block_best(Best best, Scratch& scratch) {
  for (int offset = 16; offset; offset /= 2) {
    const float value = __shfl_xor_sync(kAllLanes, best.value, offset);
    const long long token = __shfl_xor_sync(kAllLanes, static_cast<long long>(best.token), offset);
    best = better(best, {value, static_cast<int64_t>(token)});
  }
  __syncthreads();
  if (lane_index() == 0) {
    scratch.values[warp_index()] = best.value;
    scratch.tokens[warp_index()] = best.token;
  }
  __syncthreads();
  best = {scratch.values[0], scratch.tokens[0]};
  for (int warp = 1; warp < kWarps; ++warp)
    best = better(best, {scratch.values[warp], scratch.tokens[warp]});
  return best;
}

// One row as its thread block reads it.
template <typename Logit>
struct Row {
  const ReverseArgs& args;
  const Logit* logits;  // (V,) of the first latent
  float* largest;       // (K,) shared: largest logit
  float* factor;        // (K,) shared: 1 / (K sum of exponentials)
  float threshold;      // top-p: smaller probabilities count as zero

  // Read a logit over the temperature, minus infinity for the mask.
  __device__ float logit(int64_t k, int64_t token) const {
    if (token == args.mask_id) return kLowest;
    return static_cast<float>(logits[k * args.stride + token]) * args.inv_temperature;
  }

  // Compute the probability of a token, averaged over the latents.
  __device__ float probability(int64_t token) const {
    float sum = 0;
    for (int64_t k = 0; k < args.latents; ++k)
      sum += factor[k] * exp_nonpositive(logit(k, token) - largest[k]);
    return sum >= threshold ? sum : 0.0f;
  }

  // Bound the chunk of tokens that one warp sums: from chunk_begin(warp) to chunk_end(warp).
  __device__ int64_t chunk_begin(int warp) const {
    return warp * ((args.vocab + kWarps - 1) / kWarps);
  }
  __device__ int64_t chunk_end(int warp) const { return min(args.vocab, chunk_begin(warp + 1)); }
};

// Read the logits of latent k once: find the first largest logit, and write the normalisers to
// shared memory. Return false if the logits give no probabilities.
template <typename Logit>
__device__ bool read_latent(const Row<Logit>& row, int64_t k, Best& mode, Scratch& scratch) {
  Best best{kLowest, row.args.vocab};
  float sum = 0;  // of exponentials relative to the largest logit so far
  bool valid = true;
  for (int64_t token = threadIdx.x; token < row.args.vocab; token += kThreads) {
    const float logit = row.logit(k, token);
    valid &= logit < INFINITY;  // false for NaN too
    if (logit > best.value) {
      sum = sum * exp_nonpositive(best.value - logit) + 1.0f;
      best = {logit, token};
    } else if (logit > kLowest) {
      sum += exp_nonpositive(logit - best.value);
    }
  }
  mode = block_best(best, scratch);
  const double scaled =
      best.value > kLowest ? double{sum} * exp_nonpositive(best.value - mode.value) : 0.0;
  const double total = block_sum(scaled, scratch);
  valid = __syncthreads_and(valid) && mode.value > kLowest;
  if (threadIdx.x == 0) {
    row.largest[k] = mode.value;
    row.factor[k] = static_cast<float>(1.0 / (total * row.args.latents));
  }
  return valid;
}

// Read the logits of all latents: find the largest logit of the last latent, and write the
// normalisers to shared memory. Return false if the logits give no probabilities.
template <typename Logit>
__device__ bool read_row(const Row<Logit>& row, Best& mode, Scratch& scratch) {
  bool valid = true;
  for (int64_t k = 0; k < row.args.latents; ++k) valid &= read_latent(row, k, mode, scratch);
  __syncthreads();
  return valid;
}

// Find the most probable token of the mean over the latents.
template <typename Logit>
__device__ Best mode_of_mean(const Row<Logit>& row, Scratch& scratch) {
  Best mode{kLowest, row.args.vocab};
  for (int64_t token = threadIdx.x; token < row.args.vocab; token += kThreads)
    mode = better(mode, {row.probability(token), token});
  return block_best(mode, scratch);
}

// Find the largest threshold that leaves top_p of the mass, bit by bit: positive floats are ordered
// like their bits.
//
// This bisects with sums in a fixed order; the histogram of the CPU kernel would need atomic adds
// of floats, whose order varies.
template <typename Logit>
__device__ float nucleus_threshold(Row<Logit> row, Scratch& scratch) {
  uint32_t code = 0;
  for (int bit = 29; bit >= 0; --bit) {  // probabilities are at most 1: bit 30 is never set
    row.threshold = bits_to_float(code | 1u << bit);
    double mass = 0;
    for (int64_t token = threadIdx.x; token < row.args.vocab; token += kThreads)
      mass += row.probability(token);
    if (block_sum(mass, scratch) >= row.args.top_p) code |= 1u << bit;
  }
  return bits_to_float(code);
}

// Sum the mass of the chunk of each warp, in shared memory. Return the mass of the row.
template <typename Logit>
__device__ double sum_chunks(const Row<Logit>& row, Scratch& scratch) {
  const int64_t end = row.chunk_end(warp_index());
  double mass = 0;
  for (int64_t token = row.chunk_begin(warp_index()) + lane_index(); token < end; token += 32)
    mass += row.probability(token);
  mass = warp_sum(mass);
  __syncthreads();
  if (lane_index() == 0) scratch.chunks[warp_index()] = mass;
  __syncthreads();
  double total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += scratch.chunks[warp];
  return total;
}

// Find the token of a chunk at which the cumulative mass passes `target`, or the last token that
// has a probability. `before` is the mass of the chunks before it. One warp calls this.
template <typename Logit>
__device__ int64_t find_in_chunk(const Row<Logit>& row, int chunk, double before, double target) {
  const int64_t end = row.chunk_end(chunk);
  int64_t found = -1;
  for (int64_t first = row.chunk_begin(chunk); first < end; first += 32) {
    const int64_t token = first + lane_index();
    const float probability = token < end ? row.probability(token) : 0.0f;
    const double cumulative = warp_prefix_sum(probability);
    const unsigned possible = __ballot_sync(kAllLanes, probability > 0);
    const unsigned past = __ballot_sync(kAllLanes, probability > 0 && before + cumulative > target);
    if (past) return first + __ffs(past) - 1;
    if (possible) found = first + 31 - __clz(possible);
    before += __shfl_sync(kAllLanes, cumulative, 31);
  }
  return found;
}

// Draw the token at which the cumulative mass passes `target`. Every thread gets the result.
template <typename Logit>
__device__ int64_t draw(const Row<Logit>& row, double target, Scratch& scratch) {
  if (warp_index() == 0) {
    double before = 0;
    int chunk = 0, last = 0;
    for (; chunk < kWarps; ++chunk) {
      if (scratch.chunks[chunk] > 0) last = chunk;
      if (before + scratch.chunks[chunk] > target) break;
      before += scratch.chunks[chunk];
    }
    if (chunk == kWarps) {  // rounding passed the end: take the last token with a probability
      chunk = last;
      before = 0;
      target = INFINITY;
    }
    const int64_t token = find_in_chunk(row, chunk, before, target);
    if (lane_index() == 0) scratch.drawn = token;
  }
  __syncthreads();
  const int64_t token = scratch.drawn;
  __syncthreads();
  return token;
}

// Write the normalised probabilities of row n.
template <typename Logit>
__device__ void write_probabilities(const Row<Logit>& row, int64_t n, double total) {
  float* out = row.args.probabilities + n * row.args.vocab;
  for (int64_t token = threadIdx.x; token < row.args.vocab; token += kThreads)
    out[token] = static_cast<float>(row.probability(token) / total);
}

// Move the four elements of one quad of z_s towards z_hat.
__device__ void move_quad(float* z_s, const float* z_hat, const float* z_t, const float (&eps)[4],
                          int64_t quad, int64_t dim, ReverseCoefficients coefficients) {
  for (int q = 0; q < 4; ++q) {
    const int64_t e = q * quarter_of(dim) + quad;
    if (e < dim) z_s[e] = posterior(z_hat[e], z_t[e], eps[q], coefficients);
  }
}

// Move latent k of row n towards z_hat, or set it to z_hat if the token flips.
__device__ void step_latent(const ReverseArgs& args, int64_t k, int64_t n, const float* z_hat,
                            bool flip, ReverseCoefficients coefficients, RandomStream random) {
  const int64_t position = k * args.positions + args.rows[n];
  const float* z_t = args.z_t + position * args.dim;
  float* z_s = args.z_s + (k * args.count + n) * args.dim;
  if (flip) {
    for (int64_t e = threadIdx.x; e < args.dim; e += kThreads) z_s[e] = z_hat[e];
    return;
  }
  for (int64_t quad = threadIdx.x; quad < quarter_of(args.dim); quad += kThreads) {
    float eps[4] = {};
    if (coefficients.std > 0) four_normals(random, position, static_cast<uint32_t>(quad), eps);
    move_quad(z_s, z_hat, z_t, eps, quad, args.dim, coefficients);
  }
}

// Step row n: its token and its latents, or its probabilities for "soft" if it stays masked.
template <typename Logit>
__device__ void step_row(Row<Logit> row, int64_t n, Scratch& scratch) {
  const ReverseArgs& args = row.args;
  const ReverseCoefficients coefficients = ReverseColumns{args.coefficients, args.columns}.of(n);
  const RandomStream random = random_stream(args.seed);
  const int64_t position = args.rows[n];
  assert(0 <= position && position < args.positions);
  const Choices choice = choices(random, position);
  const bool flip = choice.flip < coefficients.rho_flip;
  const bool hard = args.zhat == static_cast<int>(ZHat::hard);
  if (!flip && threadIdx.x == 0) args.x_s[n] = args.mask_id;
  if (!flip && args.dim == 0) return;  // without a latent nothing else changes

  Best mode{kLowest, args.vocab};
  if (!read_row(row, mode, scratch)) {
    if (threadIdx.x == 0) *args.invalid = 1;
    return;
  }
  double total = 0;
  if (flip || !hard) {
    if (args.top_p < 1) row.threshold = nucleus_threshold(row, scratch);
    total = sum_chunks(row, scratch);
  } else if (args.latents > 1) {
    mode = mode_of_mean(row, scratch);
  }

  if (flip) mode.token = draw(row, choice.token * total, scratch);
  if (flip && threadIdx.x == 0) args.x_s[n] = mode.token;
  if (!flip && args.zhat == static_cast<int>(ZHat::soft)) {
    write_probabilities(row, n, total);
    return;
  }
  for (int64_t k = 0; k < args.latents; ++k) {
    int64_t token = mode.token;
    if (!flip && !hard)
      token = draw(row, hat_choice(random, k * args.positions + position) * total, scratch);
    step_latent(args, k, n, args.table + token * args.dim, flip, coefficients, random);
  }
}

// Step all rows, one thread block for each row.
template <typename Logit>
__global__ void reverse_step_kernel(ReverseArgs args) {
  extern __shared__ float shared[];  // (2, K) largest logit, factor
  __shared__ Scratch scratch;
  for (int64_t n = blockIdx.x; n < args.count; n += gridDim.x) {
    const Logit* logits = static_cast<const Logit*>(args.logits) + n * args.vocab;
    step_row(Row<Logit>{args, logits, shared, shared + args.latents, 0.0f}, n, scratch);
    __syncthreads();  // the next row overwrites the shared memory
  }
}

// Move the latents of the rows that stay masked towards z_hat, one thread for each quad.
__global__ void soft_move_kernel(ReverseArgs args) {
  const RandomStream random = random_stream(args.seed);
  const ReverseColumns coefficients{args.coefficients, args.columns};
  const int64_t quarter = quarter_of(args.dim), total = args.latents * args.count * quarter;
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (int64_t i = thread; i < total; i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t quad = i % quarter, n = i / quarter % args.count, k = i / quarter / args.count;
    if (args.x_s[n] != args.mask_id) continue;
    const int64_t position = k * args.positions + args.rows[n];
    const ReverseCoefficients own = coefficients.of(n);
    float eps[4] = {};
    if (own.std > 0) four_normals(random, position, static_cast<uint32_t>(quad), eps);
    move_quad(args.z_s + (k * args.count + n) * args.dim, args.z_hat + n * args.dim,
              args.z_t + position * args.dim, eps, quad, args.dim, own);
  }
}

}  // namespace

cudaError_t launch_reverse_step(const ReverseArgs& args, Dtype dtype, cudaStream_t stream) {
  if (args.count == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(args.count, 1 << 20)));
  const size_t shared = 2 * args.latents * sizeof(float);
  switch (dtype) {
    case Dtype::f16: reverse_step_kernel<__half><<<grid, kThreads, shared, stream>>>(args); break;
    case Dtype::bf16:
      reverse_step_kernel<__nv_bfloat16><<<grid, kThreads, shared, stream>>>(args);
      break;
    default: reverse_step_kernel<float><<<grid, kThreads, shared, stream>>>(args);
  }
  return cudaGetLastError();
}

cudaError_t launch_soft_move(const ReverseArgs& args, cudaStream_t stream) {
  const int64_t total = args.latents * args.count * quarter_of(args.dim);
  if (total == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>((total + 255) / 256, 1 << 20)));
  soft_move_kernel<<<grid, 256, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace cadd
