"""Mixture of experts: a whole layer in one call, and its up and down product, each assignment of a token with its
expert's weights.

T tokens, K experts a token, E experts (those whose weights are here), H hidden, I inner size: any, zero too. Sums,
scales, gates and routing weights are fp32, rounded once for each array that is stored. The products take the
assignments grouped by expert, as `kestrel_kernels.moe_align` gives them, in blocks of `config.block_m`, or of
`get_cute_moe_block_m` for the weights' shapes where no config is given. Assignments that alignment left out add nothing
to a sum; their rows of a result `[T, K, ...]` are unspecified. By one kernel, the bits of an assignment depend on its
own row and its expert's weights alone; on the GPU the kernel goes by the number of tokens (up to 64 have their own), by
strides and alignment, and by a config.

`fused_moe` is one call of the library, with all its intermediates in one workspace: the assignments are grouped by
expert (as MegaBlocks has it, Gale et al. 2022, arXiv:2211.15841), the gate is applied to the fp32 sums of the first
product, so that `[T, K, 2I]` is never in memory, and the K results of a token are summed in order in fp32 and rounded
once. With e4m3 weights (W8A8) the activations are quantized by row before each product, the second time from fp32.

Leading dimensions of activations and weights may be strided, the last is contiguous; `out` shares no memory with the
other arrays. All indices lie in arrays: out of range they are a ValueError on the CPU, on the GPU with
`KESTREL_CHECK=1`, and skipped otherwise.
"""

from __future__ import annotations

from typing import Any, overload

from kestrel_kernels import moe_align
from kestrel_kernels._moe_config import (
    CuteMoeConfig,
    block_and_tile,
    dtype_of,
    get_cute_moe_block_m,
    get_cute_moe_config,
)
from kestrel_kernels._op import Array, ArrayT, Op, new_array, result, scratch, shape_of

__all__ = [
    "CuteMoeConfig",
    "fused_moe",
    "get_cute_moe_block_m",
    "get_cute_moe_config",
    "invoke_cute_moe_down",
    "invoke_cute_moe_down_fp8",
    "invoke_cute_moe_up",
    "invoke_cute_moe_up_fp8",
]

_fused_moe = Op(
    "fused_moe",
    "out workspace x w_up w_up_scale w_down w_down_scale topk_weights topk_ids expert_map block_m tile activation",
    writes="out workspace",
)
_TAIL = "topk_weights topk_ids sorted_token_ids expert_ids num_tokens_post_pad block_m tile"
_up = Op("moe_up", f"out hidden_states w1 w2 {_TAIL} activation", writes="out")
_up_fp8 = Op("moe_up_fp8", f"out hidden hidden_scale w1 w1_scale w2 w2_scale {_TAIL} activation", writes="out")
_down = Op("moe_down", f"out workspace moe_out w3 {_TAIL} reduce", writes="out workspace")
_down_fp8 = Op(
    "moe_down_fp8", f"out workspace moe_out moe_out_scale w3 w3_scale {_TAIL} reduce", writes="out workspace"
)


def _workspace(out: Any, reduce: bool, tokens: int, slots: int, hidden: int) -> Any:
    """kestrel::moe_down_workspace_bytes()"""
    if not reduce:
        return None
    column = 4 * tokens * slots
    return scratch(out, min(column * hidden, max(256 << 20, column * 32)))


def _run_up(
    x: tuple[Any, ...], w: tuple[Any, ...], tail: tuple[Any, ...], out: Any, config: Any, activation: str | None
) -> Any:
    """x, w: with their scales in fp8; tail: from topk_weights on."""
    op, fp8 = (_up, False) if len(x) == 1 else (_up_fp8, True)
    slots = shape_of(f"{op.name}: topk_weights", tail[0], 2)[1]
    tokens, hidden = shape_of(f"{op.name}: {'hidden' if fp8 else 'hidden_states'}", x[0], 2)[-2:]
    experts, rows = shape_of(f"{op.name}: w1", w[0], 3)[:2]
    inner = rows // 2 if w[len(x)] is None else rows
    block_m, tile = block_and_tile(config, tokens, experts, hidden, inner, "fp8" if fp8 else dtype_of(x[0]))
    to = out
    if to is None:
        to = new_array(x[0], (tokens, slots, inner if activation else 2 * inner), "bfloat16" if fp8 else None)
    op.call(to, *x, *w, *tail, block_m, tile, activation or "")
    return result(to, x[0]) if out is None else out


