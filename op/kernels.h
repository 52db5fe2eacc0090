// What the kernels (.cu, free of torch) offer to their binding (.cpp). Device pointers to
// contiguous data; each call only enqueues work on the stream.

#pragma once

#include <cuda_runtime_api.h>

#include "upfirdn2d.h"

namespace pfgm {

enum class DType { float16, bfloat16, float32, float64 };

// x: (planes, in[0], in[1]), out: (planes, out[0], out[1]); filter: (taps[0], taps[1]) in float64
// for float64 images and in float32, the precision of the sums, for all others.
cudaError_t upfirdn2d(DType dtype, const void* x, const void* filter, void* out,
                      const Resampling& resampling, cudaStream_t stream);

// scale * leaky_relu(x + bias); with grad, the gradient of that: grad * scale where x + bias > 0,
// else grad * scale * negative_slope. x, grad, out: (batch, channels, inner), size numbers in all;
// bias: (channels).
cudaError_t fused_leaky_relu(DType dtype, const void* x, const void* bias, const void* grad,
                             void* out, long long size, long long channels, long long inner,
                             double negative_slope, double scale, cudaStream_t stream);

}  // namespace pfgm
