// upfirdn2d: each thread owns a strip of output pixels at one place of the plane and visits many
// planes there, so that it finds its taps only once. Neighbouring threads own neighbouring
// columns, so that reads and writes are coalesced; what strips share comes from the L1 cache.

#include <algorithm>

#include "convert.cuh"
#include "kernels.h"

namespace pfgm {
namespace {

constexpr int THREADS = 256;
constexpr long long BLOCKS = 8192;  // fills the largest GPUs several times over; below 2^16
constexpr int TAPS = 4;  // strips are for filters of 4 x 4, the networks' own
constexpr int ROWS = 4;

template <typename T, typename A, int UP, int DOWN>
__global__ void __launch_bounds__(THREADS)
    strip_kernel(const T* __restrict__ x, const A* __restrict__ filter, T* __restrict__ out,
                 Resampling r) {
  const int place = blockIdx.x * blockDim.x + threadIdx.x;
  const int column = place % r.out[1];
  const int top = place / r.out[1] * ROWS;
  if (top >= r.out[0]) return;

  const Strip<A, UP, DOWN, TAPS, ROWS> strip(filter, r, top, column);
  const long long in_size = 1LL * r.in[0] * r.in[1];
  const long long out_size = 1LL * r.out[0] * r.out[1];
  const long long step = 1LL * gridDim.y * blockDim.y;
  for (long long plane = 1LL * blockIdx.y * blockDim.y + threadIdx.y; plane < r.planes;
       plane += step) {
    A sum[ROWS];
    strip.run(x + plane * in_size, r, sum);
    T* pixel = out + plane * out_size + top * r.out[1] + column;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      if (top + row < r.out[0]) pixel[row * r.out[1]] = convert<T>(sum[row]);
    }
  }
}

template <typename T, typename A>
__global__ void __launch_bounds__(THREADS)
    pixel_kernel(const T* __restrict__ x, const A* __restrict__ filter, T* __restrict__ out,
                 Resampling r) {
  const int place = blockIdx.x * blockDim.x + threadIdx.x;
  const int column = place % r.out[1];
  const int row = place / r.out[1];
  if (row >= r.out[0]) return;

  const long long in_size = 1LL * r.in[0] * r.in[1];
  const long long out_size = 1LL * r.out[0] * r.out[1];
  const long long step = 1LL * gridDim.y * blockDim.y;
  for (long long plane = 1LL * blockIdx.y * blockDim.y + threadIdx.y; plane < r.planes;
       plane += step) {
    out[plane * out_size + place] = convert<T>(pixel(x + plane * in_size, filter, r, row, column));
  }
}

template <typename T, typename A>
void launch(const T* x, const A* filter, T* out, const Resampling& r, cudaStream_t stream) {
  const auto is = [&r](int up, int down) {
    return r.taps[0] == TAPS && r.taps[1] == TAPS && r.up[0] == up && r.up[1] == up &&
           r.down[0] == down && r.down[1] == down;
  };
  auto kernel = pixel_kernel<T, A>;
  int rows = ROWS;
  if (is(1, 1)) {
    kernel = strip_kernel<T, A, 1, 1>;
  } else if (is(2, 1)) {
    kernel = strip_kernel<T, A, 2, 1>;
  } else if (is(1, 2)) {
    kernel = strip_kernel<T, A, 1, 2>;
  } else {
    rows = 1;
  }

  // A block covers `width` places of as many planes as it has threads left for.
  const long long places = 1LL * ((r.out[0] + rows - 1) / rows) * r.out[1];
  int width = 1;
  while (width < THREADS && width < places) width *= 2;
  const int height = THREADS / width;
  const long long grid_x = (places + width - 1) / width;
  const long long grid_y =
      std::min((r.planes + height - 1) / height, std::max(BLOCKS / grid_x, 1LL));
  const dim3 grid(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y));
  kernel<<<grid, dim3(width, height), 0, stream>>>(x, filter, out, r);
}

template <typename T, typename A>
void launch(const void* x, const void* filter, void* out, const Resampling& r,
            cudaStream_t stream) {
  launch(static_cast<const T*>(x), static_cast<const A*>(filter), static_cast<T*>(out), r, stream);
}

}  // namespace

cudaError_t upfirdn2d(DType dtype, const void* x, const void* filter, void* out,
                      const Resampling& resampling, cudaStream_t stream) {
  switch (dtype) {
    case DType::float16: launch<__half, float>(x, filter, out, resampling, stream); break;
    case DType::bfloat16: launch<__nv_bfloat16, float>(x, filter, out, resampling, stream); break;
    case DType::float32: launch<float, float>(x, filter, out, resampling, stream); break;
    case DType::float64: launch<double, double>(x, filter, out, resampling, stream); break;
  }
  return cudaGetLastError();
}

}  // namespace pfgm
