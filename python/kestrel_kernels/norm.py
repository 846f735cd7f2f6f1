"""LayerNorm (Ba et al. 2016, arXiv:1607.06450) and RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467).

Over the last dimension, up to 65536 wide, rows of any stride; fp32 inside, rounded once. The into forms of LayerNorm
stand in `layernorm_cuda`.
"""

from __future__ import annotations

from kestrel_kernels._op import Array, ArrayT, Op, new_array, result, shape_of
from kestrel_kernels.layernorm_cuda import layernorm_bias_cuda

__all__ = ["layernorm", "rmsnorm", "rmsnorm_into"]

_rmsnorm = Op("rmsnorm", "out x weight eps residual", writes="out residual")


def layernorm(x: ArrayT, weight: Array, bias: Array, eps: float = 1e-5) -> ArrayT:
    """(x - mean) / sqrt(var + eps) * weight + bias, with mean and biased variance in fp32.

    x `[..., N]`, bf16 or fp16; weight and bias `[N]`, dtype of x; the result is like x. Errors as in
    `layernorm_cuda.layernorm_bias_cuda`.
    """
    out = new_array(x, shape_of("layernorm: x", x))
    layernorm_bias_cuda(out, x, weight, bias, eps)
    return result(out, x)


def rmsnorm_into(out: Array, x: Array, weight: Array, eps: float, residual: Array | None = None) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight; with a residual: residual += x, and the norm of that.

    Args:
        out: like x; written. May be x.
        x: `[..., N]`, bf16, fp16 or fp32.
        weight: `[N]`, dtype of x.
        eps: added to the mean square, zero or more.
        residual: like x; x is added to it in place, rounded to its dtype, and what was stored is normalized.

    Raises:
        TypeError: a dtype that is not taken, or an immutable `out` or `residual`.
        ValueError: a shape, stride, alignment, device or eps that does not fit.
    """
    _rmsnorm.call(out, x, weight, eps, residual)


def rmsnorm(x: ArrayT, weight: Array, eps: float = 1e-6, residual: Array | None = None) -> ArrayT:
    """x / sqrt(mean(x^2) + eps) * weight, like x; a residual is changed in place. See `rmsnorm_into`."""
    out = new_array(x, shape_of("rmsnorm: x", x))
    _rmsnorm.call(out, x, weight, eps, residual)
    return result(out, x)
