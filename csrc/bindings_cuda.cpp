// The operators on CUDA tensors: outputs, launches, and what went wrong. Compiled to nothing
// without CUDA.
#ifdef CADD_CUDA

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "launch.h"
#include "ops.h"

namespace cadd {
namespace {

Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kDouble: return Dtype::f64;
    case at::kHalf: return Dtype::f16;
    case at::kBFloat16: return Dtype::bf16;
    default:
      TORCH_CHECK_VALUE(false, "expected a floating point tensor, not ", tensor.scalar_type());
  }
}

template <typename... Tensors>
void check_device(const char* op, const at::Tensor& first, const Tensors&... rest) {
  TORCH_CHECK_VALUE(((rest.device() == first.device()) && ...), op, ": all tensors must be on ",
                    first.device());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> forward_noising_cuda(const at::Tensor& x_0,
                                                        const at::Tensor& ids,
                                                        const at::Tensor& table,
                                                        const at::Tensor& clock,
                                                        const at::Tensor& seed, int64_t mask_id) {
  check_forward_noising(x_0, ids, table, clock, seed);
  check_device("forward_noising", x_0, ids, table, clock, seed);
  const c10::cuda::CUDAGuard guard(x_0.device());
  at::Tensor x_t = at::empty_like(x_0),
             z_t = at::empty({x_0.size(0), x_0.size(1), table.size(1)}, table.options());
  const NoisingArgs args{x_0.const_data_ptr<int64_t>(),
                         ids.const_data_ptr<int64_t>(),
                         table.const_data_ptr(),
                         clock.const_data_ptr<double>(),
                         seed.const_data_ptr<int64_t>(),
                         mask_id,
                         x_0.numel(),
                         x_0.size(1),
                         table.size(0),
                         table.size(1),
                         x_t.data_ptr<int64_t>(),
                         z_t.data_ptr()};
  C10_CUDA_CHECK(launch_forward_noising(args, dtype_of(table), c10::cuda::getCurrentCUDAStream()));
  return {z_t, x_t};
}

std::tuple<at::Tensor, at::Tensor> reverse_step_cuda(const at::Tensor& logits,
                                                     const at::Tensor& rows, const at::Tensor& z_t,
                                                     const at::Tensor& table,
                                                     const at::Tensor& step, const at::Tensor& seed,
                                                     int64_t mask_id, int64_t zhat,
                                                     double temperature, double top_p) {
  check_reverse_step(logits, rows, z_t, table, step, seed, zhat, temperature, top_p);
  const c10::impl::ExcludeDispatchKeyGuard precise(
      c10::autocast_dispatch_keyset);  // the product for "soft" too
  check_device("reverse_step", logits, rows, z_t, table, step, seed);
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t latents = logits.size(0), count = rows.size(0), vocab = logits.size(2),
                dim = table.size(1);
  const bool soft = zhat == 1 && dim > 0;
  at::Tensor x_s = at::empty({count}, rows.options()),
             z_s = at::empty({latents, count, dim}, table.options());
  at::Tensor bad = at::zeros({1}, rows.options().dtype(at::kInt));
  const at::Tensor p =
      soft ? at::zeros({count, vocab}, table.options()) : at::Tensor();  // flipped rows stay zero
  ReverseArgs args{logits.const_data_ptr(),
                   rows.const_data_ptr<int64_t>(),
                   z_t.const_data_ptr<float>(),
                   table.const_data_ptr<float>(),
                   step.const_data_ptr<double>(),
                   seed.const_data_ptr<int64_t>(),
                   mask_id,
                   latents,
                   count,
                   vocab,
                   z_t.size(1),
                   dim,
                   logits.stride(0),
                   static_cast<int>(zhat),
                   static_cast<float>(1.0 / temperature),
                   top_p,
                   x_s.data_ptr<int64_t>(),
                   z_s.data_ptr<float>(),
                   soft ? p.data_ptr<float>() : nullptr,
                   nullptr,
                   bad.data_ptr<int>()};
  C10_CUDA_CHECK(launch_reverse_step(args, dtype_of(logits), stream));
  if (soft && count > 0) {
    const at::Tensor z_hat = at::mm(p, table.narrow(0, 0, vocab));
    args.z_hat = z_hat.const_data_ptr<float>();
    C10_CUDA_CHECK(launch_soft_move(args, stream));
  }
  TORCH_CHECK_VALUE(bad.item<int>() == 0,
                    "reverse_step: a row of logits is NaN, plus infinity, or all minus infinity");
  return {x_s, z_s};
}

TORCH_LIBRARY_IMPL(cadd_min, CUDA, m) {
  m.impl("forward_noising", &forward_noising_cuda);
  m.impl("reverse_step", &reverse_step_cuda);
}

}  // namespace cadd

#endif  // CADD_CUDA
