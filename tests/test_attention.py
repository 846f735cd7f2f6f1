"""flash_attn.cute: dense, packed and paged attention against float64, on every backend."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from attention_oracle import attend
from hypothesis import given, settings
from hypothesis import strategies as st
from kestrel_kernels import _library
from kestrel_kernels.flash_attn import cute
from support import BACKENDS, HALVES, HAS_JAX, Backend, assert_close, numpy_dtype, random

SLACK = 3e-6  # sums of some hundred fp32 terms, before the one rounding
# What tensor cores lose of a weight, half a unit in its last place: 2^-8 in bf16, 2^-11 in f16; squared where it is
# taken in two parts, as bf16 and f16 do, beside e4m3 in one of f16.
WEIGHT_ERROR = {"bfloat16": 2.0**-16, "float16": 2.0**-22, "float8_e4m3fn": 2.0**-11}
# The prefill kernel takes it in one part, and the sum of the parts so rounded.
PREFILL_ERROR = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float8_e4m3fn": 2.0**-11}
KERNELS = {
    "FlashAttentionPlain", "FlashAttentionFwd", "FlashAttentionDecodeSm90",
    "FlashAttentionDecodeSm90PersistentSplitFused",
}  # fmt: skip


@dataclass
class Case:
    """Sequences (len_q, len_k) and where their keys lie: dense, packed or paged. Unused memory holds NaN, unused page
    table entries hold garbage."""

    lengths: list[tuple[int, int]]
    heads: tuple[int, int] = (4, 2)
    width: int = 64
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    page_size: int = 0
    packed_q: bool = False
    packed_k: bool = False
    spare: int = 5  # keys of room past the longest
    options: dict[str, Any] = field(default_factory=dict)
    hints: dict[str, Any] = field(default_factory=dict)  # what the oracle need not know
    seed: int = 0

    def run(self, b: Backend, **more: Any) -> Any:
        rng = np.random.default_rng(self.seed)
        hq, hk = self.heads
        kv_dtype = self.kv_dtype or self.dtype
        self.q: list[np.ndarray] = []
        self.k: list[np.ndarray] = []
        self.v: list[np.ndarray] = []

        def draw(shape: tuple[int, ...], dtype: str) -> np.ndarray:
            return b.numpy(b.array(rng.standard_normal(shape), dtype))

        for len_q, len_k in self.lengths:
            self.q.append(draw((len_q, hq, self.width), self.dtype))
            self.k.append(draw((len_k, hk, self.width), kv_dtype))
            self.v.append(draw((len_k, hk, self.width), kv_dtype))
        batch = len(self.lengths)
        used = b.array([n for _, n in self.lengths], "int32")
        keywords: dict[str, Any] = {**self.options, **self.hints, "return_lse": True, **more}
        for name, dtype in (("prefix_len", "int32"), ("learnable_sink", "float32")):
            if isinstance(keywords.get(name), (list, np.ndarray)):
                keywords[name] = b.array(keywords[name], dtype)

        k: Any
        v: Any
        longest = max((n for _, n in self.lengths), default=0)
        if self.page_size:
            per_sequence = -(-(longest + self.spare) // self.page_size)
            pages = per_sequence * batch + 3
            table = rng.choice([-7, 2**31 - 1, pages], (batch, per_sequence))
            free = list(rng.permutation(pages))
            k = np.full((pages, self.page_size, hk, self.width), np.nan)
            v = k.copy()
            for i, (_, n) in enumerate(self.lengths):
                for entry in range(-(-n // self.page_size)):
                    table[i, entry] = page = free.pop()
                    part = slice(entry * self.page_size, (entry + 1) * self.page_size)
                    k[page, : len(self.k[i][part])] = self.k[i][part]
                    v[page, : len(self.v[i][part])] = self.v[i][part]
            keywords |= {"page_table": b.array(table, "int32"), "seqused_k": used}
        elif self.packed_k:
            k, v = (np.concatenate([*x, np.full((self.spare, hk, self.width), np.nan)]) for x in (self.k, self.v))
        else:
            k = np.full((batch, longest + self.spare, hk, self.width), np.nan)
            v = k.copy()
            for i, (_, n) in enumerate(self.lengths):
                k[i, :n], v[i, :n] = self.k[i], self.v[i]
            keywords["seqused_k"] = used
        k, v = b.array(k, kv_dtype), b.array(v, kv_dtype)

        if not self.packed_q:
            q = b.array(np.stack(self.q), self.dtype)
            out, lse = cute.flash_attn_with_kvcache(q, k, v, **keywords)
            out, lse = b.numpy(out), b.numpy(lse)
            return [(out[i], lse[i]) for i in range(batch)]
        q = b.array(np.concatenate([*self.q, np.full((2, hq, self.width), np.nan)]), self.dtype)
        starts_q, starts_k = (np.cumsum([0] + [n[i] for n in self.lengths]) for i in (0, 1))
        cu_k = b.array(starts_k, "int32") if self.packed_k and not self.page_size else None
        longest_q = max(n for n, _ in self.lengths)
        out, lse = cute.flash_attn_varlen_func(
            q, k, v, b.array(starts_q, "int32"), cu_k, longest_q, longest, **keywords
        )  # fmt: skip
        out, lse = b.numpy(out), b.numpy(lse)
        return [(out[i:j], lse[:, i:j]) for i, j in itertools.pairwise(starts_q)]

    def check(self, b: Backend, kernel: str | None = None) -> None:
        results = self.run(b)
        ran = cute.last_kernel()
        assert ran in ({kernel} if kernel else {"cpu"} if b.device == "cpu" else KERNELS)
        for i, (out, lse) in enumerate(results):
            options = dict(self.options)
            if isinstance(options.get("prefix_len"), list):
                options["prefix_len"] = options["prefix_len"][i]
            want, want_lse = attend(self.q[i], self.k[i], self.v[i], **options)
            slack = SLACK * self.options.get("v_scale", 1.0)
            if b.device == "cuda":
                most, _ = attend(self.q[i], self.k[i], np.abs(self.v[i]), **options)
                kind = self.kv_dtype or self.dtype
                slack = slack + (PREFILL_ERROR if ran == "FlashAttentionFwd" else WEIGHT_ERROR)[kind] * most
            assert_close(out, want, self.dtype, slack=slack)
            assert_close(lse, want_lse, "float32", slack=5e-6 + 1e-6 * self.options.get("softcap", 0.0))


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"softmax_scale": 0.3},
    "causal": {"causal": True},
    "prefix": {"prefix_len": 90},
    "prefixes": {"prefix_len": [0, 7, 500]},
    "left": {"window_size": (40, None)},
    "window": {"window_size": (70, 3)},
    "none_seen": {"window_size": (0, 0)},
    "softcap": {"softcap": 2.5},
    "sink": {"learnable_sink": np.array([-1.0, 0.0, 3.0, 9.0])},
    "sink_alone": {"learnable_sink": np.array([-200.0, 0.0, 200.0, -np.inf]), "window_size": (0, 0)},
    "scales": {"k_scale": 0.5, "v_scale": 2.0},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "packed": {"packed_q": True, "packed_k": True},
    "packed_q": {"packed_q": True},
    "paged": {"page_size": 1},
    "paged_packed": {"packed_q": True, "page_size": 7},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(backend: Backend, layout: str, feature: str) -> None:
    packed = "packed" in layout
    lengths = [(70, 70), (3, 200), (9, 4)] if packed else [(13, 70), (13, 200), (13, 4)]
    Case(lengths, options=FEATURES[feature], **LAYOUTS[layout]).check(backend)


def draw_options(
    draw: Any, batch: int, q_heads: int, *, most_prefix: int, most_side: int, one_in: int = 2
) -> dict[str, Any]:
    """Of a `Case`: causal or not, each of the others in one of so many examples."""

    def wanted() -> bool:
        return bool(draw(st.integers(1, one_in)) == one_in)

    options: dict[str, Any] = {"causal": draw(st.booleans())}
    if wanted():
        prefix = st.integers(0, most_prefix)
        options["prefix_len"] = draw(prefix | st.lists(prefix, min_size=batch, max_size=batch))
    if wanted():
        side = st.none() | st.integers(-1, most_side)
        options["window_size"] = draw(st.tuples(side, side))
    if wanted():
        options["softcap"] = draw(st.floats(0.5, 20.0))
    if wanted():
        options["learnable_sink"] = random((q_heads,)).astype(np.float32)
    if wanted():
        options |= {"k_scale": 0.25, "v_scale": 1.5}
    return options


@settings(deadline=None, max_examples=60)
@given(data=st.data(), backend=st.sampled_from(BACKENDS))
def test_combinations(data: st.DataObject, backend: Backend) -> None:
    draw = data.draw
    layout = draw(st.sampled_from(list(LAYOUTS)))
    batch = draw(st.integers(1, 3))
    len_q = draw(st.integers(0, 40))
    lengths = [
        (draw(st.integers(0, 40)) if "packed" in layout else len_q, draw(st.integers(0, 150))) for _ in range(batch)
    ]
    k_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    options = draw_options(draw, batch, k_heads * group, most_prefix=160, most_side=90)
    settings_of = dict(LAYOUTS[layout])
    if "page_size" in settings_of:
        settings_of["page_size"] = draw(st.integers(1, 20))
    Case(
        lengths, (k_heads * group, k_heads), draw(st.sampled_from([1, 5, 16, 33, 64, 80])),
        draw(st.sampled_from(HALVES)), draw(st.sampled_from([None, "float8_e4m3fn"])), spare=draw(st.integers(0, 9)),
        options=options, seed=draw(st.integers(0, 99)), **settings_of,
    ).check(backend)  # fmt: skip


@pytest.mark.parametrize("width", [1, 2, 15, 17, 64, 72, 80, 96, 128, 255, 256])
@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn"])
def test_head_sizes(backend: Backend, width: int, kv_dtype: str | None) -> None:
    Case([(9, 70)], (3, 1), width, "float16", kv_dtype, page_size=3, options={"causal": True}).check(backend)


@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (12, 12), (128, 1), (0, 0)])
def test_head_counts(backend: Backend, heads: tuple[int, int]) -> None:
    Case([(3, 66)], heads, 16, page_size=4).check(backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty(backend: Backend, layout: str) -> None:
    """No keys: zeros and -inf. No queries, no sequences: nothing."""
    lengths = [(2, 0), (0, 3), (5, 9)] if "packed" in layout else [(2, 0), (2, 9)]
    Case(lengths, **LAYOUTS[layout]).check(backend)
    Case([(0, 4)], **LAYOUTS[layout]).check(backend)
    Case([(2, 0)], spare=0, **LAYOUTS[layout]).check(backend)
    if not layout.startswith("packed"):
        q, k = (backend.array(np.zeros((0, 3, 2, 8)), "bfloat16") for _ in range(2))
        assert cute.flash_attn_func(q, k, k).shape == (0, 3, 2, 8)


@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "case",
    [
        Case([(1, 740), (1, 33)], (32, 32), 64, page_size=1, options={"causal": True}),
        Case([(1, 500), (1, 1)], (32, 8), 128, page_size=16, options={"causal": True}),
        Case([(300, 300)], (3, 3), 64, options={"causal": True}),
        Case([(200, 200)], (2, 2), 128, page_size=1, options={"prefix_len": 150}),
        Case([(243, 243)], (3, 3), 72),
    ],
    ids=["decode", "groups", "causal", "prefix", "full"],
)
def test_no_worse_than_matrix_products(backend: Backend, case: Case, dtype: str, kv_dtype: str | None) -> None:
    """The error is at most that of products whose results are stored in 16 bits, with a softmax in fp32 between."""

    def rounded(values: np.ndarray) -> np.ndarray:
        return values.astype(numpy_dtype(dtype)).astype(np.float64)

    case = replace(case, dtype=dtype, kv_dtype=kv_dtype)
    ours, theirs = [], []
    for i, (out, _) in enumerate(case.run(backend)):
        arrays = case.q[i], case.k[i], case.v[i]
        want, _ = attend(*arrays, **case.options)
        ours.append(np.abs(out - want))
        theirs.append(np.abs(attend(*arrays, **case.options, rounded=rounded)[0] - want))
    assert max(map(np.max, ours)) <= max(map(np.max, theirs))
    assert sum(map(np.mean, ours)) <= sum(map(np.mean, theirs))


def test_long_causal(backend: Backend) -> None:
    """Several blocks of queries and many of keys; the same rows alone or together, whatever the other sequences."""
    case = Case([(150, 300), (150, 170)], (3, 1), 32, options={"causal": True})
    case.check(backend)
    whole = case.run(backend)
    one = Case([(150, 300)], (3, 1), 32, options={"causal": True}).run(backend)
    assert np.array_equal(one[0][0], whole[0][0]) and np.array_equal(one[0][1], whole[0][1])


def test_alone_or_in_a_batch(backend: Backend) -> None:
    """A decode step gives what the whole prompt gave, dense or paged, alone or not; on the CPU the same bits."""
    k, v = (backend.array(random((3, 190, 2, 64), seed), "bfloat16") for seed in (1, 2))
    q = backend.array(random((3, 190, 6, 64), 3), "bfloat16")
    whole, lse = cute.flash_attn_func(q, k, v, causal=True, return_lse=True)
    table = backend.array(np.arange(190)[None], "int32")
    for row in (0, 63, 64, 100, 189):
        used = backend.array([row + 1], "int32")
        step, step_lse = cute.flash_attn_with_kvcache(
            q[1:2, row : row + 1], k[1][:, None], v[1][:, None], table, used, causal=True, return_lse=True,
            batch_invariant=True, fresh_tokens=1, num_splits=3, max_seqlen_k=190,
        )  # fmt: skip
        if backend.device == "cpu":
            assert np.array_equal(backend.bits(step)[0, 0], backend.bits(whole)[1, row])
            assert np.array_equal(backend.bits(step_lse)[0, :, 0], backend.bits(lse)[1, :, row])
        else:  # by another kernel
            assert_close(backend.numpy(step)[0, 0], backend.numpy(whole)[1, row], "bfloat16", slack=0.01)
            assert_close(backend.numpy(step_lse)[0, :, 0], backend.numpy(lse)[1, :, row], "float32", slack=1e-5)


@pytest.mark.parametrize("seers, options", [
    (range(30, 50), {"causal": True}), (range(31), {"prefix_len": 31, "window_size": (0, None)}),
    (range(28, 36), {"window_size": (5, 2)}),
])  # fmt: skip
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("of", ["k", "v"])
def test_masked_values_do_not_leak(
    backend: Backend, seers: range, options: dict[str, Any], bad: float, of: str
) -> None:
    """Key 30 holds NaN or Inf: the queries that do not see it stay right, those that do get it."""
    arrays = {name: backend.numpy(backend.array(random((1, 50, 2, 16), i), "bfloat16")) for i, name in enumerate("qkv")}
    want, _ = attend(*(x[0] for x in arrays.values()), **options)
    arrays[of][0, 30] = bad
    got = backend.numpy(cute.flash_attn_func(*(backend.array(x, "bfloat16") for x in arrays.values()), **options))[0]
    others = np.setdiff1d(np.arange(50), seers)
    assert_close(got[others], want[others], "bfloat16", slack=SLACK)
    if of == "v" or np.isnan(bad):
        assert not np.isfinite(got[seers]).any()


def test_pages_that_a_window_left_behind(backend: Backend) -> None:
    """Pages before every window hold NaN, their table entries garbage: neither is looked at."""
    q, k = backend.array(random((1, 4, 2, 16)), "bfloat16"), random((40, 1, 2, 16), 1)
    k[:26] = np.nan
    pages, table = backend.array(k, "bfloat16"), np.arange(40)[None]
    table[0, :26] = -1
    out = cute.flash_attn_with_kvcache(
        q, pages, pages, backend.array(table, "int32"), causal=True, window_size=(10, None)
    )
    keys = np.nan_to_num(backend.numpy(pages)[:, 0])
    want, _ = attend(backend.numpy(q)[0], keys, keys, causal=True, window_size=(10, None))
    assert_close(backend.numpy(out)[0], want, "bfloat16", slack=SLACK)


def test_strides_and_out(backend: Backend) -> None:
    """Heads-major storage, odd offsets; `out` given is written and returned, and nothing beside it."""
    axes = (0, 2, 1, 3)
    permuted = [backend.array(random((2, h, 30, 37), h), "float16") for h in (4, 2)]
    q, k = (x.transpose(axes) if backend.framework != "torch" else x.permute(axes) for x in permuted)
    q, k = q[..., 3:35], k[..., 3:35]
    whole = backend.poisoned((2, 30, 4, 40), "float16")
    out = whole[..., 5:37]
    assert cute.flash_attn_func(q, k, k, causal=True, out=out) is out
    for i in range(2):
        want, _ = attend(backend.numpy(q)[i], backend.numpy(k)[i], backend.numpy(k)[i], causal=True)
        assert_close(backend.numpy(out)[i], want, "float16", slack=SLACK)
    assert np.isnan(np.delete(backend.numpy(whole), np.s_[5:37], axis=-1)).all()


def test_packed_rows_of_no_sequence_stay(backend: Backend) -> None:
    q, k = backend.array(random((9, 2, 8)), "bfloat16"), backend.array(random((20, 2, 8)), "bfloat16")
    out = backend.poisoned((9, 2, 8), "bfloat16")
    starts = backend.array([2, 4, 7], "int32")
    cute.flash_attn_varlen_func(q, k, k, starts, backend.array([1, 5, 20], "int32"), None, None, out=out)
    assert np.isnan(backend.numpy(out)).all(axis=(1, 2)).tolist() == [True] * 2 + [False] * 5 + [True] * 2


def test_bits_and_scales_as_arrays(backend: Backend) -> None:
    """e4m3 as uint8 bits, scales as one-element arrays, a sink of q's dtype, -1 for no window."""
    q, sink = backend.array(random((1, 5, 2, 24)), "bfloat16"), backend.array([0.5, -1.0], "bfloat16")
    stored = backend.array(random((1, 40, 2, 24), 1), "float8_e4m3fn")
    bits = backend.array(backend.bits(stored).view(np.uint8), "uint8")
    first = cute.flash_attn_func(q, stored, stored, k_scale=0.5, v_scale=3.0, learnable_sink=sink)
    second = cute.flash_attn_func(
        q, bits, bits, k_scale=backend.array([0.5], "float32"), v_scale=backend.array(3.0, "float32"),
        learnable_sink=backend.array([0.5, -1.0], "float32"), window_size=(-1, -1),
    )  # fmt: skip
    assert np.array_equal(backend.bits(first), backend.bits(second))


