"""flash_attn.cute.merge_state against float64, and against attention over all keys at once."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from attention_oracle import attend
from kestrel_kernels.flash_attn import cute
from support import FLOATS, HAS_JAX, Backend, assert_close, random


def merged(a: np.ndarray, lse_a: np.ndarray, b: np.ndarray, lse_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """out [..., S, H, D], lse [..., H, S]"""
    lse = np.logaddexp(lse_a, lse_b)
    parts = []
    for out, part in ((a, lse_a), (b, lse_b)):
        seen = np.isfinite(part)
        weight = np.exp(part - lse, where=seen, out=np.zeros_like(part))
        parts.append(np.where(np.swapaxes(seen, -1, -2)[..., None], out, 0) * np.swapaxes(weight, -1, -2)[..., None])
    return parts[0] + parts[1], lse


def state(b: Backend, shape: tuple[int, ...], dtype: str, seed: int) -> tuple[Any, Any]:
    lse_shape = (*shape[:-3], shape[-2], shape[-3])
    return b.array(random(shape, seed), dtype), b.array(random(lse_shape, seed + 1, 5.0), "float32")


SHAPES: list[tuple[int, ...]] = [
    (7, 3, 64),
    (2, 5, 4, 16),
    (1, 1, 1),
    (2, 300, 3, 65),
    (0, 3, 8),
    (2, 3, 0, 8),
    (3, 2, 0),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(backend: Backend, dtype: str, shape: tuple[int, ...]) -> None:
    a, b = state(backend, shape, dtype, 0), state(backend, shape, dtype, 2)
    want, want_lse = merged(*(backend.numpy(x) for x in (*a, *b)))
    out, lse = cute.merge_state(*a, *b)
    assert_close(backend.numpy(out), want, dtype, slack=1e-6)
    assert_close(backend.numpy(lse), want_lse, "float32", slack=1e-6)
    cute.merge_state_into(b[0], a[1], *a, *b)  # into its own arguments
    assert np.array_equal(backend.bits(b[0]), backend.bits(out)) and np.array_equal(
        backend.bits(a[1]), backend.bits(lse)
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_parts_without_keys(backend: Backend, dtype: str) -> None:
    """-inf on one side: the other side's bits, whatever lies here; on both: zeros and -inf. Far apart: no overflow."""
    ones, others = random((5, 1, 8)), random((5, 1, 8), 1)
    ones[[0, 2]] = others[[1, 2]] = np.nan
    a, b = backend.array(ones, dtype), backend.array(others, dtype)
    lse_a = backend.array([[-np.inf, 2.0, -np.inf, 1e4, -1e4]], "float32")
    lse_b = backend.array([[3.0, -np.inf, -np.inf, -1e4, 1e4]], "float32")
    out, lse = (backend.bits(x) for x in cute.merge_state(a, lse_a, b, lse_b))
    for row, part in ((0, b), (1, a), (3, a), (4, b)):
        assert np.array_equal(out[row], backend.bits(part)[row])
    assert np.array_equal(out[2], np.zeros((1, 8)))
    assert lse.tolist() == [[3.0, 2.0, -np.inf, 1e4, 1e4]]


def test_joins_attention(backend: Backend) -> None:
    """Attention over the first keys and over the rest, joined, is attention over all."""
    q, k, v = (backend.array(random((6, 2, 32), seed), "float16") for seed in range(3))
    parts = [cute.flash_attn_func(q[None], k[None, s], v[None, s], return_lse=True) for s in (np.s_[:2], np.s_[2:])]
    out, lse = cute.merge_state(*parts[0], *parts[1])
    want, want_lse = attend(*(backend.numpy(x) for x in (q, k, v)))
    assert np.abs(backend.numpy(out)[0] - want).max() < 2e-3  # three roundings to fp16
    assert_close(backend.numpy(lse)[0], want_lse, "float32", slack=2e-6)


