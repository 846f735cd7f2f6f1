"""FlashAttentionFwd, CUDA's kernel for many queries: its tiles' edges, its sources of keys, its bet on the softmax."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from attention_oracle import attend
from hypothesis import given, settings
from hypothesis import strategies as st
from kestrel_kernels.flash_attn import cute
from support import BACKENDS, CUDA_BACKENDS, HALVES, Backend, assert_close, assert_replays_repeat, random
from test_attention import Case, draw_options

KERNEL = "FlashAttentionFwd"
pytestmark = pytest.mark.skipif(not CUDA_BACKENDS, reason="a kernel of CUDA")
TILE = 64  # queries of a group, keys of a step
SIZES = [17, TILE - 1, TILE, TILE + 1, 2 * TILE, 3 * TILE + 1, 300]
SOURCES: dict[str, dict[str, Any]] = {
    "boxes": {},
    "packed": {"packed_q": True, "packed_k": True},
    "paged": {"page_size": 1},
    "pages": {"page_size": 48},
    "converted": {"kv_dtype": "float8_e4m3fn"},
    "converted_paged": {"kv_dtype": "float8_e4m3fn", "page_size": 3},
}


@pytest.fixture(autouse=True)
def on_cuda(request: pytest.FixtureRequest) -> None:
    if "backend" in request.fixturenames and request.getfixturevalue("backend").device != "cuda":
        pytest.skip("a kernel of CUDA")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=["full", "causal"])
def test_tile_edges(backend: Backend, source: str, options: dict[str, Any]) -> None:
    for n in SIZES:
        Case([(n, n)], (2, 1), options=options, **SOURCES[source]).check(backend, KERNEL)
    keys = [0, 1, TILE - 1, TILE, TILE + 1, 2 * TILE - 1, 2 * TILE, 2 * TILE + 1, 200]
    Case([(70, n) for n in keys], options=options, **SOURCES[source]).check(backend, KERNEL)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("width", [40, 64, 72, 80, 96, 104, 128])
@pytest.mark.parametrize("dtype", HALVES)
def test_head_sizes(backend: Backend, source: str, width: int, dtype: str) -> None:
    case = Case([(100, 170), (30, 30), (100, 100)], (4, 2), width, dtype, options={"causal": True}, **SOURCES[source])
    if not case.packed_q:
        case.lengths = [(100, 170), (100, 100)]
    case.check(backend, KERNEL)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("width", [136, 192, 256])
def test_wide_heads(backend: Backend, source: str, width: int) -> None:
    Case([(100, 170)], (2, 1), width, options={"causal": True}, **SOURCES[source]).check(backend, KERNEL)
    Case([(150, 300)], (4, 2), width, "float16", options={"prefix_len": 200}, **SOURCES[source]).check(backend, KERNEL)


@pytest.mark.parametrize("width", [64, 72, 128])
def test_many_tiles(backend: Backend, width: int) -> None:
    """More than one wave, and packed sequences of every kind."""
    Case([(700, 800)] * 3, (16, 4), width, options={"causal": True}).check(backend, KERNEL)
    lengths = [(i * 37 % 90, i * 53 % 140) for i in range(40)]
    Case(lengths, (6, 3), width, options={"causal": True}, **SOURCES["packed"]).check(backend, KERNEL)
    Case(lengths, (6, 3), width, options={"window_size": (20, 5)}, **SOURCES["packed"]).check(backend, KERNEL)


@pytest.mark.parametrize(
    ("batch", "queries", "width", "source"),
    [(9, 150, 64, "boxes"), (9, 150, 72, "boxes"), (9, 250, 72, "boxes"), (11, 150, 64, "boxes"),
     (12, 150, 64, "boxes"), (12, 150, 72, "boxes"), (12, 250, 72, "boxes"), (12, 150, 64, "paged"),
     (12, 150, 64, "converted"), (12, 150, 80, "converted"), (3, 729, 72, "boxes"), (7, 729, 72, "boxes"),
     (3, 700, 64, "paged")],
)  # fmt: skip
def test_parts(backend: Backend, batch: int, queries: int, width: int, source: str) -> None:
    """Heads that are left over after whole rounds on 132 SMs, taken in parts of one group, of two or of three."""
    Case([(queries, 100 + 9 * i) for i in range(batch)], (16, 4), width, **SOURCES[source]).check(backend, KERNEL)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), backend=st.sampled_from(CUDA_BACKENDS or BACKENDS))
def test_combinations(data: st.DataObject, backend: Backend) -> None:
    draw = data.draw
    source = dict(SOURCES[draw(st.sampled_from(list(SOURCES)))])
    if "page_size" in source:
        source["page_size"] = draw(st.integers(1, 80))
    batch, len_q = draw(st.integers(1, 3)), draw(st.integers(17, 400))
    lengths = [
        (draw(st.integers(17, 200)) if "packed_q" in source else len_q, draw(st.integers(0, 500))) for _ in range(batch)
    ]
    k_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    options = draw_options(draw, batch, k_heads * group, most_prefix=450, most_side=300)
    if draw(st.booleans()):
        options["softmax_scale"] = draw(st.sampled_from([-0.1, 0.0, 0.05, 0.3]))
    Case(
        lengths, (k_heads * group, k_heads), draw(st.sampled_from([64, 64, 72, 128])), draw(st.sampled_from(HALVES)),
        spare=draw(st.integers(0, 70)), options=options, seed=draw(st.integers(0, 99)), **source,
    ).check(backend, KERNEL)  # fmt: skip


@pytest.mark.parametrize("width", [64, 72, 128])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rise", [-5.0, -1.38, -1.3, -0.5, -0.05, 0.05, 0.5, 5.0])
@pytest.mark.parametrize("step", [1, TILE])
def test_scores_that_grow(backend: Backend, width: int, dtype: str, causal: bool, rise: float, step: int) -> None:
    """Scores that grow from tile to tile, either way: by less than the weights' margin, by more, by as much as sums of
    them can hold, and by more."""
    check_scores_that_grow(backend, 2, width, dtype, causal, rise, step)


@pytest.mark.parametrize("rise", [-1.3, 0.5, 5.0])
def test_scores_that_grow_in_waves(backend: Backend, rise: float) -> None:
    """In the tile of four groups for more than one wave."""
    check_scores_that_grow(backend, 60, 72, "bfloat16", False, rise, TILE)


def check_scores_that_grow(
    backend: Backend, heads: int, width: int, dtype: str, causal: bool, rise: float, step: int
) -> None:
    tokens = 400
    q = np.abs(random((1, tokens, heads, width)))
    q /= q.mean(axis=-1, keepdims=True)
    k = np.broadcast_to((np.arange(tokens) // step * step)[None, :, None, None] * rise / np.sqrt(width), q.shape)
    q, k, v = (backend.array(x, dtype) for x in (q, k, random(q.shape, 2)))
    out, lse = cute.flash_attn_func(q, k, v, causal=causal, return_lse=True)
    assert cute.last_kernel() == KERNEL
    got, got_lse = backend.numpy(out)[0], backend.numpy(lse)[0]
    want, want_lse = attend(*(backend.numpy(x)[0] for x in (q, k, v)), causal=causal)
    # fp32 scores near s are off by s 2^-22 or so, and the weights, relatively, by as much.
    top = np.abs(want_lse).max() + 1
    assert np.abs(got - want).max() <= (2.0**-7 if dtype == "bfloat16" else 2.0**-9) * 4 + top * 4e-6
    assert np.abs(got_lse - want_lse).max() <= top * 4e-6


def test_a_row_does_not_depend_on_the_batch(backend: Backend) -> None:
    """The same bits alone, in a batch, or packed; on every run."""
    options = {"causal": True, "window_size": (150, None)}
    whole = Case([(150, 300), (150, 170)], (3, 1), options=options).run(backend)
    alone = Case([(150, 300)], (3, 1), options=options).run(backend)
    for a, b in zip(whole[0], alone[0], strict=True):
        assert np.array_equal(a, b)
    many = Case([(150, 300)] + [(150, 170)] * 60, (3, 1), options=options)
    first = many.run(backend)
    for a, b in zip(first[0], alone[0], strict=True):
        assert np.array_equal(a, b)
    for _ in range(5):
        again = many.run(backend)
        assert all(np.array_equal(x[0], y[0]) for x, y in zip(first, again, strict=True))


# What the loader takes keys from, in tiles of one wave, of several, and of blocks that go from one to the next.
REPLAYED: dict[str, tuple[dict[str, Any], int, tuple[int, int], int]] = {
    "one_wave": ({"causal": True}, 1, (8, 4), 64),
    "waves": ({"causal": True}, 3, (32, 8), 64),
    "persistent": ({}, 4, (32, 32), 72),
    "wide": ({"prefix_len": 300, "window_size": (500, None)}, 2, (16, 2), 128),
    "widest": ({"causal": True}, 2, (8, 4), 256),
}


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("problem", REPLAYED)
def test_replays(backend: Backend, problem: str, paged: bool, kv_dtype: str) -> None:
    """A captured graph serves other lengths, and a thousand replays give the same bits."""
    if backend.framework != "torch":
        pytest.skip("graphs are torch's here")
    import torch

    options, batch, heads, width = REPLAYED[problem]
    tokens, room = 500, 640
    q = backend.array(random((batch, tokens, heads[0], width)), "bfloat16")
    shape = (batch * room, 1, heads[1], width) if paged else (batch, room, heads[1], width)
    k, v = (backend.array(random(shape, i), kv_dtype) for i in (1, 2))
    table = torch.randperm(batch * room, device="cuda").int().view(batch, room) if paged else None
    used = torch.full((batch,), room, dtype=torch.int32, device="cuda")

    def attend_once() -> Any:
        return cute.flash_attn_with_kvcache(q, k, v, page_table=table, seqused_k=used, return_lse=True, **options)

    attend_once()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend_once()
    assert cute.last_kernel() == KERNEL
    for lengths in ([room] * 4, [500, 0, 1, 65], [TILE, 333, room, 501]):
        used.copy_(torch.tensor(lengths[:batch]))
        graph.replay()
        want, want_lse = attend_once()
        assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert_replays_repeat(graph, (out, want), (lse, want_lse))


def test_replays_of_packed_sequences(backend: Backend) -> None:
    """With other boundaries than at capture, sequences of no token among them."""
    if backend.framework != "torch":
        pytest.skip("graphs are torch's here")
    import torch

    q, k, v = (backend.array(random((700, 8, 64), i), "bfloat16") for i in range(3))
    starts = torch.tensor([0, 700, 700, 700, 700], dtype=torch.int32, device="cuda")

    def attend_once() -> Any:
        return cute.flash_attn_varlen_func(q, k, v, starts, starts, 700, 700, causal=True, return_lse=True)

    attend_once()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend_once()
    assert cute.last_kernel() == KERNEL
    for ends in ([0, 100, 163, 164, 700], [0, 0, 63, 640, 700], [0, 65, 65, 350, 700]):
        starts.copy_(torch.tensor(ends))
        graph.replay()
        want, want_lse = attend_once()
        assert torch.equal(out, want) and torch.equal(lse, want_lse)
        for first, last in itertools.pairwise(ends):
            true, _ = attend(*(backend.numpy(x[first:last]) for x in (q, k, v)), causal=True)
            assert_close(backend.numpy(out[first:last]), true, "bfloat16", slack=2.0**-6)
    assert_replays_repeat(graph, (out, want), (lse, want_lse))


def test_lengths_out_of_range(backend: Backend) -> None:
    """Whatever the tensors of lengths hold, nothing outside q, k, v and out is touched."""
    q, k = (backend.array(random((200, 2, 64), i), "bfloat16") for i in range(2))
    for starts_q, starts_k in (([-50, 90, 400], [-7, 300, 90]), ([300, -5, 2**31 - 1], [0, 2**31 - 1, 100])):
        cu_q, cu_k = backend.array(starts_q, "int32"), backend.array(starts_k, "int32")
        cute.flash_attn_varlen_func(q, k, k, cu_q, cu_k, None, None, causal=True)
    used, table = backend.array([2**31 - 1, -3], "int32"), backend.array(np.full((2, 90), 10**9), "int32")
    cute.flash_attn_with_kvcache(q[None][:, :100], k[:, None], k[:, None], table[:1], used[:1], causal=True)
    q2 = backend.array(random((2, 50, 2, 64)), "bfloat16")
    out = cute.flash_attn_with_kvcache(q2, k[:, None], k[:, None], table, used)
    assert not np.isnan(backend.numpy(out)).any()


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("width", [64, 80, 256])
def test_pages_that_are_none(backend: Backend, kv_dtype: str, width: int) -> None:
    """Their keys are seen by nobody."""
    pages = backend.array(random((300, 1, 2, width), 1), kv_dtype)
    q = backend.array(random((1, 200, 2, width)), "bfloat16")
    good = np.random.default_rng(0).permutation(300)
    table = np.stack([good, np.resize([-1, 300, 2**31 - 1, -(2**31)], 300)], 1).reshape(1, -1)
    first, second = (
        cute.flash_attn_with_kvcache(q, pages, pages, backend.array(x, "int32"), return_lse=True)
        for x in (table, good[None])
    )
    assert cute.last_kernel() == KERNEL
    # The same keys in other tiles: each weight is rounded once in both.
    for got, want in zip(first, second, strict=True):
        assert_close(backend.numpy(got), backend.numpy(want), "bfloat16", slack=2.0**-8)
    none, lse = cute.flash_attn_with_kvcache(q, pages, pages, backend.array(table[:, 1::2], "int32"), return_lse=True)
    assert not backend.numpy(none).any() and np.isneginf(backend.numpy(lse)).all()


@pytest.mark.parametrize("width", [64, 80, 128])
@pytest.mark.parametrize("paged", [False, True])
def test_what_stands_behind_a_sequence(backend: Backend, width: int, paged: bool) -> None:
    """Its last queries share a warp with NaN, with large numbers, with nothing: the same bits."""
    q = random((200, 2, width))
    k = backend.array(random((150, 1, 2, width) if paged else (150, 2, width), 1), "bfloat16")
    where: dict[str, Any] = {"page_table": backend.array(np.arange(150)[None], "int32")} if paged else {}
    starts_q, starts_k = (backend.array([0, n], "int32") for n in (100, 150))
    results = []
    for rows, behind in ((100, 0.0), (200, np.nan), (200, 1e4), (200, np.inf)):
        q[100:] = behind
        out, lse = cute.flash_attn_varlen_func(
            backend.array(q[:rows], "bfloat16"), k, k, starts_q, None if paged else starts_k, None, None, causal=True,
            return_lse=True, **where,
        )  # fmt: skip
        assert cute.last_kernel() == KERNEL
        results.append((backend.bits(out)[:100].tobytes(), backend.bits(lse)[:, :100].tobytes()))
    assert results == [results[0]] * 4


@pytest.mark.parametrize("of", ["q", "k"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_keeps_to_its_row(backend: Backend, of: str, bad: float) -> None:
    """A query of NaN, or a key that late queries see: the others, some in the same warp, are right."""
    arrays = {
        name: backend.numpy(backend.array(random((1, 200, 2, 64), i), "bfloat16")) for i, name in enumerate("qkv")
    }
    want, _ = attend(*(x[0] for x in arrays.values()), causal=True)
    most, _ = attend(arrays["q"][0], arrays["k"][0], np.abs(arrays["v"][0]), causal=True)
    arrays[of][0, 150] = bad
    q, k, v = (backend.array(x, "bfloat16") for x in arrays.values())
    got = backend.numpy(cute.flash_attn_func(q, k, v, causal=True))[0]
    assert cute.last_kernel() == KERNEL
    others = np.delete(np.arange(200), 150) if of == "q" else np.arange(150)
    assert_close(got[others], want[others], "bfloat16", slack=3e-6 + 2.0**-8 * most[others])
    if np.isnan(bad):
        assert np.isnan(np.delete(got, others, axis=0)).all()