def test_large_scores(backend: Backend) -> None:
    """Scores far apart and far from zero: no overflow, and a score that falls behind weighs nothing."""
    q, k = (
        backend.array(random((1, 8, 1, 16), scale=30), "bfloat16"),
        backend.array(random((1, 200, 1, 16), 1, 30), "bfloat16"),
    )
    out, lse = cute.flash_attn_func(q, k, k, return_lse=True)
    want, want_lse = attend(*(backend.numpy(x)[0] for x in (q, k, k)))
    # fp32 scores near 1e4 are off by 1e-3, and so, relatively, are the weights.
    assert_close(backend.numpy(out)[0], want, "bfloat16", slack=0.1)
    assert_close(backend.numpy(lse)[0], want_lse, "float32", slack=5e-3)


def test_workspace_bytes() -> None:
    assert _library.load().attention_workspace_bytes() == cute.WORKSPACE_BYTES


def test_defaults() -> None:
    shared = {
        "softmax_scale": None, "causal": False, "window_size": (None, None), "learnable_sink": None, "softcap": 0.0,
        "num_splits": 0, "prefix_len": None, "k_scale": None, "v_scale": None, "return_lse": False, "out": None,
    }  # fmt: skip
    first = inspect.signature(cute.flash_attn_func).parameters
    assert list(first) == ["q", "k", "v", *shared, "workspace"]
    for function in (cute.flash_attn_func, cute.flash_attn_varlen_func, cute.flash_attn_with_kvcache):
        parameters = inspect.signature(function).parameters
        assert {name: parameters[name].default for name in shared} == shared


