"""fp8_quant against NumPy, step by step in fp32 with the last one by ml_dtypes: equal to the bit, on every backend, so
whatever the number of threads that share a tensor."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kestrel_kernels.fp8_quant import (
    fp8_e4m3fn_rowwise_quant_cuda,
    fp8_e4m3fn_static_quant_cuda,
    fp8_e4m3fn_tensor_quant_cuda,
    fp8_quant,
)
from kestrel_kernels.fp8_quant_cute import fp8_quant_cute
from support import BACKENDS, HALVES, HAS_JAX, Backend, numpy_dtype, random, relative_error

NAN = 0x7F
FORMS = {"row": fp8_e4m3fn_rowwise_quant_cuda, "tensor": fp8_e4m3fn_tensor_quant_cuda}


def scale_of(x: np.ndarray, mode: str) -> np.ndarray:
    """fp32: `[M]` for rows, `[1]` for the tensor; x as it is stored."""
    magnitude = np.abs(x.astype(np.float32))
    rows = np.where(np.isnan(magnitude), 0, magnitude).max(axis=1, initial=0).astype(np.float32)
    absmax = rows if mode == "row" else rows.max(initial=0, keepdims=True)
    return np.maximum(absmax / np.float32(448), np.float32(1e-6))


def bits_of(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        r = np.float32(1) / scale.astype(np.float32).reshape(-1, 1)
        scaled = x.astype(np.float32) * r
        bits = np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return np.where(np.isnan(scaled), NAN, bits)


def raw(backend: Backend, array: Any) -> np.ndarray:
    return backend.bits(array).view(np.uint8)


def all_values(dtype: str) -> np.ndarray:
    """Each of the 65536 values once, as float64: subnormals, Inf and NaN are among them."""
    with np.errstate(invalid="ignore"):  # signaling NaNs
        return np.arange(65536, dtype=np.uint16).view(numpy_dtype(dtype)).astype(np.float64)


@pytest.mark.parametrize("mode", FORMS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits_dtype", ["float8_e4m3fn", "uint8"])
@pytest.mark.parametrize("shape", [(1, 1), (0, 8), (3, 0), (0, 0), (5, 33), (8, 1024), (999, 257), (1, 70000)])
def test_values(backend: Backend, mode: str, dtype: str, bits_dtype: str, shape: tuple[int, int]) -> None:
    x = backend.array(random(shape) * np.exp2(random(shape[:1], seed=1, scale=3))[:, None], dtype)
    stored = backend.bits(x)
    want = scale_of(stored, mode)
    bits, scale = backend.poisoned(shape, bits_dtype), backend.poisoned(want.shape, "float32")
    FORMS[mode](bits, scale, x)
    assert np.array_equal(backend.bits(scale), want)
    assert np.array_equal(raw(backend, bits), bits_of(stored, want))
    functional, its_scale = fp8_quant(x, mode=mode)  # type: ignore[arg-type]
    assert backend.bits(functional).dtype == ("uint8" if backend.framework == "cupy" else ml_dtypes.float8_e4m3fn)
    assert np.array_equal(raw(backend, functional), raw(backend, bits))
    assert np.array_equal(backend.bits(its_scale), want)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 0.37, 1e-3, 3e5, 1e-30])
def test_every_value_static(backend: Backend, dtype: str, scale: float) -> None:
    """Every 16-bit value: rounding, saturation, subnormals of both sides, NaN and Inf."""
    x = backend.array(all_values(dtype).reshape(16, -1), dtype)
    want = bits_of(backend.bits(x), np.array([scale], np.float32))
    for given_scale in (scale, backend.array([scale], "float32"), backend.array(scale, "float32")):
        bits = backend.poisoned((16, 4096), "uint8")
        fp8_e4m3fn_static_quant_cuda(bits, given_scale, x)
        assert np.array_equal(raw(backend, bits), want)
        functional, its_scale = fp8_quant(x, scale=given_scale)
        assert np.array_equal(raw(backend, functional), want)
        assert its_scale is given_scale


@pytest.mark.parametrize("dtype", HALVES)
def test_every_value_as_absmax(backend: Backend, dtype: str) -> None:
    """Every 16-bit value as the largest of its row: the division, the floor of 1e-6 and the reciprocal."""
    values = np.repeat(all_values(dtype)[:, None], 4, axis=1)
    with np.errstate(invalid="ignore"):
        values[:, 1:] *= [0.75, 0.3, -0.01]
    x = backend.array(values, dtype)
    stored = backend.bits(x)
    bits, scale = fp8_quant(x)
    assert np.array_equal(backend.bits(scale), scale_of(stored, "row"))
    assert np.array_equal(raw(backend, bits), bits_of(stored, scale_of(stored, "row")))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 9), width=st.integers(0, 300), offset=st.integers(0, 9), gap=st.integers(0, 9),
    mode=st.sampled_from([*FORMS, "static"]), dtype=st.sampled_from(HALVES), backend=st.sampled_from(BACKENDS),
    special=st.sampled_from([0.0, np.nan, np.inf, -np.inf]),
)  # fmt: skip
def test_odd_shapes(
    rows: int, width: int, offset: int, gap: int, mode: str, dtype: str, backend: Backend, special: float
) -> None:
    """Rows at any offset and stride inside larger arrays; what lies between them stays as it was."""
    columns = np.s_[offset : offset + width]
    shape = (rows, offset + width + gap)
    values = random(shape)
    values[::4, ::5] = special
    x = backend.array(values, dtype)[:, columns]
    stored = backend.bits(x)
    scale = np.array([0.01], np.float32) if mode == "static" else scale_of(stored, mode)
    whole = backend.poisoned(shape, "uint8")
    if mode == "static":
        fp8_e4m3fn_static_quant_cuda(whole[:, columns], 0.01, x)
    else:
        out_scale = backend.poisoned(scale.shape, "float32")
        FORMS[mode](whole[:, columns], out_scale, x)
        assert np.array_equal(backend.bits(out_scale), scale)
    got = backend.bits(whole)
    assert np.array_equal(got[:, columns], bits_of(stored, scale))
    assert (np.delete(got, columns, axis=1) == 255).all()


@pytest.mark.parametrize("width", [8, 256, 264, 1024, 1152, 2048, 2056, 4096, 8192, 8200, 40000])
@pytest.mark.parametrize("rows", [1, 3, 1025])
def test_widths(backend: Backend, rows: int, width: int) -> None:
    """Each way that kernels hold a row; its largest value stands at either end."""
    if rows > 3 and (backend.device == "cpu" or width > 8192):
        rows = 2
    stored = np.tile(random((1, width)), (rows, 1)) * np.exp2(random((rows, 1), seed=1, scale=3))
    stored[::2, -1] = stored[::2].min(axis=1) * 1.5
    stored[1::2, 0] = stored[1::2].max(axis=1, initial=0) * 1.5
    x = backend.array(stored, "bfloat16")
    stored = backend.bits(x)
    for mode in FORMS:
        bits, scale = fp8_quant(x, mode=mode)  # type: ignore[arg-type]
        assert np.array_equal(backend.bits(scale), scale_of(stored, mode))
        assert np.array_equal(raw(backend, bits), bits_of(stored, scale_of(stored, mode)))


def test_special_values(backend: Backend) -> None:
    x = np.array([[np.nan, 1, -2, 0], [np.inf, 1, -2, np.nan], [np.nan] * 4, [0] * 4, [-0.0, 1e-5, -448, 448]])
    bits, scale = fp8_quant(backend.array(x, "bfloat16"))
    assert np.array_equal(
        backend.bits(scale), np.array([np.float32(2) / np.float32(448), np.inf, 1e-6, 1e-6, 1], np.float32)
    )
    assert raw(backend, bits).tolist() == [
        [NAN, 0x76, 0xFE, 0],
        [NAN, 0, 0x80, NAN],
        [NAN] * 4,
        [0] * 4,
        [0x80, 0, 0xFE, 0x7E],
    ]


@pytest.mark.parametrize("mode", FORMS)
def test_round_trip(backend: Backend, mode: str) -> None:
    """Stored values times scale give x back, to e4m3's three bits of mantissa."""
    x = backend.array(random((64, 512)), "bfloat16")
    bits, scale = fp8_quant(x, mode=mode)  # type: ignore[arg-type]
    assert relative_error(backend.numpy(bits) * backend.numpy(scale)[:, None], backend.numpy(x)) < 0.03


