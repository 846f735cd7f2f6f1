"""Layers of experts past 2^31 elements, as tests/test_large.py has it: weights, activations and results."""

from __future__ import annotations

from typing import Any

import kestrel_kernels as kk
import pytest
from test_large import FP8, PERIOD, Large, assert_repeats, large, torch

__all__ = ["large"]  # the fixture

F = torch.nn.functional
DTYPES = ["bf16", "fp8"]


def assert_right(array: Any, want: Any) -> None:
    """The first period near `want`, as near as tensor cores sum e4m3 products, and all others like it."""
    off = array[:PERIOD].double() - want.double()
    assert off.norm() < 4e-3 * want.double().norm() and off.abs().max() < 2e-2 * want.abs().max()
    assert_repeats(array)


class Routed:
    """Tokens of which 97 repeat, with their experts, and what the products take of them."""

    def __init__(self, large: Large, tokens: int, slots: int, experts: list[int], count: int, block_m: int) -> None:
        pattern = torch.arange(PERIOD * slots, device=large.device).view(PERIOD, slots) % len(experts)
        self.expert = torch.tensor(experts, device=large.device)[pattern]  # of the first period
        self.weights = large.normal(PERIOD, slots, dtype=torch.float32).abs()
        ids = large.repeated(self.expert.int(), tokens)
        assignments = tokens * slots
        places = assignments + min(assignments, count) * (block_m - 1)
        lists = [torch.empty(n, dtype=torch.int32, device=large.device) for n in (places, places // block_m, 1)]
        kk.moe_align_block_size(ids, count, block_m, *lists)
        self.tail = [large.repeated(self.weights, tokens), ids, *lists]


def operand(large: Large, dtype: str, *shape: int) -> tuple[Any, Any]:
    """bf16 and None, or e4m3 and its scales."""
    if dtype == "bf16":
        return large.normal(*shape), None
    return large.normal(*shape).to(FP8), large.normal(*shape[:-1], dtype=torch.float32).abs() + 0.5


def values(x: Any, scale: Any) -> Any:
    return x.double() if scale is None else x.double() * scale.double()[..., None]


def repeated(large: Large, operand: tuple[Any, Any], rows: int) -> list[Any]:
    """The operand, with its scale where it has one."""
    return [large.repeated(x.view(torch.uint8), rows).view(FP8) if x.dtype == FP8 else large.repeated(x, rows)
            for x in operand if x is not None]  # fmt: skip


def products(x: Any, w: Any, expert: Any) -> Any:
    """[97, K, out] of x [97, K or 1, depth]."""
    return torch.einsum("tkd,tkod->tko", x.expand(*expert.shape, -1), w[expert])


def test_align(large: Large) -> None:
    """A padded total past 2^31."""
    size = large.elements // 2 + 1
    ids = torch.tensor([[0], [1]], device=large.device).int()
    ordered = large.unwritten(2 * size, dtype=torch.int32)
    blocks, total = large.unwritten(2, dtype=torch.int32), large.unwritten(1, dtype=torch.int64)
    kk.moe_align_block_size(ids, 2, size, ordered, blocks, total)
    assert total.tolist() == [2 * size] and blocks.tolist() == [0, 1]
    assert ordered[[0, size]].tolist() == [0, 1] and int((ordered == 2).sum()) == 2 * size - 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_of_up(large: Large, dtype: str) -> None:
    """[T, 2, 2I] is past 2^31."""
    inner, hidden, experts = 1024, 32, 4
    tokens = large.rows(2 * 2 * inner)
    sizes: dict[str, Any] = {"num_experts": experts, "hidden_size": hidden, "intermediate_size": inner}
    routed = Routed(large, tokens, 2, [0, 1, 2], experts, kk.get_cute_moe_block_m(tokens, **sizes, dtype=dtype))
    x, w = operand(large, dtype, PERIOD, hidden), operand(large, dtype, experts, 2 * inner, hidden)
    out = large.unwritten(tokens, 2, 2 * inner)
    w_both = [part for part in w if part is not None]
    up: Any = kk.invoke_cute_moe_up if dtype == "bf16" else kk.invoke_cute_moe_up_fp8
    up(*repeated(large, x, tokens), *w_both, *[None] * len(w_both), *routed.tail, out=out)
    want = products(values(*x)[:, None], values(*w), routed.expert)
    assert_right(out, want)


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_input_of_down(large: Large, dtype: str, reduce: bool) -> None:
    """[T, 2, I] is past 2^31."""
    inner, hidden, experts = 2048, 32, 4
    tokens = large.rows(2 * inner)
    sizes: dict[str, Any] = {"num_experts": experts, "hidden_size": hidden, "intermediate_size": inner}
    routed = Routed(large, tokens, 2, [0, 1, 2], experts, kk.get_cute_moe_block_m(tokens, **sizes, dtype=dtype))
    x, w = operand(large, dtype, PERIOD, 2, inner), operand(large, dtype, experts, hidden, inner)
    out = large.unwritten(tokens, hidden) if reduce else large.unwritten(tokens, 2, hidden)
    down: Any = kk.invoke_cute_moe_down if dtype == "bf16" else kk.invoke_cute_moe_down_fp8
    down(*repeated(large, x, tokens), *(p for p in w if p is not None), *routed.tail, out=out, reduce=reduce)
    want = products(values(*x), values(*w), routed.expert) * routed.weights.double()[..., None]
    assert_right(out, want.sum(1) if reduce else want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights(large: Large, dtype: str) -> None:
    """w_up and w_down are past 2^31: NaN but for the experts at the start, around 2^31 elements and at the end."""
    hidden, inner = (512, 2048) if large.elements > 2**30 else (32, 16)
    middle = large.elements // (2 * inner * hidden)
    used = [0, middle - 1, middle, 2 * middle, 2 * middle + 1]
    shapes = {"up": (2 * middle + 2, 2 * inner, hidden), "down": (2 * middle + 2, hidden, inner)}
    weights: dict[str, Any] = {}
    scales: dict[str, Any] = {}
    for name, shape in shapes.items():
        weights[name] = large.unwritten(*shape, dtype=FP8 if dtype == "fp8" else torch.bfloat16)
        scales[name] = large.unwritten(*shape[:2], dtype=torch.float32) if dtype == "fp8" else None
        for expert in used:
            w, scale = operand(large, dtype, *shape[1:])
            weights[name][expert] = w
            if scale is not None:
                scales[name][expert] = scale / shape[2] ** 0.5
    ids = (torch.arange(7 * 2, device=large.device).view(7, 2) % len(used)).int()
    expert_map = torch.tensor(used, device=large.device).int()
    topk_weights = large.normal(7, 2, dtype=torch.float32).abs()
    x = large.normal(7, hidden)
    sizes: dict[str, Any] = {"num_experts": len(used), "hidden_size": hidden, "intermediate_size": inner}
    keywords: dict[str, Any] = {"activation": "silu", "config": kk.get_cute_moe_config("up", 7, **sizes, dtype=dtype)}
    got = kk.fused_moe(
        x, weights["up"], weights["down"], topk_weights, ids, **keywords, expert_map=expert_map,
        w_up_scale=scales["up"], w_down_scale=scales["down"],
    )  # fmt: skip
    small = {
        name: w.view(torch.uint8)[used].view(w.dtype) if w.dtype == FP8 else w[used] for name, w in weights.items()
    }
    want = kk.fused_moe(
        x, small["up"], small["down"], topk_weights, ids, **keywords,
        w_up_scale=None if scales["up"] is None else scales["up"][used],
        w_down_scale=None if scales["down"] is None else scales["down"][used],
    )  # fmt: skip
    assert not want.isnan().any() and want.abs().max() > 0
    torch.testing.assert_close(got.float(), want.float(), rtol=2**-6, atol=float(want.abs().max()) * 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer(large: Large, dtype: str) -> None:
    """x and the result are past 2^31."""
    hidden, inner, experts = 2048, 32, 4
    tokens = large.rows(hidden)
    x = large.normal(PERIOD, hidden)
    ids = (torch.arange(PERIOD, device=large.device)[:, None] % 3).int()
    topk_weights = large.normal(PERIOD, 1, dtype=torch.float32).abs()
    up, up_scale = operand(large, dtype, experts, 2 * inner, hidden)
    down, down_scale = operand(large, dtype, experts, hidden, inner)
    # With the same tile: another order of sums may put a value on the other side between two of e4m3.
    keywords: dict[str, Any] = {
        "activation": "silu", "w_up_scale": up_scale if up_scale is None else up_scale / hidden**0.5,
        "w_down_scale": down_scale, "config": kk.get_cute_moe_config(
            "up", tokens, num_experts=experts, hidden_size=hidden, intermediate_size=inner, dtype=dtype
        ),
    }  # fmt: skip
    if dtype == "bf16":
        up /= hidden**0.5
    out = large.unwritten(tokens, hidden)
    routing = (topk_weights, ids)
    kk.fused_moe(
        large.repeated(x, tokens), up, down, *(large.repeated(r, tokens) for r in routing), out=out, **keywords
    )
    want = kk.fused_moe(x, up, down, *routing, **keywords)
    assert not want.isnan().any() and want.abs().max() > 0
    assert_right(out, want)