@pytest.mark.skipif(not HAS_JAX, reason="JAX is not installed")
def test_jax() -> None:
    backend = Backend("jax")
    q, k = backend.array(random((1, 5, 2, 16)), "bfloat16"), backend.array(random((1, 9, 2, 16), 1), "bfloat16")
    out, lse = cute.flash_attn_func(q, k, k, return_lse=True)
    assert type(out) is type(q) and type(lse) is type(q)
    want, want_lse = attend(*(backend.numpy(x)[0] for x in (q, k, k)))
    assert_close(backend.numpy(out)[0], want, "bfloat16", slack=SLACK)
    assert_close(backend.numpy(lse)[0], want_lse, "float32", slack=SLACK)
    with pytest.raises(TypeError, match="flash_attn_func: out must be writable"):
        cute.flash_attn_func(q, k, k, out=out)


# (error, message, what changes in a good call of flash_attn_with_kvcache: q [2, 3, 4, 16], cache [30, 2, 2, 16])
BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "q must be bfloat16 or float16, got float32", {"q": ((2, 3, 4, 16), "float32")}),
    (TypeError, "k_cache must be bfloat16, float8_e4m3fn or uint8, got float16", {"k": ((30, 2, 2, 16), "float16")}),
    (TypeError, "v_cache must be bfloat16, got (float8_e4m3fn|uint8)", {"v": ((30, 2, 2, 16), "float8_e4m3fn")}),
    (TypeError, "page_table must be int32, got int64", {"page_table": (np.zeros((2, 5)), "int64")}),
    (TypeError, "seqused_k must be int32, got int64", {"seqused_k": ([3, 3], "int64")}),
    (TypeError, "prefix_len must be int32, got float32", {"prefix_len": ([3, 3], "float32")}),
    (TypeError, "learnable_sink must be bfloat16, float16 or float32, got", {"learnable_sink": ([1] * 4, "float64")}),
    (TypeError, "k_scale must be float32, got float16", {"k_scale": ([1.0], "float16")}),
    (TypeError, "out must be bfloat16, got float32", {"out": ((2, 3, 4, 16), "float32")}),
    (ValueError, r"q must have shape \[B, Sq, Hq, D\], got \[2, 3, 64\]", {"q": ((2, 3, 64), "bfloat16")}),
    (ValueError, "q must be of a head size from 1 to 256, got 257", {"q": ((2, 3, 4, 257), "bfloat16")}),
    (ValueError, "q must be of a head size from 1 to 256, got 0", {"q": ((2, 3, 4, 0), "bfloat16")}),
    (ValueError, r"k_cache must have shape \[pages, page_size, Hk, 16\]", {"k": ((30, 2, 2, 8), "bfloat16")}),
    (ValueError, "k_cache must be of a page size of at least 1, got 0", {"k": ((30, 0, 2, 16), "bfloat16")}),
    (ValueError, r"v_cache must have shape \[30, 2, 2, 16\]", {"v": ((30, 2, 1, 16), "bfloat16")}),
    (ValueError, "q must be of a multiple of the key heads, got 5", {"q": ((2, 3, 5, 16), "bfloat16")}),
    (ValueError, r"page_table must have shape \[2, max_pages\]", {"page_table": (np.zeros((3, 5)), "int32")}),
    (ValueError, r"page_table must hold pages in \[0, 30\), got 30 at \[0, 0\]",
     {"page_table": ([[30], [0]], "int32"), "seqused_k": ([1, 1], "int32")}),
    (ValueError, r"page_table must hold pages in \[0, 30\), got -1 at \[1, 1\]",
     {"page_table": ([[3, -9], [4, -1]], "int32"), "seqused_k": ([2, 4], "int32")}),
    (ValueError, r"seqused_k must have shape \[2\], got \[1\]", {"seqused_k": ([3], "int32")}),
    (ValueError, "seqused_k must be 0 or more, got -1", {"seqused_k": ([3, -1], "int32")}),
    (ValueError, "seqused_k must be within the room of its page table, got 11", {"seqused_k": ([3, 11], "int32")}),
    (ValueError, "max_seqlen_k must be at least the longest sequence, got 3 for a length of 4", {"max_seqlen_k": 3}),
    (ValueError, "max_seqlen_k must be 0 or more, got -1", {"max_seqlen_k": -1}),
    (ValueError, r"prefix_len must have shape \[2\], got \[3\]", {"prefix_len": ([1, 2, 3], "int32")}),
    (ValueError, r"prefix_len must lie in \[0, 2147483648\), got -2 at index 1", {"prefix_len": ([0, -2], "int32")}),
    (ValueError, "prefix_len must be 0 or more, got -1", {"prefix_len": -1}),
    (ValueError, r"learnable_sink must have shape \[4\], got \[2\]", {"learnable_sink": ([1, 1], "float32")}),
    (ValueError, "k_scale must be one number, got 2", {"k_scale": ([1.0, 1.0], "float32")}),
    (ValueError, "v_scale must be one number, got 0", {"v_scale": ([], "float32")}),
    (ValueError, r"out must have shape \[2, 3, 4, 16\], got \[2, 4, 3, 16\]", {"out": ((2, 4, 3, 16), "bfloat16")}),
    (ValueError, "softcap must be 0 or more, got -1", {"softcap": -1.0}),
    (ValueError, "softcap must be 0 or more, got nan", {"softcap": float("nan")}),
    (ValueError, "window_size must be None, -1 or more on the left, got -2", {"window_size": (-2, 0)}),
    (ValueError, "window_size must be None, -1 or more on the right, got -3", {"window_size": (None, -3)}),
    (ValueError, r"window_size must be a pair \(left, right\), got 5", {"window_size": 5}),
    (ValueError, "num_splits must be 0 or more, got -1", {"num_splits": -1}),
    (ValueError, "fresh_tokens must be 0 or more, got -1", {"fresh_tokens": -1}),
    (TypeError, "q must be an array", {"q": [1.0]}),
    (TypeError, "k_cache must be an array", {"k": [1.0]}),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(backend: Backend, case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KESTREL_CHECK", "1")
    error, message, changes = BAD[case]
    values: dict[str, Any] = {
        "q": ((2, 3, 4, 16), "bfloat16"), "k": ((30, 2, 2, 16), "bfloat16"), "v": ((30, 2, 2, 16), "bfloat16"),
        "page_table": (np.arange(10).reshape(2, 5), "int32"), "seqused_k": ([1, 4], "int32"),
        "out": ((2, 3, 4, 16), "bfloat16"),
    }  # fmt: skip
    arguments: dict[str, Any] = {}
    for name, value in (values | changes).items():
        if isinstance(value, tuple) and isinstance(value[1], str):
            content, dtype = value
            arguments[name] = (
                backend.poisoned(content, dtype) if isinstance(content, tuple) else backend.array(content, dtype)
            )
        else:
            arguments[name] = value
    q, k, v = (arguments.pop(name) for name in "qkv")
    with pytest.raises(error, match=f"^flash_attn_with_kvcache: {message}"):
        cute.flash_attn_with_kvcache(q, k, v, **arguments)
    if arguments["out"] is not None:
        assert np.isnan(backend.numpy(arguments["out"])).all()


BAD_PACKED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "cu_seqlens_q must be an array, got None", {"cu_seqlens_q": None}),
    (TypeError, "cu_seqlens_q must be int32, got int64", {"cu_seqlens_q": ([0, 3, 6], "int64")}),
    (TypeError, "cu_seqlens_k must be int32, got float32", {"cu_seqlens_k": ([0, 3, 6], "float32")}),
    (ValueError, "cu_seqlens_q must be B . 1 offsets long, got 0", {"cu_seqlens_q": ([], "int32")}),
    (ValueError, "cu_seqlens_q must be offsets that start at 0 or above and never fall, got -1",
     {"cu_seqlens_q": ([-1, 3, 6], "int32")}),
    (ValueError, "cu_seqlens_q must be offsets that start at 0 or above and never fall, got 2",
     {"cu_seqlens_q": ([0, 3, 2], "int32")}),
    (ValueError, "cu_seqlens_q must be offsets into the rows there are, got 7", {"cu_seqlens_q": ([0, 3, 7], "int32")}),
    (ValueError, r"cu_seqlens_k must have shape \[3\], got \[2\]", {"cu_seqlens_k": ([0, 8], "int32")}),
    (ValueError, "cu_seqlens_k must be offsets into the rows there are, got 9", {"cu_seqlens_k": ([0, 3, 9], "int32")}),
    (ValueError, "max_seqlen_q must be at least the longest sequence, got 2 for a length of 3", {"max_seqlen_q": 2}),
    (ValueError, "max_seqlen_q must be 0 or more, got -1", {"max_seqlen_q": -1}),
    (ValueError, "max_seqlen_k must be at least the longest sequence, got 4 for a length of 5", {"max_seqlen_k": 4}),
    (ValueError, "seqused_k must be within the keys, got 4", {"seqused_k": ([4, 5], "int32")}),
    (ValueError, r"k must have shape \[2, Sk, Hk, 16\], got \[8, 1, 16\]", {"cu_seqlens_k": None}),
    (ValueError, "cu_seqlens_k must be None where a page_table is given", {"page_table": ([[0], [0]], "int32")}),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD_PACKED)))
