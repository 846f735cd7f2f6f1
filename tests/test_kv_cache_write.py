"""kv_cache_write: slots, layouts and both cache formats, to the bit, on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kestrel_kernels.kv_cache_write import reshape_and_cache_flash
from support import BACKENDS, HALVES, HAS_JAX, Backend, numpy_dtype, random

E4M3 = numpy_dtype("float8_e4m3fn")


def quantized(x: np.ndarray, scale: Any) -> np.ndarray:
    """e4m3(x * r), r = 1 / scale rounded to fp32; x [..., H, D], scale a number or a NumPy array [H]."""
    with np.errstate(all="ignore"):
        r = np.float32(1) / np.asarray(scale, np.float32).reshape(-1, 1)
        return np.clip(x.astype(np.float32) * r, -448, 448).astype(E4M3)


def expected(cache: np.ndarray, x: np.ndarray, slots: np.ndarray) -> np.ndarray:
    cache = cache.copy()
    for token, slot in enumerate(slots):
        if slot >= 0:
            cache[slot // cache.shape[1], slot % cache.shape[1]] = x[token]
    return cache


def assert_same(backend: Backend, actual: Any, want: np.ndarray) -> None:
    got = backend.bits(actual)
    if got.dtype == np.uint8:
        got = got.view(E4M3)
    number = ~np.isnan(want.astype(np.float32))
    bits = np.dtype(f"uint{8 * got.itemsize}")
    assert got.dtype == want.dtype and got.shape == want.shape
    assert np.array_equal(got.view(bits)[number], want.view(bits)[number])
    assert np.isnan(got.astype(np.float32)[~number]).all()


def slots_of(tokens: int, pages: int, page_size: int, seed: int = 0) -> np.ndarray:
    """Different slots in random order, some of them negative."""
    rng = np.random.default_rng(seed)
    slots = rng.permutation(pages * page_size)[:tokens]
    return np.where(rng.random(tokens) < 0.2, rng.integers(-3, 0, tokens), slots)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mode", ["auto", "fp8", "fp8_e4m3"])
@pytest.mark.parametrize(
    ("tokens", "heads", "size", "pages", "page_size"),
    [(0, 2, 8, 3, 4), (1, 1, 1, 1, 1), (5, 3, 64, 9, 1), (37, 4, 80, 6, 16), (3, 0, 64, 4, 2), (2, 2, 0, 4, 2),
     (200, 8, 128, 300, 1), (4, 1, 6, 1, 4)],
)  # fmt: skip
def test_values(
    backend: Backend, dtype: str, mode: str, tokens: int, heads: int, size: int, pages: int, page_size: int
) -> None:
    cache_dtype = dtype if mode == "auto" else "float8_e4m3fn"
    key, value = (backend.array(random((tokens, heads, size), s, 20.0), dtype) for s in (1, 2))
    caches = [backend.poisoned((pages, page_size, heads, size), cache_dtype) for _ in range(2)]
    before = [Backend("numpy").poisoned(c.shape, cache_dtype) for c in caches]
    slots = slots_of(tokens, pages, page_size)
    per_head = 0.5 + np.arange(heads)
    scales = (None, None) if mode == "auto" else (0.3, backend.array(per_head, "float32"))
    reshape_and_cache_flash(key, value, caches[0], caches[1], backend.array(slots, "int64"), mode, *scales)
    for x, cache, start, scale in zip((key, value), caches, before, (0.3, per_head), strict=True):
        rows = backend.bits(x) if mode == "auto" else quantized(backend.numpy(x), scale)
        assert_same(backend, cache, expected(start, rows, slots))


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 6), heads=st.integers(0, 3), size=st.integers(0, 70), pages=st.integers(1, 5),
    page_size=st.integers(1, 4), offset=st.integers(0, 5), gap=st.integers(0, 5), head_major=st.booleans(),
    mode=st.sampled_from(["auto", "fp8"]), dtype=st.sampled_from(HALVES), index=st.sampled_from(["int32", "int64"]),
    backend=st.sampled_from(BACKENDS), seed=st.integers(0, 9),
)  # fmt: skip
def test_odd_shapes(
    tokens: int, heads: int, size: int, pages: int, page_size: int, offset: int, gap: int, head_major: bool,
    mode: str, dtype: str, index: str, backend: Backend, seed: int,
) -> None:  # fmt: skip
    """Slices of a packed projection into caches of any strides, at any offset; what lies between stays as it was."""
    tokens = min(tokens, pages * page_size)
    inside = np.s_[..., offset : offset + size]
    packed = backend.array(random((tokens, 3 * heads + 1, offset + size + gap), seed), dtype)
    key, value = packed[:, heads : 2 * heads][inside], packed[:, 2 * heads : 3 * heads][inside]
    shape = (pages, heads, page_size) if head_major else (pages, page_size, heads)
    cache_dtype = dtype if mode == "auto" else "float8_e4m3fn"
    stores = [backend.poisoned((*shape, offset + size + gap), cache_dtype) for _ in range(2)]
    caches = [(s.swapaxes(1, 2) if head_major else s)[inside] for s in stores]
    slots = slots_of(tokens, pages, page_size, seed)
    reshape_and_cache_flash(key, value, caches[0], caches[1], backend.array(slots, index), mode, 0.25, 2)
    for x, store, scale in zip((key, value), stores, (0.25, 2), strict=True):
        want = Backend("numpy").poisoned((*shape, offset + size + gap), cache_dtype)
        view = (want.swapaxes(1, 2) if head_major else want)[inside]
        view[:] = expected(view, backend.bits(x) if mode == "auto" else quantized(backend.numpy(x), scale), slots)
        assert_same(backend, store, want)


def test_bits(backend: Backend) -> None:
    """ "auto" copies every bit pattern, the NaNs too."""
    x = np.arange(2**16, dtype=np.uint16).reshape(16, 64, 64)
    for dtype in HALVES:
        key = backend.array(x.view(numpy_dtype(dtype)), dtype)
        caches = [backend.poisoned((1, 16, 64, 64), dtype) for _ in range(2)]
        reshape_and_cache_flash(
            key, key, caches[0], caches[1], backend.array(np.arange(16), "int64"), "auto", None, None
        )
        for cache in caches:
            assert np.array_equal(backend.bits(cache)[0].view(np.uint16), x)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [False, True])
def test_every_value_to_fp8(backend: Backend, dtype: str, bits: bool) -> None:
    """All 16-bit values, NaN, Inf and subnormals among them, at scales that saturate and that underflow."""
    every = np.arange(2**16, dtype=np.uint16).view(numpy_dtype(dtype)).reshape(16, 64, 64)
    key, slots = backend.array(every, dtype), backend.array(np.arange(16), "int64")
    scales = np.geomspace(1e-3, 300.0, 64)
    shape = (16, 1, 64, 64)
    caches = [backend.array(np.zeros(shape), "uint8" if bits else "float8_e4m3fn") for _ in range(2)]
    reshape_and_cache_flash(
        key, key, caches[0], caches[1], slots, "fp8", backend.array(scales, "float32"), np.float32(1.0)
    )
    assert_same(backend, caches[0], quantized(every, scales)[:, None])
    assert_same(backend, caches[1], quantized(every, 1.0)[:, None])


def test_scales(backend: Backend) -> None:
    """One element of any rank, one per head of any stride, a number: the same bits for the same value."""
    key = backend.array(random((4, 2, 64), scale=5.0), "bfloat16")
    slots = backend.array([3, 2, 1, 0], "int64")
    strided = backend.array([0.7, 9.0, 0.7, 9.0], "float32")[::2]
    forms = [backend.array(0.7, "float32"), backend.array([0.7], "float32"), strided, float(np.float32(0.7))]
    for form in forms:
        caches = [backend.poisoned((2, 2, 2, 64), "float8_e4m3fn") for _ in range(2)]
        reshape_and_cache_flash(key, key, caches[0], caches[1], slots, "fp8_e4m3", form, form)
        for cache in caches:
            assert_same(backend, cache, quantized(backend.numpy(key)[::-1], 0.7).reshape(2, 2, 2, 64))


def test_slot_named_twice(backend: Backend) -> None:
    key = backend.array(random((400, 8, 64)), "float16")
    slots = np.random.default_rng(0).integers(0, 7, 400)
    caches = [backend.poisoned((7, 1, 8, 64), "float16") for _ in range(2)]
    reshape_and_cache_flash(key, key, caches[0], caches[1], backend.array(slots, "int64"), "auto", None, None)
    if backend.device == "cpu":
        assert_same(backend, caches[1], expected(backend.bits(caches[0]), backend.bits(key), slots))
    rows = backend.bits(key)
    for slot, row in enumerate(backend.bits(caches[0])[:, 0]):
        for head in range(8):
            writers = rows[slots == slot, head] == row[head]
            # On a GPU tokens may win a vector each.
            assert writers.all(-1).any() if backend.device == "cpu" else writers.any(0).all()


@pytest.mark.skipif(not HAS_JAX, reason="JAX is not installed")
def test_jax() -> None:
    jax, host = Backend("jax"), Backend("numpy")
    x = random((3, 2, 8))
    key, slots = jax.array(x, "bfloat16"), jax.array([2, -1, 0], "int32")
    caches = [host.poisoned((3, 1, 2, 8), "bfloat16") for _ in range(2)]
    reshape_and_cache_flash(key, key, caches[0], caches[1], slots, "auto", None, None)
    want = expected(host.poisoned((3, 1, 2, 8), "bfloat16"), host.array(x, "bfloat16"), np.array([2, -1, 0]))
    assert_same(host, caches[1], want)
    with pytest.raises(TypeError, match="reshape_and_cache_flash: key_cache must be writable, got a JAX array"):
        reshape_and_cache_flash(key, key, jax.array(caches[0], "bfloat16"), caches[1], slots, "auto", None, None)


BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "key must be bfloat16 or float16, got float32", {"key": ("float32", (4, 2, 8))}),
    (TypeError, "value must be bfloat16, got float16", {"value": ("float16", (4, 2, 8))}),
    (TypeError, "key_cache must be bfloat16, got (float8_e4m3fn|uint8)",
     {"key_cache": ("float8_e4m3fn", (3, 2, 2, 8))}),
    (TypeError, "value_cache must be bfloat16, got float16", {"value_cache": ("float16", (3, 2, 2, 8))}),
    (TypeError, "key_cache must be float8_e4m3fn or uint8, got bfloat16", {"kv_cache_dtype": "fp8"}),
    (TypeError, "slot_mapping must be int64 or int32, got float32", {"slot_mapping": ("float32", (4,))}),
    (TypeError, "k_scale must be a number or a float32 array, got None",
     {"kv_cache_dtype": "fp8", "k_scale": None, "key_cache": ("float8_e4m3fn", (3, 2, 2, 8)),
      "value_cache": ("float8_e4m3fn", (3, 2, 2, 8))}),
    (ValueError, "kv_cache_dtype must be auto, fp8 or fp8_e4m3, got int4", {"kv_cache_dtype": "int4"}),
    (ValueError, r"key must have shape \[T, H, D\], got \[4, 16\]", {"key": ("bfloat16", (4, 16))}),
    (ValueError, r"value must have shape \[4, 2, 8\], got \[3, 2, 8\]", {"value": ("bfloat16", (3, 2, 8))}),
    (ValueError, r"key_cache must have shape \[pages, page_size, 2, 8\], got \[3, 2, 8\]",
     {"key_cache": ("bfloat16", (3, 2, 8))}),
    (ValueError, r"value_cache must have shape \[3, 2, 2, 8\], got \[3, 4, 2, 8\]",
     {"value_cache": ("bfloat16", (3, 4, 2, 8))}),
    (ValueError, r"slot_mapping must have shape \[4\], got \[5\]", {"slot_mapping": ("int64", (5,))}),
    (ValueError, r"slot_mapping must lie in \[0, 6\) or be negative, got 6 at index 2",
     {"slot_mapping": ("int64", [0, -1, 6, 7])}),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(backend: Backend, case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KESTREL_CHECK", "1")
    error, message, changes = BAD[case]
    arrays: dict[str, Any] = {
        "key": ("bfloat16", (4, 2, 8)), "value": ("bfloat16", (4, 2, 8)), "key_cache": ("bfloat16", (3, 2, 2, 8)),
        "value_cache": ("bfloat16", (3, 2, 2, 8)), "slot_mapping": ("int64", [0, 1, 2, 3]),
        "kv_cache_dtype": "auto", "k_scale": 1.0, "v_scale": 1.0,
    } | changes  # fmt: skip
    call: dict[str, Any] = {}
    for name, given_as in arrays.items():
        if not isinstance(given_as, tuple):
            call[name] = given_as
        elif isinstance(given_as[1], list):
            call[name] = backend.array(given_as[1], given_as[0])
        else:
            fill = np.nan if "cache" in name else 0
            call[name] = backend.array(np.full(given_as[1], fill), given_as[0])
    with pytest.raises(error, match=f"^reshape_and_cache_flash: {message}"):
        reshape_and_cache_flash(**call)
    for name in ("key_cache", "value_cache"):
        assert np.isnan(backend.numpy(call[name])).all()


def test_bad_layouts_and_scales(backend: Backend) -> None:
    key = backend.array(random((4, 2, 8)), "float16")
    wide = backend.array(random((4, 2, 16)), "float16")
    slots = backend.array([0, 1, 2, 3], "int64")
    cache, wide_cache = (backend.poisoned((3, 2, 2, n), "float8_e4m3fn") for n in (8, 16))
    scale = backend.array([1.0], "float32")

    def call(*, k: Any = key, k_cache: Any = cache, k_scale: Any = scale, v_scale: Any = 1.0) -> None:
        reshape_and_cache_flash(k, key, k_cache, cache, slots, "fp8", k_scale, v_scale)

    with pytest.raises(ValueError, match="key must have a contiguous last dimension"):
        call(k=wide[..., ::2])
    with pytest.raises(ValueError, match="key_cache must have a contiguous last dimension"):
        call(k_cache=wide_cache[..., ::2])
    with pytest.raises(ValueError, match=r"v_scale must have shape \[2\], got \[3\]"):
        call(v_scale=backend.array([1.0, 2.0, 3.0], "float32"))
    with pytest.raises(TypeError, match="k_scale must be float32, got float16"):
        call(k_scale=backend.array([1.0], "float16"))
    assert np.isnan(backend.numpy(cache)).all()
