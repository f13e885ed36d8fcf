// The two operators: their checks, once for every backend, and who implements them.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace cadd {

// x_0, ids (B, L) int64; table (V or more, D); clock (B, 3) double: alpha, signal, noise; seed (2)
// int64: seed, offset. Returns z_t (B, L, D) and x_t (B, L), in this order: PyTorch's opcheck sums
// up outputs, floating point ones first.
void check_forward_noising(const at::Tensor& x_0, const at::Tensor& ids, const at::Tensor& table,
                           const at::Tensor& clock, const at::Tensor& seed);
std::tuple<at::Tensor, at::Tensor> forward_noising_cpu(const at::Tensor& x_0, const at::Tensor& ids,
                                                       const at::Tensor& table,
                                                       const at::Tensor& clock,
                                                       const at::Tensor& seed, int64_t mask_id);

// logits (K, N, V) of the N masked rows; rows (N) int64, their places in 0..P-1; z_t (K, P, D) and
// table (V or more, D) float32; step (4) double: rho_flip, pull, keep, std; seed as above; zhat 0
// hard, 1 soft, 2 sample. Returns x_s (N), mask_id where a row stays masked, and z_s (K, N, D).
void check_reverse_step(const at::Tensor& logits, const at::Tensor& rows, const at::Tensor& z_t,
                        const at::Tensor& table, const at::Tensor& step, const at::Tensor& seed,
                        int64_t zhat, double temperature, double top_p);
std::tuple<at::Tensor, at::Tensor> reverse_step_cpu(const at::Tensor& logits,
                                                    const at::Tensor& rows, const at::Tensor& z_t,
                                                    const at::Tensor& table, const at::Tensor& step,
                                                    const at::Tensor& seed, int64_t mask_id,
                                                    int64_t zhat, double temperature, double top_p);

}  // namespace cadd
