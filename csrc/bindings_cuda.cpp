// The two operators on CUDA tensors: outputs, launches and errors. Compiled to nothing without
// CUDA.
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

// Translate the type of a tensor for the kernels.
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

// Raise ValueError unless all tensors are on the device of the first tensor.
template <typename... Tensors>
void check_device(const char* op, const at::Tensor& first, const Tensors&... rest) {
  TORCH_CHECK_VALUE(((rest.device() == first.device()) && ...), op, ": all tensors must be on ",
                    first.device());
}

// Collect the inputs of the reverse step. The outputs stay null.
ReverseArgs reverse_inputs(const at::Tensor& logits, const at::Tensor& rows, const at::Tensor& z_t,
                           const at::Tensor& table, const at::Tensor& coefficients,
                           const at::Tensor& seed) {
  ReverseArgs args{};
  args.logits = logits.const_data_ptr();
  args.rows = rows.const_data_ptr<int64_t>();
  args.z_t = z_t.const_data_ptr<float>();
  args.table = table.const_data_ptr<float>();
  args.coefficients = coefficients.const_data_ptr<double>();
  args.columns = coefficients.numel() / 4;
  args.seed = seed.const_data_ptr<int64_t>();
  args.latents = logits.size(0);
  args.count = rows.size(0);
  args.vocab = logits.size(2);
  args.positions = z_t.size(1);
  args.dim = table.size(1);
  args.stride = logits.stride(0);
  return args;
}

// Launch the reverse step. For "soft", multiply the probabilities by the table and move the latents
// after it.
void launch(ReverseArgs args, const at::Tensor& logits, const at::Tensor& table) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const bool soft = args.zhat == 1 && args.dim > 0;
  at::Tensor probabilities;
  if (soft) {  // zeros, because a row that flips writes nothing
    probabilities = at::zeros({args.count, args.vocab}, table.options());
    args.probabilities = probabilities.data_ptr<float>();
  }
  C10_CUDA_CHECK(launch_reverse_step(args, dtype_of(logits), stream));
  if (soft && args.count > 0) {
    const at::Tensor z_hat = at::mm(probabilities, table.narrow(0, 0, args.vocab));
    args.z_hat = z_hat.const_data_ptr<float>();
    C10_CUDA_CHECK(launch_soft_move(args, stream));
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> forward_noising_cuda(const at::Tensor& x_0,
                                                        const at::Tensor& ids,
                                                        const at::Tensor& table,
                                                        const at::Tensor& coefficients,
                                                        const at::Tensor& seed, int64_t mask_id) {
  check_forward_noising(x_0, ids, table, coefficients, seed);
  check_device("forward_noising", x_0, ids, table, coefficients, seed);
  const c10::cuda::CUDAGuard guard(x_0.device());
  at::Tensor x_t = at::empty_like(x_0);
  at::Tensor z_t = at::empty({x_0.size(0), x_0.size(1), table.size(1)}, table.options());
  NoisingArgs args{};
  args.x_0 = x_0.const_data_ptr<int64_t>();
  args.ids = ids.const_data_ptr<int64_t>();
  args.table = table.const_data_ptr();
  args.coefficients = coefficients.const_data_ptr<double>();
  args.seed = seed.const_data_ptr<int64_t>();
  args.mask_id = mask_id;
  args.count = x_0.numel();
  args.length = x_0.size(1);
  args.vocab = table.size(0);
  args.dim = table.size(1);
  args.x_t = x_t.data_ptr<int64_t>();
  args.z_t = z_t.data_ptr();
  C10_CUDA_CHECK(launch_forward_noising(args, dtype_of(table), c10::cuda::getCurrentCUDAStream()));
  return {z_t, x_t};
}

std::tuple<at::Tensor, at::Tensor> reverse_step_cuda(
    const at::Tensor& logits, const at::Tensor& rows, const at::Tensor& z_t,
    const at::Tensor& table, const at::Tensor& coefficients, const at::Tensor& seed,
    int64_t mask_id, int64_t zhat, double temperature, double top_p) {
  check_reverse_step(logits, rows, z_t, table, coefficients, seed, zhat, temperature, top_p);
  check_device("reverse_step", logits, rows, z_t, table, coefficients, seed);
  // Autocast would round the product of "soft".
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const c10::cuda::CUDAGuard guard(logits.device());
  ReverseArgs args = reverse_inputs(logits, rows, z_t, table, coefficients, seed);
  at::Tensor x_s = at::empty({args.count}, rows.options());
  at::Tensor z_s = at::empty({args.latents, args.count, args.dim}, table.options());
  const at::Tensor invalid = at::zeros({1}, rows.options().dtype(at::kInt));
  args.mask_id = mask_id;
  args.zhat = static_cast<int>(zhat);
  args.inv_temperature = static_cast<float>(1.0 / temperature);
  args.top_p = top_p;
  args.x_s = x_s.data_ptr<int64_t>();
  args.z_s = z_s.data_ptr<float>();
  args.invalid = invalid.data_ptr<int>();
  launch(args, logits, table);
  TORCH_CHECK_VALUE(invalid.item<int>() == 0,
                    "reverse_step: a row of logits is NaN, plus infinity, or all minus infinity");
  return {x_s, z_s};
}

TORCH_LIBRARY_IMPL(cadd_min, CUDA, m) {
  m.impl("forward_noising", &forward_noising_cuda);
  m.impl("reverse_step", &reverse_step_cuda);
}

}  // namespace cadd

#endif  // CADD_CUDA
