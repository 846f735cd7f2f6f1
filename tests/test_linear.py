"""linear and fused_mlp: against float64 on every backend; a row's bits whatever is beside it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kestrel_kernels import _library
from kestrel_kernels import fused_linear_residual_ops as ops
from kestrel_kernels import fused_mlp as mlp
from support import (
    BACKENDS,
    CUDA_BACKENDS,
    FLOATS,
    GATES,
    HALVES,
    HAS_JAX,
    Backend,
    assert_close,
    gelu,
    gelu_tanh,
    numpy_dtype,
    random,
    silu,
)

PLAIN: dict[str | None, Callable[[np.ndarray], np.ndarray]] = {
    None: lambda a: a,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
}
ACTIVATIONS = [*PLAIN, *GATES]
# The sum of |terms| is about sqrt(K) here, so fp32 sums are wrong by some 1e-7 times a few; a gate multiplies that.
SLACK = 4e-6


def slack(backend: Backend, k: int) -> float:
    """Tensor cores add 16 terms at a time and cut the sum, some 2^-23 of it, toward zero (Fasi et al. 2021)."""
    return SLACK + (k * 2.0**-26 if backend.device == "cuda" else 0)


def expected(
    activation: str | None,
    x: np.ndarray,
    w: np.ndarray,
    b: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> np.ndarray:
    a = x @ w.T + (0 if b is None else b)
    half = a.shape[-1] // 2
    a = GATES[activation](a[..., :half], a[..., half:]) if activation in GATES else PLAIN[activation](a)
    return a + (0 if residual is None else residual)


def layer(m: int, n: int, k: int, activation: str | None = None, seed: int = 0) -> list[np.ndarray]:
    """x, w, b, residual whose products are about 1."""
    rows = n * (2 if activation in GATES else 1)
    w = random((rows, k), seed + 1, scale=max(k, 1) ** -0.5)
    return [random((m, k), seed), w, random((rows,), seed + 2), random((m, n), seed + 3)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 64, 96), (3, 5, 33), (0, 8, 8), (4, 0, 8), (4, 6, 0), (13, 150, 67)])
def test_values(backend: Backend, activation: str | None, dtype: str, shape: tuple[int, int, int]) -> None:
    x, w, b, residual = (backend.array(a, dtype) for a in layer(*shape, activation))
    out = backend.poisoned(tuple(shape[:2]), dtype)
    for bias in (None, b):
        for added in (None, residual):
            more = (None if a is None else backend.numpy(a) for a in (bias, added))
            want = expected(activation, backend.numpy(x), backend.numpy(w), *more)
            ops.linear_into(out, x, w, bias, added, activation)
            assert_close(backend.numpy(out), want, dtype, slack(backend, shape[2]))
            assert np.array_equal(backend.bits(ops.linear(x, w, bias, added, activation)), backend.bits(out))


# Several slices of the depth; several chunks of rows; a tall and a wide one; all with remainders.
@pytest.mark.parametrize("shape", [(8, 9, 5003), (100, 5, 45000), (700, 7, 66), (2, 3001, 130), (37, 260, 1200)])
@pytest.mark.parametrize("dtype", HALVES)
def test_large(backend: Backend, dtype: str, shape: tuple[int, int, int]) -> None:
    x, w, b, residual = (backend.array(a, dtype) for a in layer(*shape))
    out = backend.numpy(ops.linear(x, w, b, residual))
    want = expected(None, *map(backend.numpy, (x, w, b, residual)))
    assert_close(out, want, dtype, slack(backend, shape[2]))


@settings(deadline=None, max_examples=60)
@given(
    m=st.integers(0, 20), n=st.integers(0, 40), k=st.integers(0, 150), offset=st.integers(0, 9), gap=st.integers(0, 9),
    activation=st.sampled_from(ACTIVATIONS), dtype=st.sampled_from(FLOATS), backend=st.sampled_from(BACKENDS),
)  # fmt: skip
def test_odd_shapes(
    m: int, n: int, k: int, offset: int, gap: int, activation: str | None, dtype: str, backend: Backend
) -> None:
    """Every matrix at any offset and stride inside a larger one that holds NaN, and still does afterwards."""

    def inside(values: np.ndarray) -> tuple:
        margins = [(0, 0)] * (values.ndim - 1) + [(offset, gap)]
        whole = backend.array(np.pad(values, margins, constant_values=np.nan), dtype)
        return whole, whole[..., offset : offset + values.shape[-1]]

    (_, x), (_, w), (_, b), (_, residual) = (inside(a) for a in layer(m, n, k, activation))
    whole, out = inside(np.full((m, n), np.nan))
    ops.linear_into(out, x, w, b, residual, activation)
    want = expected(activation, *map(backend.numpy, (x, w, b, residual)))
    assert_close(backend.numpy(out), want, dtype, slack(backend, k))
    assert np.isnan(np.delete(backend.numpy(whole), np.s_[offset : offset + n], axis=1)).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", [None, "silu_and_mul"])
def test_in_place(backend: Backend, dtype: str, activation: str | None) -> None:
    x, w, b, residual = (backend.array(a, dtype) for a in layer(9, 200, 77, activation))
    want = backend.bits(ops.linear(x, w, b, residual, activation))
    ops.linear_into(residual, x, w, b, residual, activation)
    assert np.array_equal(backend.bits(residual), want)


def test_bias_residual(backend: Backend) -> None:
    x, w, b, residual = (backend.array(a, "bfloat16") for a in layer(9, 200, 77))
    want = backend.bits(ops.linear(x, w, b, residual))
    ops.fused_linear_bias_residual_into(x, w, b, residual, residual)
    assert np.array_equal(backend.bits(residual), want)


def test_leading_dimensions(backend: Backend) -> None:
    x, w, b, _ = layer(24, 10, 64)
    x, w, b = (backend.array(a, "bfloat16") for a in (x.reshape(4, 6, 64), w, b))
    x, w = x[::2, :5], w[::2]
    b = b[:5]
    want = expected("silu", *map(backend.numpy, (x, w, b)))
    assert_close(backend.numpy(ops.linear(x, w, b, activation="silu")), want, "bfloat16", SLACK)
    assert_close(backend.numpy(ops.linear(x[0, 0], w, b, activation="silu")), want[0, 0], "bfloat16", SLACK)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [3, 576, 2500])
def test_row_alone(backend: Backend, dtype: str, k: int) -> None:
    """The same bits whatever the other rows hold; on the CPU also in batches of any size."""
    x, w, b, residual = (backend.array(a, dtype) for a in layer(45, 37, k))
    whole = backend.bits(ops.linear(x, w, b, residual, "gelu"))
    for size in (1, 2, 3, 4, 5, 6, 7, 11, 20) if backend.device == "cpu" else ():
        part = slice(size, 2 * size)
        assert np.array_equal(backend.bits(ops.linear(x[part], w, b, residual[part], "gelu")), whole[part])
    x[:20], x[21:] = math.nan, math.inf
    assert np.array_equal(backend.bits(ops.linear(x, w, b, residual, "gelu"))[20], whole[20])


CHILD = """
import sys
sys.modules["torch"] = None  # tvm_ffi would take seconds to import it
import ml_dtypes, numpy as np
from kestrel_kernels.fused_linear_residual_ops import linear
folder = sys.argv[1]
x, w = np.load(folder + "/x.npy"), np.load(folder + "/w.npy")
out = [linear(x.astype(d), w.astype(d)).astype("f4") for d in (ml_dtypes.bfloat16, np.float16, np.float32)]
np.save(folder + "/out.npy", np.stack(out))
"""


def in_child(folder: Path, **environment: str) -> np.ndarray:
    paths = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", CHILD, str(folder)]
    subprocess.run(command, env={**os.environ, **environment, "PYTHONPATH": paths}, check=True)
    return np.load(folder / "out.npy")


def test_threads_and_levels(tmp_path: Path) -> None:
    """The same bits on any number of threads; right on each instruction set level."""
    x, w, _, _ = layer(50, 211, 1500)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "w.npy", w)
    here = [ops.linear(x.astype(d), w.astype(d)).astype("f4") for d in map(numpy_dtype, FLOATS)]
    assert np.array_equal(here, in_child(tmp_path, KESTREL_NUM_THREADS="1"))
    for level in ("v1", "v3"):
        for got, dtype in zip(in_child(tmp_path, KESTREL_CPU_LEVEL=level), FLOATS, strict=True):
            rounded = [a.astype(numpy_dtype(dtype)).astype(float) for a in (x, w)]
            assert_close(got, rounded[0] @ rounded[1].T, dtype, SLACK)


@pytest.mark.parametrize("dtype", FLOATS)
def test_special_values(backend: Backend, dtype: str) -> None:
    """Zero, NaN and Inf as IEEE arithmetic says; nothing leaks in from the padding of a row."""
    x = np.zeros((4, 5))
    x[1, 4], x[2, 4], x[3, :2] = math.nan, math.inf, (math.inf, -math.inf)
    w = np.ones((3, 5))
    w[2, 4] = 0
    want = np.array([[0, 0, 0], [math.nan] * 3, [math.inf, math.inf, math.nan], [math.nan] * 3])
    out = ops.linear(backend.array(x, dtype), backend.array(w, dtype))
    np.testing.assert_array_equal(backend.numpy(out), want)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_value(backend: Backend, dtype: str) -> None:
    """x @ [[1]] is x for each of the 65536 values, subnormals included."""
    every = np.arange(65536, dtype=np.uint16).view(numpy_dtype(dtype)).reshape(-1, 1)
    x = backend.array(every, dtype)
    out = ops.linear(x, backend.array(np.ones((1, 1)), dtype))
    with np.errstate(invalid="ignore"):  # signaling NaNs
        np.testing.assert_array_equal(backend.numpy(out), backend.numpy(x))


MLP_SHAPES = [(1, 4, 6, 5), (0, 4, 6, 5), (3, 0, 6, 5), (3, 4, 0, 5), (3, 4, 6, 0), (9, 64, 200, 130)]


def mlp_layer(m: int, k: int, hidden: int, n: int) -> list[np.ndarray]:
    x, w1, b1, _ = layer(m, hidden, k)
    _, w2, b2, residual = layer(m, n, hidden, seed=10)
    return [x, w1, b1, w2, b2, residual]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", MLP_SHAPES)
def test_mlp(backend: Backend, dtype: str, shape: tuple[int, int, int, int]) -> None:
    m, _, width, n = shape
    x, w1, b1, w2, b2, residual = arrays = [backend.array(a, dtype) for a in mlp_layer(*shape)]
    hidden = backend.poisoned((m, width), dtype)
    out = backend.poisoned((m, n), dtype)
    mlp.fused_mlp_gelu_bias_residual_cuda(out, hidden, *arrays)
    want = expected("gelu_tanh", *map(backend.numpy, (x, w1, b1)))
    # In bf16 on the GPU by cuBLASLt's epilogue, whose tanh is off by up to 5e-4.
    approximate = 5e-4 if backend.device == "cuda" and dtype == "bfloat16" else 0
    assert_close(backend.numpy(hidden), want, dtype, slack(backend, shape[1]) + approximate)
    want = expected(None, *map(backend.numpy, (hidden, w2, b2, residual)))
    assert_close(backend.numpy(out), want, dtype, slack(backend, width))
    assert np.array_equal(backend.bits(mlp.fused_mlp(*arrays)), backend.bits(out))
    mlp.fused_mlp_gelu_bias_residual_cuda(residual, hidden, *arrays)
    assert np.array_equal(backend.bits(residual), backend.bits(out))


@pytest.mark.parametrize("matrix", [True, False])
def test_mlp_leading_dimensions(backend: Backend, matrix: bool) -> None:
    x, w1, b1, w2, b2, residual = mlp_layer(12, 16, 24, 8)
    arrays = [backend.array(a, "float16") for a in (x, w1, b1, w2, b2, residual)]
    folded = [backend.array(a, "float16") for a in (x.reshape(2, 6, 16), w1, b1, w2, b2, residual.reshape(2, 6, 8))]
    hidden = backend.poisoned((12, 30) if matrix else (2, 6, 30), "float16")
    out = backend.poisoned((2, 6, 8), "float16")
    mlp.fused_mlp_gelu_bias_residual_cuda(out, hidden[..., 3:27], *folded)
    inner = backend.numpy(hidden)[..., 3:27].reshape(12, 24)
    assert_close(inner, expected("gelu_tanh", *map(backend.numpy, arrays[:3])), "float16", SLACK)
    want = expected(None, inner, *map(backend.numpy, arrays[3:]))
    assert_close(backend.numpy(out).reshape(12, 8), want, "float16", SLACK)
    if backend.device == "cpu":  # cuBLASLt may have other algorithms for unaligned rows
        assert np.array_equal(backend.bits(out).reshape(12, 8), backend.bits(mlp.fused_mlp(*arrays)))
    assert np.isnan(backend.numpy(hidden)[..., [0, 2, 27, 29]]).all()


@pytest.mark.skipif(not HAS_JAX, reason="JAX is not installed")
def test_jax() -> None:
    jax, host = Backend("jax"), Backend("numpy")
    arrays = [jax.array(a, "bfloat16") for a in layer(3, 10, 64)]
    out = ops.linear(*arrays)
    assert type(out) is type(arrays[0])
    want = ops.linear(*(host.array(jax.numpy(a), "bfloat16") for a in arrays))
    assert np.array_equal(jax.bits(out), want)
    with pytest.raises(TypeError, match="linear: out must be writable"):
        ops.linear_into(out, *arrays)
    with pytest.raises(TypeError, match="fused_mlp: hidden must be writable"):
        six = [jax.array(a, "bfloat16") for a in mlp_layer(3, 4, 5, 6)]
        mlp.fused_mlp_gelu_bias_residual_cuda(host.poisoned((3, 6), "bfloat16"), six[0], *six)


def bad_calls(b: Backend) -> list[tuple[type[Exception], str, dict[str, object]]]:
    def zeros(*shape: int, dtype: str = "bfloat16") -> object:
        return b.array(np.zeros(shape), dtype)

    return [
        (TypeError, "x must be bfloat16, float16 or float32, got float64", {"x": zeros(4, 64, dtype="float64")}),
        (TypeError, "w must be bfloat16, got float16", {"w": zeros(8, 64, dtype="float16")}),
        (TypeError, "b must be bfloat16, got float32", {"b": zeros(8, dtype="float32")}),
        (TypeError, "residual must be bfloat16, got float32", {"residual": zeros(4, 8, dtype="float32")}),
        (TypeError, "w must be an array", {"w": [[1.0]]}),
        (ValueError, "x must have 1 to 6 dimensions", {"x": b.array(1.0, "bfloat16")}),
        (ValueError, r"w must have shape \[N, 64\], got \[8, 32\]", {"w": zeros(8, 32)}),
        (ValueError, r"w must have shape \[N, 64\], got \[64\]", {"w": zeros(64)}),
        (ValueError, r"b must have shape \[8\], got \[4\]", {"b": zeros(4)}),
        (ValueError, r"residual must have shape \[4, 8\], got \[8\]", {"residual": zeros(8)}),
        (ValueError, r"out must have shape \[4, 8\], got \[4, 16\]", {"w": zeros(8, 64), "out": zeros(4, 16)}),
        (ValueError, r"out must have shape \[4, 4\], got \[4, 8\]", {"activation": "silu_and_mul", "residual": None}),
        (ValueError, "w must be two halves high for a gate: an even number of rows, got 7",
         {"activation": "silu_and_mul", "w": zeros(7, 64)}),
        (ValueError, "activation must be gelu, .* or none, got relu", {"activation": "relu"}),
        (ValueError, "x must have a contiguous last dimension", {"x": zeros(4, 128)[:, ::2]}),  # type: ignore[index]
        (ValueError, "w must have a contiguous last dimension", {"w": zeros(8, 128)[:, ::2]}),  # type: ignore[index]
        (ValueError, "b must have a contiguous last dimension", {"b": zeros(16)[::2]}),  # type: ignore[index]
    ]  # fmt: skip


@pytest.mark.parametrize("case", range(17))
def test_bad_input(backend: Backend, case: int) -> None:
    error, message, changed = bad_calls(backend)[case]
    x, w, b, residual = (backend.array(a, "bfloat16") for a in layer(4, 8, 64))
    out = backend.poisoned((4, 8), "bfloat16")
    call = {"out": out, "x": x, "w": w, "b": b, "residual": residual, "activation": None, **changed}
    before = backend.bits(call["out"])
    with pytest.raises(error, match=f"^linear: {message}"):
        ops.linear_into(**call)
    assert np.array_equal(backend.bits(call["out"]), before, equal_nan=True)


def test_bad_mlp(backend: Backend) -> None:
    arrays = [backend.array(a, "bfloat16") for a in mlp_layer(4, 16, 24, 8)]
    out, hidden = backend.poisoned((4, 8), "bfloat16"), backend.poisoned((4, 24), "bfloat16")
    for error, message, change in [
        (ValueError, r"hidden must have shape \[4, 24\], got \[4, 23\]", {"hidden": hidden[:, :23]}),
        (ValueError, r"w2 must have shape \[N, 24\], got \[8, 23\]", {"w2": arrays[3][:, :23]}),
        (ValueError, r"b1 must have shape \[24\], got \[8\]", {"b1": arrays[4]}),
        (ValueError, r"residual must have shape \[4, 8\], got \[3, 8\]", {"residual": arrays[5][:3]}),
        (TypeError, "b2 must be bfloat16, got float32", {"b2": backend.array(np.zeros(8), "float32")}),
    ]:  # fmt: skip
        names = ("x", "w1", "b1", "w2", "b2", "residual")
        call = {"out": out, "hidden": hidden, **dict(zip(names, arrays, strict=True)), **change}
        with pytest.raises(error, match=f"^fused_mlp: {message}"):
            mlp.fused_mlp_gelu_bias_residual_cuda(**call)
    assert np.isnan(backend.numpy(out)).all()
    assert np.isnan(backend.numpy(hidden)).all()


def from_ways(backend: Backend, dtype: str, m: int, n: int, k: int) -> None:
    """Every combination of bias, residual and activation for one shape, against float64."""
    for activation in ACTIVATIONS:
        x, w, b, residual = (backend.array(a, dtype) for a in layer(m, n, k, activation))
        for bias, added in [(None, None), (b, None), (None, residual), (b, residual)]:
            more = (None if a is None else backend.numpy(a) for a in (bias, added))
            want = expected(activation, backend.numpy(x), backend.numpy(w), *more)
            out = ops.linear(x, w, bias, added, activation)
            # 2e-5: a gate multiplies what the sums lose by numbers up to 5
            assert_close(backend.numpy(out), want, dtype, slack(backend, k) + 2e-5)


FEW_ROWS = (1, 2, 7, 8, 9, 16, 17, 33, 64, 65)


# Depths of one granule and of several, whole and with a rest, and all that have a kernel of their own; tiles of 16
# outputs, whole and with a rest.
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("k", [64, 72, 512, 576, 768, 1024, 1152, 1536, 2048, 2112, 4304])
def test_few_rows(backend: Backend, dtype: str, k: int) -> None:
    x, w, b, residual = (backend.array(a, dtype) for a in layer(FEW_ROWS[-1], 17, k))
    for activation in (None, "gelu"):
        want = expected(activation, *map(backend.numpy, (x, w, b, residual)))
        for m in FEW_ROWS:
            for n in (1, 15, 16, 17):
                out = ops.linear(x[:m], w[:n], b[:n], residual[:m, :n], activation)
                assert_close(backend.numpy(out), want[:m, :n], dtype, slack(backend, k))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation", GATES)
def test_few_rows_gates(backend: Backend, dtype: str, activation: str) -> None:
    for n, k in ((1, 64), (7, 576), (8, 1152), (9, 2048), (24, 264)):
        x, w, b, residual = (backend.array(a, dtype) for a in layer(FEW_ROWS[-1], n, k, activation))
        for bias, added in ((None, None), (b, residual)):
            more = (None if a is None else backend.numpy(a) for a in (bias, added))
            want = expected(activation, backend.numpy(x), backend.numpy(w), *more)
            for m in FEW_ROWS:
                out = ops.linear(x[:m], w, bias, None if added is None else added[:m], activation)
                assert_close(backend.numpy(out), want[:m], dtype, slack(backend, k) + 2e-5)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("k", [72, 576])
def test_few_rows_special_values(backend: Backend, dtype: str, k: int) -> None:
    """NaN and Inf of a row of x or of w stay in that row or column, at the end of the depth too."""
    x, w, _, _ = layer(12, 20, k)
    x[1, 0], x[2, k - 1], w[5, k - 1], w[19, 3] = math.nan, math.inf, -math.inf, math.nan
    x, w = backend.array(x, dtype), backend.array(w, dtype)
    with np.errstate(invalid="ignore"):
        want = expected(None, backend.numpy(x), backend.numpy(w))
    for m in (3, 12):
        out = backend.numpy(ops.linear(x[:m], w))
        special = ~np.isfinite(want[:m])
        np.testing.assert_array_equal(out[special], want[:m][special])
        assert np.isfinite(out[~special]).all()


@pytest.mark.parametrize("activation", [None, "gelu_tanh", "gelu_residual"])
@pytest.mark.parametrize("shape", [(1, 960, 576), (16, 960, 576), (3, 1200, 64), (20, 600, 136)])
def test_few_rows_strided(backend: Backend, activation: str | None, shape: tuple[int, int, int]) -> None:
    """Rows of x, w, residual and out inside wider ones, at 16 bytes; the residual is out. The wider ones stay."""
    m, n, k = shape
    x, w, b, residual = layer(m, n, k, activation)
    wide = [np.pad(a, ((0, 0), (8, 16)), constant_values=np.nan) for a in (x, w, residual)]
    x, w, whole = (backend.array(a, "bfloat16") for a in wide)
    b, residual = backend.array(b, "bfloat16"), whole[:, 8 : 8 + n]
    x, w = x[:, 8 : 8 + k], w[:, 8 : 8 + k]
    want = expected(activation, *map(backend.numpy, (x, w, b, residual)))
    copy = backend.array(backend.numpy(residual), "bfloat16")
    apart = backend.bits(ops.linear(x, w, b, copy, activation))
    ops.linear_into(residual, x, w, b, residual, activation)
    assert_close(backend.numpy(residual), want, "bfloat16", slack(backend, k) + 2e-5)
    assert np.array_equal(backend.bits(residual), apart)
    outside = np.delete(backend.numpy(whole), np.s_[8 : 8 + n], axis=1)
    assert np.isnan(outside).all()


# More granules than the ring has stages, many tiles for each block.
@pytest.mark.cuda
@pytest.mark.parametrize("on", CUDA_BACKENDS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(12000, 2048), (24000, 576), (2056, 8192), (6000, 1160), (7001, 1024)])
def test_few_rows_many_tiles(on: Backend, n: int, k: int) -> None:
    for activation in (None, "silu_and_mul"):
        x, w, b, residual = (on.array(a, "bfloat16") for a in layer(64, n, k, activation))
        want = expected(activation, *map(on.numpy, (x, w, b, residual)))
        for m in (1, 5, 8, 16, 24, 64):
            out = ops.linear(x[:m], w, b, residual[:m], activation)
            assert_close(on.numpy(out), want[:m], "bfloat16", slack(on, k) + 2e-5)
            for _ in range(20):
                assert np.array_equal(on.bits(ops.linear(x[:m], w, b, residual[:m], activation)), on.bits(out))


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA_BACKENDS, reason="no CUDA device")
def test_few_rows_chain() -> None:
    """Layers that start while the ones before them run, each reading what the last one wrote."""
    import torch

    b = Backend("torch-cuda")
    layers = [[b.array(a, "bfloat16") for a in layer(4, n, k, seed=seed)]
              for seed, (n, k) in enumerate([(960, 576), (576, 960), (2048, 576), (576, 2048)] * 3)]  # fmt: skip

    def run(x: torch.Tensor) -> torch.Tensor:
        for _, w, bias, residual in layers:
            x = ops.linear(x, w, bias, residual)
        return x

    want = layers[0][0]
    for _, w, bias, residual in layers:
        want = ops.linear(want, w, bias, residual)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(layers[0][0])
    for _ in range(50):
        assert torch.equal(run(layers[0][0]), want)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, want)


# Those of the demo's layers at few rows and a prompt; a column; sizes without alignment.
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "shape", [(1, 960, 576), (2, 1536, 576), (3, 576, 1536), (16, 576, 576), (129, 960, 576),
              (33, 1, 64), (5, 333, 77), (1, 4304, 1152)]
)  # fmt: skip
@pytest.mark.parametrize("on", CUDA_BACKENDS, ids=str)
def test_demo_shapes(on: Backend, dtype: str, shape: tuple[int, int, int]) -> None:
    from_ways(on, dtype, *shape)


@pytest.mark.cuda
@pytest.mark.parametrize("on", CUDA_BACKENDS, ids=str)
@pytest.mark.parametrize(("activation", "n"), [("silu", 16000), ("silu_and_mul", 8000)])
def test_chunks(on: Backend, activation: str, n: int) -> None:
    """Sums that the workspace holds for a part of the rows only; the residual is out."""
    x, w, b, residual = (on.array(a, "bfloat16") for a in layer(700, n, 16, activation))
    want = expected(activation, *map(on.numpy, (x, w, b, residual)))
    ops.linear_into(residual, x, w, b, residual, activation)
    assert_close(on.numpy(residual), want, "bfloat16", slack(on, 16) + 2e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA_BACKENDS, reason="no CUDA device")
@pytest.mark.parametrize("layout", ["row", "wide", "levels", "overlap", "bias"])
@pytest.mark.parametrize("activation", [None, "gelu_tanh", "silu_and_mul"])
def test_layouts(layout: str, activation: str | None) -> None:
    """Rows that cuBLASLt takes, and such that only the plain kernel does."""
    import torch

    b = Backend("torch-cuda")
    x, w, bias, residual = (b.array(a, "bfloat16") for a in layer(24, 40, 64, activation))
    if layout == "row":
        x = x[:1].expand(24, 64)
    elif layout == "wide":
        x, w = torch.nn.functional.pad(x, (3, 5))[:, 3:67], torch.nn.functional.pad(w, (8, 8))[:, 8:72]
    elif layout == "levels":
        x, residual = x.view(4, 6, 64)[:, :5], residual.view(4, 6, 40)[:, 1:]
    elif layout == "overlap":
        x = torch.as_strided(x, (20, 64), (1, 1))
        residual = residual[:20]
    else:
        bias = torch.nn.functional.pad(bias, (1, 0))[1:]
    want = expected(activation, *map(b.numpy, (x, w, bias, residual)))
    out = torch.nn.functional.pad(torch.full_like(residual, torch.nan), (0, 7))
    ops.linear_into(out[..., :40], x, w, bias, residual, activation)
    assert_close(b.numpy(out[..., :40]), want, "bfloat16", slack(b, 64) + 2e-5)
    assert (out[..., 40:] == 0).all()
    assert_close(b.numpy(ops.linear(x, w, bias, residual, activation)), want, "bfloat16", slack(b, 64) + 2e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA_BACKENDS, reason="no CUDA device")
def test_workspace() -> None:
    """A call goes without one too; one that is too small or lies badly changes nothing. None is kept."""
    import torch

    b = Backend("torch-cuda")
    for activation in ACTIVATIONS:
        x, w, bias, residual = (b.array(a, "bfloat16") for a in layer(9, 64, 128, activation))
        out = torch.full_like(residual, torch.nan)
        ops._linear.call(out, None, x, w, bias, residual, activation or "")
        want = expected(activation, *map(b.numpy, (x, w, bias, residual)))
        assert_close(b.numpy(out), want, "bfloat16", slack(b, 128) + 2e-5)
    size = ops.WORKSPACE_BYTES
    memory = torch.empty(size + 1, dtype=torch.uint8, device="cuda")
    out.fill_(torch.nan)
    for bad, message in [
        (memory[:100], r"workspace must be linear_workspace_bytes\(\) long, got 100"),
        (memory[1:], "workspace must be at a multiple of 256 bytes, got another address"),
        (memory.cpu(), "workspace must be on cuda:0 like x, got cpu"),
    ]:
        with pytest.raises(ValueError, match=f"^linear: {message}"):
            ops._linear.call(out, bad, x, w, bias, residual, activation or "")
    assert out.isnan().all()


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA_BACKENDS, reason="no CUDA device")
@pytest.mark.parametrize("first", ["eager", "captured"])
def test_mlp_graph(first: str) -> None:
    """The same bits from a graph, also where the first call of a shape is captured; and again on other contents."""
    import torch

    b = Backend("torch-cuda")
    rows = 50 + len(first)  # a shape of its own
    arrays = [b.array(a, "bfloat16") for a in mlp_layer(rows, 576, 1536, 576)]
    hidden, out = (torch.empty(rows, n, dtype=torch.bfloat16, device="cuda") for n in (1536, 576))

    def call() -> None:
        mlp.fused_mlp_gelu_bias_residual_cuda(out, hidden, *arrays)

    if first == "eager":
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for seed in range(3):
        arrays[0].copy_(b.array(random((rows, 576), seed), "bfloat16"))
        call()
        want = out.clone()
        out.fill_(torch.nan)
        hidden.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, want)


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA_BACKENDS, reason="no CUDA device")
def test_dlpack_objects() -> None:
    """Arrays that are no framework's: their workspace comes from the one that is loaded."""
    import torch
    from kestrel_kernels._op import as_tensor

    b = Backend("torch-cuda")
    x, w, bias, residual = (b.array(a, "bfloat16") for a in layer(5, 64, 128, "silu_and_mul"))
    want = ops.linear(x, w, bias, residual, "silu_and_mul")
    out = torch.full_like(want, torch.nan)
    args = [as_tensor(a) for a in (out, x, w, bias, residual)]
    ops.linear_into(args[0], args[1], args[2], args[3], args[4], "silu_and_mul")
    assert torch.equal(out, want)


def test_workspace_bytes() -> None:
    assert _library.load().linear_workspace_bytes() == ops.WORKSPACE_BYTES
