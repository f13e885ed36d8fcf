// What Python sees: the two operators with their CPU kernels, a self-test, and what was compiled.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <cmath>

#include "ops.h"
#include "reverse_step.h"
#include "vector_blocks.h"

// The CUDA architectures come as bare words, 8.0,9.0+PTX: quotes and semicolons do not survive
// every shell.
#define CADD_TEXT(...) #__VA_ARGS__
#define CADD_EXPANDED(...) CADD_TEXT(__VA_ARGS__)
#ifndef CADD_ARCHITECTURES
#define CADD_ARCHITECTURES
#endif

namespace cadd {
namespace {

// Check Philox against its published vector for the digits of pi.
bool philox_is_right() {
  const Words words =
      philox(0x299F31D0A4093822u, {0x243F6A88u, 0x85A308D3u, 0x13198A2Eu, 0x03707344u});
  return words.x == 0xD16CFE09u && words.y == 0x94FDCCEBu && words.z == 0x5001E420u &&
         words.w == 0x24126EA1u;
}

// Check that this build computes what it should: Philox, and the logarithm and the exponential
// against those of the standard library.
bool self_test() {
  bool good = philox_is_right();
  for (float x = 1e-9f; x < 80.0f; x *= 1.7f) {
    good &= std::abs(log_positive(x) - std::log(x)) <= 1e-6f * (1 + std::abs(std::log(x)));
    good &= std::abs(exp_nonpositive(-x) - std::exp(-x)) <= 1e-6f * std::exp(-x);
  }
  return good;
}

}  // namespace

TORCH_LIBRARY(cadd_min, m) {
  m.def(
      "forward_noising(Tensor x_0, Tensor ids, Tensor table, Tensor coefficients, Tensor seed, "
      "int mask_id) -> (Tensor, Tensor)");
  m.def(
      "reverse_step(Tensor logits, Tensor rows, Tensor z_t, Tensor table, Tensor coefficients, "
      "Tensor seed, int mask_id, int zhat, float temperature, float top_p) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(cadd_min, CPU, m) {
  m.impl("forward_noising", &forward_noising_cpu);
  m.impl("reverse_step", &reverse_step_cpu);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("philox", [](uint64_t key, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    const Words words = philox(key, {x, y, z, w});
    return pybind11::make_tuple(words.x, words.y, words.z, words.w);
  });
  m.def("self_test", &self_test);
  m.attr("vector_code") = vector_code();
  m.attr("cuda_architectures") = CADD_EXPANDED(CADD_ARCHITECTURES);
  m.attr("compiler") = __VERSION__;
}

}  // namespace cadd
