"""Mixture of experts: the up and the down product, each assignment of a token with its expert's weights.

T tokens, K experts a token, E experts (those whose weights are here), H hidden, I inner size: any, zero too. Sums,
scales, gates and routing weights are fp32, rounded once for each array that is stored. The assignments come grouped by
expert, as `kestrel_kernels.moe_align` gives them, in blocks of `config.block_m`, or of `get_cute_moe_block_m` for the
weights' shapes where no config is given. Assignments that alignment left out add nothing to a sum; their rows of a
result `[T, K, ...]` are unspecified. The bits of an assignment depend on its own row and its expert's weights alone.

Leading dimensions of activations and weights may be strided, the last is contiguous; `out` shares no memory with the
other arrays. All indices lie in arrays: out of range they are a ValueError on the CPU, on the GPU with
`KESTREL_CHECK=1`, and skipped otherwise.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, overload

from kestrel_kernels._op import Array, ArrayT, Op, new_array, result, scratch, shape_of

__all__ = [
    "CuteMoeConfig",
    "get_cute_moe_block_m",
    "get_cute_moe_config",
    "invoke_cute_moe_down",
    "invoke_cute_moe_down_fp8",
    "invoke_cute_moe_up",
    "invoke_cute_moe_up_fp8",
]

_TAIL = "topk_weights topk_ids sorted_token_ids expert_ids num_tokens_post_pad block_m"
_up = Op("moe_up", f"out hidden_states w1 w2 {_TAIL} activation", writes="out")
_up_fp8 = Op("moe_up_fp8", f"out hidden hidden_scale w1 w1_scale w2 w2_scale {_TAIL} activation", writes="out")
_down = Op("moe_down", f"out workspace moe_out w3 {_TAIL} reduce", writes="out workspace")
_down_fp8 = Op(
    "moe_down_fp8", f"out workspace moe_out moe_out_scale w3 w3_scale {_TAIL} reduce", writes="out workspace"
)

_DTYPES = ("bf16", "fp16", "fp8")
_KINDS = ("up", "down")


@dataclasses.dataclass(frozen=True)
class CuteMoeConfig:
    """Which kernel makes a product, and in which tiles.

    Today one plain kernel makes them all, which takes any `block_m` and nothing else from its config.

    Attributes:
        block_m: rows of a block of aligned assignments; up and down share it.
        block_n: columns of a tile.
        block_k: depth of a step.
        num_warps: warps of a block.
        num_stages: steps that are on their way from memory.
        dtype: "bf16", "fp16" or "fp8".
        kernel_type: "warp" or "wgmma".

    Raises:
        ValueError: a size below 1, or another name.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    dtype: str
    kernel_type: str = "warp"

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k", "num_warps", "num_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"CuteMoeConfig: {name} must be at least 1, got {getattr(self, name)}")
        _check_name("CuteMoeConfig: dtype", self.dtype, _DTYPES)
        _check_name("CuteMoeConfig: kernel_type", self.kernel_type, ("warp", "wgmma"))


def _check_name(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"{what} must be {', '.join(known[:-1])} or {known[-1]}, got {name!r}")


_Shape = tuple[int, int, int, str]  # experts, hidden, intermediate, dtype
_Choices = dict[str, list[tuple[int, CuteMoeConfig]]]  # kind -> (token count, config), ascending


def _load_configs(folder: Path) -> dict[_Shape, _Choices]:
    """All `*.json` of a folder, one for each model shape, dtype and GPU:

    `{"gpu": ..., "num_experts": E, "hidden_size": H, "intermediate_size": I, "dtype": "fp8",`
    `"tokens": {"1": {"up": {"block_m": 16, ...}, "down": {...}}, ...}}`
    """
    loaded: dict[_Shape, _Choices] = {}
    for path in sorted(folder.glob("*.json")):
        file = json.loads(path.read_text())
        dtype = file["dtype"]
        choices: _Choices = {kind: [] for kind in _KINDS}
        for tokens, configs in sorted(file["tokens"].items(), key=lambda item: int(item[0])):
            both = {kind: CuteMoeConfig(**configs[kind], dtype=dtype) for kind in _KINDS}
            if both["up"].block_m != both["down"].block_m:
                raise ValueError(f"{path}: up and down must share block_m, which they do not at {tokens} tokens")
            for kind in _KINDS:
                choices[kind].append((int(tokens), both[kind]))
        loaded[file["num_experts"], file["hidden_size"], file["intermediate_size"], dtype] = choices
    return loaded


