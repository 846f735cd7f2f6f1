"""tau_tail: the scaled queries and values against float64, in place, on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kestrel_kernels.tau_tail_ops import tau_tail_apply_into
from support import BACKENDS, CUDA_BACKENDS, HALVES, HAS_JAX, Backend, assert_close, random


def expected(qkv: np.ndarray, tok: np.ndarray, tau: np.ndarray, positions: np.ndarray) -> np.ndarray:
    heads = tau.shape[1]
    out = qkv.copy().reshape(*qkv.shape[:-1], 3, heads, qkv.shape[-1] // max(3 * heads, 1))
    out[..., 0, :, :] *= (np.tanh(tok[..., :heads]) + tau[positions])[..., None]
    out[..., 2, :, :] *= (np.tanh(tok[..., heads:]) + tau[positions])[..., None]
    return out.reshape(qkv.shape)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tau_dtype", ["as qkv", "float32"])
@pytest.mark.parametrize(
    ("tokens", "heads", "size"),
    [((2, 3), 4, 64), ((5,), 2, 80), ((1, 1), 1, 1), ((0, 4), 2, 8), ((0,), 2, 8), ((2, 2), 0, 0), ((3,), 2, 0),
     ((130,), 32, 64), ((7, 30), 19, 72)],
)  # fmt: skip
def test_values(backend: Backend, dtype: str, tau_dtype: str, tokens: tuple[int, ...], heads: int, size: int) -> None:
    tau_dtype = dtype if tau_dtype == "as qkv" else tau_dtype
    qkv = backend.array(random((*tokens, 3 * heads * size), 1, 3.0), dtype)
    tok = backend.array(random((*tokens, 2 * heads), 2, 2.0), dtype)
    tau = backend.array(random((40, heads), 3), tau_dtype)
    positions = np.random.default_rng(0).integers(0, 40, tokens)
    want = expected(backend.numpy(qkv), backend.numpy(tok), backend.numpy(tau), positions)
    tau_tail_apply_into(qkv, tok, tau, backend.array(positions, "int32" if heads == 2 else "int64"))
    assert_close(backend.numpy(qkv), want, dtype, slack=1e-5)  # tanh in fp32, times values of 10


@settings(deadline=None, max_examples=50)
@given(
    batch=st.integers(0, 3), sequence=st.integers(0, 4), heads=st.integers(0, 20), size=st.integers(0, 20),
    offset=st.integers(0, 5), gap=st.integers(0, 5), swapped=st.booleans(), dtype=st.sampled_from(HALVES),
    backend=st.sampled_from(BACKENDS),
)  # fmt: skip
def test_odd_shapes(
    batch: int, sequence: int, heads: int, size: int, offset: int, gap: int, swapped: bool, dtype: str,
    backend: Backend,
) -> None:  # fmt: skip
    """Rows of any stride at any offset; what lies between stays as it was."""

    def strided(width: int, seed: int) -> tuple[Any, Any]:
        shape = (sequence, batch) if swapped else (batch, sequence)
        store = backend.array(random((*shape, offset + width + gap), seed), dtype)
        return store, (store.swapaxes(0, 1) if swapped else store)[..., offset : offset + width]

    width = 3 * heads * size
    store, qkv = strided(width, 1)
    _, tok = strided(2 * heads, 2)
    tau = backend.array(random((6, heads + gap), 3), dtype)[::2, :heads]
    positions = np.random.default_rng(heads).integers(0, 3, (batch, sequence))
    want = backend.numpy(store)
    view = (want.swapaxes(0, 1) if swapped else want)[..., offset : offset + width]
    view[:] = expected(view, backend.numpy(tok), backend.numpy(tau), positions)
    tau_tail_apply_into(qkv, tok, tau, backend.array(positions, "int64"))
    assert_close(backend.numpy(store), want, dtype, slack=1e-5)


@pytest.mark.parametrize("on_cuda", CUDA_BACKENDS, ids=repr)
@pytest.mark.cuda
@pytest.mark.parametrize("size", [64, 72, 5])
@pytest.mark.parametrize("index", ["int32", "int64"])
def test_positions_out_of_range(on_cuda: Backend, size: int, index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unchecked: their tokens stay as they are, the others are scaled."""
    monkeypatch.delenv("KESTREL_CHECK", raising=False)
    bad = np.array([20, -1, 2**31 - 1, -(2**31)] + [2**32, 2**32 + 3, 2**40, -(2**40), 2**63 - 1] * (index == "int64"))
    positions = np.concatenate((bad, np.arange(20)))
    qkv = on_cuda.array(random((len(positions), 3 * 2 * size)), "bfloat16")
    tok, tau = on_cuda.array(random((len(positions), 4), 1), "bfloat16"), on_cuda.array(random((20, 2), 2), "float32")
    before = on_cuda.numpy(qkv)
    tau_tail_apply_into(qkv, tok, tau, on_cuda.array(positions, index))
    want = expected(
        before, on_cuda.numpy(tok), on_cuda.numpy(tau), np.where(positions == np.clip(positions, 0, 19), positions, 0)
    )
    want[: len(bad)] = before[: len(bad)]
    assert_close(on_cuda.numpy(qkv), want, "bfloat16", slack=1e-5)


