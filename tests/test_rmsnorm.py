"""rmsnorm, with and without a residual, against float64, on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kestrel_kernels.norm import rmsnorm, rmsnorm_into
from support import BACKENDS, FLOATS, HAS_JAX, Backend, assert_close, numpy_dtype, random


def expected(backend: Backend, x: Any, weight: Any, eps: float = 1e-6) -> np.ndarray:
    x, weight = backend.numpy(x), backend.numpy(weight)
    with np.errstate(invalid="ignore"):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def rounded_sum(backend: Backend, residual: Any, x: Any) -> np.ndarray:
    """residual + x in fp32, rounded to their dtype: what the op stores, to the bit."""
    residual, x = backend.bits(residual), backend.bits(x)
    return (residual.astype(np.float32) + x.astype(np.float32)).astype(x.dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape",
    [(1,), (0, 8), (3, 0), (5, 1), (3, 2), (9, 33), (2, 3, 130), (5, 576), (64, 2048), (3, 4097), (2, 65536)],
)
def test_values(backend: Backend, dtype: str, shape: tuple[int, ...]) -> None:
    x = backend.array(random(shape, scale=2.0), dtype)
    weight = backend.array(random(shape[-1:], seed=1), dtype)
    want = expected(backend, x, weight) if np.prod(shape) else np.zeros(shape)
    out = backend.poisoned(shape, dtype)
    rmsnorm_into(out, x, weight, 1e-6)
    assert_close(backend.numpy(out), want, dtype)
    assert np.array_equal(backend.bits(rmsnorm(x, weight)), backend.bits(out))
    rmsnorm_into(x, x, weight, 1e-6)
    assert np.array_equal(backend.bits(x), backend.bits(out))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1,), (0, 8), (9, 33), (2, 3, 130), (5, 576), (64, 2048), (3, 4097)])
def test_residual(backend: Backend, dtype: str, shape: tuple[int, ...]) -> None:
    """The norm is that of the sum as it was stored, so that the residual alone repeats it."""
    x, residual = (backend.array(random(shape, seed=seed), dtype) for seed in (0, 2))
    before = backend.array(backend.bits(residual), dtype)
    weight = backend.array(random(shape[-1:], seed=1), dtype)
    stored = rounded_sum(backend, residual, x)
    out = backend.poisoned(shape, dtype)
    rmsnorm_into(out, x, weight, 1e-6, residual)
    assert np.array_equal(backend.bits(residual), stored)
    assert np.array_equal(backend.bits(out), backend.bits(rmsnorm(residual, weight)))
    rmsnorm_into(x, x, weight, 1e-6, residual=before)
    assert np.array_equal(backend.bits(before), stored)
    assert np.array_equal(backend.bits(x), backend.bits(out))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 9), width=st.integers(0, 300), offset=st.integers(0, 9), gap=st.integers(0, 9),
    eps=st.sampled_from([0.0, 0.001, 1.0]), dtype=st.sampled_from(FLOATS), backend=st.sampled_from(BACKENDS),
    with_residual=st.booleans(),
)  # fmt: skip
def test_odd_shapes(
    rows: int, width: int, offset: int, gap: int, eps: float, dtype: str, backend: Backend, with_residual: bool
) -> None:
    """Rows at any offset and stride inside larger arrays; what lies between them stays as it was."""
    columns = np.s_[offset : offset + width]
    shape = (rows, offset + width + gap)
    x = backend.array(random(shape), dtype)[:, columns]
    weight = backend.array(random((offset + width,), seed=1), dtype)[offset:]
    residuals = backend.array(random(shape, seed=2), dtype)
    outside = np.delete(backend.numpy(residuals), columns, axis=1)
    stored = rounded_sum(backend, residuals[:, columns], x)
    whole = backend.poisoned(shape, dtype)
    rmsnorm_into(whole[:, columns], x, weight, eps, residuals[:, columns] if with_residual else None)
    got = backend.numpy(whole)
    if with_residual:
        assert np.array_equal(backend.bits(residuals)[:, columns], stored)
        x = residuals[:, columns]
    if rows and width:
        assert_close(got[:, columns], expected(backend, x, weight, eps), dtype)
    assert np.isnan(np.delete(got, columns, axis=1)).all()
    assert np.array_equal(np.delete(backend.numpy(residuals), columns, axis=1), outside)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [576, 1024, 1152, 2048])
@pytest.mark.parametrize("levels", [1, 2])
def test_wide_strides(backend: Backend, dtype: str, width: int, levels: int) -> None:
    """Rows a little apart, in one level and in two, of widths that have kernels of their own."""
    rows = np.s_[:, : 5 if levels == 1 else 3, :width]
    x, residual, whole = (backend.array(random((2, 5, width + 16), seed=seed), dtype) for seed in range(3))
    weight = backend.array(random((width,), seed=3), dtype)
    outside = backend.bits(whole)
    stored = backend.bits(residual)
    stored[rows] = rounded_sum(backend, residual[rows], x[rows])
    rmsnorm_into(whole[rows], x[rows], weight, 1e-6)
    assert_close(backend.numpy(whole[rows]), expected(backend, x[rows], weight), dtype)
    rmsnorm_into(whole[rows], x[rows], weight, 1e-6, residual[rows])
    assert np.array_equal(backend.bits(residual), stored)
    assert_close(backend.numpy(whole[rows]), expected(backend, residual[rows], weight), dtype)
    got = backend.bits(whole)
    got[rows] = outside[rows]
    assert np.array_equal(got, outside)


def test_special_rows(backend: Backend) -> None:
    """NaN fills its row with NaN, Inf (over an infinite root) its row with zeros and one NaN; no other row changes."""
    values = random((5, 96))
    values[0, 7], values[2, 95], values[3, :] = np.nan, -np.inf, 0.0
    x, weight = backend.array(values, "float32"), backend.array(random((96,), seed=1), "float32")
    got = backend.numpy(rmsnorm(x, weight))
    assert_close(got, expected(backend, x, weight), "float32")
    assert np.isnan(got[0]).all()
    assert np.isnan(got[2, 95])
    assert (got[2, :95] == 0).all()
    assert (got[3] == 0).all()


def test_row_alone(backend: Backend) -> None:
    """A row's bits do not depend on the batch around it."""
    x = backend.array(random((50, 1152)), "bfloat16")
    weight = backend.array(random((1152,), seed=1), "bfloat16")
    batch = backend.bits(rmsnorm(x, weight))
    for row in (0, 17, 49):
        assert np.array_equal(backend.bits(rmsnorm(x[row : row + 1], weight))[0], batch[row])


