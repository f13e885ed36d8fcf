// The two operators on the CPU, and the checks of their arguments for every backend.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace cadd {

// Raise ValueError unless the arguments of forward_noising have these types and shapes:
//   x_0    (B, L) int64 tokens
//   ids    (B, L) int64 rows of the table
//   table  (V or more, D) float
//   coefficients  (B, 3) float64: alpha, signal, noise
//   seed   (2,) int64: seed, offset
void check_forward_noising(const at::Tensor& x_0, const at::Tensor& ids, const at::Tensor& table,
                           const at::Tensor& coefficients, const at::Tensor& seed);

// Return z_t (B, L, D) and x_t (B, L). This order suits opcheck of PyTorch, which sums outputs,
// floating point outputs first.
std::tuple<at::Tensor, at::Tensor> forward_noising_cpu(const at::Tensor& x_0, const at::Tensor& ids,
                                                       const at::Tensor& table,
                                                       const at::Tensor& coefficients,
                                                       const at::Tensor& seed, int64_t mask_id);

// Raise ValueError unless the arguments of reverse_step have these types and shapes:
//   logits       (K, N, V) float32, float16 or bfloat16, of the N masked rows
//   rows         (N,) int64: position of each row, from 0 to P - 1
//   z_t          (K, P, D) float32
//   table        (V or more, D) float32
//   coefficients (4,), or (4, N) for each row, float64: rho_flip, pull, keep, std
//   seed         (2,) int64: seed, offset
//   zhat         0 hard, 1 soft, 2 sample
//   temperature  greater than 0
//   top_p        in (0, 1]
void check_reverse_step(const at::Tensor& logits, const at::Tensor& rows, const at::Tensor& z_t,
                        const at::Tensor& table, const at::Tensor& coefficients,
                        const at::Tensor& seed, int64_t zhat, double temperature, double top_p);

// Return x_s (N,), mask_id where a row stays masked, and z_s (K, N, D).
std::tuple<at::Tensor, at::Tensor> reverse_step_cpu(const at::Tensor& logits,
                                                    const at::Tensor& rows, const at::Tensor& z_t,
                                                    const at::Tensor& table,
                                                    const at::Tensor& coefficients,
                                                    const at::Tensor& seed, int64_t mask_id,
                                                    int64_t zhat, double temperature, double top_p);

}  // namespace cadd
