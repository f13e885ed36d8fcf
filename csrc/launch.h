// How the CUDA kernels are launched. No PyTorch here, so nvcc compiles them on any machine that has
// it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace cadd {

enum class Dtype { f32, f64, f16, bf16 };

// All pointers are to device memory, contiguous, as described in ops.h.
struct NoisingArgs {
  const int64_t *x_0, *ids;
  const void* table;
  const double* clock;
  const int64_t* seed;
  int64_t mask_id, count, length, vocab, dim;  // count = B L
  int64_t* x_t;
  void* z_t;
};

struct ReverseArgs {
  const void* logits;
  const int64_t* rows;
  const float *z_t, *table;
  const double* step;
  const int64_t* seed;
  int64_t mask_id, latents, count, vocab, positions, dim,
      stride;  // stride: from one latent's logits to the next's
  int zhat;
  float inv_tau;
  double top_p;
  int64_t* x_s;
  float *z_s, *probabilities;  // (N, V) for "soft" only
  const float* z_hat;          // (N, D) for "soft" only, in its second launch
  int* bad;                    // set where a row has no law
};

cudaError_t launch_forward_noising(const NoisingArgs& args, Dtype dtype, cudaStream_t stream);
cudaError_t launch_reverse_step(const ReverseArgs& args, Dtype dtype, cudaStream_t stream);
cudaError_t launch_soft_move(const ReverseArgs& args,
                             cudaStream_t stream);  // z_s towards z_hat where masked

}  // namespace cadd
