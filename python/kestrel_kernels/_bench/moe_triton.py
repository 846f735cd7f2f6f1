"""A peer of the products of experts: a tiled product in Triton over the same aligned lists.

A program has BLOCK_M entries of the list, which are assignments of one expert, and BLOCK_N columns; with a gate both
panels of weights. Programs that share weights are neighbours. Tiles are chosen by Triton's tuner, per shape, on the
first call.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


def block_m(tokens: int, slots: int, experts: int) -> int:
    """By the rows of an expert: the height that is tuned for below."""
    rows = tokens * slots / experts
    return 16 if rows <= 24 else 64 if rows <= 128 else 128


def _configs() -> list[triton.Config]:
    shapes = [(64, 128, 4, 4), (64, 64, 4, 5), (128, 128, 4, 4), (128, 64, 8, 4), (32, 256, 4, 3)]
    return [
        triton.Config({"BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for n, k, warps, stages in shapes
    ]


@triton.autotune(configs=_configs(), key=["width", "depth", "blocks", "GATED", "FP8", "BLOCK_M"])
@triton.jit
def _product(
    out, x, x_scale, w1, w1_scale, w2, w2_scale, topk_weights, sorted_ids, expert_ids, used,
    width, depth, blocks, assignments, slots_per_row,
    GATED: tl.constexpr, WEIGHTED: tl.constexpr, FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    if block * BLOCK_M >= tl.load(used):
        return
    expert = tl.load(expert_ids + block).to(tl.int64)
    ids = tl.load(sorted_ids + block * BLOCK_M + tl.arange(0, BLOCK_M))
    valid = ids < assignments
    rows = tl.where(valid, ids // slots_per_row, 0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < width
    steps = tl.arange(0, BLOCK_K)
    a = x + rows[:, None] * depth + steps[None, :]
    offset = (expert * width + columns[None, :]) * depth + steps[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gates = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        rest = steps < depth - k
        values = tl.load(a + k, mask=valid[:, None] & rest[None, :], other=0.0)
        mask = rest[:, None] & inside[None, :]
        sums = tl.dot(values, tl.load(w1 + offset + k, mask=mask, other=0.0), sums)
        if GATED:
            gates = tl.dot(values, tl.load(w2 + offset + k, mask=mask, other=0.0), gates)
    if FP8:
        scale = tl.load(x_scale + rows)[:, None]
        sums *= scale * tl.load(w1_scale + expert * width + columns, mask=inside, other=0.0)[None, :]
        if GATED:
            gates *= scale * tl.load(w2_scale + expert * width + columns, mask=inside, other=0.0)[None, :]
    if GATED:
        sums = 0.5 * sums * (1 + tl.erf(sums * 0.70710678)) * (gates + 1)
    if WEIGHTED:
        sums *= tl.load(topk_weights + ids, mask=valid, other=0.0)[:, None]
    to = out + ids.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=valid[:, None] & inside[None, :])


def _run(s: dict[str, Any], x: str, w1: str, w2: str | None, slots_per_row: int, weighted: bool) -> torch.Tensor:
    out, lists = s["out"], s["triton"]
    fp8 = s[w1].dtype == torch.float8_e4m3fn
    scales = [s[f"{name}_scale"] if fp8 else None for name in (x, w1, w2 or w1)]
    blocks = len(lists["expert_ids"])
    width, depth = s[w1].shape[1:]

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return blocks, triton.cdiv(width, meta["BLOCK_N"])

    _product[grid](
        out, s[x], scales[0], s[w1], scales[1], s[w2 or w1], scales[2], s["topk_weights"],
        lists["sorted_token_ids"], lists["expert_ids"], lists["num_tokens_post_pad"],
        width, depth, blocks, s["topk_ids"].numel(), slots_per_row,
        GATED=w2 is not None, WEIGHTED=weighted, FP8=fp8, BLOCK_M=lists["block_m"],
    )  # fmt: skip
    return out


def up(s: dict[str, Any]) -> torch.Tensor:
    """gelu_residual of both panels."""
    return _run(s, "hidden_states", "w1", "w2", s["topk_ids"].shape[1], False)


def down(s: dict[str, Any]) -> torch.Tensor:
    return _run(s, "moe_out", "w3", None, 1, True)
