"""LayerNorm (Ba et al. 2016, arXiv:1607.06450)."""

from __future__ import annotations

from kestrel_kernels._op import Array, ArrayT, new_array, result, shape_of
from kestrel_kernels.layernorm_cuda import layernorm_bias_cuda

__all__ = ["layernorm"]


def layernorm(x: ArrayT, weight: Array, bias: Array, eps: float = 1e-5) -> ArrayT:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, mean and biased variance in fp32.

    x `[..., N]`, bf16 or fp16, N up to 65536; weight and bias `[N]`, dtype of x; the result is like x. Errors as in
    `layernorm_cuda.layernorm_bias_cuda`.
    """
    out = new_array(x, shape_of("layernorm: x", x))
    layernorm_bias_cuda(out, x, weight, bias, eps)
    return result(out, x)
