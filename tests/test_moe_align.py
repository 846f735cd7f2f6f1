"""moe_align: both ops against NumPy, written from the contract, to the bit, on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kestrel_kernels import _library, moe_align
from support import BACKENDS, CUDA_BACKENDS, HAS_JAX, Backend

POISON = np.iinfo(np.int32).max
GAP = 3  # untouched elements on both sides of each output


def places(count: int, experts: int, size: int) -> int:
    """What the contract has callers allocate."""
    return count * size if count < experts else count + experts * (size - 1)


def expected(
    ids: np.ndarray, experts: int, size: int, length: int, blocks: int, expert_map: Any = None, taken: Any = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`taken`: which tokens count (those of one LoRA)."""
    flat = ids.reshape(-1)
    counts = np.ones(flat.shape, bool) if taken is None else np.repeat(taken, ids.shape[1])
    sorted_ids = np.full(length, flat.size, np.int32)
    expert_ids = np.zeros(blocks, np.int32)
    end = 0
    for expert in np.unique(flat[(flat >= 0) & (flat < experts)]):
        local = expert if expert_map is None or not len(expert_map) else expert_map[expert]
        group = np.flatnonzero((flat == expert) & counts)
        if local < 0 or not len(group):
            continue
        padded = -(-len(group) // size) * size
        sorted_ids[end : end + len(group)] = group
        expert_ids[end // size : (end + padded) // size] = local
        end += padded
    return sorted_ids, expert_ids, np.array([end])


def check(
    b: Backend, ids: np.ndarray, experts: int, size: int, expert_map: Any = None, spare: int = 0, loras: int = 0,
    mapping: Any = None, wide: bool = False,
) -> None:  # fmt: skip
    """One call; with `loras` one of the LoRA form. The outputs lie inside poisoned arrays, the ids in wider rows."""
    length = places(ids.size, experts, size) + spare
    blocks = length // size
    rows = loras if mapping is not None else 1
    whole = [
        b.poisoned((rows, n + 2 * GAP), dtype)
        for n, dtype in ((length, "int32"), (blocks, "int32"), (1, "int64" if wide else "int32"))
    ]
    outs = [w[:, GAP:-GAP] for w in whole]
    wider = b.array(np.pad(ids, ((0, 0), (1, 2)), constant_values=1), "int32")[:, 1:-2]
    map_ = None if expert_map is None else b.array(expert_map, "int32")
    for _ in range(2):  # a second time over its own results
        if mapping is None:
            moe_align.moe_align_block_size(wider, experts, size, outs[0][0], outs[1][0], outs[2][0], map_)
        else:
            lora_of = b.array(mapping, "int32")
            moe_align.moe_lora_align_block_size(
                wider, lora_of, experts, size, outs[0], outs[1], outs[2][:, 0], map_
            )  # fmt: skip
        for row in range(rows):
            taken = None if mapping is None else mapping == row
            want = expected(ids, experts, size, length, blocks, expert_map, taken)
            for out, right in zip(whole, want, strict=True):
                got = b.numpy(out)[row]
                assert np.array_equal(got[GAP:-GAP], right)
                poison = np.iinfo(got.dtype).max
                assert (got[:GAP] == poison).all() and (got[-GAP:] == poison).all()


def draw(tokens: int, slots: int, experts: int, seed: int = 0, beyond: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-beyond, experts + beyond, (tokens, slots))


@pytest.mark.parametrize(
    ("tokens", "slots", "experts", "size"),
    [(0, 8, 64, 16), (3, 0, 4, 2), (1, 1, 1, 1), (1, 8, 64, 16), (16, 8, 64, 64), (32, 8, 64, 8), (33, 8, 64, 8),
     (5, 2, 64, 128), (7, 3, 65, 5), (100, 4, 512, 16), (20, 8, 513, 16), (60, 6, 1024, 1), (4, 2, 1024, 1000),
     (128, 8, 8, 64), (740, 8, 64, 16), (512, 8, 1000, 4), (1023, 4, 60, 32), (2000, 4, 64, 300),
     (129, 8, 33, 7), (1024, 8, 65, 1), (1024, 8, 512, 1), (150, 8, 513, 16)],
)  # fmt: skip
def test_sizes(backend: Backend, tokens: int, slots: int, experts: int, size: int) -> None:
    check(backend, draw(tokens, slots, experts), experts, size)


@pytest.mark.parametrize("count", [4095, 4096, 4097, 8191, 8192, 8193, 9216, 40000, 131071, 131072, 131073])
def test_around_the_kernels_limits(backend: Backend, count: int) -> None:
    check(backend, draw(count, 1, 64, beyond=1), 64, 128)
    if count < 10000 or count == 131073:
        check(backend, draw(count, 1, 1000), 1000, 3, spare=5)


@settings(deadline=None, max_examples=80)
@given(
    tokens=st.integers(0, 1200), slots=st.integers(0, 9), experts=st.integers(1, 1024), size=st.integers(1, 150),
    kind=st.sampled_from(["any", "beyond", "one", "few"]), local=st.sampled_from(["all", "none given", "some"]),
    spare=st.sampled_from([0, 1, 77, 40000]), loras=st.sampled_from([0, 0, 1, 3]), wide=st.booleans(),
    seed=st.integers(0, 9), backend=st.sampled_from(BACKENDS),
)  # fmt: skip
def test_anything(
    tokens: int, slots: int, experts: int, size: int, kind: str, local: str, spare: int, loras: int, wide: bool,
    seed: int, backend: Backend,
) -> None:  # fmt: skip
    ids = draw(tokens, slots, min(experts, 4) if kind == "few" else experts, seed, 5 * (kind == "beyond"))
    if kind == "one":
        ids[:] = experts - 1
    some = np.random.default_rng(seed).permutation(2 * experts)[:experts] - experts
    expert_map = {"all": None, "none given": np.zeros(0), "some": some}[local]
    mapping = np.random.default_rng(seed + 1).integers(-1, loras, tokens) if loras else None
    check(backend, ids, experts, size, expert_map, spare, loras, mapping, wide)


@pytest.mark.parametrize("ids", [[-1, -(2**31), 2**31 - 1, 64], [63, 0, 63, 0], [-1, 5, 64, 5]])
def test_ids_out_of_range(backend: Backend, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are left out, and legal: KESTREL_CHECK=1 says nothing either."""
    for checks in ("0", "1"):
        monkeypatch.setenv("KESTREL_CHECK", checks)
        check(backend, np.array([ids] * 50), 64, 16)


@pytest.mark.parametrize("count", [24, 3000, 9000])
def test_ranks(backend: Backend, count: int) -> None:
    """Two ranks with half of the experts each: together the whole, ids counted from 0 on both."""
    ids, size = draw(count // 8, 8, 64), 16
    length = places(ids.size, 64, size)
    for rank in range(2):
        expert_map = np.where(np.arange(64) // 32 == rank, np.arange(64) % 32, -1)
        check(backend, ids, 64, size, expert_map)
        mine, *_ = expected(ids, 64, size, length, length // size, expert_map)
        assert {int(i) for i in mine} - {ids.size} == set(np.flatnonzero(ids.reshape(-1) // 32 == rank))


@pytest.mark.parametrize("loras", [0, 1, 2, 5])
@pytest.mark.parametrize("tokens", [0, 1, 40, 1500])
def test_loras(backend: Backend, loras: int, tokens: int) -> None:
    mapping = np.random.default_rng(1).integers(-2, max(loras - 1, 0), tokens)  # the last one has none
    check(backend, draw(tokens, 6, 60, beyond=1), 60, 16, loras=loras, mapping=mapping)


def test_lora_out_of_range(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend.device == "cuda":
        monkeypatch.delenv("KESTREL_CHECK", raising=False)
        check(backend, draw(3, 2, 4), 4, 2, loras=2, mapping=np.array([0, 2, 2**31 - 1]))
    monkeypatch.setenv("KESTREL_CHECK", "1")
    with pytest.raises(ValueError, match=r"^moe_lora_align_block_size: token_lora_mapping must lie in \[0, 2\) or be "):
        check(backend, draw(3, 2, 4), 4, 2, loras=2, mapping=np.array([0, -1, 2]))


@pytest.mark.skipif(not HAS_JAX, reason="JAX is not installed")
def test_jax() -> None:
    ids = draw(5, 2, 8)
    outs = [np.full(n, POISON, np.int32) for n in (26, 13, 1)]
    moe_align.moe_align_block_size(Backend("jax").array(ids, "int32"), 8, 2, *outs)
    want = expected(ids, 8, 2, 26, 13)
    assert all(np.array_equal(a, b) for a, b in zip(outs, want, strict=True))
    with pytest.raises(TypeError, match="expert_ids must be writable, got a JAX array"):
        moe_align.moe_align_block_size(ids, 8, 2, outs[0], Backend("jax").array(outs[1], "int32"), outs[2])


def test_workspace_bytes() -> None:
    for assignments, experts, loras in ((8192, 64, 1), (8193, 64, 1), (131072, 1024, 7)):
        want = _library.load().moe_align_workspace_bytes(assignments, experts, loras)
        assert moe_align.workspace_bytes(assignments, experts, loras) == want


def test_totals_past_31_bits() -> None:
    """The padded total may pass what int32 holds: then it must be int64. The check stands before any write."""
    ids, short = np.zeros((2, 1), np.int32), np.full(1, POISON, np.int32)
    size = 2**30 + 1
    unmapped = np.lib.stride_tricks.as_strided(short, (2 * size,), (4,), writeable=True)  # never touched
    with pytest.raises(TypeError, match="num_tokens_post_pad must be int64, got int32"):
        moe_align.moe_align_block_size(ids, 2, size, unmapped, np.full(2, POISON, np.int32), short)
    assert short[0] == POISON


def bad_calls(b: Backend) -> list[tuple[type[Exception], str, dict[str, Any]]]:
    def ints(*shape: int, dtype: str = "int32") -> Any:
        return b.array(np.zeros(shape), dtype)

    def out(*shape: int, dtype: str = "int32") -> Any:
        return b.poisoned(shape, dtype)

    return [
        (TypeError, "topk_ids must be int32, got int64", {"topk_ids": ints(6, 2, dtype="int64")}),
        (TypeError, "sorted_token_ids must be int32, got int64", {"sorted_token_ids": out(24, dtype="int64")}),
        (TypeError, "expert_ids must be int32, got float32", {"expert_ids": out(6, dtype="float32")}),
        (TypeError, "num_tokens_post_pad must be int32 or int64, got", {"num_tokens_post_pad": out(1, dtype="int16")}),
        (TypeError, "expert_map must be int32, got int64", {"expert_map": ints(4, dtype="int64")}),
        (ValueError, r"topk_ids must have shape \[T, K\], got \[12\]", {"topk_ids": ints(12)}),
        (ValueError, "topk_ids must have a contiguous last dimension", {"topk_ids": ints(6, 4)[:, ::2]}),
        (ValueError, "num_experts must be from 1 to 1024, got 0", {"num_experts": 0}),
        (ValueError, "num_experts must be from 1 to 1024, got 1025", {"num_experts": 1025}),
        (ValueError, "block_size must be from 1 to 2\\^31 - 1, got 0", {"block_size": 0}),
        (ValueError, "block_size must be from 1 to 2\\^31 - 1, got -3", {"block_size": -3}),
        (ValueError, "sorted_token_ids must hold at least 24 elements, got 23", {"sorted_token_ids": out(23)}),
        (ValueError, "sorted_token_ids must have 1 dimension, got shape", {"sorted_token_ids": out(1, 24)}),
        (ValueError, "sorted_token_ids must have a contiguous last", {"sorted_token_ids": out(48)[::2]}),
        (ValueError, "expert_ids must hold at least 6 elements, got 5", {"expert_ids": out(5)}),
        (ValueError, r"num_tokens_post_pad must have shape \[1\], got \[2\]", {"num_tokens_post_pad": out(2)}),
        (ValueError, r"expert_map must have shape \[4\], got \[3\]", {"expert_map": ints(3)}),
    ]


@pytest.mark.parametrize("case", range(17))
def test_bad_input(backend: Backend, case: int) -> None:
    error, message, changed = bad_calls(backend)[case]
    args = {
        "topk_ids": backend.array(draw(6, 2, 4), "int32"),
        "num_experts": 4,
        "block_size": 4,
        "sorted_token_ids": backend.poisoned((24,), "int32"),
        "expert_ids": backend.poisoned((6,), "int32"),
        "num_tokens_post_pad": backend.poisoned((1,), "int32"),
    }
    args.update(changed)
    with pytest.raises(error, match=f"^moe_align_block_size: {message}"):
        moe_align.moe_align_block_size(**args)
    for name in ("sorted_token_ids", "expert_ids", "num_tokens_post_pad"):
        got = backend.numpy(args[name])
        assert np.isnan(got).all() if got.dtype.kind == "f" else (got == np.iinfo(got.dtype).max).all()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("sorted_token_ids", (24,), "have 2 dimensions"), ("sorted_token_ids", (2, 23), "hold at least 24 elements"),
     ("expert_ids", (3, 6), r"have shape \[2, 6\]"), ("expert_ids", (2, 5), "hold at least 6 elements"),
     ("num_tokens_post_pad", (1,), r"have shape \[2\]"), ("token_lora_mapping", (5,), r"have shape \[6\]")],
)  # fmt: skip
def test_bad_lora_input(backend: Backend, name: str, shape: tuple[int, ...], message: str) -> None:
    args = {
        "topk_ids": backend.array(draw(6, 2, 4), "int32"),
        "token_lora_mapping": backend.array(np.zeros(6), "int32"),
        "num_experts": 4,
        "block_size": 4,
        "sorted_token_ids": backend.poisoned((2, 24), "int32"),
        "expert_ids": backend.poisoned((2, 6), "int32"),
        "num_tokens_post_pad": backend.poisoned((2,), "int32"),
    }
    args[name] = backend.poisoned(shape, "int32")
    with pytest.raises(ValueError, match=f"^moe_lora_align_block_size: {name} must {message}"):
        moe_align.moe_lora_align_block_size(**args)
    for out in ("sorted_token_ids", "expert_ids", "num_tokens_post_pad"):
        assert (backend.numpy(args[out]) == POISON).all()


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA_BACKENDS, reason="no CUDA device")
def test_workspace() -> None:
    """The caller's own, and what one that does not fit is told."""
    torch = pytest.importorskip("torch")
    ids = draw(3000, 4, 64)
    length = places(ids.size, 64, 16)
    want = expected(ids, 64, 16, length, length // 16)
    memory = torch.full((moe_align.workspace_bytes(ids.size, 64),), 255, dtype=torch.uint8, device="cuda")
    outs = [torch.full((n,), POISON, dtype=torch.int32, device="cuda") for n in (length, length // 16, 1)]
    on_device = torch.from_numpy(ids).int().cuda()
    for bad, message in (
        (memory[:100], r"workspace must be moe_align_workspace_bytes\(\) long, got 100"),
        (torch.cat([memory, memory])[1:], "workspace must be at a multiple of 4 bytes"),
        (memory.cpu(), "workspace must be on cuda:0 like topk_ids, got cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            moe_align.moe_align_block_size(on_device, 64, 16, *outs, workspace=bad)
        assert all((out == POISON).all() for out in outs)
    moe_align.moe_align_block_size(on_device, 64, 16, *outs, workspace=memory)
    assert all(np.array_equal(out.cpu(), right) for out, right in zip(outs, want, strict=True))


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA_BACKENDS, reason="no CUDA device")
@pytest.mark.parametrize("tokens", [1, 16, 740, 4000])
def test_graph_with_changed_routing(tokens: int) -> None:
    torch = pytest.importorskip("torch")
    length = places(tokens * 8, 64, 16)
    ids = torch.zeros(tokens, 8, dtype=torch.int32, device="cuda")
    outs = [torch.zeros(n, dtype=torch.int32, device="cuda") for n in (length, length // 16, 1)]
    moe_align.moe_align_block_size(ids, 64, 16, *outs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moe_align.moe_align_block_size(ids, 64, 16, *outs)
    for seed in range(20):
        routed = draw(tokens, 8, 64, seed, beyond=seed % 2)
        ids.copy_(torch.from_numpy(routed))
        graph.replay()
        want = expected(routed, 64, 16, length, length // 16)
        assert all(np.array_equal(out.cpu(), right) for out, right in zip(outs, want, strict=True))