_configs = _load_configs(Path(__file__).parent / "configs")


def _heuristic(num_tokens: int, num_experts: int, dtype: str) -> CuteMoeConfig:
    """By the rows of an expert, were there eight experts a token. The tiles are those of ops/moe/tiles.json."""
    rows = 8 * num_tokens / max(num_experts, 1)
    block_m = 16 if rows <= 32 else 64 if rows <= 128 else 128
    return CuteMoeConfig(block_m, 32, 256, 8, 1, dtype)


def get_cute_moe_config(
    kind: str, num_tokens: int, *, num_experts: int, hidden_size: int, intermediate_size: int, dtype: str
) -> CuteMoeConfig:
    """The config of a product: from the tuned file of this shape, by the nearest token count (of two as near the
    smaller); where there is no file by a heuristic, for any shape.

    Args:
        kind: "up" or "down".
        num_tokens: T.
        num_experts: those whose weights are here.
        hidden_size: H.
        intermediate_size: I.
        dtype: "bf16", "fp16" or "fp8".

    Raises:
        ValueError: another kind or dtype.
    """
    _check_name("get_cute_moe_config: kind", kind, _KINDS)
    _check_name("get_cute_moe_config: dtype", dtype, _DTYPES)
    choices = _configs.get((num_experts, hidden_size, intermediate_size, dtype), {}).get(kind)
    if choices:
        return min(choices, key=lambda choice: abs(choice[0] - num_tokens))[1]
    return _heuristic(num_tokens, num_experts, dtype)


def get_cute_moe_block_m(
    num_tokens: int, *, num_experts: int, hidden_size: int, intermediate_size: int, dtype: str
) -> int:
    """The block size to align for, which up and down share. Arguments and errors of `get_cute_moe_config`."""
    return get_cute_moe_config(
        "up",
        num_tokens,
        num_experts=num_experts,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        dtype=dtype,
    ).block_m


def _block_m(config: CuteMoeConfig | None, tokens: int, experts: int, hidden: int, inner: int, dtype: str) -> int:
    if config is not None:
        return config.block_m
    return get_cute_moe_block_m(tokens, num_experts=experts, hidden_size=hidden, intermediate_size=inner, dtype=dtype)


def _dtype(array: Any) -> str:
    return "bf16" if "bfloat16" in str(array.dtype) else "fp16"


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
    block_m = _block_m(config, tokens, experts, hidden, inner, "fp8" if fp8 else _dtype(x[0]))
    to = out
    if to is None:
        to = new_array(x[0], (tokens, slots, inner if activation else 2 * inner), "bfloat16" if fp8 else None)
    op(to, *x, *w, *tail, block_m, activation or "")
    return result(to, x[0]) if out is None else out


def _run_down(
    x: tuple[Any, ...], w3: tuple[Any, ...], tail: tuple[Any, ...], out: Any, config: Any, reduce: bool
) -> Any:
    op, fp8 = (_down, False) if len(x) == 1 else (_down_fp8, True)
    tokens, slots = shape_of(f"{op.name}: topk_weights", tail[0], 2)[:2]
    shape_of(f"{op.name}: moe_out", x[0], 2)
    experts, hidden, inner = shape_of(f"{op.name}: w3", w3[0], 3)[:3]
    block_m = _block_m(config, tokens, experts, hidden, inner, "fp8" if fp8 else _dtype(x[0]))
    to = out
    if to is None:
        shape = (tokens, hidden) if reduce else (tokens, slots, hidden)
        to = new_array(x[0], shape, "bfloat16" if fp8 else None)
    op(to, _workspace(to, reduce, tokens, slots, hidden), *x, *w3, *tail, block_m, bool(reduce))
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
    config: CuteMoeConfig | None = None,
    activation: str | None = None,
) -> Any:
    tail = (topk_weights, topk_ids, sorted_token_ids, expert_ids, num_tokens_post_pad)
    return _run_up((hidden_states,), (w1, w2), tail, out, config, activation)