def test_bad_packed_input(backend: Backend, case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KESTREL_CHECK", "1")
    error, message, changes = BAD_PACKED[case]
    arguments: dict[str, Any] = {
        "cu_seqlens_q": ([0, 3, 6], "int32"), "cu_seqlens_k": ([0, 3, 8], "int32"),
        "max_seqlen_q": 3, "max_seqlen_k": 5,
    }  # fmt: skip
    arguments |= changes
    for name, value in arguments.items():
        if isinstance(value, tuple):
            arguments[name] = backend.array(*value)
    q, k = backend.array(random((6, 2, 16)), "bfloat16"), backend.array(random((8, 1, 16)), "bfloat16")
    out = backend.poisoned((6, 2, 16), "bfloat16")
    with pytest.raises(error, match=f"^flash_attn_varlen_func: {message}"):
        cute.flash_attn_varlen_func(q, k, k, out=out, **arguments)
    assert np.isnan(backend.numpy(out)).all()


def test_last_dimension_must_be_contiguous(backend: Backend) -> None:
    q, wide = backend.array(random((1, 2, 1, 8)), "bfloat16"), backend.array(random((1, 2, 1, 16)), "bfloat16")
    for name, arguments in (
        ("q", (wide[..., ::2], q, q)),
        ("k", (q, wide[..., ::2], q)),
        ("v", (q, q, wide[..., ::2])),
    ):
        with pytest.raises(ValueError, match=f"^flash_attn_func: {name} must have a contiguous last dimension"):
            cute.flash_attn_func(*arguments)
