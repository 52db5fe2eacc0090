// Tensors to pointers: checks what the kernels rely on, allocates, and calls them on the current
// stream of the tensors' device. Autograd is in Python.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>

#include "kernels.h"

namespace {

using Pair = std::array<int64_t, 2>;

pfgm::DType dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kHalf: return pfgm::DType::float16;
    case at::kBFloat16: return pfgm::DType::bfloat16;
    case at::kFloat: return pfgm::DType::float32;
    case at::kDouble: return pfgm::DType::float64;
    default: TORCH_CHECK(false, "no kernel for ", x.scalar_type());
  }
}

void check_same(const at::Tensor& x, const at::Tensor& other, at::ScalarType dtype) {
  TORCH_CHECK(other.device() == x.device() && other.scalar_type() == dtype, "expected ", dtype,
              " on ", x.device(), ", got ", other.scalar_type(), " on ", other.device());
  TORCH_CHECK(x.is_cuda() && x.is_contiguous() && other.is_contiguous(),
              "expected contiguous CUDA tensors");
}

void copy(int (&to)[2], Pair from) {
  for (int axis = 0; axis < 2; ++axis) to[axis] = static_cast<int>(from[axis]);
}

// pad: zeros before the first pixel; size: of the output.
at::Tensor upfirdn2d(const at::Tensor& x, const at::Tensor& filter, Pair up, Pair down, Pair pad,
                     Pair size) {
  check_same(x, filter, x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  TORCH_CHECK(x.dim() == 4 && filter.dim() == 2, "expected 4-d images and a 2-d filter");
  // Rows and columns of a plane, zeros inserted or not, are counted in 32 bits.
  const int64_t pixels = std::max(x.size(2) * up[0] * x.size(3) * up[1],
                                  size[0] * down[0] * size[1] * down[1]);
  constexpr int64_t limit = std::numeric_limits<int>::max() / 2;
  TORCH_CHECK(pixels < limit, "image of ", pixels, " pixels, zeros inserted, is too large");
  for (const int64_t zeros : pad) {
    TORCH_CHECK(-limit < zeros && zeros < limit, "padding of ", zeros, " is too large");
  }

  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor out = at::empty({x.size(0), x.size(1), size[0], size[1]}, x.options());
  if (out.numel() == 0) return out;
  pfgm::Resampling r;
  r.planes = x.size(0) * x.size(1);
  copy(r.in, {x.size(2), x.size(3)});
  copy(r.out, size);
  copy(r.taps, {filter.size(0), filter.size(1)});
  copy(r.up, up);
  copy(r.down, down);
  copy(r.pad, pad);
  C10_CUDA_CHECK(pfgm::upfirdn2d(dtype_of(x), x.const_data_ptr(), filter.const_data_ptr(),
                                 out.mutable_data_ptr(), r,
                                 c10::cuda::getCurrentCUDAStream().stream()));
  return out;
}

at::Tensor fused_leaky_relu(const at::Tensor& x, const at::Tensor& bias,
                            const std::optional<at::Tensor>& grad, double negative_slope,
                            double scale) {
  check_same(x, bias, x.scalar_type());
  if (grad) {
    check_same(x, *grad, x.scalar_type());
    TORCH_CHECK(grad->sizes() == x.sizes(), "gradient and input differ in shape");
  }
  TORCH_CHECK(x.dim() >= 2 && bias.dim() == 1 && bias.size(0) == x.size(1), "bias of wrong length");

  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor out = at::empty(x.sizes(), x.options());
  if (out.numel() == 0) return out;
  const int64_t inner = x.numel() / (x.size(0) * x.size(1));
  C10_CUDA_CHECK(pfgm::fused_leaky_relu(
      dtype_of(x), x.const_data_ptr(), bias.const_data_ptr(),
      grad ? grad->const_data_ptr() : nullptr, out.mutable_data_ptr(), x.numel(), x.size(1), inner,
      negative_slope, scale, c10::cuda::getCurrentCUDAStream().stream()));
  return out;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("upfirdn2d", &upfirdn2d);
  module.def("fused_leaky_relu", &fused_leaky_relu);
}
