"""embedding: rows of a table, bit for bit, on every backend."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kestrel_kernels.embedding import embedding, embedding_into
from support import BACKENDS, CUDA_BACKENDS, HAS_JAX, Backend, random

DTYPES = ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "uint8", "int32", "int64")


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("id_dtype", ["int32", "int64"])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (7,), (2, 3), (2, 0, 3), (2, 1, 2, 1, 3)])
def test_values(backend: Backend, dtype: str, id_dtype: str, shape: tuple[int, ...]) -> None:
    table = backend.array(random((11, 24), scale=50), dtype)
    ids = backend.array(np.random.default_rng(1).integers(0, 11, shape), id_dtype)
    want = backend.bits(table)[backend.bits(ids)]
    out = backend.poisoned((*shape, 24), dtype)
    embedding_into(out, table, ids)
    assert same_bits(backend.bits(out), want)
    got = embedding(table, ids)
    assert type(got) is type(table)
    assert same_bits(backend.bits(got), want)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9), width=st.integers(0, 40), count=st.integers(0, 9), offset=st.integers(0, 3),
    gap=st.integers(0, 3), step=st.integers(1, 3), dtype=st.sampled_from(DTYPES), backend=st.sampled_from(BACKENDS),
)  # fmt: skip
def test_odd_shapes(
    rows: int, width: int, count: int, offset: int, gap: int, step: int, dtype: str, backend: Backend
) -> None:
    """Rows at any offset and stride, ids of any stride; what lies between the rows of out stays as it was."""
    table = backend.array(random((rows, offset + width + gap), scale=50), dtype)[:, offset : offset + width]
    ids = backend.array(np.random.default_rng(2).integers(0, rows, (count, 2 * step)), "int64")[:, ::step]
    poison = backend.poisoned((count, 2, offset + width + gap), dtype)
    before = backend.bits(poison)
    embedding_into(poison[..., offset : offset + width], table, ids)
    before[..., offset : offset + width] = backend.bits(table)[backend.bits(ids)]
    assert same_bits(backend.bits(poison), before)


def test_large_rows(backend: Backend) -> None:
    """Enough bytes for every thread; broadcast ids."""
    table = backend.array(random((50, 4096)), "float32")
    ids = np.broadcast_to(np.array([49, 0, 7], np.int32), (80, 3))
    given_ids = backend.array([[49, 0, 7]], "int32")
    given_ids = given_ids.expand(80, 3) if backend.framework == "torch" else np.broadcast_to(given_ids, (80, 3))
    assert same_bits(backend.bits(embedding(table, given_ids)), backend.bits(table)[ids])


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 17, 24, 32, 1024, 4096])
@pytest.mark.parametrize("dtype", ["uint8", "bfloat16"])
def test_widths(backend: Backend, width: int, dtype: str) -> None:
    """Many rows, as wide as each unit of the copy."""
    table = backend.array(random((50, width), scale=50), dtype)
    ids = backend.array(np.random.default_rng(3).integers(0, 50, (300,)), "int32")
    assert same_bits(backend.bits(embedding(table, ids)), backend.bits(table)[backend.bits(ids)])


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA_BACKENDS, reason="no CUDA device")
@pytest.mark.parametrize("bad", [8, 2**31 - 1, 2**40, 2**63 - 1, -1, -(2**31), -(2**63)])
@pytest.mark.parametrize("width", [64, 7])
def test_ids_out_of_range(bad: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA their rows become zeros, and nothing else changes; KESTREL_CHECK=1 names the first."""
    monkeypatch.delenv("KESTREL_CHECK", raising=False)
    for backend in CUDA_BACKENDS:
        table = backend.array(random((8, width)), "bfloat16")
        for id_dtype in ("int64", "int32") if -(2**31) <= bad < 2**31 else ("int64",):
            ids = backend.array([3, bad, 0], id_dtype)
            whole = backend.poisoned((5, width), "bfloat16")
            want = backend.bits(whole)
            want[1:4] = backend.bits(table)[[3, 0, 0]]
            want[2] = 0
            embedding_into(whole[1:4], table, ids)
            assert same_bits(backend.bits(whole), want)
            with monkeypatch.context() as checked, pytest.raises(ValueError, match=rf"\[0, 8\), got {bad} at index 1"):
                checked.setenv("KESTREL_CHECK", "1")
                embedding_into(whole[1:4], table, ids)
            assert same_bits(backend.bits(whole), want)
            embedding_into(whole[1:4], table[:0], ids)
            assert (backend.numpy(whole[1:4]) == 0).all()


