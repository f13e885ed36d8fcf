// The CUDA kernel of the forward noising: a group of lanes shares a token.
//
// The ladder to this kernel. Its rungs have no figures: nothing was measured on a GPU yet.
//   a thread a token     neighbouring threads write D elements apart
//   a thread an element  neighbouring threads write neighbours, but each uses one word of four
//   a thread a quad      a thread uses all four words, but neighbouring threads write 4 apart
//   this kernel          a thread writes its four elements D / 4 apart, so lanes write neighbours
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cassert>
#include <type_traits>

#include "forward_noising.h"
#include "launch.h"

namespace cadd {
namespace {

// Noise all tokens. Each token has `lanes` threads, a power of two up to 32.
template <typename T>
__global__ void forward_noising_kernel(NoisingArgs args, int lanes) {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const RandomStream random = random_stream(args.seed);
  const int64_t quarter = quarter_of(args.dim);
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t groups = int64_t{gridDim.x} * blockDim.x / lanes;
  const int lane = threadIdx.x % lanes;
  for (int64_t i = thread / lanes; i < args.count; i += groups) {
    const double* own = args.coefficients + i / args.length * 3;
    // Every lane draws the mask: that is cheaper than an exchange between lanes.
    const bool masked = is_masked(random, i, own[0]);
    const int64_t id = args.ids[i];
    assert(0 <= id && id < args.vocab);
    if (lane == 0) args.x_t[i] = masked ? args.mask_id : args.x_0[i];
    const T* z_0 = static_cast<const T*>(args.table) + id * args.dim;
    T* z_t = static_cast<T*>(args.z_t) + i * args.dim;
    const Wide signal = static_cast<Wide>(own[1]), noise = static_cast<Wide>(own[2]);
    for (int64_t quad = lane; quad < quarter; quad += lanes) {
      float eps[4] = {};
      if (masked) four_normals(random, i, static_cast<uint32_t>(quad), eps);
      for (int q = 0; q < 4; ++q) {
        const int64_t e = q * quarter + quad;
        if (e >= args.dim) continue;
        const Wide wide_z_0 = static_cast<Wide>(z_0[e]), wide_eps = static_cast<Wide>(eps[q]);
        z_t[e] = masked ? static_cast<T>(mix(wide_z_0, wide_eps, signal, noise)) : z_0[e];
      }
    }
  }
}

}  // namespace

cudaError_t launch_forward_noising(const NoisingArgs& args, Dtype dtype, cudaStream_t stream) {
  if (args.count == 0) return cudaSuccess;
  constexpr int kThreads = 256;
  int lanes = 1;
  while (lanes < 32 && lanes < quarter_of(args.dim)) lanes *= 2;
  const int64_t blocks = (args.count * lanes + kThreads - 1) / kThreads;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocks, 1 << 20)));
  switch (dtype) {
    case Dtype::f32:
      forward_noising_kernel<float><<<grid, kThreads, 0, stream>>>(args, lanes);
      break;
    case Dtype::f64:
      forward_noising_kernel<double><<<grid, kThreads, 0, stream>>>(args, lanes);
      break;
    case Dtype::f16:
      forward_noising_kernel<__half><<<grid, kThreads, 0, stream>>>(args, lanes);
      break;
    case Dtype::bf16:
      forward_noising_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(args, lanes);
      break;
  }
  return cudaGetLastError();
}

}  // namespace cadd