def _up_low_form(
    A: Any,
    B: Any,
    C: Any = None,
    *,
    topk_weights: Any,
    sorted_token_ids: Any,
    expert_ids: Any,
    num_tokens_post_padded: Any,
    config: CuteMoeConfig | None = None,
) -> Any:
    tail = (topk_weights, None, sorted_token_ids, expert_ids, num_tokens_post_padded)
    return _run_up((A,), (B, None), tail, C, config, None)


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
    config: CuteMoeConfig | None = None,
    activation: str | None = None,
) -> Any:
    tail = (topk_weights, topk_ids, sorted_token_ids, expert_ids, num_tokens_post_pad)
    return _run_up((hidden, hidden_scale), (w1, w1_scale, w2, w2_scale), tail, out, config, activation)


def _up_fp8_low_form(
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
    config: CuteMoeConfig | None = None,
) -> Any:
    tail = (topk_weights, None, sorted_token_ids, expert_ids, num_tokens_post_padded)
    return _run_up((A, A_scale), (B, B_scale, None, None), tail, C, config, None)


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
    config: CuteMoeConfig | None = None,
    reduce: bool = False,
) -> Any:
    tail = (topk_weights, topk_ids, sorted_token_ids, expert_ids, num_tokens_post_pad)
    return _run_down((moe_out,), (w3,), tail, out, config, reduce)


def _down_low_form(
    A: Any,
    B: Any,
    C: Any = None,
    *,
    topk_weights: Any,
    sorted_token_ids: Any,
    expert_ids: Any,
    num_tokens_post_padded: Any,
    config: CuteMoeConfig | None = None,
) -> Any:
    tail = (topk_weights, None, sorted_token_ids, expert_ids, num_tokens_post_padded)
    return _run_down((A,), (B,), tail, C, config, False)


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
    config: CuteMoeConfig | None = None,
    reduce: bool = False,
) -> Any:
    tail = (topk_weights, topk_ids, sorted_token_ids, expert_ids, num_tokens_post_pad)
    return _run_down((moe_out, moe_out_scale), (w3, w3_scale), tail, out, config, reduce)


def _down_fp8_low_form(
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
    config: CuteMoeConfig | None = None,
) -> Any:
    tail = (topk_weights, None, sorted_token_ids, expert_ids, num_tokens_post_padded)
    return _run_down((A, A_scale), (B, B_scale), tail, C, config, False)


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
    config: CuteMoeConfig | None = None,
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
    config: CuteMoeConfig | None = None,
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
        config: what the ids were aligned for; None: see the module.
        activation: None, or a gate of `kestrel_kernels.activation` by name: `gelu_residual`, `silu_and_mul`,
            `gelu_and_mul`, `gelu_tanh_and_mul`.

    The low-level form `(A, B, C, *, topk_weights, sorted_token_ids, expert_ids, num_tokens_post_padded, config)` has
    A `[T, H]`, B `[E, 2I, H]` and C `[T, K, 2I]`, or None.

    Returns:
        out.

    Raises:
        TypeError: a dtype that is not taken, or an immutable `out`.
        ValueError: a shape, stride, alignment, device, activation or index that does not fit.
    """
    return (_up_low_form if "num_tokens_post_padded" in keywords else _up_form)(*args, **keywords)


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
    config: CuteMoeConfig | None = None,
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
    config: CuteMoeConfig | None = None,
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
    return (_up_fp8_low_form if "num_tokens_post_padded" in keywords else _up_fp8_form)(*args, **keywords)


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
    config: CuteMoeConfig | None = None,
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
    config: CuteMoeConfig | None = None,
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
    return (_down_low_form if "num_tokens_post_padded" in keywords else _down_form)(*args, **keywords)


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
    config: CuteMoeConfig | None = None,
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
    config: CuteMoeConfig | None = None,
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
    return (_down_fp8_low_form if "num_tokens_post_padded" in keywords else _down_fp8_form)(*args, **keywords)
