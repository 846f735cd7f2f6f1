"""rotary_embedding: both pairings against float64, in place, on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kestrel_kernels.rotary_embedding import rotary_embedding
from support import BACKENDS, CUDA_BACKENDS, FLOATS, HAS_JAX, Backend, assert_close, random


def table(positions: int, width: int) -> np.ndarray:
    angles = np.arange(positions)[:, None] * 10000.0 ** (-np.arange(0, width, 2) / max(width, 1))
    return np.concatenate((np.cos(angles), np.sin(angles)), axis=1).astype(np.float32)


def expected(x: np.ndarray, positions: np.ndarray, cos_sin: np.ndarray, interleaved: bool) -> np.ndarray:
    """x [..., heads, D] in float64."""
    half = cos_sin.shape[1] // 2
    row = cos_sin.astype(np.float64)[positions][..., None, :]
    cos, sin = row[..., :half], row[..., half:]
    first = np.s_[..., 0 : 2 * half : 2] if interleaved else np.s_[..., :half]
    second = np.s_[..., 1 : 2 * half : 2] if interleaved else np.s_[..., half : 2 * half]
    out = x.copy()
    out[first] = x[first] * cos - x[second] * sin
    out[second] = x[second] * cos + x[first] * sin
    return out


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("tokens", "query_heads", "key_heads", "size", "width"),
    [((5,), 4, 2, 64, 32), ((2, 3), 9, 3, 64, 64), ((1, 1), 1, 1, 2, 2), ((0,), 2, 2, 8, 8), ((2, 0), 2, 2, 8, 8),
     ((3,), 2, 0, 80, 40), ((4, 2), 32, 32, 96, 0), ((130,), 8, None, 130, 34),
     ((160,), 37, 11, 104, 96)],
)  # fmt: skip
def test_values(
    backend: Backend, dtype: str, interleaved: bool, tokens: tuple[int, ...], query_heads: int, key_heads: int | None,
    size: int, width: int,
) -> None:  # fmt: skip
    cos_sin = table(50, width)
    positions = np.random.default_rng(0).integers(0, 50, tokens)
    query = backend.array(random((*tokens, query_heads, size), 1), dtype)
    key = None if key_heads is None else backend.array(random((*tokens, key_heads, size), 2), dtype)
    before = [None if x is None else backend.numpy(x) for x in (query, key)]
    index = backend.array(positions, "int32" if interleaved else "int64")
    rotary_embedding(index, query, key, size, backend.array(cos_sin, "float32"), interleaved=interleaved)
    for x, start in zip((query, key), before, strict=True):
        if start is not None:
            assert_close(backend.numpy(x), expected(start, positions, cos_sin, interleaved), dtype, slack=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(0, 3), sequence=st.integers(0, 4), heads=st.integers(0, 3), half=st.integers(0, 40),
    rest=st.integers(0, 9), offset=st.integers(0, 5), gap=st.integers(0, 5), heads_first=st.booleans(),
    interleaved=st.booleans(), dtype=st.sampled_from(FLOATS), backend=st.sampled_from(BACKENDS),
)  # fmt: skip
def test_odd_shapes(
    batch: int, sequence: int, heads: int, half: int, rest: int, offset: int, gap: int, heads_first: bool,
    interleaved: bool, dtype: str, backend: Backend,
) -> None:  # fmt: skip
    """[B, S, H, D] views of any strides, at any offset; what lies between stays as it was."""
    size = 2 * half + rest
    cos_sin = table(7, 2 * half + gap)[:, : 2 * half]  # rows of the table may be strided too
    whole_table = backend.array(table(7, 2 * half + gap), "float32")[:, : 2 * half]
    positions = np.random.default_rng(half).integers(0, 7, (2 * batch, sequence))[::2]
    index = backend.array(np.repeat(positions, 2, axis=0), "int64")[::2]
    shape = (batch, heads, sequence) if heads_first else (batch, sequence, heads)
    stores = [backend.array(random((*shape, offset + size + gap), seed), dtype) for seed in (1, 2)]
    wants = [backend.numpy(s) for s in stores]
    inside = np.s_[..., offset : offset + size]
    query, key = ((s.swapaxes(1, 2) if heads_first else s)[inside] for s in stores)
    rotary_embedding(index, query, key, size, whole_table, interleaved)
    for store, want in zip(stores, wants, strict=True):
        view = (want.swapaxes(1, 2) if heads_first else want)[inside]
        view[:] = expected(view, positions, cos_sin, interleaved)
        assert_close(backend.numpy(store), want, dtype, slack=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_special_values(backend: Backend, interleaved: bool) -> None:
    """NaN and Inf stay in their own pair; elements past R keep their bits."""
    x = np.tile([0.0, -0.0, np.inf, np.nan, 1.0, -np.inf, 3.0, 4.0, np.nan, np.inf, -0.0], (2, 1, 1))
    positions, cos_sin = np.array([0, 3]), table(4, 8)
    query = backend.array(x, "float32")
    rotary_embedding(backend.array(positions, "int64"), query, None, 11, backend.array(cos_sin, "float32"), interleaved)
    with np.errstate(invalid="ignore"):
        assert_close(backend.numpy(query), expected(x, positions, cos_sin, interleaved), "float32", slack=1e-6)
    assert np.array_equal(backend.bits(query)[..., 8:].view(np.uint32), x[..., 8:].astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("on_cuda", CUDA_BACKENDS, ids=repr)
@pytest.mark.cuda
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", [64, 65])
@pytest.mark.parametrize("index", ["int32", "int64"])
def test_positions_out_of_range(
    on_cuda: Backend, interleaved: bool, size: int, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unchecked: their tokens stay as they are, the others are rotated."""
    monkeypatch.delenv("KESTREL_CHECK", raising=False)
    cos_sin = table(20, 32)
    bad = np.array([20, -1, 2**31 - 1, -(2**31)] + [2**32, 2**32 + 3, 2**40, -(2**40), 2**63 - 1] * (index == "int64"))
    positions = np.concatenate((bad, np.arange(20)))
    query = on_cuda.array(random((len(positions), 3, size)), "bfloat16")
    before = on_cuda.bits(query)
    rotary_embedding(on_cuda.array(positions, index), query, None, size, on_cuda.array(cos_sin, "float32"), interleaved)
    after = on_cuda.bits(query)
    assert np.array_equal(after[: len(bad)], before[: len(bad)])
    good = before[len(bad) :].astype(np.float64)
    want = expected(good, np.arange(20), cos_sin, interleaved)
    assert_close(after[len(bad) :].astype(np.float64), want, "bfloat16", slack=1e-6)