def _run_down(
    x: tuple[Any, ...], w3: tuple[Any, ...], tail: tuple[Any, ...], out: Any, config: Any, reduce: bool
) -> Any:
    op, fp8 = (_down, False) if len(x) == 1 else (_down_fp8, True)
    tokens, slots = shape_of(f"{op.name}: topk_weights", tail[0], 2)[:2]
    shape_of(f"{op.name}: moe_out", x[0], 2)
    experts, hidden, inner = shape_of(f"{op.name}: w3", w3[0], 3)[:3]
    block_m, tile = block_and_tile(config, tokens, experts, hidden, inner, "fp8" if fp8 else dtype_of(x[0]))
    to = out
    if to is None:
        shape = (tokens, hidden) if reduce else (tokens, slots, hidden)
        to = new_array(x[0], shape, "bfloat16" if fp8 else None)
    op.call(to, _workspace(to, reduce, tokens, slots, hidden), *x, *w3, *tail, block_m, tile, bool(reduce))
    return result(to, x[0]) if out is None else out


# The two calling forms of each function, told apart by the keyword num_tokens_post_padded.


def _up_form(
    hidden_states: Any,
    w1: Any,
    w2: Any,
    topk_weights: Any,
    topk_ids: Any,
    sorted_token_ids: Any,
    expert_ids: Any,
    num_tokens_post_pad: Any,
    *,
    out: Any = None,
    config: CuteMoeConfig | int | None = None,
    activation: str | None = None,
) -> Any:
    tail = (topk_weights, topk_ids, sorted_token_ids, expert_ids, num_tokens_post_pad)
    return _run_up((hidden_states,), (w1, w2), tail, out, config, activation)


def _up_fp8_form(
    hidden: Any,
    hidden_scale: Any,
    w1: Any,
    w1_scale: Any,
    w2: Any,
    w2_scale: Any,
    topk_weights: Any,
    topk_ids: Any,
    sorted_token_ids: Any,
    expert_ids: Any,
    num_tokens_post_pad: Any,
    *,
    out: Any = None,
    config: CuteMoeConfig | int | None = None,
    activation: str | None = None,
) -> Any:
    tail = (topk_weights, topk_ids, sorted_token_ids, expert_ids, num_tokens_post_pad)
    return _run_up((hidden, hidden_scale), (w1, w1_scale, w2, w2_scale), tail, out, config, activation)


def _down_form(
    moe_out: Any,
    w3: Any,
    topk_weights: Any,
    topk_ids: Any,
    sorted_token_ids: Any,
    expert_ids: Any,
    num_tokens_post_pad: Any,
    *,
    out: Any = None,
    config: CuteMoeConfig | int | None = None,
    reduce: bool = False,
) -> Any:
    tail = (topk_weights, topk_ids, sorted_token_ids, expert_ids, num_tokens_post_pad)
    return _run_down((moe_out,), (w3,), tail, out, config, reduce)


def _down_fp8_form(
    moe_out: Any,
    moe_out_scale: Any,
    w3: Any,
    w3_scale: Any,
    topk_weights: Any,
    topk_ids: Any,
    sorted_token_ids: Any,
    expert_ids: Any,
    num_tokens_post_pad: Any,
    *,
    out: Any = None,
    config: CuteMoeConfig | int | None = None,
    reduce: bool = False,
) -> Any:
    tail = (topk_weights, topk_ids, sorted_token_ids, expert_ids, num_tokens_post_pad)
    return _run_down((moe_out, moe_out_scale), (w3, w3_scale), tail, out, config, reduce)


