"""layernorm: both forms against float64, on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kestrel_kernels.layernorm_cuda import layernorm_bias_cuda, layernorm_bias_reload_cuda
from kestrel_kernels.norm import layernorm
from support import BACKENDS, HALVES, HAS_JAX, Backend, assert_close, random

FORMS = (layernorm_bias_cuda, layernorm_bias_reload_cuda)
SLACK = 4e-6  # fp32 arithmetic on values of size one, where weight and bias cancel


def expected(backend: Backend, x: Any, weight: Any, bias: Any, eps: float = 1e-5) -> np.ndarray:
    x, weight, bias = backend.numpy(x), backend.numpy(weight), backend.numpy(bias)
    with np.errstate(invalid="ignore"):
        centered = x - x.mean(axis=-1, keepdims=True)
        return centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + eps) * weight + bias


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "shape",
    [
        (1,),
        (0, 8),
        (3, 0),
        (5, 1),
        (3, 2),
        (9, 33),
        (2, 3, 130),
        (5, 1152),
        (64, 2048),
        (3, 4097),
        (2, 8200),
        (2, 65536),
    ],
)
def test_values(backend: Backend, form, dtype: str, shape: tuple[int, ...]) -> None:
    x = backend.array(random(shape, scale=2.0), dtype)
    weight, bias = (backend.array(random(shape[-1:], seed=seed), dtype) for seed in (1, 2))
    want = expected(backend, x, weight, bias) if np.prod(shape) else np.zeros(shape)
    out = backend.poisoned(shape, dtype)
    form(out, x, weight, bias, 1e-5)
    assert_close(backend.numpy(out), want, dtype, slack=SLACK)
    if form is layernorm_bias_cuda:
        assert np.array_equal(backend.bits(layernorm(x, weight, bias)), backend.bits(out))
    form(x, x, weight, bias, 1e-5)
    assert np.array_equal(backend.bits(x), backend.bits(out))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 9), width=st.integers(0, 300), offset=st.integers(0, 9), gap=st.integers(0, 9),
    eps=st.sampled_from([0.001, 1.0]), form=st.sampled_from(FORMS), dtype=st.sampled_from(HALVES),
    backend=st.sampled_from(BACKENDS),
)  # fmt: skip
def test_odd_shapes(
    rows: int, width: int, offset: int, gap: int, eps: float, form, dtype: str, backend: Backend
) -> None:
    """Rows at any offset and stride inside a larger array; what lies between them stays as it was."""
    inside = np.s_[:, offset : offset + width]
    x = backend.array(random((rows, offset + width + gap)), dtype)[inside]
    weight, bias = (backend.array(random((offset + width,), seed=seed), dtype)[offset:] for seed in (1, 2))
    whole = backend.poisoned((rows, offset + width + gap), dtype)
    form(whole[inside], x, weight, bias, eps)
    got = backend.numpy(whole)
    if rows and width:
        want = expected(backend, x, weight, bias, eps)
        assert_close(got[inside], want, dtype, slack=SLACK)
    assert np.isnan(np.delete(got, np.s_[offset : offset + width], axis=1)).all()


def test_two_strided_levels(backend: Backend) -> None:
    x = backend.array(random((4, 6, 64)), "bfloat16")[::2, :5]
    weight, bias = (backend.array(random((64,), seed=seed), "bfloat16") for seed in (1, 2))
    want = expected(backend, x, weight, bias)
    assert_close(backend.numpy(layernorm(x, weight, bias)), want, "bfloat16", slack=SLACK)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [1152, 2048, 5000])
def test_large_mean(backend: Backend, form, width: int) -> None:
    """A mean 1000 times the deviation: E[x^2] - E[x]^2 in fp32 would be off by a tenth of the variance."""
    x = backend.array(1000 + random((4, width)), "float16")
    ones, zeros = backend.array(np.ones(width), "float16"), backend.array(np.zeros(width), "float16")
    out = backend.poisoned((4, width), "float16")
    form(out, x, ones, zeros, 0.0)
    want = expected(backend, x, ones, zeros, 0.0)
    assert_close(backend.numpy(out), want, "float16", slack=1e-3)  # the mean itself, 1000 * 2^-20


@pytest.mark.parametrize("form", FORMS)
def test_special_rows(backend: Backend, form) -> None:
    """NaN and Inf fill their own row with NaN and touch no other; a constant row gives the bias."""
    values = random((5, 96))
    values[0, 7], values[2, 95], values[3, :] = np.nan, -np.inf, 3.0
    x = backend.array(values, "float16")
    weight, bias = (backend.array(random((96,), seed=seed), "float16") for seed in (1, 2))
    out = backend.poisoned((5, 96), "float16")
    form(out, x, weight, bias, 1e-5)
    got = backend.numpy(out)
    assert_close(got, expected(backend, x, weight, bias), "float16", slack=SLACK)
    assert np.isnan(got[[0, 2]]).all()
    assert np.array_equal(got[3], backend.numpy(bias))


@pytest.mark.parametrize("form", FORMS)
def test_row_alone(backend: Backend, form) -> None:
    """A row's bits do not depend on the batch around it."""
    x = backend.array(random((50, 1152)), "bfloat16")
    weight, bias = (backend.array(random((1152,), seed=seed), "bfloat16") for seed in (1, 2))
    batch, alone = backend.poisoned((50, 1152), "bfloat16"), backend.poisoned((1, 1152), "bfloat16")
    form(batch, x, weight, bias, 1e-5)
    for row in (0, 17, 49):
        form(alone, x[row : row + 1], weight, bias, 1e-5)
        assert np.array_equal(backend.bits(alone)[0], backend.bits(batch)[row])


