// Stand-ins for what the kernels of op/ use of CUDA, so that a C++ compiler for the host takes
// them: the threads of a launch run one after another. There is no stand-in for shared memory nor
// for __syncthreads, which no kernel uses; one that did would not compile here.

#pragma once

#include <cstdint>

#define __global__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 gridDim(0), blockDim(0), blockIdx(0), threadIdx(0);

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };

inline cudaError_t last_error = cudaSuccess;

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

// `kernel<<<grid, block, shared, stream>>>(arguments...)`, within the limits of every GPU.
template <typename... Arguments>
auto launch_on_host(void (*kernel)(Arguments...), dim3 grid, dim3 block, int, cudaStream_t) {
  return [=](auto... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 ||
        grid.z > 65535 || block.x * block.y * block.z - 1 >= 1024) {
      last_error = cudaErrorInvalidConfiguration;
      return;
    }
    gridDim = grid;
    blockDim = block;
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
      for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
          for (threadIdx.z = 0; threadIdx.z < block.z; ++threadIdx.z)
            for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y)
              for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) kernel(arguments...);
  };
}
