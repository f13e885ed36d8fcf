// What PyTorch sees: two operators, their checks, their CPU kernels, and what was compiled.
#include "ops.h"

#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <cmath>

#include "cpu.h"
#include "reverse_step.h"

// The CUDA architectures come as bare words, 8.0,9.0+PTX: quotes and semicolons do not survive every shell.
#define CADD_TEXT(...) #__VA_ARGS__
#define CADD_EXPANDED(...) CADD_TEXT(__VA_ARGS__)
#ifndef CADD_ARCHITECTURES
#define CADD_ARCHITECTURES
#endif

namespace cadd {
namespace {

void check_seed(const char* op, const at::Tensor& seed) {
  TORCH_CHECK_VALUE(seed.scalar_type() == at::kLong && seed.dim() == 1 && seed.size(0) == 2 && seed.is_contiguous(),
                    op, ": seed must be (2,) int64, a seed and an offset");
}

}  // namespace

void check_forward_noising(const at::Tensor& x_0, const at::Tensor& ids, const at::Tensor& table, const at::Tensor& clock,
                           const at::Tensor& seed) {
  check_seed("forward_noising", seed);
  TORCH_CHECK_VALUE(x_0.dim() == 2 && x_0.scalar_type() == at::kLong && x_0.is_contiguous(),
                    "forward_noising: x_0 must be (B, L), int64 and contiguous");
  TORCH_CHECK_VALUE(ids.sizes() == x_0.sizes() && ids.scalar_type() == at::kLong && ids.is_contiguous(),
                    "forward_noising: ids must be like x_0, int64 and contiguous");
  TORCH_CHECK_VALUE(table.dim() == 2 && table.is_contiguous(), "forward_noising: table must be (V, D) and contiguous");
  TORCH_CHECK_VALUE(clock.dim() == 2 && clock.size(0) == x_0.size(0) && clock.size(1) == 3 &&
                        clock.scalar_type() == at::kDouble && clock.is_contiguous(),
                    "forward_noising: clock must be (B, 3) float64 and contiguous: alpha, signal, noise");
}

void check_reverse_step(const at::Tensor& logits, const at::Tensor& rows, const at::Tensor& z_t, const at::Tensor& table,
                        const at::Tensor& step, const at::Tensor& seed, int64_t zhat, double temperature, double top_p) {
  check_seed("reverse_step", seed);
  const auto type = logits.scalar_type();
  TORCH_CHECK_VALUE(logits.dim() == 3 && logits.stride(2) == 1 && logits.stride(1) == logits.size(2) &&
                        (type == at::kFloat || type == at::kHalf || type == at::kBFloat16),
                    "reverse_step: logits must be (K, N, V) with contiguous rows, float32, float16 or bfloat16");
  TORCH_CHECK_VALUE(rows.dim() == 1 && rows.size(0) == logits.size(1) && rows.scalar_type() == at::kLong && rows.is_contiguous(),
                    "reverse_step: rows must be (N,) int64");
  TORCH_CHECK_VALUE(z_t.dim() == 3 && z_t.size(0) == logits.size(0) && z_t.is_contiguous() && z_t.scalar_type() == at::kFloat,
                    "reverse_step: z_t must be (K, P, D), float32 and contiguous");
  TORCH_CHECK_VALUE(table.dim() == 2 && table.size(0) >= logits.size(2) && table.size(1) == z_t.size(2) &&
                        table.is_contiguous() && table.scalar_type() == at::kFloat,
                    "reverse_step: table must be (V, D), float32 and contiguous");
  TORCH_CHECK_VALUE(step.dim() == 1 && step.size(0) == 4 && step.scalar_type() == at::kDouble && step.is_contiguous(),
                    "reverse_step: step must be (4,) float64: rho_flip, pull, keep, std");
  TORCH_CHECK_VALUE(0 <= zhat && zhat <= 2, "reverse_step: zhat must be 0 (hard), 1 (soft) or 2 (sample)");
  TORCH_CHECK_VALUE(temperature > 0, "reverse_step: temperature must be greater than 0, not ", temperature);
  TORCH_CHECK_VALUE(0 < top_p && top_p <= 1, "reverse_step: top_p must be in (0, 1], not ", top_p);
}

TORCH_LIBRARY(cadd_min, m) {
  m.def("forward_noising(Tensor x_0, Tensor ids, Tensor table, Tensor clock, Tensor seed, int mask_id) -> (Tensor, Tensor)");
  m.def(
      "reverse_step(Tensor logits, Tensor rows, Tensor z_t, Tensor table, Tensor step, Tensor seed, int mask_id, int zhat, "
      "float temperature, float top_p) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(cadd_min, CPU, m) {
  m.impl("forward_noising", &forward_noising_cpu);
  m.impl("reverse_step", &reverse_step_cpu);
}

}  // namespace cadd

// Does this build compute what it should? Philox's published vector of pi's digits, and the two functions of our own.
static bool self_test() {
  const cadd::Words w = cadd::philox(0x299F31D0A4093822u, {0x243F6A88u, 0x85A308D3u, 0x13198A2Eu, 0x03707344u});
  bool good = w.x == 0xD16CFE09u && w.y == 0x94FDCCEBu && w.z == 0x5001E420u && w.w == 0x24126EA1u;
  for (float x = 1e-9f; x < 80.0f; x *= 1.7f) {
    good &= std::abs(cadd::log_positive(x) - std::log(x)) <= 1e-6f * (1 + std::abs(std::log(x)));
    good &= std::abs(cadd::exp_nonpositive(-x) - std::exp(-x)) <= 1e-6f * std::exp(-x);
  }
  return good;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("philox", [](uint64_t key, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const cadd::Words w = cadd::philox(key, {a, b, c, d});
    return pybind11::make_tuple(w.x, w.y, w.z, w.w);
  });
  m.def("self_test", &self_test);
  m.attr("vector_code") = vector_code();
  m.attr("cuda_architectures") = CADD_EXPANDED(CADD_ARCHITECTURES);
  m.attr("compiler") = __VERSION__;
}
