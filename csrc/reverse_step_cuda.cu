// The CUDA kernel of the reverse step: one block of threads a row. The row is read once for the
// normalisers; only rows that draw read it again, in contiguous chunks of one warp each, so that
// the cumulative sum runs in token order as on the CPU. Sums have a fixed order: the same call
// gives the same bits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cassert>

#include "launch.h"
#include "reverse_step.h"

namespace cadd {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr float kLowest = -INFINITY;

// Reduce over the block; every thread gets the result. `scratch` has room for one value a warp.
template <typename T, typename Op>
__device__ T block_reduce(T value, T* scratch, Op op) {
  for (int offset = 16; offset; offset /= 2)
    value = op(value, __shfl_xor_sync(0xFFFFFFFFu, value, offset));
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[0];
  for (int w = 1; w < kWarps; ++w) value = op(value, scratch[w]);
  return value;
}

struct Best {
  float value;
  int64_t token;
};

__device__ Best better(Best a, Best b) {
  return b.value > a.value || (b.value == a.value && b.token < a.token) ? b : a;
}

__device__ Best block_best(Best best, float* values, int64_t* tokens) {
  for (int offset = 16; offset; offset /= 2)
    best = better(best, {__shfl_xor_sync(0xFFFFFFFFu, best.value, offset),
                         static_cast<int64_t>(__shfl_xor_sync(
                             0xFFFFFFFFu, static_cast<long long>(best.token), offset))});
  __syncthreads();
  if (threadIdx.x % 32 == 0)
    values[threadIdx.x / 32] = best.value, tokens[threadIdx.x / 32] = best.token;
  __syncthreads();
  best = {values[0], tokens[0]};
  for (int w = 1; w < kWarps; ++w) best = better(best, {values[w], tokens[w]});
  return best;
}

// One row as seen by its block of threads.
template <typename L>
struct Row {
  const ReverseArgs& a;
  const L* logits;
  float *top, *factor;  // (K) each, shared: largest logit, and 1 / (K sum of exponentials)
  float least;          // top-p: probabilities below it count as zero