def test_alias() -> None:
    assert fp8_quant_cute is fp8_e4m3fn_rowwise_quant_cuda


@pytest.mark.skipif(not HAS_JAX, reason="JAX is not installed")
@pytest.mark.parametrize("mode", FORMS)
def test_jax(mode: str) -> None:
    backend = Backend("jax")
    x = backend.array(random((3, 64)), "bfloat16")
    bits, scale = fp8_quant(x, mode=mode)  # type: ignore[arg-type]
    assert type(bits) is type(x)
    assert np.array_equal(np.array(scale), scale_of(backend.bits(x), mode))
    assert np.array_equal(raw(backend, bits), bits_of(backend.bits(x), np.array(scale)))
    with pytest.raises(TypeError, match="out_bits must be writable"):
        FORMS[mode](bits, np.empty(scale.shape, np.float32), x)
    with pytest.raises(TypeError, match="out_scale must be writable"):
        FORMS[mode](np.empty((3, 64), np.uint8), scale, x)


# form, error, message, what differs from a good call
BAD: list[tuple[str, type[Exception], str, dict[str, Any]]] = [
    ("row", TypeError, "x must be bfloat16 or float16, got float32", {"x": ((4, 64), "float32")}),
    ("row", TypeError, "out_bits must be float8_e4m3fn or uint8, got int8", {"bits": ((4, 64), "int8")}),
    ("row", TypeError, "out_scale must be float32, got float64", {"scale": ((4,), "float64")}),
    ("row", ValueError, r"x must have shape \[M, N\], got \[2, 2, 64\]", {"x": ((2, 2, 64), "bfloat16")}),
    ("row", ValueError, r"out_bits must have shape \[4, 64\], got \[4, 63\]", {"bits": ((4, 63), "uint8")}),
    ("row", ValueError, r"out_scale must have shape \[4\], got \[4, 1\]", {"scale": ((4, 1), "float32")}),
    ("tensor", ValueError, "out_scale must be of one element, got 4", {"scale": ((4,), "float32")}),
    ("tensor", TypeError, "out_scale must be float32, got float16", {"scale": ((1,), "float16")}),
    ("static", ValueError, "scale must be of one element, got 4", {"scale": ((4,), "float32")}),
    ("static", TypeError, "scale must be float32, got bfloat16", {"scale": ((1,), "bfloat16")}),
]


