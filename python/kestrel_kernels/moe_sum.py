"""The sum over the experts of a token: the last step of a mixture-of-experts layer."""

from __future__ import annotations

from typing import overload

from kestrel_kernels._op import Array, ArrayT, Op, new_array, result, shape_of

__all__ = ["moe_sum"]

_moe_sum = Op("moe_sum", "out x", writes="out")


@overload
def moe_sum(x: ArrayT) -> ArrayT: ...
@overload
def moe_sum(x: ArrayT, out: None) -> ArrayT: ...
@overload
def moe_sum(x: Array, out: Array) -> None: ...
def moe_sum(x: Array, out: Array | None = None) -> Array | None:
    """x `[T, K, N]` summed over K, in fp32 in the order k = 0 .. K-1, rounded once.

    Args:
        x: `[T, K, N]`, bf16, fp16 or fp32, any K (zero gives zeros).
        out: `[T, N]`, dtype of x; written. It shares no memory with x.

    Returns:
        The sum `[T, N]` where no `out` was given, else None.

    Raises:
        TypeError: a dtype that is not taken, or an immutable `out`.
        ValueError: a shape, stride, alignment or device that does not fit.
    """
    if out is not None:
        _moe_sum.call(out, x)
        return None
    tokens, *_, width = shape_of("moe_sum: x", x, rank=3)
    sums = new_array(x, (tokens, width))
    _moe_sum.call(sums, x)
    return result(sums, x)
