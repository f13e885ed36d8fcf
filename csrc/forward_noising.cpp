// The CPU kernel of the forward noising: one pass over the tokens, which writes each latent once.
//
// The ladder to this kernel. Milliseconds for B=8 L=1024 D=768, on one core of an AMD EPYC with
// AVX-512 unless said:
//   50    eager PyTorch, two cores: noise for every element, then a pass for each operation
//   24.3  one pass over the data, noise only where a token is masked, no vector code
//   13.7  vectors of 4 floats (SSE2)
//   11.8  vectors of 16 floats (AVX-512)
//    4.5  two cores: the noise is a function of the position, so no core waits for another core
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "ops.h"
#include "vector_blocks.h"

namespace cadd {
namespace {

// Mix one latent with noise, as vector code.
CADD_CLONES void mix_latent(const float* __restrict z_0, const float* __restrict eps,
                            NoisingCoefficients coefficients, int64_t dim, float* __restrict z_t) {
  for (int64_t e = 0; e < dim; ++e)
    z_t[e] = mix(z_0[e], eps[e], static_cast<float>(coefficients.signal),
                 static_cast<float>(coefficients.noise));
}

// Mix one latent with noise: doubles in double precision, half types in float.
template <typename T>
void mix_latent(const T* z_0, const float* eps, NoisingCoefficients coefficients, int64_t dim,
                T* z_t) {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const Wide signal = static_cast<Wide>(coefficients.signal);
  const Wide noise = static_cast<Wide>(coefficients.noise);
  for (int64_t e = 0; e < dim; ++e)
    z_t[e] =
        static_cast<T>(mix(static_cast<Wide>(z_0[e]), static_cast<Wide>(eps[e]), signal, noise));
}

// The arguments of one call, contiguous and checked.
template <typename T>
struct Call {
  const int64_t* x_0;          // (B, L) tokens
  const int64_t* ids;          // (B, L) rows of the table
  const T* table;              // (V, D) latents
  const double* coefficients;  // (B, 3) alpha, signal, noise
  RandomStream random;         // seed and offset
  int64_t mask_id;             // the token of a masked position
  int64_t length;              // L
  int64_t vocab;               // V
  int64_t dim;                 // D
  int64_t* x_t;                // (B, L) tokens
  T* z_t;                      // (B, L, D) latents
};

// Noise the tokens [begin, end) of B L. Return false if an id is not a row of the table.
template <typename T>
bool noise_tokens(const Call<T>& call, int64_t begin, int64_t end) {
  std::vector<float> eps(4 * quarter_of(call.dim));
  for (int64_t i = begin; i < end; ++i) {
    const double* own = call.coefficients + i / call.length * 3;
    const NoisingCoefficients coefficients{own[0], own[1], own[2]};
    const bool masked = is_masked(call.random, i, coefficients.alpha);
    const int64_t id = call.ids[i];
    call.x_t[i] = masked ? call.mask_id : call.x_0[i];
    if (id < 0 || id >= call.vocab) return false;
    const T* z_0 = call.table + id * call.dim;
    T* z_t = call.z_t + i * call.dim;
    if (masked) {
      fill_normals(call.random, i, call.dim, eps.data());
      mix_latent(z_0, eps.data(), coefficients, call.dim, z_t);
    } else {
      std::copy_n(z_0, call.dim, z_t);
    }
  }
  return true;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> forward_noising_cpu(const at::Tensor& x_0, const at::Tensor& ids,
                                                       const at::Tensor& table,
                                                       const at::Tensor& coefficients,
                                                       const at::Tensor& seed, int64_t mask_id) {
  check_forward_noising(x_0, ids, table, coefficients, seed);
  const int64_t length = x_0.size(1), vocab = table.size(0), dim = table.size(1);
  at::Tensor x_t = at::empty_like(x_0);
  at::Tensor z_t = at::empty({x_0.size(0), length, dim}, table.options());
  const int64_t tokens_per_task = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, dim));
  std::atomic<bool> ids_known{true};
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, table.scalar_type(), "forward_noising", [&] {
        const Call<scalar_t> call{x_0.const_data_ptr<int64_t>(),
                                  ids.const_data_ptr<int64_t>(),
                                  table.const_data_ptr<scalar_t>(),
                                  coefficients.const_data_ptr<double>(),
                                  random_stream(seed.const_data_ptr<int64_t>()),
                                  mask_id,
                                  length,
                                  vocab,
                                  dim,
                                  x_t.data_ptr<int64_t>(),
                                  z_t.data_ptr<scalar_t>()};
        at::parallel_for(0, x_0.numel(), tokens_per_task, [&](int64_t begin, int64_t end) {
          if (!noise_tokens(call, begin, end)) ids_known = false;
        });
      });
  TORCH_CHECK_INDEX(ids_known.load(), "forward_noising: ids must be from 0 to ", vocab - 1,
                    ", the rows of the table");
  return {z_t, x_t};
}

}  // namespace cadd