def test_nan_payloads_survive() -> None:
    table = np.array([[0x7FC12345, 0x7F812345, 0xFF800001]], np.uint32).view(np.float32)
    assert same_bits(embedding(table, np.zeros(2, np.int64)), table[[0, 0]])


def test_part_of_a_byte() -> None:
    torch = pytest.importorskip("torch")
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no elements of four bits")
    table = torch.zeros(4, 8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(TypeError, match=r"^embedding: table must have elements of whole bytes, got .* 4 bits$"):
        embedding_into(table[:2], table, torch.tensor([0, 1]))


@pytest.mark.skipif(not HAS_JAX, reason="JAX is not installed")
def test_jax() -> None:
    backend = Backend("jax")
    table, ids = backend.array(random((5, 8)), "bfloat16"), backend.array([[4, 0]], "int32")
    out = embedding(table, ids)
    assert type(out) is type(table)
    assert same_bits(backend.bits(out), backend.bits(table)[[[4, 0]]])
    with pytest.raises(TypeError, match=r"^embedding: out must be writable"):
        embedding_into(out, table, ids)


def bad_calls(b: Backend) -> list[tuple[type[Exception], str, object, object, object]]:
    """(error, message, out, table, ids)"""
    table = b.array(random((6, 8)), "bfloat16")
    out = b.poisoned((3, 8), "bfloat16")
    ids = b.array([0, 5, 2], "int64")
    deep = b.array(np.zeros((1, 1, 1, 1, 1, 3)), "int64")
    return [
        (ValueError, r"ids must lie in \[0, 6\), got 6 at index 1", out, table, b.array([0, 6, 2], "int64")),
        (ValueError, r"ids must lie in \[0, 6\), got -1 at index 2", out, table, b.array([0, 5, -1], "int32")),
        (ValueError, r"ids must lie in \[0, 0\), got 0 at index 0", out, table[:0], ids),
        (TypeError, "ids must be int32 or int64, got float32", out, table, b.array([0, 5, 2], "float32")),
        (TypeError, "ids must be an array", out, table, [0, 5, 2]),
        (TypeError, "out must be bfloat16, got float16", b.poisoned((3, 8), "float16"), table, ids),
        (ValueError, r"out must have shape \[3, 8\], got \[2, 8\]", out[:2], table, ids),
        (ValueError, r"out must have shape \[3, 8\], got \[3, 7\]", out[:, :7], table, ids),
        (ValueError, r"table must have 2 dimensions, got shape \[8\]", out, table[0], ids),
        (ValueError, "ids must have 0 to 5 dimensions, got shape", out, table, deep),
        (ValueError, "table must have a contiguous last dimension", out[:, :4], table[:, ::2], ids),
        (ValueError, "out must have a contiguous last dimension", b.poisoned((3, 16), "bfloat16")[:, ::2], table, ids),
    ]


@pytest.mark.parametrize("case", range(12))
def test_bad_input(backend: Backend, case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KESTREL_CHECK", "1")
    error, message, out, table, ids = bad_calls(backend)[case]
    with pytest.raises(error, match=f"^embedding: {message}"):
        embedding_into(out, table, ids)
    assert np.isnan(backend.numpy(out)).all()


def test_bad_functional(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KESTREL_CHECK", "1")
    table = backend.array(random((6, 8)), "bfloat16")
    with pytest.raises(TypeError, match=r"^embedding: ids must be an array"):
        embedding(table, 3)
    with pytest.raises(ValueError, match=r"^embedding: table must have at least 2 dimensions"):
        embedding(table[0], backend.array([0], "int64"))
    with pytest.raises(ValueError, match=r"^embedding: table must have 2 dimensions"):
        embedding(backend.array(random((2, 3, 4)), "float32"), backend.array([0], "int64"))
    with pytest.raises(ValueError, match=r"^embedding: ids must lie in \[0, 6\), got 9 at index 3"):
        embedding(table, backend.array([[0, 1], [2, 9]], "int64"))
