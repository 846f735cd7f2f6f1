"""Gated activations: two halves of a row become one, `gate(x[..., :N], x[..., N:])`.

Each takes x `[..., 2N]` (bf16, fp16 or fp32, any N, rows of any stride) and gives `[..., N]` of the same dtype; fp32
inside, rounded once. The into form writes `out` and returns nothing; `out` must share no memory with `x`.
"""

from __future__ import annotations

from kestrel_kernels._op import Array, ArrayT, Op, new_array, result, shape_of

__all__ = [
    "gelu_and_mul",
    "gelu_and_mul_into",
    "gelu_residual",
    "gelu_residual_cuda",
    "gelu_tanh_and_mul",
    "gelu_tanh_and_mul_into",
    "silu_and_mul",
    "silu_and_mul_into",
]

_gelu_residual = Op("gelu_residual", "out x", writes="out")
_silu_and_mul = Op("silu_and_mul", "out x", writes="out")
_gelu_and_mul = Op("gelu_and_mul", "out x", writes="out")
_gelu_tanh_and_mul = Op("gelu_tanh_and_mul", "out x", writes="out")


def _functional(op: Op, x: ArrayT) -> ArrayT:
    *leading, width = shape_of(f"{op.name}: x", x)
    out = new_array(x, (*leading, width // 2))
    op.call(out, x)
    return result(out, x)


def gelu_residual_cuda(out: Array, x: Array) -> None:
    """out = gelu(x[..., :N]) * (x[..., N:] + 1), exact (erf) GELU. On the CPU too, whatever the name says.

    Args:
        out: `[..., N]`, dtype of x; written.
        x: `[..., 2N]`, bf16, fp16 or fp32.

    Raises:
        TypeError: a dtype that is not taken, or an immutable `out`.
        ValueError: a shape, stride, alignment or device that does not fit.
    """
    _gelu_residual.call(out, x)


def gelu_residual(x: ArrayT) -> ArrayT:
    """gelu(x[..., :N]) * (x[..., N:] + 1), exact (erf) GELU: x `[..., 2N]` -> `[..., N]`. See `gelu_residual_cuda`."""
    return _functional(_gelu_residual, x)


def silu_and_mul_into(out: Array, x: Array) -> None:
    """out = silu(x[..., :N]) * x[..., N:], SwiGLU (Shazeer 2020). Arguments and errors of `gelu_residual_cuda`."""
    _silu_and_mul.call(out, x)


def silu_and_mul(x: ArrayT) -> ArrayT:
    """silu(x[..., :N]) * x[..., N:], SwiGLU (Shazeer 2020): x `[..., 2N]` -> `[..., N]`."""
    return _functional(_silu_and_mul, x)


def gelu_and_mul_into(out: Array, x: Array) -> None:
    """out = gelu(x[..., :N]) * x[..., N:], exact (erf) GELU. Arguments and errors of `gelu_residual_cuda`."""
    _gelu_and_mul.call(out, x)


def gelu_and_mul(x: ArrayT) -> ArrayT:
    """gelu(x[..., :N]) * x[..., N:], exact (erf) GELU: x `[..., 2N]` -> `[..., N]`."""
    return _functional(_gelu_and_mul, x)


def gelu_tanh_and_mul_into(out: Array, x: Array) -> None:
    """out = gelu_tanh(x[..., :N]) * x[..., N:], tanh GELU. Arguments and errors of `gelu_residual_cuda`."""
    _gelu_tanh_and_mul.call(out, x)


def gelu_tanh_and_mul(x: ArrayT) -> ArrayT:
    """gelu_tanh(x[..., :N]) * x[..., N:], tanh GELU: x `[..., 2N]` -> `[..., N]`."""
    return _functional(_gelu_tanh_and_mul, x)
