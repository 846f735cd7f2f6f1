"""rope_and_cache: to the bit what the separate ops give, on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kestrel_kernels.kv_cache_write import reshape_and_cache_flash, rope_and_cache
from kestrel_kernels.rotary_embedding import rotary_embedding
from kestrel_kernels.tau_tail_ops import tau_tail_apply_into
from support import BACKENDS, CUDA_BACKENDS, HALVES, HAS_JAX, Backend, random

TABLE = 30


def raw(backend: Backend, array: Any) -> np.ndarray:
    host = backend.bits(array)
    return host.view(f"uint{8 * host.itemsize}")


class Problem:
    """A packed projection, the tables and caches; `fused` and `separate` give all that the ops write, as bits."""

    def __init__(
        self, backend: Backend, dtype: str, mode: str, tokens: tuple[int, ...], query_heads: int, key_heads: int,
        size: int, width: int, tau: str | None = None, interleaved: bool = False, page_size: int = 2, seed: int = 0,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(seed)
        count = int(np.prod(tokens))
        self.backend, self.mode, self.interleaved = backend, mode, interleaved
        self.tokens, self.count, self.size = tokens, count, size
        self.heads = (query_heads, key_heads)
        self.packed = random((*tokens, (query_heads + 2 * key_heads) * size), seed, 3.0)
        self.dtype, self.cache_dtype = dtype, dtype if mode == "auto" else "float8_e4m3fn"
        self.cos_sin = backend.array(rng.uniform(-1, 1, (TABLE, width)), "float32")
        self.positions_host = rng.integers(0, TABLE, tokens)
        self.positions = backend.array(self.positions_host, "int64")
        pages = count // page_size + 2
        slots = rng.permutation(pages * page_size)[:count]
        self.slots = backend.array(np.where(rng.random(count) < 0.2, -1, slots), "int64")
        self.cache_shape = (pages, page_size, key_heads, size)
        self.scales = (0.05, backend.array(rng.uniform(0.01, 1, key_heads), "float32"))
        self.tau: tuple[Any, Any] = (None, None)
        if tau is not None:
            self.tau = (
                backend.array(random((*tokens, 2 * key_heads), seed + 1), dtype),
                backend.array(random((TABLE, key_heads), seed + 2), dtype if tau == "as q" else tau),
            )

    def split(self, packed: Any) -> tuple[Any, Any, Any]:
        """q, k and v as strided views."""
        query_heads, key_heads = self.heads
        ends = np.array([0, query_heads, query_heads + key_heads, query_heads + 2 * key_heads]) * self.size
        heads = (query_heads, key_heads, key_heads)
        views = [
            packed[..., int(ends[i]) : int(ends[i + 1])].reshape(*self.tokens, heads[i], self.size) for i in range(3)
        ]
        return views[0], views[1], views[2]

    def new(self) -> tuple[Any, Any, Any]:
        caches = [self.backend.poisoned(self.cache_shape, self.cache_dtype) for _ in range(2)]
        return self.backend.array(self.packed, self.dtype), caches[0], caches[1]

    def fused(self) -> list[np.ndarray]:
        packed, k_cache, v_cache = self.new()
        q, k, v = self.split(packed)
        rope_and_cache(
            self.positions, q, k, v, self.cos_sin, k_cache, v_cache, self.slots, self.mode, *self.scales,
            self.interleaved, *self.tau,
        )  # fmt: skip
        for x, start in zip((k, v), self.split(self.new()[0])[1:], strict=True):
            assert np.array_equal(raw(self.backend, x), raw(self.backend, start))
        return [raw(self.backend, x) for x in (q, k_cache, v_cache)]

    def separate(self) -> list[np.ndarray]:
        packed, k_cache, v_cache = self.new()
        if self.tau[0] is not None:
            tau_tail_apply_into(packed, *self.tau, self.positions)
        q, k, v = self.split(packed)
        rotary_embedding(self.positions, q, k, self.size, self.cos_sin, self.interleaved)
        k, v = (x.reshape(self.count, self.heads[1], self.size) for x in (k, v))
        reshape_and_cache_flash(k, v, k_cache, v_cache, self.slots, self.mode, *self.scales)
        return [raw(self.backend, x) for x in (q, k_cache, v_cache)]

    def check(self) -> None:
        for name, got, want in zip(("q", "k_cache", "v_cache"), self.fused(), self.separate(), strict=True):
            assert np.array_equal(got, want), name


@pytest.mark.parametrize("mode", ["auto", "fp8"])
@pytest.mark.parametrize("tau", [None, "as q", "float32"])
@pytest.mark.parametrize(
    ("tokens", "heads", "size", "width"),
    [((5,), 4, 64, 32), ((2, 3), 2, 80, 80), ((1,), 1, 2, 2), ((0,), 2, 8, 8), ((3, 0), 2, 8, 8), ((2, 2), 3, 33, 6),
     ((150,), 8, 64, 32), ((240,), 9, 96, 64)],
)  # fmt: skip
def test_same_bits(
    backend: Backend, mode: str, tau: str | None, tokens: tuple[int, ...], heads: int, size: int, width: int
) -> None:
    for dtype in HALVES:
        for interleaved in (False, True):
            Problem(backend, dtype, mode, tokens, heads, heads, size, width, tau, interleaved).check()


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.one_of(st.tuples(st.integers(0, 6)), st.tuples(st.integers(0, 3), st.integers(0, 4))),
    query_heads=st.integers(0, 4), key_heads=st.integers(0, 3), half=st.integers(0, 20), rest=st.integers(0, 5),
    tau=st.sampled_from([None, "as q", "float32"]), interleaved=st.booleans(), page_size=st.integers(1, 5),
    mode=st.sampled_from(["auto", "fp8_e4m3"]), dtype=st.sampled_from(HALVES), backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_odd_shapes(
    tokens: tuple[int, ...], query_heads: int, key_heads: int, half: int, rest: int, tau: str | None,
    interleaved: bool, page_size: int, mode: str, dtype: str, backend: Backend, seed: int,
) -> None:  # fmt: skip
    if tau is not None:
        query_heads = key_heads
    size, width = 2 * half + rest, 2 * half
    problem = Problem(
        backend, dtype, mode, tokens, query_heads, key_heads, size, width, tau, interleaved, page_size, seed
    )
    problem.check()


def test_special_values(backend: Backend) -> None:
    """NaN and Inf come out as the separate ops put them."""
    for mode in ("auto", "fp8"):
        problem = Problem(backend, "bfloat16", mode, (40,), 2, 2, 16, 8, "as q")
        rng = np.random.default_rng(0)
        mask = rng.random(problem.packed.shape) < 0.1
        problem.packed[mask] = rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e38], mask.sum())
        problem.check()


@pytest.mark.parametrize("on_cuda", CUDA_BACKENDS, ids=repr)
@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["auto", "fp8"])
@pytest.mark.parametrize("tau", [None, "as q", "float32"])
@pytest.mark.parametrize(("size", "width"), [(64, 32), (33, 6)])
def test_indices_out_of_range(
    on_cuda: Backend, mode: str, tau: str | None, size: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unchecked: as in the separate ops, a bad position leaves out its step and a bad slot its token."""
    monkeypatch.delenv("KESTREL_CHECK", raising=False)
    problem = Problem(on_cuda, "bfloat16", mode, (40,), 4, 4, size, width, tau)
    positions = problem.positions_host.copy()
    positions[::3] = np.resize([TABLE, -1, 2**40, -(2**40), 2**32, 2**32 + 3, 2**63 - 1], len(positions[::3]))
    problem.positions = on_cuda.array(positions, "int64")
    slots = on_cuda.numpy(problem.slots).copy()
    slots[1::4] = np.resize([2**31, 2**40, -(2**40), 2**63 - 1, problem.cache_shape[0] * 2], len(slots[1::4]))
    problem.slots = on_cuda.array(slots, "int64")
    problem.check()


