// How the CUDA kernels are launched. This file has no PyTorch in it, so that nvcc alone compiles
// the kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace cadd {

// The element type of the table (forward noising) or of the logits (reverse step).
enum class Dtype { f32, f64, f16, bf16 };

// B sequences of L tokens, a table of V latents of D elements. All pointers are to contiguous
// device memory.
struct NoisingArgs {
  const int64_t* x_0;          // (B, L) tokens
  const int64_t* ids;          // (B, L) rows of the table
  const void* table;           // (V, D) Dtype: latents
  const double* coefficients;  // (B, 3) alpha, signal, noise of each sequence
  const int64_t* seed;         // (2,) seed, offset
  int64_t mask_id;             // the token of a masked position
  int64_t count;               // B L
  int64_t length;              // L
  int64_t vocab;               // V
  int64_t dim;                 // D
  int64_t* x_t;                // (B, L) tokens, written
  void* z_t;                   // (B, L, D) Dtype: latents, written
};

// K latents, N masked rows of V logits, P = B L positions, D elements a latent. All pointers are to
// contiguous device memory, except that `stride` separates the logits of two latents.
struct ReverseArgs {
  const void* logits;          // (K, N, V) Dtype
  const int64_t* rows;         // (N,) position of each row, from 0 to P - 1
  const float* z_t;            // (K, P, D) latents at time t
  const float* table;          // (V or more, D) latents of the tokens
  const double* coefficients;  // (4, C) rho_flip, pull, keep, std
  int64_t columns;             // C: 1, or N where each row has its own
  const int64_t* seed;         // (2,) seed, offset
  int64_t mask_id;             // the token of a masked position
  int64_t latents;             // K
  int64_t count;               // N
  int64_t vocab;               // V
  int64_t positions;           // P
  int64_t dim;                 // D
  int64_t stride;              // elements from the logits of one latent to those of the next latent
  int zhat;                    // a ZHat: 0 hard, 1 soft, 2 sample
  float inv_temperature;       // 1 / temperature
  double top_p;                // in (0, 1]
  int64_t* x_s;                // (N,) tokens at time s, written
  float* z_s;                  // (K, N, D) latents at time s, written
  float* probabilities;        // (N, V) written for "soft" only, where a row stays masked
  const float* z_hat;          // (N, D) read by launch_soft_move only
  int* invalid;                // (1,) set to 1 if a row of logits has no probabilities
};

// Launch the forward noising of all tokens.
cudaError_t launch_forward_noising(const NoisingArgs& args, Dtype dtype, cudaStream_t stream);

// Launch the reverse step of all rows. For "soft", z_s is not written where a row stays masked.
cudaError_t launch_reverse_step(const ReverseArgs& args, Dtype dtype, cudaStream_t stream);

// Launch the move of z_s towards z_hat where a row stays masked.
cudaError_t launch_soft_move(const ReverseArgs& args, cudaStream_t stream);

}  // namespace cadd
