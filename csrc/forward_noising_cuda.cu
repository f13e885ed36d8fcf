// The CUDA kernel of the forward noising. A group of lanes shares a token; each lane makes four
// normals at a time, and neighbouring lanes write neighbouring elements.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cassert>
#include <type_traits>

#include "forward_noising.h"
#include "launch.h"

namespace cadd {
namespace {

template <typename T>
__global__ void forward_noising_kernel(NoisingArgs a, int lanes) {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const T* table = static_cast<const T*>(a.table);
  T* z_t = static_cast<T*>(a.z_t);
  const Stream stream{static_cast<uint64_t>(a.seed[0]), static_cast<uint32_t>(a.seed[1])};
  const int64_t quarter = quarter_of(a.dim),
                thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t groups = int64_t{gridDim.x} * blockDim.x / lanes;
  const int lane = threadIdx.x % lanes;
  for (int64_t i = thread / lanes; i < a.count; i += groups) {
    const double* clock = a.clock + i / a.length * 3;
    const bool hidden =
        masked(stream, i, clock[0]);  // every lane for itself: cheaper than telling each other
    const int64_t id = a.ids[i];
    assert(0 <= id && id < a.vocab);
    if (lane == 0) a.x_t[i] = hidden ? a.mask_id : a.x_0[i];
    const T* row = table + id * a.dim;
    T* out = z_t + i * a.dim;
    const Wide signal = static_cast<Wide>(clock[1]), noise = static_cast<Wide>(clock[2]);
    for (int64_t block = lane; block < quarter; block += lanes) {
      float eps[4] = {};
      if (hidden) four_normals(stream, i, static_cast<uint32_t>(block), eps);
      for (int q = 0; q < 4; ++q) {
        const int64_t e = q * quarter + block;
        if (e >= a.dim) continue;
        out[e] = hidden ? static_cast<T>(mix(static_cast<Wide>(row[e]), static_cast<Wide>(eps[q]),
                                             signal, noise))
                        : row[e];
      }
    }
  }
}

}  // namespace

cudaError_t launch_forward_noising(const NoisingArgs& a, Dtype dtype, cudaStream_t stream) {
  if (a.count == 0) return cudaSuccess;
  constexpr int kThreads = 256;
  int lanes = 1;
  while (lanes < 32 && lanes < quarter_of(a.dim)) lanes *= 2;
  const int64_t blocks = std::min<int64_t>((a.count * lanes + kThreads - 1) / kThreads, 1 << 20);
  const dim3 grid(static_cast<unsigned>(blocks));
  switch (dtype) {
    case Dtype::f32: forward_noising_kernel<float><<<grid, kThreads, 0, stream>>>(a, lanes); break;
    case Dtype::f64: forward_noising_kernel<double><<<grid, kThreads, 0, stream>>>(a, lanes); break;
    case Dtype::f16: forward_noising_kernel<__half><<<grid, kThreads, 0, stream>>>(a, lanes); break;
    case Dtype::bf16:
      forward_noising_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(a, lanes);
      break;
  }
  return cudaGetLastError();
}

}  // namespace cadd
