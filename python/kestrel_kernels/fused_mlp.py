"""A transformer's feed-forward layer with residual: `residual + gelu_tanh(x @ w1.T + b1) @ w2.T + b2`.

Tanh GELU (Hendrycks and Gimpel 2016). Arrays are bf16, fp16 or fp32, all of one dtype, rows of any stride. Both
products are summed in fp32; the hidden layer is rounded to its dtype between them.
"""

from __future__ import annotations

from kestrel_kernels._op import Array, ArrayT, Op, new_array, result, shape_of
from kestrel_kernels.fused_linear_residual_ops import _workspace

__all__ = ["fused_mlp", "fused_mlp_gelu_bias_residual_cuda"]

_fused_mlp = Op("fused_mlp", "out hidden workspace x w1 b1 w2 b2 residual", writes="out hidden workspace")


def fused_mlp_gelu_bias_residual_cuda(
    out: Array, hidden: Array, x: Array, w1: Array, b1: Array, w2: Array, b2: Array, residual: Array
) -> None:
    """out = residual + gelu_tanh(x @ w1.T + b1) @ w2.T + b2. On the CPU too, whatever the name says.

    Args:
        out: `[..., N]`, dtype of x; written. May be `residual`; must share no memory with the other arguments.
        hidden: scratch `[..., H]` or `[M, H]`, dtype of x; written.
        x: `[..., K]`, M rows, bf16, fp16 or fp32.
        w1: `[H, K]`; b1: `[H]`; w2: `[N, H]`; b2: `[N]`; dtype of x.
        residual: as out.

    Raises:
        TypeError: a dtype that is not taken, or an immutable `out` or `hidden`.
        ValueError: a shape, stride, alignment or device that does not fit.
    """
    _fused_mlp.call(out, hidden, _workspace(out), x, w1, b1, w2, b2, residual)


def fused_mlp(x: ArrayT, w1: Array, b1: Array, w2: Array, b2: Array, residual: Array) -> ArrayT:
    """residual + gelu_tanh(x @ w1.T + b1) @ w2.T + b2. See `fused_mlp_gelu_bias_residual_cuda`."""
    *leading, _ = shape_of("fused_mlp: x", x)
    hidden = new_array(x, (*leading, shape_of("fused_mlp: w1", w1)[0]))
    out = new_array(x, (*leading, shape_of("fused_mlp: w2", w2)[0]))
    _fused_mlp.call(out, hidden, _workspace(out), x, w1, b1, w2, b2, residual)
    return result(out, x)