@pytest.mark.skipif(not HAS_JAX, reason="JAX is not installed")
def test_jax() -> None:
    backend = Backend("jax")
    x, weight = backend.array(random((3, 64)), "bfloat16"), backend.array(random((64,), seed=1), "bfloat16")
    out = rmsnorm(x, weight)
    assert type(out) is type(x)
    assert_close(backend.numpy(out), expected(backend, x, weight), "bfloat16")
    with pytest.raises(TypeError, match="rmsnorm: residual must be writable"):
        rmsnorm(x, weight, residual=x)
    with pytest.raises(TypeError, match="rmsnorm: out must be writable"):
        rmsnorm_into(out, x, weight, 1e-6)


BAD = [
    (TypeError, "x must be bfloat16, float16 or float32, got float64", {"x": ((4, 64), "float64")}),
    (TypeError, "weight must be bfloat16, got float16", {"weight": ((64,), "float16")}),
    (TypeError, "out must be bfloat16, got float16", {"out": ((4, 64), "float16")}),
    (TypeError, "residual must be bfloat16, got float32", {"residual": ((4, 64), "float32")}),
    (ValueError, r"weight must have shape \[64\], got \[63\]", {"weight": ((63,), "bfloat16")}),
    (ValueError, r"out must have shape \[4, 64\], got \[3, 64\]", {"out": ((3, 64), "bfloat16")}),
    (ValueError, r"residual must have shape \[4, 64\], got \[64\]", {"residual": ((64,), "bfloat16")}),
    (ValueError, r"x must have 1 to 6 dimensions, got shape \[\]", {"x": ((), "bfloat16")}),
    (ValueError, "x must be at most 65536 wide, got 65537", {"x": ((1, 65537), "bfloat16")}),
    (ValueError, "eps must be zero or more, got -1", {"eps": -1.0}),
]


@pytest.mark.parametrize("error, message, change", BAD)
def test_bad_input(backend: Backend, error: type[Exception], message: str, change: dict[str, Any]) -> None:
    of: dict[str, Any] = {"out": ((4, 64), "bfloat16"), "x": ((4, 64), "bfloat16"), "weight": ((64,), "bfloat16")}
    of |= {"eps": 1e-6, "residual": ((4, 64), "bfloat16")} | change
    out, residual = (backend.poisoned(*of[name]) for name in ("out", "residual"))
    x, weight = (backend.array(random(of[name][0]), of[name][1]) for name in ("x", "weight"))
    with pytest.raises(error, match=f"^rmsnorm: {message}"):
        rmsnorm_into(out, x, weight, of["eps"], residual)
    assert np.isnan(backend.numpy(out)).all()
    assert np.isnan(backend.numpy(residual)).all()


def test_bad_strides(backend: Backend) -> None:
    wide = backend.array(random((4, 128)), "bfloat16")
    weight, out = wide[0, :64], backend.poisoned((4, 64), "bfloat16")
    for args, message in [
        ((out, wide[:, ::2], weight, 1e-6), "x must have a contiguous last dimension"),
        ((out, wide[:, :64], wide[0, ::2], 1e-6), "weight must have a contiguous last dimension"),
        ((out, wide[:, :64], weight, 1e-6, wide[:, ::2]), "residual must have a contiguous last dimension"),
    ]:
        with pytest.raises(ValueError, match=f"^rmsnorm: {message}"):
            rmsnorm_into(*args)
    with pytest.raises(TypeError, match="rmsnorm: x must be an array"):
        rmsnorm_into(out, [[1.0, 2.0]], weight, 1e-6)
    assert np.isnan(backend.numpy(out)).all()


def test_read_only_residual() -> None:
    x = random((2, 8)).astype(np.float32)
    residual = np.ones((2, 8), np.float32)
    residual.flags.writeable = False
    with pytest.raises(TypeError, match="rmsnorm: residual must be writable"):
        rmsnorm(x, np.ones(8, numpy_dtype("float32")), residual=residual)