# The low-level forms, the same for up and down: x and the weights, each with its scale in fp8, the tail, out, config.
_Call = tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...], Any, CuteMoeConfig | int | None]


def _low_form(
    A: Any,
    B: Any,
    C: Any = None,
    *,
    topk_weights: Any,
    sorted_token_ids: Any,
    expert_ids: Any,
    num_tokens_post_padded: Any,
    config: CuteMoeConfig | int | None = None,
) -> _Call:
    return (A,), (B,), (topk_weights, None, sorted_token_ids, expert_ids, num_tokens_post_padded), C, config


def _low_fp8_form(
    A: Any,
    A_scale: Any,
    B: Any,
    B_scale: Any,
    C: Any = None,
    *,
    topk_weights: Any,
    sorted_token_ids: Any,
    expert_ids: Any,
    num_tokens_post_padded: Any,
    config: CuteMoeConfig | int | None = None,
) -> _Call:
    tail = (topk_weights, None, sorted_token_ids, expert_ids, num_tokens_post_padded)
    return (A, A_scale), (B, B_scale), tail, C, config


@overload
def invoke_cute_moe_up(
    hidden_states: ArrayT,
    w1: Array,
    w2: Array | None,
    topk_weights: Array,
    topk_ids: Array,
    sorted_token_ids: Array,
    expert_ids: Array,
    num_tokens_post_pad: Array,
    *,
    out: Array | None = None,
    config: CuteMoeConfig | int | None = None,
    activation: str | None = None,
) -> ArrayT: ...
@overload
def invoke_cute_moe_up(
    A: ArrayT,
    B: Array,
    C: Array | None = None,
    *,
    topk_weights: Array,
    sorted_token_ids: Array,
    expert_ids: Array,
    num_tokens_post_padded: Array,
    config: CuteMoeConfig | int | None = None,
) -> ArrayT: ...
def invoke_cute_moe_up(*args: Any, **keywords: Any) -> Any:
    """out[t, k] = x[t] w1ᵀ in the first half, x[t] w2ᵀ in the second, with the weights of expert topk_ids[t, k]; or the
    gate of the two, applied to the fp32 sums.

    Args:
        hidden_states: `[T, H]`, bf16 or fp16.
        w1: `[E, I, H]`, as hidden_states; or `[E, 2I, H]`, both, without w2.
        w2: `[E, I, H]`, or None.
        topk_weights: `[T, K]`, fp32: here it tells K alone.
        topk_ids: `[T, K]`, int32, or None; the alignment says all that it could.
        sorted_token_ids, expert_ids, num_tokens_post_pad: int32, of `moe_align_block_size`.
        out: `[T, K, 2I]`, with a gate `[T, K, I]`, as hidden_states; written. None: allocated.
        config: what the ids were aligned for: a compiled tile; or a block size, any, for which the library chooses the
            tile; None: see the module.
        activation: None, or a gate of `kestrel_kernels.activation` by name: `gelu_residual`, `silu_and_mul` (or
            `silu`), `gelu_and_mul`, `gelu_tanh_and_mul`.

    The low-level form `(A, B, C, *, topk_weights, sorted_token_ids, expert_ids, num_tokens_post_padded, config)` has
    A `[T, H]`, B `[E, 2I, H]` and C `[T, K, 2I]`, or None.

    Returns:
        out.

    Raises:
        TypeError: a dtype that is not taken, or an immutable `out`.
        ValueError: a shape, stride, alignment, device, activation or index that does not fit.
    """
    if "num_tokens_post_padded" not in keywords:
        return _up_form(*args, **keywords)
    x, w, tail, out, config = _low_form(*args, **keywords)
    return _run_up(x, (*w, None), tail, out, config, None)