def test_strides(backend: Backend) -> None:
    whole, logs = backend.array(random((2, 9, 5, 40)), "bfloat16"), backend.array(random((4, 9, 2, 5)), "float32")
    a, b = (whole[:, i::2][:, :4, :3, 2:35] for i in (0, 1))
    lse_a, lse_b = (logs[i::2, ::3, 0, :4] for i in (0, 1))
    out, lse = backend.poisoned((2, 4, 5, 33), "bfloat16"), backend.poisoned((2, 3, 8), "float32")
    cute.merge_state_into(out[:, :, 1:4], lse[..., ::2], a, lse_a, b, lse_b)
    want, want_lse = merged(*(backend.numpy(x) for x in (a, lse_a, b, lse_b)))
    got, got_lse = backend.numpy(out), backend.numpy(lse)
    assert_close(got[:, :, 1:4], want, "bfloat16", slack=1e-6)
    assert_close(got_lse[..., ::2], want_lse, "float32", slack=1e-6)
    assert np.isnan(got[:, :, [0, 4]]).all() and np.isnan(got_lse[..., 1::2]).all()


@pytest.mark.skipif(not HAS_JAX, reason="JAX is not installed")
def test_jax() -> None:
    b = Backend("jax")
    one, two = state(b, (7, 3, 64), "bfloat16", 0), state(b, (7, 3, 64), "bfloat16", 2)
    out, lse = cute.merge_state(*one, *two)
    assert type(out) is type(one[0]) and type(lse) is type(one[0])
    assert_close(b.numpy(out), merged(*(b.numpy(x) for x in (*one, *two)))[0], "bfloat16", slack=1e-6)
    with pytest.raises(TypeError, match="merge_state: out must be writable"):
        cute.merge_state_into(out, lse, *one, *two)


BAD: list[tuple[type[Exception], str, str, tuple[int, ...], str]] = [
    (TypeError, "out_a must be bfloat16, float16 or float32, got float64", "out_a", (6, 2, 8), "float64"),
    (TypeError, "lse_a must be float32, got float16", "lse_a", (2, 6), "float16"),
    (TypeError, "out_b must be bfloat16, got float32", "out_b", (6, 2, 8), "float32"),
    (TypeError, "lse_b must be float32, got bfloat16", "lse_b", (2, 6), "bfloat16"),
    (TypeError, "out must be bfloat16, got float32", "out", (6, 2, 8), "float32"),
    (TypeError, "lse must be float32, got float64", "lse", (2, 6), "float64"),
    (ValueError, "out_a must have 3 to 4 dimensions, got shape", "out_a", (6, 8), "bfloat16"),
    (ValueError, r"lse_a must have shape \[2, 6\], got \[6, 2\]", "lse_a", (6, 2), "float32"),
    (ValueError, r"out_b must have shape \[6, 2, 8\], got \[6, 2, 9\]", "out_b", (6, 2, 9), "bfloat16"),
    (ValueError, r"lse_b must have shape \[2, 6\], got \[2, 5\]", "lse_b", (2, 5), "float32"),
    (ValueError, r"out must have shape \[6, 2, 8\], got \[1, 6, 2, 8\]", "out", (1, 6, 2, 8), "bfloat16"),
    (ValueError, r"lse must have shape \[2, 6\], got \[2, 7\]", "lse", (2, 7), "float32"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(backend: Backend, case: int) -> None:
    error, message, name, shape, dtype = BAD[case]
    names = ("out", "lse", "out_a", "lse_a", "out_b", "lse_b")
    arguments = {n: backend.poisoned((2, 6) if "lse" in n else (6, 2, 8), "float32" if "lse" in n else "bfloat16")
                 for n in names}  # fmt: skip
    arguments[name] = backend.poisoned(shape, dtype)
    with pytest.raises(error, match=f"^merge_state: {message}"):
        cute.merge_state_into(**arguments)
    assert np.isnan(backend.numpy(arguments["out"])).all() and np.isnan(backend.numpy(arguments["lse"])).all()


@pytest.mark.parametrize("shape", [(6, 2, 8), (3, 6, 2, 8)])
def test_tokens_before_heads(backend: Backend, shape: tuple[int, ...]) -> None:
    """All three of lse in the order of out."""
    out, lse = backend.poisoned(shape, "bfloat16"), backend.poisoned(shape[:-1], "float32")
    want = [*shape[:-3], shape[-2], shape[-3]]
    with pytest.raises(ValueError, match=re.escape(f"merge_state: lse_a must have shape {want}, got {[*shape[:-1]]}")):
        cute.merge_state_into(out, lse, out, lse, out, lse)
