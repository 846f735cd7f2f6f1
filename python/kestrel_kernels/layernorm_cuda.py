"""LayerNorm with weight and bias (Ba et al. 2016, arXiv:1607.06450), into a given array.

Two forms of one op: `layernorm_bias_cuda` keeps a row in registers, `layernorm_bias_reload_cuda` reads it again for the
last pass, which takes fewer registers and leaves room for more rows at once. The functional form is `norm.layernorm`.
"""

from __future__ import annotations

from kestrel_kernels._op import Array, Op

__all__ = ["layernorm_bias_cuda", "layernorm_bias_reload_cuda"]

_layernorm = Op("layernorm", "out x weight bias eps", writes="out")
_layernorm_reload = Op("layernorm_reload", "out x weight bias eps", writes="out")


def layernorm_bias_cuda(out: Array, x: Array, weight: Array, bias: Array, eps: float) -> None:
    """out = (x - mean) / sqrt(var + eps) * weight + bias, per row; on the CPU too, whatever the name says.

    Mean and biased variance in fp32, the variance from the differences to the mean; one rounding.

    Args:
        out: like x; written. May be x.
        x: `[..., N]`, bf16 or fp16, N up to 65536, rows of any stride.
        weight: `[N]`, dtype of x.
        bias: `[N]`, dtype of x.
        eps: added to the variance, zero or more.

    Raises:
        TypeError: a dtype that is not taken, or an immutable `out`.
        ValueError: a shape, stride, alignment, device or eps that does not fit.
    """
    _layernorm.call(out, x, weight, bias, eps)


def layernorm_bias_reload_cuda(out: Array, x: Array, weight: Array, bias: Array, eps: float) -> None:
    """`layernorm_bias_cuda` that reads x a second time: same arguments, same errors."""
    _layernorm_reload.call(out, x, weight, bias, eps)