@pytest.mark.parametrize("form, error, message, change", BAD)
def test_bad_input(backend: Backend, form: str, error: type[Exception], message: str, change: dict[str, Any]) -> None:
    of: dict[str, Any] = {"x": ((4, 64), "bfloat16"), "bits": ((4, 64), "uint8")}
    of |= {"scale": ((4,) if form == "row" else (1,), "float32")} | change
    x, bits, scale = (
        backend.array(random(of["x"][0]), of["x"][1]),
        *(backend.poisoned(*of[n]) for n in ("bits", "scale")),
    )
    before = raw(backend, bits)
    with pytest.raises(error, match=f"^fp8_quant_{form}: {message}"):
        (FORMS | {"static": fp8_e4m3fn_static_quant_cuda})[form](bits, scale, x)
    assert np.array_equal(raw(backend, bits), before)
    assert np.isnan(backend.numpy(scale)).all()


def test_bad_values(backend: Backend) -> None:
    x, bits = backend.array(random((4, 64)), "bfloat16"), backend.poisoned((4, 64), "uint8")
    for scale, got in ((0.0, "0"), (-1.0, "-1"), (float("nan"), "nan")):
        with pytest.raises(ValueError, match=f"fp8_quant_static: scale must be above zero, got {got}"):
            fp8_e4m3fn_static_quant_cuda(bits, scale, x)
    with pytest.raises(ValueError, match="fp8_quant_row: x must have a contiguous last dimension"):
        fp8_quant(x[:, ::2])
    with pytest.raises(ValueError, match="fp8_quant_static: out_bits must have a contiguous last dimension"):
        fp8_e4m3fn_static_quant_cuda(bits[:, ::2], 1.0, x[:, :32])
    with pytest.raises(ValueError, match="fp8_quant: mode must be 'row' or 'tensor', got 'column'"):
        fp8_quant(x, mode="column")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fp8_quant: x must have at least 2 dimensions"):
        fp8_quant(x[0])
    with pytest.raises(TypeError, match="fp8_quant: x must be an array"):
        fp8_quant([1.0])
    assert (backend.bits(bits) == 255).all()
