"""activation: the gates against float64, on every backend."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kestrel_kernels import activation
from kestrel_kernels.gelu_residual import gelu_residual_cute
from support import BACKENDS, FLOATS, GATES, HAS_JAX, Backend, assert_close, random

OPS = {
    "gelu_residual": (activation.gelu_residual, activation.gelu_residual_cuda),
    "silu_and_mul": (activation.silu_and_mul, activation.silu_and_mul_into),
    "gelu_and_mul": (activation.gelu_and_mul, activation.gelu_and_mul_into),
    "gelu_tanh_and_mul": (activation.gelu_tanh_and_mul, activation.gelu_tanh_and_mul_into),
}


def expected(op: str, x: np.ndarray) -> np.ndarray:
    width = x.shape[-1] // 2
    return GATES[op](x[..., :width], x[..., width:])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2,), (0, 8), (3, 0), (1, 2), (5, 14), (7, 256), (2, 3, 130), (64, 2048)])
def test_values(backend: Backend, op: str, dtype: str, shape: tuple[int, ...]) -> None:
    functional, into = OPS[op]
    x = backend.array(random(shape, scale=2.0), dtype)
    want = expected(op, backend.numpy(x))
    out = backend.poisoned((*shape[:-1], shape[-1] // 2), dtype)
    into(out, x)
    # fp32 arithmetic near zero of the gate: absolute, far below one unit of the 16-bit dtypes.
    assert_close(backend.numpy(out), want, dtype, slack=1e-6)
    assert np.array_equal(backend.bits(functional(x)), backend.bits(out))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 9), width=st.integers(0, 300), offset=st.integers(0, 9), gap=st.integers(0, 9),
    op=st.sampled_from(list(OPS)), dtype=st.sampled_from(FLOATS), backend=st.sampled_from(BACKENDS),
)  # fmt: skip
def test_odd_shapes(rows: int, width: int, offset: int, gap: int, op: str, dtype: str, backend: Backend) -> None:
    """Rows at any offset and stride inside a larger array; what lies between them stays as it was."""
    x = backend.array(random((rows, offset + 2 * width + gap)), dtype)[:, offset : offset + 2 * width]
    whole = backend.poisoned((rows, offset + width + gap), dtype)
    OPS[op][1](whole[:, offset : offset + width], x)
    got = backend.numpy(whole)
    assert_close(got[:, offset : offset + width], expected(op, backend.numpy(x)), dtype, slack=1e-6)
    assert np.isnan(np.delete(got, np.s_[offset : offset + width], axis=1)).all()


def test_two_strided_levels(backend: Backend) -> None:
    x = backend.array(random((4, 6, 64)), "bfloat16")[::2, :5]
    out = backend.numpy(activation.silu_and_mul(x))
    assert_close(out, expected("silu_and_mul", backend.numpy(x)), "bfloat16", slack=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_special_values(backend: Backend, op: str) -> None:
    """NaN and Inf go through as IEEE arithmetic says and stay in their own element."""
    values = [0.0, -0.0, np.inf, np.nan, 6.0, -6.0, 1.0, 2.0]
    x = np.array([values + [1.0] * 8, values + [np.inf] * 8])
    with np.errstate(invalid="ignore"):
        want = expected(op, x)
    assert_close(backend.numpy(OPS[op][0](backend.array(x, "float32"))), want, "float32", slack=1e-6)


def test_alias() -> None:
    assert gelu_residual_cute is activation.gelu_residual_cuda


@pytest.mark.skipif(not HAS_JAX, reason="JAX is not installed")
def test_jax() -> None:
    backend = Backend("jax")
    x = backend.array(random((3, 64)), "bfloat16")
    out = activation.gelu_residual(x)
    assert type(out) is type(x)
    assert_close(backend.numpy(out), expected("gelu_residual", backend.numpy(x)), "bfloat16", slack=1e-6)
    with pytest.raises(TypeError, match="gelu_residual: out must be writable"):
        activation.gelu_residual_cuda(out, x)


def bad_calls(b: Backend) -> list[tuple[type[Exception], str, object, object]]:
    """(error, message, out, x)"""
    x = b.array(random((4, 64)), "bfloat16")
    out = b.poisoned((4, 32), "bfloat16")
    return [
        (TypeError, "x must be bfloat16, float16 or float32, got float64", out, b.array(random((4, 64)), "float64")),
        (TypeError, "out must be bfloat16, got float32", b.poisoned((4, 32), "float32"), x),
        (TypeError, "x must be an array", out, [[1.0, 2.0]]),
        (ValueError, r"out must have shape \[4, 32\], got \[3, 32\]", out[:3], x),
        (ValueError, r"out must have shape \[4, 32\], got \[4, 64\]", b.poisoned((4, 64), "bfloat16"), x),
        (ValueError, "x must be two halves wide: an even last dimension, got 63", out, x[:, :63]),
        (ValueError, "x must have 1 to 6 dimensions, got shape", out, b.array(1.0, "bfloat16")),
        (ValueError, "x must have a contiguous last dimension", out, b.array(random((4, 128)), "bfloat16")[:, ::2]),
    ]


@pytest.mark.parametrize("case", range(8))
def test_bad_input(backend: Backend, case: int) -> None:
    error, message, out, x = bad_calls(backend)[case]
    with pytest.raises(error, match=f"^gelu_residual: {message}"):
        activation.gelu_residual_cuda(out, x)
    assert np.isnan(backend.numpy(out)).all()