def test_slot_named_twice(backend: Backend) -> None:
    if backend.device == "cuda":
        pytest.skip("either token's row may stay")
    problem = Problem(backend, "bfloat16", "auto", (300,), 8, 8, 64, 64, "as q")
    problem.slots = backend.array(np.random.default_rng(0).integers(0, 5, 300), "int64")
    problem.check()


@pytest.mark.skipif(not HAS_JAX, reason="JAX is not installed")
def test_jax() -> None:
    jax, host = Backend("jax"), Backend("numpy")
    problem = Problem(host, "bfloat16", "fp8", (4,), 2, 2, 8, 4, "float32")
    want = problem.separate()
    packed, k_cache, v_cache = problem.new()
    q, k, v = problem.split(packed)
    tok, tau = jax.array(problem.tau[0], "bfloat16"), jax.array(problem.tau[1], "float32")
    positions, slots = jax.array(problem.positions, "int32"), jax.array(problem.slots, "int32")
    k, v = jax.array(k, "bfloat16"), jax.array(v, "bfloat16")
    tables = (jax.array(problem.cos_sin, "float32"), k_cache, v_cache, slots)
    rope_and_cache(positions, q, k, v, *tables, "fp8", 0.05, jax.array(problem.scales[1], "float32"), False, tok, tau)
    for got, wanted in zip((q, k_cache, v_cache), want, strict=True):
        assert np.array_equal(raw(host, got), wanted)
    with pytest.raises(TypeError, match="rope_and_cache: q must be writable, got a JAX array"):
        rope_and_cache(positions, jax.array(q, "bfloat16"), k, v, *tables, "fp8", 0.05, 1.0)


BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "q must be bfloat16 or float16, got float32", {"q": ("float32", (4, 2, 8))}),
    (TypeError, "k must be bfloat16, got float16", {"k": ("float16", (4, 2, 8))}),
    (TypeError, "v must be bfloat16, got float16", {"v": ("float16", (4, 2, 8))}),
    (TypeError, "cos_sin_cache must be float32, got bfloat16", {"cos_sin_cache": ("bfloat16", (5, 8))}),
    (TypeError, "k_cache must be bfloat16, got float16", {"k_cache": ("float16", (3, 2, 2, 8))}),
    (TypeError, "v_cache must be float8_e4m3fn or uint8, got bfloat16",
     {"k_cache": ("float8_e4m3fn", (3, 2, 2, 8)), "kv_cache_dtype": "fp8"}),
    (TypeError, "v_scale must be a number or a float32 array, got None",
     {"kv_cache_dtype": "fp8", "v_scale": None, "k_cache": ("float8_e4m3fn", (3, 2, 2, 8)),
      "v_cache": ("float8_e4m3fn", (3, 2, 2, 8))}),
    (TypeError, "tau_pos_table must be bfloat16 or float32, got float16", {"tau_pos_table": ("float16", (5, 2))}),
    (ValueError, "q must have 3 to 4 dimensions", {"q": ("bfloat16", (4, 16))}),
    (ValueError, r"k must have shape \[4, Hk, 8\], got \[2, 2, 2, 8\]", {"k": ("bfloat16", (2, 2, 2, 8))}),
    (ValueError, r"v must have shape \[4, 2, 8\], got \[4, 1, 8\]", {"v": ("bfloat16", (4, 1, 8))}),
    (ValueError, r"v_cache must have shape \[3, 2, 2, 8\], got \[3, 2, 1, 8\]",
     {"v_cache": ("bfloat16", (3, 2, 1, 8))}),
    (ValueError, r"tok_qv_lin must have shape \[4, 4\], got \[4, 2\]", {"tok_qv_lin": ("bfloat16", (4, 2))}),
    (ValueError, "tok_qv_lin and tau_pos_table must be given both or neither, got one", {"tok_qv_lin": None}),
    (ValueError, "k must be of as many heads as q where tau is given, got 2", {"q": ("bfloat16", (4, 4, 8))}),
    (ValueError, "kv_cache_dtype must be auto, fp8 or fp8_e4m3, got e5m2", {"kv_cache_dtype": "e5m2"}),
    (ValueError, r"positions must lie in \[0, 5\), got 5 at index 3", {"positions": ("int64", [0, 1, 2, 5])}),
    (ValueError, r"positions must lie in \[0, 2\), got 3 at index 3", {"tau_pos_table": ("float32", (2, 2)),
     "positions": ("int64", [0, 1, 1, 3])}),
    (ValueError, r"slot_mapping must have shape \[4\], got \[2, 2\]", {"slot_mapping": ("int64", (2, 2))}),
    (ValueError, r"slot_mapping must lie in \[0, 6\) or be negative, got 9",
     {"slot_mapping": ("int64", [0, -5, 9, 0])}),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(backend: Backend, case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KESTREL_CHECK", "1")
    error, message, changes = BAD[case]
    call: dict[str, Any] = {
        "positions": ("int64", [0, 1, 2, 3]), "q": ("bfloat16", (4, 2, 8)), "k": ("bfloat16", (4, 2, 8)),
        "v": ("bfloat16", (4, 2, 8)), "cos_sin_cache": ("float32", (5, 8)), "k_cache": ("bfloat16", (3, 2, 2, 8)),
        "v_cache": ("bfloat16", (3, 2, 2, 8)), "slot_mapping": ("int64", [0, 1, 2, 3]), "kv_cache_dtype": "auto",
        "k_scale": 1.0, "v_scale": 1.0, "tok_qv_lin": ("bfloat16", (4, 4)), "tau_pos_table": ("bfloat16", (5, 2)),
    } | changes  # fmt: skip
    for name, what in call.items():
        if isinstance(what, tuple):
            call[name] = backend.array(what[1] if isinstance(what[1], list) else np.ones(what[1]), what[0])
    with pytest.raises(error, match=f"^rope_and_cache: {message}"):
        rope_and_cache(**call)
    assert all((backend.numpy(call[name]) == 1).all() for name in ("q", "k_cache", "v_cache"))


def test_bad_layouts(backend: Backend) -> None:
    x = backend.array(np.ones((2, 2, 16)), "bfloat16")
    good = x[..., :8]
    positions, slots = backend.array([0, 1], "int64"), backend.array([1, 0], "int64")
    cos_sin, cache = backend.array(np.ones((2, 8)), "float32"), backend.array(np.ones((2, 1, 2, 8)), "bfloat16")
    for name in "qkv":
        call = {"q": good, "k": good, "v": good} | {name: x[..., ::2]}
        with pytest.raises(ValueError, match=f"{name} must have a contiguous last dimension"):
            rope_and_cache(positions, **call, cos_sin_cache=cos_sin, k_cache=cache, v_cache=cache, slot_mapping=slots,
                           kv_cache_dtype="auto", k_scale=None, v_scale=None)  # fmt: skip
    assert (backend.numpy(x) == 1).all() and (backend.numpy(cache) == 1).all()