@pytest.mark.skipif(not HAS_JAX, reason="JAX is not installed")
def test_jax() -> None:
    backend = Backend("jax")
    x = backend.array(random((3, 64)), "bfloat16")
    weight, bias = (backend.array(random((64,), seed=seed), "bfloat16") for seed in (1, 2))
    out = layernorm(x, weight, bias)
    assert type(out) is type(x)
    want = expected(backend, x, weight, bias)
    assert_close(backend.numpy(out), want, "bfloat16", slack=SLACK)
    with pytest.raises(TypeError, match="layernorm: out must be writable"):
        layernorm_bias_cuda(out, x, weight, bias, 1e-5)


BAD = [
    (TypeError, "x must be bfloat16 or float16, got float32", {"x": ((4, 64), "float32")}),
    (TypeError, "weight must be bfloat16, got float16", {"weight": ((64,), "float16")}),
    (TypeError, "bias must be bfloat16, got float32", {"bias": ((64,), "float32")}),
    (TypeError, "out must be bfloat16, got float16", {"out": ((4, 64), "float16")}),
    (ValueError, r"weight must have shape \[64\], got \[63\]", {"weight": ((63,), "bfloat16")}),
    (ValueError, r"bias must have shape \[64\], got \[1, 64\]", {"bias": ((1, 64), "bfloat16")}),
    (ValueError, r"out must have shape \[4, 64\], got \[3, 64\]", {"out": ((3, 64), "bfloat16")}),
    (ValueError, r"x must have 1 to 6 dimensions, got shape \[\]", {"x": ((), "bfloat16")}),
    (ValueError, "x must be at most 65536 wide, got 65537", {"x": ((1, 65537), "bfloat16")}),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("error, message, change", BAD)
def test_bad_input(backend: Backend, form, error, message: str, change: dict) -> None:
    arrays = {"out": ((4, 64), "bfloat16"), "x": ((4, 64), "bfloat16")}
    arrays |= {"weight": ((64,), "bfloat16"), "bias": ((64,), "bfloat16")} | change
    args = [backend.poisoned(*of) if n == "out" else backend.array(random(of[0]), of[1]) for n, of in arrays.items()]
    name = form.__name__.replace("_bias", "").removesuffix("_cuda")
    with pytest.raises(error, match=f"^{name}: {message}"):
        form(*args, 1e-5)
    assert np.isnan(backend.numpy(args[0])).all()


def test_bad_strides_and_eps(backend: Backend) -> None:
    wide = backend.array(random((4, 128)), "bfloat16")
    weight, out = wide[0, :64], backend.poisoned((4, 64), "bfloat16")
    for args, message in [
        ((out, wide[:, ::2], weight, weight, 1e-5), "x must have a contiguous last dimension"),
        ((out, wide[:, :64], wide[0, ::2], weight, 1e-5), "weight must have a contiguous last dimension"),
        ((out, wide[:, :64], weight, weight, -1.0), "eps must be zero or more, got -1"),
        ((out, wide[:, :64], weight, weight, float("nan")), "eps must be zero or more, got nan"),
    ]:
        with pytest.raises(ValueError, match=f"^layernorm: {message}"):
            layernorm_bias_cuda(*args)
    with pytest.raises(TypeError, match="layernorm: x must be an array"):
        layernorm_bias_cuda(out, [[1.0, 2.0]], weight, weight, 1e-5)
    assert np.isnan(backend.numpy(out)).all()
