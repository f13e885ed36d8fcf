// The CPU kernel of the forward noising: one pass over the tokens, each latent written once, noise
// only where masked.
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

CADD_CLONES void mix_row(const float* __restrict row, const float* __restrict eps, Clock clock,
                         int64_t dim, float* __restrict out) {
  for (int64_t e = 0; e < dim; ++e)
    out[e] = mix(row[e], eps[e], static_cast<float>(clock.signal), static_cast<float>(clock.noise));
}

template <typename T>
void mix_row(const T* row, const float* eps, Clock clock, int64_t dim, T* out) {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  for (int64_t e = 0; e < dim; ++e)
    out[e] = static_cast<T>(mix(static_cast<Wide>(row[e]), static_cast<Wide>(eps[e]),
                                static_cast<Wide>(clock.signal), static_cast<Wide>(clock.noise)));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> forward_noising_cpu(const at::Tensor& x_0, const at::Tensor& ids,
                                                       const at::Tensor& table,
                                                       const at::Tensor& clock,
                                                       const at::Tensor& seed, int64_t mask_id) {
  check_forward_noising(x_0, ids, table, clock, seed);
  const int64_t length = x_0.size(1), vocab = table.size(0), dim = table.size(1);
  at::Tensor x_t = at::empty_like(x_0),
             z_t = at::empty({x_0.size(0), length, dim}, table.options());
  const int64_t *x = x_0.const_data_ptr<int64_t>(), *id = ids.const_data_ptr<int64_t>(),
                *key = seed.const_data_ptr<int64_t>();
  const double* clocks = clock.const_data_ptr<double>();
  int64_t* x_out = x_t.data_ptr<int64_t>();
  const Stream stream{static_cast<uint64_t>(key[0]), static_cast<uint32_t>(key[1])};
  std::atomic<bool> known{true};
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, table.scalar_type(), "forward_noising", [&] {
        const scalar_t* rows = table.const_data_ptr<scalar_t>();
        scalar_t* z = z_t.data_ptr<scalar_t>();
        at::parallel_for(0, x_0.numel(), std::max<int64_t>(1, 16384 / std::max<int64_t>(1, dim)),
                         [&](int64_t begin, int64_t end) {
                           std::vector<float> eps(4 * quarter_of(dim));
                           for (int64_t i = begin; i < end; ++i) {
                             const double* c = clocks + i / length * 3;
                             const bool hidden = masked(stream, i, c[0]);
                             x_out[i] = hidden ? mask_id : x[i];
                             if (id[i] < 0 || id[i] >= vocab) {
                               known = false;
                               return;
                             }
                             const scalar_t* row = rows + id[i] * dim;
                             if (!hidden) {
                               std::copy_n(row, dim, z + i * dim);
                               continue;
                             }
                             fill_normals(stream, i, dim, eps.data());
                             mix_row(row, eps.data(), Clock{c[0], c[1], c[2]}, dim, z + i * dim);
                           }
                         });
      });
  TORCH_CHECK_INDEX(known.load(), "forward_noising: ids must be from 0 to ", vocab - 1,
                    ", the rows of the table");
  return {z_t, x_t};
}

}  // namespace cadd