@overload
def invoke_cute_moe_up_fp8(
    hidden: ArrayT,
    hidden_scale: Array,
    w1: Array,
    w1_scale: Array,
    w2: Array | None,
    w2_scale: Array | None,
    topk_weights: Array,
    topk_ids: Array,
    sorted_token_ids: Array,
    expert_ids: Array,
    num_tokens_post_pad: Array,
    *,
    out: Array | None = None,
    config: CuteMoeConfig | int | None = None,
    activation: str | None = None,
) -> ArrayT: ...
@overload
def invoke_cute_moe_up_fp8(
    A: ArrayT,
    A_scale: Array,
    B: Array,
    B_scale: Array,
    C: Array | None = None,
    *,
    topk_weights: Array,
    sorted_token_ids: Array,
    expert_ids: Array,
    num_tokens_post_padded: Array,
    config: CuteMoeConfig | int | None = None,
) -> ArrayT: ...
def invoke_cute_moe_up_fp8(*args: Any, **keywords: Any) -> Any:
    """`invoke_cute_moe_up` of e4m3 operands (float8_e4m3fn, or their bits as uint8), bf16 out.

    Args:
        hidden: `[T, H]`, e4m3.
        hidden_scale: `[T]`, fp32: true value = stored * scale.
        w1: `[E, I, H]`, or `[E, 2I, H]`, e4m3.
        w1_scale: `[E, I]`, or `[E, 2I]`, fp32.
        w2: `[E, I, H]`, e4m3, or None.
        w2_scale: `[E, I]`, fp32, or None with w2.

    The others, and the errors, are those of `invoke_cute_moe_up`; out is bf16. The low-level form is
    `(A, A_scale, B, B_scale, C, *, ...)`.
    """
    if "num_tokens_post_padded" not in keywords:
        return _up_fp8_form(*args, **keywords)
    x, w, tail, out, config = _low_fp8_form(*args, **keywords)
    return _run_up(x, (*w, None, None), tail, out, config, None)


@overload
def invoke_cute_moe_down(
    moe_out: ArrayT,
    w3: Array,
    topk_weights: Array,
    topk_ids: Array,
    sorted_token_ids: Array,
    expert_ids: Array,
    num_tokens_post_pad: Array,
    *,
    out: Array | None = None,
    config: CuteMoeConfig | int | None = None,
    reduce: bool = False,
) -> ArrayT: ...
@overload
def invoke_cute_moe_down(
    A: ArrayT,
    B: Array,
    C: Array | None = None,
    *,
    topk_weights: Array,
    sorted_token_ids: Array,
    expert_ids: Array,
    num_tokens_post_padded: Array,
    config: CuteMoeConfig | int | None = None,
) -> ArrayT: ...
def invoke_cute_moe_down(*args: Any, **keywords: Any) -> Any:
    """out[t, k] = topk_weights[t, k] * (moe_out[t, k] w3ᵀ); with `reduce` the sum of that over k, in order.

    Args:
        moe_out: `[T, K, I]` (or `[T * K, I]`), bf16 or fp16.
        w3: `[E, H, I]`, as moe_out.
        topk_weights: `[T, K]`, fp32.
        topk_ids, sorted_token_ids, expert_ids, num_tokens_post_pad, config: as in `invoke_cute_moe_up`.
        out: `[T, K, H]`, with reduce `[T, H]`, as moe_out; written. None: allocated.
        reduce: sum over K. On the GPU this takes scratch memory, 4 T K H bytes up to 256 MB, from the framework.

    The low-level form `(A, B, C, *, topk_weights, sorted_token_ids, expert_ids, num_tokens_post_padded, config)` has
    A `[T * K, I]`, B `[E, H, I]` and C `[T, K, H]`, or None.

    Returns:
        out.

    Raises:
        TypeError: a dtype that is not taken, or an immutable `out`.
        ValueError: a shape, stride, alignment, device or index that does not fit.
    """
    if "num_tokens_post_padded" not in keywords:
        return _down_form(*args, **keywords)
    return _run_down(*_low_form(*args, **keywords), False)


