"""Routed tokens sorted by expert, in padded blocks: what a grouped product of a mixture of experts works through.

The T*K assignments (`token * K + slot`) are grouped by expert, ascending inside a group, groups in the order of expert
ids, each padded to a multiple of `block_size` with the sentinel T*K (the layout of MegaBlocks, Gale et al. 2022,
arXiv:2211.15841, as vLLM writes it). Exact and the same on every run.
"""

from __future__ import annotations

import math
from typing import Any

from kestrel_kernels._op import Array, Op, scratch, shape_of

__all__ = ["moe_align_block_size", "moe_lora_align_block_size"]

_moe_align_block_size = Op(
    "moe_align_block_size",
    "sorted_token_ids expert_ids num_tokens_post_pad workspace topk_ids num_experts block_size expert_map",
    writes="sorted_token_ids expert_ids num_tokens_post_pad workspace",
)
_moe_lora_align_block_size = Op(
    "moe_lora_align_block_size",
    "sorted_token_ids expert_ids num_tokens_post_pad workspace topk_ids token_lora_mapping num_experts block_size "
    "expert_map",
    writes="sorted_token_ids expert_ids num_tokens_post_pad workspace",
)


def workspace_bytes(assignments: int, num_experts: int, max_loras: int = 1) -> int:
    """kestrel::moe_align_workspace_bytes(), again: torch.compile cannot ask the library."""
    return 0 if assignments <= 8192 else 128 * num_experts * max_loras * 4


def _workspace(op: str, like: Any, topk_ids: Any, num_experts: int, max_loras: int) -> Any:
    assignments = math.prod(shape_of(f"{op}: topk_ids", topk_ids))
    # What is out of range the library names.
    size = workspace_bytes(assignments, num_experts, max_loras) if 1 <= num_experts <= 1024 else 0
    return scratch(like, size) if size else None


def moe_align_block_size(
    topk_ids: Array,
    num_experts: int,
    block_size: int,
    sorted_token_ids: Array,
    expert_ids: Array,
    num_tokens_post_pad: Array,
    expert_map: Array | None = None,
    *,
    workspace: Array | None = None,
) -> None:
    """Groups the assignments of topk_ids by expert.

    Args:
        topk_ids: `[T, K]`, int32; ids outside [0, num_experts) are left out.
        num_experts: E, from 1 to 1024.
        block_size: at least 1.
        sorted_token_ids: int32, `[T*K + E*(block_size-1)]` (`[T*K*block_size]` where T*K < E) or longer; written: the
            groups, then the sentinel T*K up to its end.
        expert_ids: int32, a place for each whole block of that; written: the expert of each block, 0 behind the last.
        num_tokens_post_pad: `[1]`, int32 (int64 where 2^31 - 1 may not do); written: the padded total.
        expert_map: `[E]`, int32, or None or empty (all experts are local): the id that expert_ids gets, or -1 for an
            expert that lives elsewhere, whose assignments are left out.
        workspace: uint8 `[workspace_bytes(T*K, E)]` on the GPU, for a CUDA graph captured without torch: it must live
            as long as the graph, and calls that run at once must not share it. None takes it from the framework's
            allocator.

    Raises:
        TypeError: a dtype that is not taken, or an immutable output.
        ValueError: a shape, stride, alignment, device or number that does not fit, or an output that is too short.
    """
    if workspace is None:
        workspace = _workspace("moe_align_block_size", sorted_token_ids, topk_ids, num_experts, 1)
    _moe_align_block_size.call(
        sorted_token_ids, expert_ids, num_tokens_post_pad, workspace, topk_ids, num_experts, block_size, expert_map
    )


def moe_lora_align_block_size(
    topk_ids: Array,
    token_lora_mapping: Array,
    num_experts: int,
    block_size: int,
    sorted_token_ids: Array,
    expert_ids: Array,
    num_tokens_post_pad: Array,
    expert_map: Array | None = None,
    *,
    workspace: Array | None = None,
) -> None:
    """The same once for each LoRA, over the tokens mapped to it (the layout of S-LoRA's batches, Sheng et al. 2023).

    Args:
        topk_ids, num_experts, block_size, expert_map: as `moe_align_block_size`.
        token_lora_mapping: `[T]`, int32, below max_loras; negative: none.
        sorted_token_ids, expert_ids, num_tokens_post_pad: as `moe_align_block_size`, with a leading `[max_loras]`.
        workspace: uint8 `[workspace_bytes(T*K, E, max_loras)]`; see there.

    Raises:
        TypeError, ValueError: as `moe_align_block_size`; also a LoRA that is not below max_loras.
    """
    if workspace is None:
        max_loras = shape_of("moe_lora_align_block_size: sorted_token_ids", sorted_token_ids)[0]
        workspace = _workspace("moe_lora_align_block_size", sorted_token_ids, topk_ids, num_experts, max_loras)
    _moe_lora_align_block_size.call(
        sorted_token_ids, expert_ids, num_tokens_post_pad, workspace, topk_ids, token_lora_mapping, num_experts,
        block_size, expert_map,
    )  # fmt: skip
