"""moe_sum against an fp32 sum in the same order, on every backend: equal to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kestrel_kernels.moe_sum import moe_sum
from support import BACKENDS, FLOATS, HAS_JAX, Backend, assert_close, random


def expected(backend: Backend, x: Any) -> np.ndarray:
    """One fp32 addition after the other, and one rounding."""
    values = backend.bits(x)
    total = np.zeros((values.shape[0], values.shape[2]), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for k in range(values.shape[1]):
            total = total + values[:, k].astype(np.float32)
        return total.astype(values.dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (0, 8, 16), (3, 0, 5), (3, 8, 0), (5, 8, 33), (16, 8, 2048), (4, 6, 1025), (2, 3, 512), (1, 64, 7)],
)
def test_values(backend: Backend, dtype: str, shape: tuple[int, ...]) -> None:
    x = backend.array(random(shape), dtype)
    out = backend.poisoned((shape[0], shape[2]), dtype)
    assert moe_sum(x, out) is None
    assert np.array_equal(backend.bits(out), expected(backend, x))
    assert np.array_equal(backend.bits(moe_sum(x)), backend.bits(out))
    exact = backend.numpy(x).sum(axis=1)
    assert_close(backend.numpy(out), exact, dtype, slack=2e-5)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 5), experts=st.integers(0, 10), width=st.integers(0, 300), offset=st.integers(0, 9),
    gap=st.integers(0, 9), skip=st.integers(1, 2), dtype=st.sampled_from(FLOATS), backend=st.sampled_from(BACKENDS),
)  # fmt: skip
def test_odd_shapes(
    tokens: int, experts: int, width: int, offset: int, gap: int, skip: int, dtype: str, backend: Backend
) -> None:
    """Strided tokens, experts and columns of larger arrays; what lies between the outputs stays as it was."""
    columns = np.s_[offset : offset + width]
    x = backend.array(random((tokens * skip, experts * skip, offset + width + gap)), dtype)[::skip, ::skip, columns]
    whole = backend.poisoned((tokens, offset + width + gap), dtype)
    moe_sum(x, whole[:, columns])
    got = backend.bits(whole)
    assert np.array_equal(got[:, columns], expected(backend, x))
    assert np.isnan(np.delete(backend.numpy(whole), columns, axis=1)).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("experts", [8, 5])
def test_wide_strides(backend: Backend, dtype: str, experts: int) -> None:
    """Every other expert of rows that lie a little apart, and all of them a multiple of 16 bytes."""
    x = backend.array(random((7, 2 * experts + 1, 208)), dtype)[:, : 2 * experts : 2, 8:200]
    whole = backend.poisoned((7, 224), dtype)
    moe_sum(x, whole[:, 16:208])
    assert np.array_equal(backend.bits(whole)[:, 16:208], expected(backend, x))
    assert np.isnan(np.delete(backend.numpy(whole), np.s_[16:208], axis=1)).all()


@pytest.mark.parametrize("experts", [8, 5])
def test_order(backend: Backend, experts: int) -> None:
    """In fp32, 2^24 + 1 + ... + 1 - 2^24 is 0 from the left, and something else in any other order."""
    x = np.ones((2, experts, 40))
    x[:, 0], x[:, -1] = 2.0**24, -(2.0**24)
    assert (backend.numpy(moe_sum(backend.array(x, "float32"))) == 0).all()


def test_special_values(backend: Backend) -> None:
    x = np.ones((2, 8, 6))
    x[0, 3, 0], x[0, 3, 1], x[0, 5, 1], x[0, 3, 2], x[0, 2, 3] = np.nan, np.inf, -np.inf, np.inf, -np.inf
    x[1, :, :2] = 60000.0
    got = backend.numpy(moe_sum(backend.array(x, "float16")))
    assert np.array_equal(got[0], [np.nan, np.nan, np.inf, -np.inf, 8, 8], equal_nan=True)
    assert np.array_equal(got[1], [np.inf, np.inf, 8, 8, 8, 8])


@pytest.mark.skipif(not HAS_JAX, reason="JAX is not installed")
def test_jax() -> None:
    backend = Backend("jax")
    x = backend.array(random((3, 8, 64)), "bfloat16")
    out = moe_sum(x)
    assert type(out) is type(x)
    assert np.array_equal(backend.bits(out), expected(backend, x))
    with pytest.raises(TypeError, match="moe_sum: out must be writable"):
        moe_sum(x, out)


BAD = [
    (TypeError, "x must be bfloat16, float16 or float32, got int32", ((4, 64), "bfloat16"), ((4, 8, 64), "int32")),
    (TypeError, "out must be bfloat16, got float32", ((4, 64), "float32"), ((4, 8, 64), "bfloat16")),
    (ValueError, r"x must have shape \[T, K, N\], got \[4, 64\]", ((4, 64), "bfloat16"), ((4, 64), "bfloat16")),
    (ValueError, r"out must have shape \[4, 64\], got \[8, 64\]", ((8, 64), "bfloat16"), ((4, 8, 64), "bfloat16")),
    (ValueError, r"out must have shape \[4, 64\], got \[4, 63\]", ((4, 63), "bfloat16"), ((4, 8, 64), "bfloat16")),
    (ValueError, r"out must have shape \[4, 64\], got \[256\]", ((256,), "bfloat16"), ((4, 8, 64), "bfloat16")),
]


@pytest.mark.parametrize("error, message, out_of, x_of", BAD)
def test_bad_input(backend: Backend, error: type[Exception], message: str, out_of: Any, x_of: Any) -> None:
    out = backend.poisoned(*out_of)
    with pytest.raises(error, match=f"^moe_sum: {message}"):
        moe_sum(backend.array(random(x_of[0]), x_of[1]), out)
    assert np.isnan(backend.numpy(out)).all()


def test_bad_strides(backend: Backend) -> None:
    x, out = backend.array(random((4, 8, 64)), "bfloat16"), backend.poisoned((4, 64), "bfloat16")
    with pytest.raises(ValueError, match="moe_sum: x must have a contiguous last dimension"):
        moe_sum(x[:, :, ::2], out[:, :32])
    with pytest.raises(ValueError, match="moe_sum: out must have a contiguous last dimension"):
        moe_sum(x[:, :, :32], out[:, ::2])
    with pytest.raises(ValueError, match="moe_sum: x must have at least 3 dimensions"):
        moe_sum(out)
    with pytest.raises(TypeError, match="moe_sum: x must be an array"):
        moe_sum(3.0)
    assert np.isnan(backend.numpy(out)).all()
