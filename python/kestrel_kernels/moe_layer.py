"""A whole layer of experts in one call: alignment, both products with the gate between them, the weighted sum.

One call of the library, with all its intermediates in one workspace: the T*K assignments are grouped by expert (as
MegaBlocks has it, Gale et al. 2022, arXiv:2211.15841), the gate is applied to the fp32 sums of the first product, so
that `[T, K, 2I]` is never in memory, and the K results of a token are summed in order in fp32 and rounded once. With
e4m3 weights (W8A8) the activations are quantized by row before each product, the second time from fp32.
"""

from __future__ import annotations

from typing import Any

from kestrel_kernels import moe_align
from kestrel_kernels._op import Array, ArrayT, Op, new_array, result, scratch, shape_of
from kestrel_kernels.cute_moe import CuteMoeConfig, _block_m, _dtype

__all__ = ["fused_moe"]

_fused_moe = Op(
    "fused_moe",
    "out workspace x w_up w_up_scale w_down w_down_scale topk_weights topk_ids expert_map block_m activation",
    writes="out workspace",
)


def workspace_bytes(tokens: int, slots: int, num_experts: int, hidden: int, inner: int, block_m: int, fp8: bool) -> int:
    """kestrel::fused_moe_workspace_bytes(), again: torch.compile cannot ask the library."""
    assignments = tokens * slots
    places = assignments + min(assignments, num_experts) * (block_m - 1)
    if places >= 2**31:
        return 0  # the library names what is out of range
    row = (inner + 15) // 16 * 16
    sizes = [
        4 * places, 4 * (places // block_m), 4, moe_align.workspace_bytes(assignments, num_experts),
        assignments * row * (1 if fp8 else 2),
    ]  # fmt: skip
    gated = 0
    if fp8:
        sizes += [4 * assignments, tokens * ((hidden + 15) // 16 * 16), 4 * tokens]
        gated = 4 * assignments * ((inner + 3) // 4 * 4)
    parts = min(4 * assignments * hidden, max(256 << 20, 4 * assignments * 32))
    return sum((size + 127) // 128 * 128 for size in (*sizes, max(gated, parts)))


def fused_moe(
    x: ArrayT,
    w_up: Array,
    w_down: Array,
    topk_weights: Array,
    topk_ids: Array,
    *,
    activation: str = "gelu_residual",
    w_up_scale: Array | None = None,
    w_down_scale: Array | None = None,
    expert_map: Array | None = None,
    config: CuteMoeConfig | None = None,
    out: Array | None = None,
) -> ArrayT:
    """out[t] = sum over k of topk_weights[t, k] * gate(x[t] w_upᵀ) w_downᵀ, with the weights of expert topk_ids[t, k].

    The bits of a token's result depend on its own row, its weights and its experts alone.

    Args:
        x: `[T, H]`, bf16 or fp16.
        w_up: `[E, 2I, H]`, dtype of x: the rows that the gate bends, then those that multiply. With scales e4m3 (or its
            bits as uint8).
        w_down: `[E, H, I]`, as w_up.
        topk_weights: `[T, K]`, fp32.
        topk_ids: `[T, K]`, int32; ids of no expert add nothing.
        activation: a gate of `kestrel_kernels.activation` by name: `gelu_residual`, `silu_and_mul`, `gelu_and_mul`,
            `gelu_tanh_and_mul`.
        w_up_scale, w_down_scale: `[E, 2I]` and `[E, H]`, fp32, a scale for each output channel; both or none. With them
            x is quantized for each token, and the gated value, in fp32, for each assignment: to e4m3 with the scale
            max(absmax / 448, 1e-6).
        expert_map: `[G]`, int32, G the number of experts that topk_ids know, or None or empty (G = E): the place of
            each in w_up and w_down, or -1 for an expert that lives elsewhere, whose assignments add nothing.
        config: for its block_m; None: the choice of `get_cute_moe_config`.
        out: `[T, H]`, dtype of x, with scales bf16; written. None: allocated. It shares no memory with the others.

    G is from 1 to 1024; the other sizes are any, zero too. Rows and experts may be strided.

    Returns:
        out.

    Raises:
        TypeError: a dtype that is not taken, or an immutable `out`.
        ValueError: a shape, stride, alignment, device or activation that does not fit; a place in expert_map that w_up
            lacks (on the GPU with `KESTREL_CHECK=1`; else its assignments add nothing).
    """
    fp8 = w_up_scale is not None
    tokens, hidden = shape_of("fused_moe: x", x, 2)[-2:]
    experts, rows = shape_of("fused_moe: w_up", w_up, 3)[:2]
    slots = shape_of("fused_moe: topk_ids", topk_ids, 2)[1]
    block_m = _block_m(config, tokens, experts, hidden, rows // 2, "fp8" if fp8 else _dtype(x))
    routed = experts if expert_map is None else shape_of("fused_moe: expert_map", expert_map)[0] or experts
    to: Any = new_array(x, (tokens, hidden), "bfloat16" if fp8 else None) if out is None else out
    workspace = scratch(to, workspace_bytes(tokens, slots, routed, hidden, rows // 2, block_m, fp8))
    _fused_moe(
        to, workspace, x, w_up, w_up_scale, w_down, w_down_scale, topk_weights, topk_ids, expert_map, block_m,
        activation or "",
    )  # fmt: skip
    return result(to, x) if out is None else out