def test_rows_do_not_depend_on_the_batch(backend: Backend) -> None:
    x, cos_sin = random((300, 4, 64)), backend.array(table(300, 64), "float32")
    positions = np.arange(300)
    whole, one = backend.array(x, "bfloat16"), backend.array(x[271:272], "bfloat16")
    rotary_embedding(backend.array(positions, "int64"), whole, None, 64, cos_sin)
    rotary_embedding(backend.array(positions[271:272], "int64"), one, None, 64, cos_sin)
    assert np.array_equal(backend.bits(whole)[271:272].view(np.uint16), backend.bits(one).view(np.uint16))


@pytest.mark.skipif(not HAS_JAX, reason="JAX is not installed")
def test_jax() -> None:
    jax, host = Backend("jax"), Backend("numpy")
    query, positions, cos_sin = random((3, 2, 8)).astype(np.float32), np.array([2, 0, 3]), table(4, 8)
    want = expected(query.astype(np.float64), positions, cos_sin, False)
    rotary_embedding(jax.array(positions, "int32"), query, None, 8, jax.array(cos_sin, "float32"))
    assert_close(host.numpy(query), want, "float32", slack=1e-6)
    with pytest.raises(TypeError, match="rotary_embedding: query must be writable, got a JAX array"):
        rotary_embedding(positions, jax.array(query, "float32"), None, 8, cos_sin)


BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "query must be bfloat16, float16 or float32, got float64", {"query": ("float64", (4, 2, 8))}),
    (TypeError, "key must be bfloat16, got float16", {"key": ("float16", (4, 1, 8))}),
    (TypeError, "positions must be int64 or int32, got float32", {"positions": ("float32", (4,))}),
    (TypeError, "cos_sin_cache must be float32, got float16", {"cos_sin_cache": ("float16", (5, 8))}),
    (ValueError, "query must have 3 to 4 dimensions, got shape", {"query": ("bfloat16", (4, 16))}),
    (ValueError, r"key must have shape \[4, Hk, 8\], got \[3, 1, 8\]", {"key": ("bfloat16", (3, 1, 8))}),
    (ValueError, r"key must have shape \[4, Hk, 8\], got \[4, 1, 6\]", {"key": ("bfloat16", (4, 1, 6))}),
    (ValueError, r"positions must have shape \[4\], got \[5\]", {"positions": ("int64", (5,))}),
    (ValueError, r"positions must have shape \[4\], got \[2, 2\]", {"positions": ("int64", (2, 2))}),
    (ValueError, "positions must lie in .0, 5., got 5 at index 3", {"positions": ("int64", [0, 4, 2, 5])}),
    (ValueError, "positions must lie in .0, 5., got -1 at index 0", {"positions": ("int32", [-1, 4, 2, 5])}),
    (ValueError, "cos_sin_cache must be of an even width, no wider than a head, got 7",
     {"cos_sin_cache": ("float32", (5, 7))}),
    (ValueError, "cos_sin_cache must be of an even width, no wider than a head, got 10",
     {"cos_sin_cache": ("float32", (5, 10))}),
    (ValueError, r"cos_sin_cache must have shape \[P, R\], got \[8\]", {"cos_sin_cache": ("float32", (8,))}),
    (ValueError, "head_size must be the last dimension of query, got 16", {"head_size": 16}),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(backend: Backend, case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KESTREL_CHECK", "1")
    error, message, changes = BAD[case]
    call: dict[str, Any] = {
        "positions": ("int64", [0, 1, 2, 3]), "query": ("bfloat16", (4, 2, 8)), "key": ("bfloat16", (4, 1, 8)),
        "head_size": 8, "cos_sin_cache": ("float32", (5, 8)),
    } | changes  # fmt: skip
    for name, what in call.items():
        if isinstance(what, tuple):
            values = what[1] if isinstance(what[1], list) else np.ones(what[1])
            call[name] = backend.array(values, what[0])
    with pytest.raises(error, match=f"^rotary_embedding: {message}"):
        rotary_embedding(**call)
    assert (backend.numpy(call["query"]) == 1).all() and (backend.numpy(call["key"]) == 1).all()


def test_bad_layouts(backend: Backend) -> None:
    positions, cos_sin = backend.array([0, 1], "int64"), backend.array(table(2, 8), "float32")
    query = backend.array(np.ones((2, 2, 16)), "float16")
    with pytest.raises(ValueError, match="query must have a contiguous last dimension"):
        rotary_embedding(positions, query[..., ::2], None, 8, cos_sin)
    with pytest.raises(ValueError, match="cos_sin_cache must have a contiguous last dimension"):
        rotary_embedding(positions, query, None, 16, cos_sin[:, ::2])
    assert (backend.numpy(query) == 1).all()