def test_special_values(backend: Backend) -> None:
    """NaN and Inf stay in their own head; keys keep their bits."""
    qkv = np.tile([1.0, -0.0, np.inf, np.nan], (1, 9))  # three heads of four
    tok = np.array([[np.nan, np.inf, 0.0, -np.inf, 30.0, 0.5]])
    tau = np.array([[0.5, -1.0, np.inf]])
    got = backend.array(qkv, "bfloat16")
    tau_tail_apply_into(
        got, backend.array(tok, "bfloat16"), backend.array(tau, "bfloat16"), backend.array([0], "int64")
    )
    with np.errstate(invalid="ignore"):
        assert_close(backend.numpy(got), expected(qkv, tok, tau, np.array([0])), "bfloat16", slack=1e-5)


@pytest.mark.skipif(not HAS_JAX, reason="JAX is not installed")
def test_jax() -> None:
    jax, host = Backend("jax"), Backend("numpy")
    qkv = host.array(random((3, 48), 1), "bfloat16")
    tok, tau, positions = random((3, 4), 2), random((5, 2), 3), np.array([4, 0, 2])
    want = expected(
        host.numpy(qkv), tok.astype(qkv.dtype).astype(float), tau.astype(np.float32).astype(float), positions
    )
    tau_tail_apply_into(qkv, jax.array(tok, "bfloat16"), jax.array(tau, "float32"), jax.array(positions, "int32"))
    assert_close(host.numpy(qkv), want, "bfloat16", slack=1e-5)
    with pytest.raises(TypeError, match="tau_tail_apply_into: qkv_out must be writable, got a JAX array"):
        tau_tail_apply_into(jax.array(qkv, "bfloat16"), tok, tau, positions)


BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "qkv_out must be bfloat16 or float16, got float32", {"qkv_out": ("float32", (4, 48))}),
    (TypeError, "tok_qv_lin must be bfloat16, got float16", {"tok_qv_lin": ("float16", (4, 4))}),
    (TypeError, "tau_pos_table must be bfloat16 or float32, got float16", {"tau_pos_table": ("float16", (5, 2))}),
    (TypeError, "position_ids must be int64 or int32, got float32", {"position_ids": ("float32", (4,))}),
    (ValueError, "qkv_out must have 2 to 3 dimensions", {"qkv_out": ("bfloat16", (48,))}),
    (ValueError, "qkv_out must be a multiple of three times the heads wide, got 50",
     {"qkv_out": ("bfloat16", (4, 50))}),
    (ValueError, "tok_qv_lin must have 2 dimensions", {"tok_qv_lin": ("bfloat16", (1, 4, 4))}),
    (ValueError, "tok_qv_lin must be two factors a head wide, got 5", {"tok_qv_lin": ("bfloat16", (4, 5))}),
    (ValueError, r"tok_qv_lin must have shape \[4, 4\], got \[3, 4\]", {"tok_qv_lin": ("bfloat16", (3, 4))}),
    (ValueError, r"tau_pos_table must have shape \[P, 2\], got \[5, 3\]", {"tau_pos_table": ("bfloat16", (5, 3))}),
    (ValueError, r"position_ids must have shape \[4\], got \[3\]", {"position_ids": ("int64", (3,))}),
    (ValueError, r"position_ids must lie in \[0, 5\), got 5 at index 1", {"position_ids": ("int64", [0, 5, -1, 0])}),
    (ValueError, r"position_ids must lie in \[0, 5\), got -1 at index 2", {"position_ids": ("int64", [0, 4, -1, 0])}),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(backend: Backend, case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KESTREL_CHECK", "1")
    error, message, changes = BAD[case]
    call: dict[str, Any] = {
        "qkv_out": ("bfloat16", (4, 48)), "tok_qv_lin": ("bfloat16", (4, 4)), "tau_pos_table": ("bfloat16", (5, 2)),
        "position_ids": ("int64", [0, 1, 2, 3]),
    } | changes  # fmt: skip
    for name, (dtype, values) in call.items():
        call[name] = backend.array(values if isinstance(values, list) else np.ones(values), dtype)
    with pytest.raises(error, match=f"^tau_tail_apply_into: {message}"):
        tau_tail_apply_into(**call)
    assert (backend.numpy(call["qkv_out"]) == 1).all()


def test_bad_layouts(backend: Backend) -> None:
    qkv, positions = backend.array(np.ones((2, 12)), "float16"), backend.array([0, 1], "int64")
    tok, tau = backend.array(np.ones((2, 8)), "float16"), backend.array(np.ones((2, 8)), "float16")
    with pytest.raises(ValueError, match="qkv_out must have a contiguous last dimension"):
        tau_tail_apply_into(qkv[:, ::2], tok[:, :4], tau[:, :2], positions)
    with pytest.raises(ValueError, match="tok_qv_lin must have a contiguous last dimension"):
        tau_tail_apply_into(qkv, tok[:, ::2], tau[:, :2], positions)
    with pytest.raises(ValueError, match="tau_pos_table must have a contiguous last dimension"):
        tau_tail_apply_into(qkv, tok[:, :4], tau[:, ::4], positions)
    assert (backend.numpy(qkv) == 1).all()
