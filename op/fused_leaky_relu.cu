// Bias, leaky ReLU and scale in one pass over memory, 16 bytes per access where shapes allow.

#include <algorithm>
#include <cstdint>

#include "convert.cuh"
#include "kernels.h"

namespace pfgm {
namespace {

constexpr int THREADS = 256;
constexpr long long BLOCKS = 8192;  // fills the largest GPUs several times over

template <typename T, int N>
struct alignas(N * sizeof(T)) Vector {
  T values[N];
};

// size and inner count vectors. Without grad, the value itself passes through the slope.
template <typename T, typename A, int N>
__global__ void __launch_bounds__(THREADS)
    leaky_relu_kernel(const Vector<T, N>* __restrict__ x, const T* __restrict__ bias,
                      const Vector<T, N>* __restrict__ grad, Vector<T, N>* __restrict__ out,
                      long long size, long long channels, long long inner, A negative_slope,
                      A scale) {
  const long long step = 1LL * gridDim.x * blockDim.x;
  for (long long i = 1LL * blockIdx.x * blockDim.x + threadIdx.x; i < size; i += step) {
    const A shift = convert<A>(bias[i / inner % channels]);
    const Vector<T, N> input = x[i];
    const Vector<T, N> through = grad ? grad[i] : input;
    Vector<T, N> result;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const A value = convert<A>(input.values[n]) + shift;
      const A passed = grad ? convert<A>(through.values[n]) : value;
      result.values[n] = convert<T>(passed * (value > A(0) ? scale : scale * negative_slope));
    }
    out[i] = result;
  }
}

template <typename T, typename A, int N>
void launch(const void* x, const void* bias, const void* grad, void* out, long long size,
            long long channels, long long inner, double negative_slope, double scale,
            cudaStream_t stream) {
  const long long blocks = std::min((size / N + THREADS - 1) / THREADS, BLOCKS);
  leaky_relu_kernel<T, A, N><<<static_cast<unsigned>(blocks), THREADS, 0, stream>>>(
      static_cast<const Vector<T, N>*>(x), static_cast<const T*>(bias),
      static_cast<const Vector<T, N>*>(grad), static_cast<Vector<T, N>*>(out), size / N, channels,
      inner / N, static_cast<A>(negative_slope), static_cast<A>(scale));
}

template <typename T, typename A, typename... Rest>
void launch_widest(const void* x, const void* bias, const void* grad, void* out, long long size,
                   long long channels, long long inner, Rest... rest) {
  constexpr int N = 16 / sizeof(T);
  const auto bits = reinterpret_cast<std::uintptr_t>(x) | reinterpret_cast<std::uintptr_t>(grad) |
                    reinterpret_cast<std::uintptr_t>(out);
  if (inner % N == 0 && bits % 16 == 0) {
    launch<T, A, N>(x, bias, grad, out, size, channels, inner, rest...);
  } else {
    launch<T, A, 1>(x, bias, grad, out, size, channels, inner, rest...);
  }
}

}  // namespace

cudaError_t fused_leaky_relu(DType dtype, const void* x, const void* bias, const void* grad,
                             void* out, long long size, long long channels, long long inner,
                             double negative_slope, double scale, cudaStream_t stream) {
  const auto run = [&](auto launcher) {
    launcher(x, bias, grad, out, size, channels, inner, negative_slope, scale, stream);
  };
  switch (dtype) {
    case DType::float16: run(launch_widest<__half, float, double, double, cudaStream_t>); break;
    case DType::bfloat16:
      run(launch_widest<__nv_bfloat16, float, double, double, cudaStream_t>);
      break;
    case DType::float32: run(launch_widest<float, float, double, double, cudaStream_t>); break;
    case DType::float64: run(launch_widest<double, double, double, double, cudaStream_t>); break;
  }
  return cudaGetLastError();
}

}  // namespace pfgm
