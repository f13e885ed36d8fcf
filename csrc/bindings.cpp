// What PyTorch sees: two operators, their CPU kernels, and what was compiled.
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

TORCH_LIBRARY(cadd_min, m) {
  m.def(
      "forward_noising(Tensor x_0, Tensor ids, Tensor table, Tensor clock, Tensor seed, int "
      "mask_id) -> (Tensor, Tensor)");
  m.def(
      "reverse_step(Tensor logits, Tensor rows, Tensor z_t, Tensor table, Tensor step, Tensor "
      "seed, int mask_id, int zhat, "
      "float temperature, float top_p) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(cadd_min, CPU, m) {
  m.impl("forward_noising", &forward_noising_cpu);
  m.impl("reverse_step", &reverse_step_cpu);
}

}  // namespace cadd

// Does this build compute what it should? Philox's published vector of pi's digits, and the two
// functions of our own.
static bool self_test() {
  const cadd::Words w =
      cadd::philox(0x299F31D0A4093822u, {0x243F6A88u, 0x85A308D3u, 0x13198A2Eu, 0x03707344u});
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
