"""Operators of the networks: CUDA kernels where they can be had, plain PyTorch everywhere else.

`upfirdn2d` resamples images through an FIR filter; `fused_leaky_relu` adds a bias and applies a
scaled leaky ReLU. Both are differentiable to any order on every device. `extension.py` says when
the kernels are built and used. `on_cpu.py` has operators in forms that a CPU computes faster.
"""

from op.leaky_relu import fused_leaky_relu
from op.upfirdn import upfirdn2d

__all__ = ["fused_leaky_relu", "upfirdn2d"]
