"""The name under which older callers know `activation.gelu_residual_cuda`."""

from kestrel_kernels.activation import gelu_residual_cuda
from kestrel_kernels.activation import gelu_residual_cuda as gelu_residual_cute

__all__ = ["gelu_residual_cuda", "gelu_residual_cute"]
