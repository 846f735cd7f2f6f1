"""16-bit floats to e4m3 with a scale (Micikevicius et al. 2022, arXiv:2209.05433), so that x ~ bits * scale.

A computed scale is max(absmax / 448, 1e-6). To the bit on every device: r = 1 / scale rounded to fp32, the product of x
and r in fp32, clamped to +-448, rounded to nearest even. NaN becomes NaN (0x7f) and does not enter absmax; an Inf makes
the scale Inf, itself NaN and the rest zero. M and N may be zero. The into forms write their outputs, return nothing.
"""

from __future__ import annotations

from typing import Any, Literal

from kestrel_kernels._op import Array, ArrayT, Op, new_array, result, shape_of

__all__ = [
    "fp8_e4m3fn_rowwise_quant_cuda",
    "fp8_e4m3fn_static_quant_cuda",
    "fp8_e4m3fn_tensor_quant_cuda",
    "fp8_quant",
]

_row = Op("fp8_quant_row", "out_bits out_scale x", writes="out_bits out_scale")
_tensor = Op("fp8_quant_tensor", "out_bits out_scale x", writes="out_bits out_scale")
_static = Op("fp8_quant_static", "out_bits scale x", writes="out_bits")


def fp8_e4m3fn_rowwise_quant_cuda(out_bits: Array, out_scale: Array, x: Array) -> None:
    """A scale for each row. On the CPU too, whatever the name says.

    Args:
        out_bits: `[M, N]`, float8_e4m3fn, or uint8 for its bits; written.
        out_scale: `[M]`, fp32; written.
        x: `[M, N]`, bf16 or fp16, rows of any stride. It shares no memory with the outputs.

    Raises:
        TypeError: a dtype that is not taken, or an immutable output.
        ValueError: a shape, stride, alignment or device that does not fit.
    """
    _row.call(out_bits, out_scale, x)


def fp8_e4m3fn_tensor_quant_cuda(out_bits: Array, out_scale: Array, x: Array) -> None:
    """One scale for the whole tensor: out_scale has one element, fp32. Else as `fp8_e4m3fn_rowwise_quant_cuda`."""
    _tensor.call(out_bits, out_scale, x)


def fp8_e4m3fn_static_quant_cuda(out_bits: Array, scale: Array | float, x: Array) -> None:
    """A given scale, as it is: a number above zero, or an array of one element, fp32. Else as the row form."""
    _static.call(out_bits, scale, x)


def fp8_quant(
    x: ArrayT, mode: Literal["row", "tensor"] = "row", scale: Array | float | None = None
) -> tuple[ArrayT, Any]:
    """x `[M, N]`, bf16 or fp16, as (float8_e4m3fn `[M, N]`, scale fp32).

    The scale is `[M]` in mode "row", `[1]` in mode "tensor"; one that is given is used, and returned as it came,
    whatever the mode. Errors as in `fp8_e4m3fn_rowwise_quant_cuda`; another mode is a ValueError.
    """
    if mode not in ("row", "tensor"):
        raise ValueError(f"fp8_quant: mode must be 'row' or 'tensor', got {mode!r}")
    shape = shape_of("fp8_quant: x", x, rank=2)
    bits = new_array(x, shape, "float8_e4m3fn")
    if scale is not None:
        _static.call(bits, scale, x)
        return result(bits, x), scale
    scales = new_array(x, shape[:1] if mode == "row" else (1,), "float32")
    (_row if mode == "row" else _tensor).call(bits, scales, x)
    return result(bits, x), result(scales, x)