  __device__ float logit(int64_t k, int64_t v) const {
    return v == a.mask_id ? kLowest : static_cast<float>(logits[k * a.stride + v]) * a.inv_tau;
  }
  __device__ float p(int64_t v) const {
    float sum = 0;
    for (int64_t k = 0; k < a.latents; ++k)
      sum += factor[k] * exp_nonpositive(logit(k, v) - top[k]);
    return sum >= least ? sum : 0.0f;
  }
};

template <typename L>
__global__ void reverse_step_kernel(ReverseArgs a) {
  extern __shared__ float shared[];  // top (K), factor (K)
  __shared__ double sums[kWarps], chunks[kWarps];
  __shared__ float values[kWarps];
  __shared__ int64_t tokens[kWarps], found;
  const Stream stream{static_cast<uint64_t>(a.seed[0]), static_cast<uint32_t>(a.seed[1])};
  const Step step{a.step[0], static_cast<float>(a.step[1]), static_cast<float>(a.step[2]),
                  static_cast<float>(a.step[3])};
  const bool hard = a.zhat == static_cast<int>(ZHat::hard),
             soft = a.zhat == static_cast<int>(ZHat::soft);
  const auto larger = [](float x, float y) { return y > x ? y : x; };
  const auto add = [](double x, double y) { return x + y; };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t chunk = (a.vocab + kWarps - 1) / kWarps;

  for (int64_t n = blockIdx.x; n < a.count; n += gridDim.x) {
    const int64_t position = a.rows[n];
    assert(0 <= position && position < a.positions);
    const Choices choice = choices(stream, position);
    const bool flip = choice.flip < step.rho_flip;
    if (!flip && a.dim == 0) {
      if (threadIdx.x == 0) a.x_s[n] = a.mask_id;
      continue;
    }
    Row<L> row{a, static_cast<const L*>(a.logits) + n * a.vocab, shared, shared + a.latents, 0.0f};

    Best mode{kLowest, a.vocab};
    bool law = true;
    for (int64_t k = 0; k < a.latents;
         ++k) {  // one read: the largest logit and the sum relative to it, online
      Best best{kLowest, a.vocab};
      float sum = 0;
      bool good = true;
      for (int64_t v = threadIdx.x; v < a.vocab; v += kThreads) {
        const float l = row.logit(k, v);
        good &= l < INFINITY;  // false for NaN too
        if (l > best.value) {
          sum = sum * exp_nonpositive(best.value - l) + 1.0f;
          best = {l, v};
        } else if (l > kLowest) {
          sum += exp_nonpositive(l - best.value);
        }
      }
      mode = block_best(best, values, tokens);
      const double scaled =
          best.value > kLowest ? double{sum} * exp_nonpositive(best.value - mode.value) : 0.0;
      const double total = block_reduce(scaled, sums, add);
      law &= __syncthreads_and(good) && mode.value > kLowest;
      if (threadIdx.x == 0)
        row.top[k] = mode.value, row.factor[k] = static_cast<float>(1.0 / (total * a.latents));
    }
    __syncthreads();
    if (!law) {
      if (threadIdx.x == 0) *a.bad = 1;
      continue;
    }
    if (a.latents > 1 && hard && !flip) {
      mode = {kLowest, a.vocab};
      for (int64_t v = threadIdx.x; v < a.vocab; v += kThreads) mode = better(mode, {row.p(v), v});
      mode = block_best(mode, values, tokens);
    }

    if (a.top_p < 1 &&
        (flip || !hard)) {  // the largest threshold that leaves top_p of the mass, bit by bit
      uint32_t code = 0;
      for (int bit = 29; bit >= 0; --bit) {  // probabilities are at most 1: bit 30 is never set
        row.least = bits_to_float(code | 1u << bit);
        double mass = 0;
        for (int64_t v = threadIdx.x; v < a.vocab; v += kThreads) mass += row.p(v);
        if (block_reduce(mass, sums, add) >= a.top_p) code |= 1u << bit;
      }
      row.least = bits_to_float(code);
    }

    double total = 0;
    const auto weigh = [&] {  // the mass of each warp's chunk
      double mass = 0;
      const int64_t end = min(a.vocab, (warp + 1) * chunk);
      for (int64_t v = warp * chunk + lane; v < end; v += 32) mass += row.p(v);
      for (int offset = 16; offset; offset /= 2) mass += __shfl_xor_sync(0xFFFFFFFFu, mass, offset);
      __syncthreads();
      if (lane == 0) chunks[warp] = mass;
      __syncthreads();
      total = 0;
      for (int w = 0; w < kWarps; ++w) total += chunks[w];
    };
    const auto draw = [&](double u) {  // the token at which the cumulative probability passes u
      if (warp == 0) {
        double before = 0, rest = u * total;
        int w = 0, last = 0;
        for (; w < kWarps; ++w) {
          if (chunks[w] > 0) last = w;
          if (before + chunks[w] > rest) break;
          before += chunks[w];
        }
        if (w == kWarps) w = last, before = 0, rest = INFINITY;  // rounding stepped beyond the end
        int64_t token = -1;
        const int64_t end = min(a.vocab, (w + 1) * chunk);
        for (int64_t first = w * chunk; first < end; first += 32) {
          const float p = first + lane < end ? row.p(first + lane) : 0.0f;
          double cdf = p;
          for (int offset = 1; offset < 32; offset *= 2) {
            const double left = __shfl_up_sync(0xFFFFFFFFu, cdf, offset);
            if (lane >= offset) cdf += left;
          }
          const unsigned some = __ballot_sync(0xFFFFFFFFu, p > 0);
          const unsigned past = __ballot_sync(0xFFFFFFFFu, p > 0 && before + cdf > rest);
          if (some) token = first + 31 - __clz(some);
          if (past) {
            token = first + __ffs(past) - 1;
            break;
          }
          before += __shfl_sync(0xFFFFFFFFu, cdf, 31);
        }
        if (lane == 0) found = token;
      }
      __syncthreads();
      const int64_t token = found;
      __syncthreads();
      return token;
    };
    if (flip || !hard) weigh();
    const int64_t token = flip ? draw(choice.token) : a.mask_id;
    if (threadIdx.x == 0) a.x_s[n] = token;
    if (soft && !flip) {
      for (int64_t v = threadIdx.x; v < a.vocab; v += kThreads)
        a.probabilities[n * a.vocab + v] = static_cast<float>(row.p(v) / total);
      continue;
    }
    const int64_t quarter = quarter_of(a.dim);
    for (int64_t k = 0; k < a.latents; ++k) {
      const int64_t at = k * a.positions + position;
      const int64_t source = flip ? token : hard ? mode.token : draw(hat_choice(stream, at));
      const float *w = a.table + source * a.dim, *z_t = a.z_t + at * a.dim;
      float* z_s = a.z_s + (k * a.count + n) * a.dim;
      for (int64_t block = threadIdx.x; block < quarter; block += kThreads) {
        float eps[4] = {};
        if (!flip && step.std > 0) four_normals(stream, at, static_cast<uint32_t>(block), eps);
        for (int q = 0; q < 4; ++q) {
          const int64_t e = q * quarter + block;
          if (e < a.dim) z_s[e] = flip ? w[e] : posterior(w[e], z_t[e], eps[q], step);
        }
      }
    }
    __syncthreads();
  }
}

__global__ void soft_move_kernel(ReverseArgs a) {
  const Stream stream{static_cast<uint64_t>(a.seed[0]), static_cast<uint32_t>(a.seed[1])};
  const Step step{a.step[0], static_cast<float>(a.step[1]), static_cast<float>(a.step[2]),
                  static_cast<float>(a.step[3])};
  const int64_t quarter = quarter_of(a.dim), total = a.latents * a.count * quarter;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < total;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t block = i % quarter, n = i / quarter % a.count, k = i / quarter / a.count;
    if (a.x_s[n] != a.mask_id) continue;
    const int64_t at = k * a.positions + a.rows[n];
    float eps[4] = {};
    if (step.std > 0) four_normals(stream, at, static_cast<uint32_t>(block), eps);
    for (int q = 0; q < 4; ++q) {
      const int64_t e = q * quarter + block;
      if (e < a.dim)
        a.z_s[(k * a.count + n) * a.dim + e] =
            posterior(a.z_hat[n * a.dim + e], a.z_t[at * a.dim + e], eps[q], step);
    }
  }
}

}  // namespace

cudaError_t launch_reverse_step(const ReverseArgs& a, Dtype dtype, cudaStream_t stream) {
  if (a.count == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(a.count, 1 << 20)));
  const size_t shared = 2 * a.latents * sizeof(float);
  switch (dtype) {
    case Dtype::f16: reverse_step_kernel<__half><<<grid, kThreads, shared, stream>>>(a); break;
    case Dtype::bf16:
      reverse_step_kernel<__nv_bfloat16><<<grid, kThreads, shared, stream>>>(a);
      break;
    default: reverse_step_kernel<float><<<grid, kThreads, shared, stream>>>(a);
  }
  return cudaGetLastError();
}

cudaError_t launch_soft_move(const ReverseArgs& a, cudaStream_t stream) {
  const int64_t total = a.latents * a.count * quarter_of(a.dim);
  if (total == 0) return cudaSuccess;
  soft_move_kernel<<<static_cast<unsigned>(std::min<int64_t>((total + 255) / 256, 1 << 20)), 256, 0,
                     stream>>>(a);
  return cudaGetLastError();
}

}  // namespace cadd