@overload
def invoke_cute_moe_down_fp8(
    moe_out: ArrayT,
    moe_out_scale: Array,
    w3: Array,
    w3_scale: Array,
    topk_weights: Array,
    topk_ids: Array,
    sorted_token_ids: Array,
    expert_ids: Array,
    num_tokens_post_pad: Array,
    *,
    out: Array | None = None,
    config: CuteMoeConfig | int | None = None,
    reduce: bool = False,
) -> ArrayT: ...
@overload
def invoke_cute_moe_down_fp8(
    A: ArrayT,
    A_scale: Array,
    B: Array,
    B_scale: Array,
    C: Array | None = None,
    *,
    topk_weights: Array,
    sorted_token_ids: Array,
    expert_ids: Array,
    num_tokens_post_padded: Array,
    config: CuteMoeConfig | int | None = None,
) -> ArrayT: ...
def invoke_cute_moe_down_fp8(*args: Any, **keywords: Any) -> Any:
    """`invoke_cute_moe_down` of e4m3 operands (float8_e4m3fn, or their bits as uint8), bf16 out.

    Args:
        moe_out: `[T, K, I]` (or `[T * K, I]`), e4m3.
        moe_out_scale: `[T, K]` (or `[T * K]`), fp32, one for each row.
        w3: `[E, H, I]`, e4m3.
        w3_scale: `[E, H]`, fp32.

    The others, and the errors, are those of `invoke_cute_moe_down`; out is bf16. The low-level form is
    `(A, A_scale, B, B_scale, C, *, ...)`.
    """
    if "num_tokens_post_padded" not in keywords:
        return _down_fp8_form(*args, **keywords)
    return _run_down(*_low_fp8_form(*args, **keywords), False)


def _layer_workspace_bytes(
    tokens: int, slots: int, num_experts: int, hidden: int, inner: int, block_m: int, fp8: bool
) -> int:
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
    config: CuteMoeConfig | int | None = None,
    out: Array | None = None,
) -> ArrayT:
    """out[t] = sum over k of topk_weights[t, k] * gate(x[t] w_upᵀ) w_downᵀ, with the weights of expert topk_ids[t, k].

    By the same kernels, the bits of a token's result depend on its own row, its weights and its experts alone: see the
    module. The sum is in fp32; on the GPU, with many tokens, of rows that are rounded to out's dtype, as
    `invoke_cute_moe_down` and `moe_sum` have them.

    Args:
        x: `[T, H]`, bf16 or fp16.
        w_up: `[E, 2I, H]`, dtype of x: the rows that the gate bends, then those that multiply. With scales e4m3 (or its
            bits as uint8).
        w_down: `[E, H, I]`, as w_up.
        topk_weights: `[T, K]`, fp32.
        topk_ids: `[T, K]`, int32; ids of no expert add nothing.
        activation: a gate of `kestrel_kernels.activation` by name: `gelu_residual`, `silu_and_mul` (or `silu`),
            `gelu_and_mul`, `gelu_tanh_and_mul`.
        w_up_scale, w_down_scale: `[E, 2I]` and `[E, H]`, fp32, a scale for each output channel; both or none. With them
            x is quantized for each token, and the gated value, in fp32, for each assignment: to e4m3 with the scale
            max(absmax / 448, 1e-6).
        expert_map: `[G]`, int32, G the number of experts that topk_ids know, or None or empty (G = E): the place of
            each in w_up and w_down, or -1 for an expert that lives elsewhere, whose assignments add nothing.
        config: the tile of both products, or a block size, any; None: the choice of `get_cute_moe_config` for each.
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
    block_m, tile = block_and_tile(config, tokens, experts, hidden, rows // 2, "fp8" if fp8 else dtype_of(x))
    routed = experts if expert_map is None else shape_of("fused_moe: expert_map", expert_map)[0] or experts
    to: Any = new_array(x, (tokens, hidden), "bfloat16" if fp8 else None) if out is None else out
    workspace = scratch(to, _layer_workspace_bytes(tokens, slots, routed, hidden, rows // 2, block_m, fp8))
    _fused_moe.call(
        to, workspace, x, w_up, w_up_scale, w_down, w_down_scale, topk_weights, topk_ids, expert_map, block_m,
        tile, activation or "",
    )  # fmt: skip
    return result(to, x) if out is None else out
