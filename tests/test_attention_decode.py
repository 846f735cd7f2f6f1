"""flash_attn_with_kvcache for few queries, decoding and speculative tokens, over every layout and on every backend. On
CUDA also the kernels' promises: graphs replayed with other lengths, the same bits again and whatever the neighbours,
keys that the kernel before has only just written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kestrel_kernels as kk
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kestrel_kernels import kv_cache_write
from kestrel_kernels._attention_plan import H200_SMS, attention_plan
from kestrel_kernels.flash_attn import cute
from support import BACKENDS, HALVES, Backend, assert_replays_repeat
from test_attention import Case, draw_options

LENGTHS = [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300]
SPLIT = "FlashAttentionDecodeSm90PersistentSplitFused"


@settings(deadline=None, max_examples=200)
@given(data=st.data(), backend=st.sampled_from(BACKENDS))
def test_combinations(data: st.DataObject, backend: Backend) -> None:
    draw = data.draw
    len_q = draw(st.sampled_from([1, 1, 1, 2, 4, 7, 16]))
    lengths = [(len_q, draw(st.sampled_from(LENGTHS))) for _ in range(draw(st.integers(1, 4)))]
    group = draw(st.sampled_from([1, 1, 2, 3, 4, 8, 9, 64]))
    k_heads = draw(st.sampled_from([1, 2, 3, 4, 8] if group < 64 else [1]))
    options = draw_options(draw, len(lengths), k_heads * group, most_prefix=160, most_side=140, one_in=3)
    case = Case(
        lengths, (k_heads * group, k_heads),
        draw(st.sampled_from([16, 64, 64, 72, 80, 96, 128, 128, 144, 240, 256, 256])), draw(st.sampled_from(HALVES)),
        draw(st.sampled_from([None, None, "float8_e4m3fn"])),
        page_size=draw(st.sampled_from([0, 1, 1, 2, 7, 16, 64])), spare=draw(st.sampled_from([0, 5, 700])),
        options=options, seed=draw(st.integers(0, 99)),
    )  # fmt: skip
    case.hints = {
        "num_splits": draw(st.sampled_from([0, 0, 0, 1, 2, 5, 31])),
        "fresh_tokens": draw(st.sampled_from([None, None, 0, 1, 40])),
        "batch_invariant": draw(st.sampled_from([False, False, True])),
    }
    case.check(backend)


@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn"])
@pytest.mark.parametrize(
    ("heads", "width"), [((64, 1), 64), ((32, 32), 64), ((32, 8), 128), ((9, 3), 64), ((8, 4), 256)]
)
@pytest.mark.parametrize("batch", [1, 5, 40])
def test_sizes(backend: Backend, batch: int, heads: tuple[int, int], width: int, kv_dtype: str | None) -> None:
    """What the rule chooses between, one query each and lengths far apart."""
    lengths = [(1, LENGTHS[i % len(LENGTHS)] if batch > 1 else 900) for i in range(batch)]
    if backend.device == "cpu" and batch == 40:
        lengths = lengths[:7]
    Case(lengths, heads, width, "bfloat16", kv_dtype, page_size=1, options={"causal": True}).check(backend)


@pytest.mark.parametrize(("heads", "keys", "blocks"), [(32, 740, 2), (13, 640, 5), (11, 740, 6), (9, 896, 7)])
@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn"])
def test_clusters(backend: Backend, kv_dtype: str | None, heads: int, keys: int, blocks: int) -> None:
    """Of as many blocks as have keys, whose shares of a row differ then."""
    plan = attention_plan(H200_SMS, 1, 1, keys, heads, heads, 64, e4m3=kv_dtype is not None, page_size=1, causal=True)
    assert plan["cluster"] == blocks
    Case([(1, keys)], (heads, heads), 64, "bfloat16", kv_dtype, page_size=1, options={"causal": True}).check(backend)


@pytest.mark.parametrize("page_size", [1, 16])
def test_steps_of_two_tokens_a_lane(backend: Backend, page_size: int) -> None:
    """Whose second half may have no key at all, or pages in other places."""
    lengths = [256, 200, 33, 32, 31, 1, 0, 64, 65, 129, 97, 96, 160, 191, 193, 255]
    plan = attention_plan(H200_SMS, 16, 1, 256, 32, 8, 128, e4m3=True, page_size=page_size, causal=True)
    assert plan["batches"] == 4
    requests = [(1, keys) for keys in lengths]
    Case(requests, (32, 8), 128, "bfloat16", "float8_e4m3fn", page_size=page_size, options={"causal": True}).check(
        backend
    )


class Cache:
    """Sequences of up to `room` tokens in shuffled pages, on CUDA; q for one token each."""

    def __init__(self, batch: int, room: int, heads: tuple[int, int] = (8, 8), page: int = 1, seed: int = 0) -> None:
        import torch

        generator = torch.Generator("cuda").manual_seed(seed)
        pages = batch * room // page
        self.k, self.v = (
            torch.randn(pages, page, heads[1], 64, device="cuda", generator=generator).bfloat16() for _ in range(2)
        )
        self.q = torch.randn(batch, 1, heads[0], 64, device="cuda", generator=generator).bfloat16()
        order = torch.randperm(pages, device="cuda", generator=generator).int()
        self.table = order.view(batch, room // page)
        self.used = torch.full((batch,), room, dtype=torch.int32, device="cuda")

    def attend(self, rows: Any = slice(None), **options: Any) -> Any:
        return cute.flash_attn_with_kvcache(
            self.q[rows], self.k, self.v, self.table[rows], self.used[rows], causal=True, return_lse=True, **options
        )


def cuda_only(backend: Backend) -> None:
    if backend.name != "torch-cuda":
        pytest.skip("graphs and streams are torch's here")


def replay(run: Callable[[], None]) -> None:
    """Once as it is, then five times as a graph."""
    import torch

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()


@pytest.mark.parametrize("options", [{}, {"num_splits": 7}, {"fresh_tokens": 1}, {"batch_invariant": True}])
@pytest.mark.parametrize(("batch", "room"), [(1, 8192), (1, 1024), (6, 6000), (40, 300)])
def test_replays(backend: Backend, batch: int, room: int, options: dict[str, Any]) -> None:
    """A captured graph serves other lengths, and gives the same bits every time."""
    cuda_only(backend)
    import torch

    cache = Cache(batch, room)
    cache.attend(**options)
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out, lse = cache.attend(**options)
    for lengths in (
        [room] * batch,
        list(range(1, batch + 1)),
        ([0, room // 2, room, 33, 1, min(900, room)] * 7)[:batch],
    ):
        cache.used.copy_(torch.tensor(lengths))
        graph.replay()
        want, want_lse = cache.attend(**options)
        assert torch.equal(out, want) and torch.equal(lse, want_lse)
        q, table = cache.q.double(), cache.table.long()
        for i, n in enumerate(lengths):
            k, v = (x[table[i, :n], 0].double() for x in (cache.k, cache.v))
            scores = torch.einsum("hd,thd->ht", q[i, 0], k) / 8
            true = torch.einsum("ht,thd->hd", scores.softmax(1), v)
            assert (out[i, 0] - true).abs().max() <= 0.01 * max(1.0, float(true.abs().max()))
    assert_replays_repeat(graph, (out, want), (lse, want_lse))


@pytest.mark.parametrize("heads", [(8, 8), (9, 3)])
def test_neighbours(backend: Backend, heads: tuple[int, int]) -> None:
    """batch_invariant: alone or among others, long and short, the same bits."""
    cuda_only(backend)
    import torch

    cache = Cache(6, 4096, heads, page=16)
    cache.used.copy_(torch.tensor([4096, 1, 513, 700, 0, 2000]))
    out, lse = cache.attend(batch_invariant=True)
    for i in range(6):
        alone, alone_lse = cache.attend(slice(i, i + 1), batch_invariant=True)
        assert torch.equal(alone[0], out[i]) and torch.equal(alone_lse[0], lse[i])
        some, _ = cache.attend(slice(i // 2 * 2, None), batch_invariant=True)
        assert torch.equal(some[i % 2], out[i])


def test_names(backend: Backend) -> None:
    cuda_only(backend)
    Cache(1, 4096).attend()
    assert cute.last_kernel() == SPLIT
    Cache(64, 64).attend()
    assert cute.last_kernel() == "FlashAttentionDecodeSm90"


@pytest.mark.parametrize("options", [{"fresh_tokens": 1}, {}, {"fresh_tokens": 1, "num_splits": 4}])
@pytest.mark.parametrize("room", [700, 5000])
def test_fresh_tokens(backend: Backend, room: int, options: dict[str, Any]) -> None:
    """The kernel before writes the newest token; with nothing promised, also the lengths and all pages."""
    cuda_only(backend)
    import torch

    cache = Cache(2, room)
    # One kernel after the other, in a graph: the newest token of each sequence, then attention, many times.
    steps = 40
    fresh = torch.randn(steps, 2, 2, 8, 64, device="cuda").bfloat16()
    one = torch.ones(1, device="cuda")
    outs: list[Any] = []

    slots = cache.table[:, -1].long()

    def run() -> None:
        outs.clear()
        for k, v in fresh:
            kv_cache_write.reshape_and_cache_flash(k, v, cache.k, cache.v, slots, "auto", one, one)
            outs.append(cache.attend(**options)[0])

    replay(run)
    got = [x.clone() for x in outs]

    for step in range(steps):
        cache.k.view(-1, 8, 64)[slots], cache.v.view(-1, 8, 64)[slots] = fresh[step]
        torch.cuda.synchronize()
        assert torch.equal(got[step], cache.attend(**options)[0])


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("width", [64, 128])
def test_keys_that_the_kernel_before_takes_away(backend: Backend, width: int, kv_dtype: str) -> None:
    """It leaves 7 of 54. The others, which may have been looked at while it still ran, are NaN."""
    cuda_only(backend)
    import torch

    def keys() -> Any:
        values = torch.randn(54, 1, 4, width, device="cuda")
        values[7:] = float("nan")
        return values.to(getattr(torch, kv_dtype))

    k, v = keys(), keys()
    q = torch.randn(1, 1, 4, width, device="cuda").bfloat16()
    table = torch.arange(54, dtype=torch.int32, device="cuda")[None]
    used = torch.full((1, 1), 54, dtype=torch.int32, device="cuda")
    lengths = torch.tensor([[54], [7]], dtype=torch.int32, device="cuda")
    first, second = (torch.tensor([i], device="cuda") for i in range(2))
    outs: list[Any] = []

    def run() -> None:
        outs.clear()
        for _ in range(40):
            kk.embedding_into(used, lengths, first)
            kk.embedding_into(used, lengths, second)
            outs.append(cute.flash_attn_with_kvcache(q, k, v, table, used[0], causal=True))

    replay(run)
    want = cute.flash_attn_with_kvcache(q, k[:7], v[:7], table[:, :7], lengths[1], causal=True)
    assert want.isfinite().all()
    for out in outs:
        assert torch.allclose(out, want, rtol=0.02, atol=0.02)
