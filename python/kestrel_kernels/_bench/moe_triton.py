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
    width, expert_rows, depth, blocks, assignments, slots_per_row,
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
    offset = (expert * expert_rows + columns[None, :]) * depth + steps[:, None]
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
        sums *= scale * tl.load(w1_scale + expert * expert_rows + columns, mask=inside, other=0.0)[None, :]
        if GATED:
            gates *= scale * tl.load(w2_scale + expert * expert_rows + columns, mask=inside, other=0.0)[None, :]
    if GATED:
        sums = 0.5 * sums * (1 + tl.erf(sums * 0.70710678)) * (gates + 1)
    if WEIGHTED:
        sums *= tl.load(topk_weights + ids, mask=valid, other=0.0)[:, None]
    to = out + ids.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=valid[:, None] & inside[None, :])


@triton.jit
def _quantize(x, bits, scale, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    values = tl.load(x + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
    s = tl.maximum(tl.max(tl.abs(values)) / 448, 1e-6)
    tl.store(scale + row, s)
    tl.store(bits + row * width + columns, (values / s).to(bits.dtype.element_ty), mask=columns < width)


_Scaled = tuple[torch.Tensor, torch.Tensor | None]  # e4m3 and its scales, or bf16


def quantized(x: torch.Tensor) -> _Scaled:
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    bits = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    _quantize[(rows,)](x, bits, scale, width, BLOCK=triton.next_power_of_2(width), num_warps=4)
    return bits, scale


def product(
    out: torch.Tensor, x: _Scaled, w1: _Scaled, w2: _Scaled | None, width: int, slots_per_row: int,
    topk_weights: torch.Tensor | None, lists: dict[str, Any],
) -> torch.Tensor:  # fmt: skip
    """out [T, K, width]; of w1 and w2 the first `width` rows of each expert."""
    blocks = len(lists["expert_ids"])
    w, second = w1[0], w2 or w1
    expert_rows = w.stride(0) // w.shape[2]

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return blocks, triton.cdiv(width, meta["BLOCK_N"])

    _product[grid](
        out, x[0], x[1], w, w1[1], second[0], second[1], topk_weights,
        lists["sorted_token_ids"], lists["expert_ids"], lists["num_tokens_post_pad"],
        width, expert_rows, w.shape[2], blocks, out.numel() // width, slots_per_row,
        GATED=w2 is not None, WEIGHTED=topk_weights is not None, FP8=x[1] is not None, BLOCK_M=lists["block_m"],
    )  # fmt: skip
    return out


def _operand(s: dict[str, Any], name: str) -> _Scaled:
    return s[name], s.get(f"{name}_scale")


def up(s: dict[str, Any]) -> torch.Tensor:
    """gelu_residual of both panels."""
    w1, w2 = _operand(s, "w1"), _operand(s, "w2")
    slots = s["topk_ids"].shape[1]
    return product(s["out"], _operand(s, "hidden_states"), w1, w2, w1[0].shape[1], slots, None, s["triton"])


def down(s: dict[str, Any]) -> torch.Tensor:
    w3 = _operand(s, "w3")
    return product(s["out"], _operand(s, "moe_out"), w3, None, w3[0].shape[1], 1, s["topk_weights"], s["triton"])


def layer(s: dict[str, Any]) -> torch.Tensor:
    """Both products with what is between them, and the sum; the lists are there already."""
    (w_up, up_scale), w_down = _operand(s, "w_up"), _operand(s, "w_down")
    (tokens, hidden), slots, inner = s["x"].shape, s["topk_ids"].shape[1], w_up.shape[1] // 2
    fp8 = up_scale is not None
    x = quantized(s["x"]) if fp8 else (s["x"], None)
    halves: list[_Scaled] = [
        (w_up[:, at : at + inner], None if up_scale is None else up_scale[:, at : at + inner]) for at in (0, inner)
    ]
    mid = s["x"].new_empty(tokens, slots, inner)
    product(mid, x, halves[0], halves[1], inner, slots, None, s["triton"])
    parts = s["x"].new_empty(tokens, slots, hidden)
    product(parts, quantized(mid) if fp8 else (mid, None), w_down, None, hidden, 1, s["topk_weights"], s["triton"])
    return torch.sum(parts, 1, out=s["out"])
