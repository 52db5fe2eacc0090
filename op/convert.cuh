// float16 and bfloat16 to float32, in which they are computed with, and back. By name, because
// torch builds extensions with the implicit conversions of these types switched off.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "upfirdn2d.h"

namespace pfgm {

template <>
HOST_DEVICE inline float convert<float, __half>(__half value) {
  return __half2float(value);
}

template <>
HOST_DEVICE inline __half convert<__half, float>(float value) {
  return __float2half_rn(value);
}

template <>
HOST_DEVICE inline float convert<float, __nv_bfloat16>(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

template <>
HOST_DEVICE inline __nv_bfloat16 convert<__nv_bfloat16, float>(float value) {
  return __float2bfloat16_rn(value);
}

}  // namespace pfgm
