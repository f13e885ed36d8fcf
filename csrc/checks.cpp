// The checks of the arguments of the two operators, shared by every backend.
#include <c10/util/Exception.h>

#include "ops.h"

namespace cadd {
namespace {

void check_seed(const char* op, const at::Tensor& seed) {
  TORCH_CHECK_VALUE(seed.scalar_type() == at::kLong && seed.dim() == 1 && seed.size(0) == 2 &&
                        seed.is_contiguous(),
                    op, ": seed must be (2,) int64, a seed and an offset");
}

}  // namespace

void check_forward_noising(const at::Tensor& x_0, const at::Tensor& ids, const at::Tensor& table,
                           const at::Tensor& coefficients, const at::Tensor& seed) {
  check_seed("forward_noising", seed);
  TORCH_CHECK_VALUE(x_0.dim() == 2 && x_0.scalar_type() == at::kLong && x_0.is_contiguous(),
                    "forward_noising: x_0 must be (B, L), int64 and contiguous");
  TORCH_CHECK_VALUE(
      ids.sizes() == x_0.sizes() && ids.scalar_type() == at::kLong && ids.is_contiguous(),
      "forward_noising: ids must be like x_0, int64 and contiguous");
  TORCH_CHECK_VALUE(table.dim() == 2 && table.is_contiguous(),
                    "forward_noising: table must be (V, D) and contiguous");
  TORCH_CHECK_VALUE(
      coefficients.dim() == 2 && coefficients.size(0) == x_0.size(0) && coefficients.size(1) == 3 &&
          coefficients.scalar_type() == at::kDouble && coefficients.is_contiguous(),
      "forward_noising: coefficients must be (B, 3) float64 and contiguous: alpha, signal, noise");
}

void check_reverse_step(const at::Tensor& logits, const at::Tensor& rows, const at::Tensor& z_t,
                        const at::Tensor& table, const at::Tensor& coefficients,
                        const at::Tensor& seed, int64_t zhat, double temperature, double top_p) {
  check_seed("reverse_step", seed);
  const auto type = logits.scalar_type();
  TORCH_CHECK_VALUE(
      logits.dim() == 3 && logits.stride(2) == 1 && logits.stride(1) == logits.size(2) &&
          (type == at::kFloat || type == at::kHalf || type == at::kBFloat16),
      "reverse_step: logits must be (K, N, V) with contiguous rows, float32, float16 or bfloat16");
  TORCH_CHECK_VALUE(rows.dim() == 1 && rows.size(0) == logits.size(1) &&
                        rows.scalar_type() == at::kLong && rows.is_contiguous(),
                    "reverse_step: rows must be (N,) int64");
  TORCH_CHECK_VALUE(z_t.dim() == 3 && z_t.size(0) == logits.size(0) && z_t.is_contiguous() &&
                        z_t.scalar_type() == at::kFloat,
                    "reverse_step: z_t must be (K, P, D), float32 and contiguous");
  TORCH_CHECK_VALUE(table.dim() == 2 && table.size(0) >= logits.size(2) &&
                        table.size(1) == z_t.size(2) && table.is_contiguous() &&
                        table.scalar_type() == at::kFloat,
                    "reverse_step: table must be (V, D), float32 and contiguous");
  TORCH_CHECK_VALUE(
      (coefficients.dim() == 1 ||
       (coefficients.dim() == 2 && coefficients.size(1) == rows.size(0))) &&
          coefficients.size(0) == 4 && coefficients.scalar_type() == at::kDouble &&
          coefficients.is_contiguous(),
      "reverse_step: coefficients must be (4,) or (4, N) float64: rho_flip, pull, keep, std");
  TORCH_CHECK_VALUE(0 <= zhat && zhat <= 2,
                    "reverse_step: zhat must be 0 (hard), 1 (soft) or 2 (sample)");
  TORCH_CHECK_VALUE(temperature > 0, "reverse_step: temperature must be greater than 0, not ",
                    temperature);
  TORCH_CHECK_VALUE(0 < top_p && top_p <= 1, "reverse_step: top_p must be in (0, 1], not ", top_p);
}

}  // namespace cadd
