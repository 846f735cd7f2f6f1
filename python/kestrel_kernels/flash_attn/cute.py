"""Attention, softmax(q k^T * scale) v, without the matrix of scores (Dao et al. 2022, FlashAttention; Dao 2023,
FlashAttention-2; online softmax: Milakov & Gimelshein 2018), over dense, packed or paged keys and values.

Shapes: `[B, S, H, D]`, or packed ("varlen") `[total, H, D]` with offsets cu_seqlens, int32 `[B + 1]`: sequence b has
the rows `cu_seqlens[b]` to `cu_seqlens[b + 1]`. Hq, the heads of q, is a multiple of Hk, those of k and v (grouped
heads: Ainslie et al. 2023). 1 <= D <= 256. Any strides with a contiguous last dimension.
Dtypes: q bf16 or fp16; k and v both as q, or both e4m3 (also as uint8 bits). fp32 inside, rounded once.
Positions: query i of a sequence stands at position `p = i + len_k - len_q` (aligned to the bottom right), key j at j.
"""

from __future__ import annotations

from typing import Any

from kestrel_kernels import _library
from kestrel_kernels._op import Array, Op, new_array, result, scratch, shape_of

__all__ = [
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "last_kernel",
    "merge_state",
    "merge_state_into",
]

_ARGUMENTS = (
    "out lse workspace q {k} {v} cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_k page_table causal "
    "prefix_len window_left window_right softmax_scale softcap learnable_sink k_scale v_scale num_splits fresh_tokens "
    "batch_invariant"
)
_func = Op("flash_attn_func", _ARGUMENTS.format(k="k", v="v"), writes="out lse workspace")
_varlen = Op("flash_attn_varlen_func", _ARGUMENTS.format(k="k", v="v"), writes="out lse workspace")
_with_kvcache = Op("flash_attn_with_kvcache", _ARGUMENTS.format(k="k_cache", v="v_cache"), writes="out lse workspace")
_merge_state = Op("merge_state", "out lse out_a lse_a out_b lse_b", writes="out lse")

# kestrel::attention_workspace_bytes(): decoding, 16 queries at most, may split the keys and keep the parts there.
WORKSPACE_BYTES = 8 << 20


def _attention(
    op: Op,
    out: Array | None,
    return_lse: bool,
    window_size: tuple[int | None, int | None],
    q: Array,
    *k_to_page_table: Any,
    mask_and_scales: tuple[Any, ...],
    hints: tuple[Any, ...],
    workspace: Array | None,
) -> Any:
    """Allocates what is to be returned, and unpacks the window."""
    shape = shape_of(f"{op.name}: q", q)
    packed = k_to_page_table[2] is not None
    if len(shape) != 4 - packed:
        expected = "[total_q, Hq, D]" if packed else "[B, Sq, Hq, D]"
        raise ValueError(f"{op.name}: q must have shape {expected}, got {list(shape)}")
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(f"{op.name}: window_size must be a pair (left, right), got {window_size!r}")
    written = new_array(q, shape) if out is None else out
    lse = None
    if return_lse:
        lse = new_array(q, (shape[1], shape[0]) if packed else (shape[0], shape[2], shape[1]), "float32")
    if workspace is None and not packed and shape[1] <= 16:
        workspace = scratch(written, WORKSPACE_BYTES)
    causal, prefix_len, *scales = mask_and_scales
    op.call(written, lse, workspace, q, *k_to_page_table, causal, prefix_len, *window_size, *scales, *hints)
    given = out if out is not None else result(written, q)
    return (given, result(lse, q)) if return_lse else given


def flash_attn_func(
    q: Array,
    k: Array,
    v: Array,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Array | None = None,
    softcap: float = 0.0,
    num_splits: int = 0,
    prefix_len: int | Array | None = None,
    k_scale: float | Array | None = None,
    v_scale: float | Array | None = None,
    return_lse: bool = False,
    out: Array | None = None,
    *,
    workspace: Array | None = None,
) -> Any:
    """Attention of q over dense k and v. Positions: see the module, `kestrel_kernels.flash_attn.cute`.

    Args:
        q: `[B, Sq, Hq, D]`, bf16 or fp16.
        k, v: `[B, Sk, Hk, D]`, both as q, or both e4m3.
        softmax_scale: factor of the scores; None: 1 / sqrt(D).
        causal: a query at position p sees the keys j <= p.
        window_size: (left, right), in tokens: only keys p - left <= j <= p + right are seen, on top of the other masks.
            None or -1: no limit on that side.
        learnable_sink: `[Hq]` bf16, fp16 or fp32: one more score per head, neither scaled nor capped, that takes its
            share of the softmax and has no value (Xiao et al. 2023).
        softcap: c > 0 turns scores into c * tanh(score / c) (Gemma 2, 2024); 0: off.
        num_splits: parts into which the keys are split on the GPU; 0: chosen by the library.
        prefix_len: int, or int32 `[B]`: causal, but positions below it see one another both ways (prefix-LM). In
            tokens, counted from the first key. None: no prefix.
        k_scale, v_scale: true value = stored * scale: a number or a one-element fp32 array; None: 1.
        return_lse: give (out, lse) instead of out.
        out: array like q, written and returned; it shares no memory with the inputs. None: a new one.
        workspace: uint8 `[WORKSPACE_BYTES]` on the GPU, for a CUDA graph captured without torch: it must live as long
            as the graph, and calls that run at once must not share it. None takes it from the framework's allocator.

    Returns:
        out, shape and dtype of q; with return_lse also lse, fp32 `[B, Hq, Sq]` (packed: `[Hq, total_q]`): the natural
        log of the sum of exp(score) over the keys seen, and the sink. A query that sees no key gives zeros and -inf
        (with a sink: the sink).

    Raises:
        TypeError: a dtype that is not taken, or an immutable out.
        ValueError: a shape, stride, device or value that does not fit: also a length above its bound or the room there
            is, and a needed page outside the cache (on the CPU always checked; on CUDA with KESTREL_CHECK=1, else such
            lengths are cut to what there is and such pages masked).
    """
    return _attention(
        _func, out, return_lse, window_size, q, k, v, None, None, None, None, None, None,
        mask_and_scales=(causal, prefix_len, softmax_scale, softcap, learnable_sink, k_scale, v_scale),
        hints=(num_splits, None, False), workspace=workspace,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Array | None = None,
    softcap: float = 0.0,
    num_splits: int = 0,
    prefix_len: int | Array | None = None,
    k_scale: float | Array | None = None,
    v_scale: float | Array | None = None,
    return_lse: bool = False,
    out: Array | None = None,
    seqused_k: Array | None = None,
    page_table: Array | None = None,
    *,
    workspace: Array | None = None,
) -> Any:
    """Attention over packed sequences of different lengths; the keys packed, paged, or dense.

    Rows of q that belong to no sequence are not read, and those of out and lse not written.

    Args:
        q: `[total_q, Hq, D]`, bf16 or fp16.
        k, v: `[total_k, Hk, D]`; with page_table `[pages, page_size, Hk, D]`; with neither `[B, Sk, Hk, D]`. Both as q,
            or both e4m3.
        cu_seqlens_q: int32 `[B + 1]`, the row of q where each sequence begins, and the end.
        cu_seqlens_k: the same for k and v; None where they are paged or dense.
        max_seqlen_q, max_seqlen_k: the host's bounds on the lengths; None: what there is room for.
        seqused_k: int32 `[B]`, keys in use of each sequence; what lies past them is not read. None: all.
        page_table: int32 `[B, max_pages]`: token j of sequence b lies in page `page_table[b, j // page_size]`. Entries
            that no query needs may hold anything.
        The others, the result and the errors: those of `flash_attn_func`.
    """
    if cu_seqlens_q is None:
        raise TypeError("flash_attn_varlen_func: cu_seqlens_q must be an array, got None")
    return _attention(
        _varlen, out, return_lse, window_size, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        seqused_k, page_table,
        mask_and_scales=(causal, prefix_len, softmax_scale, softcap, learnable_sink, k_scale, v_scale),
        hints=(num_splits, None, False), workspace=workspace,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    page_table: Array | None = None,
    seqused_k: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Array | None = None,
    softcap: float = 0.0,
    num_splits: int = 0,
    prefix_len: int | Array | None = None,
    k_scale: float | Array | None = None,
    v_scale: float | Array | None = None,
    return_lse: bool = False,
    out: Array | None = None,
    max_seqlen_k: int | None = None,
    fresh_tokens: int | None = None,
    batch_invariant: bool = False,
    *,
    workspace: Array | None = None,
) -> Any:
    """Attention of the newest queries, one (decode) or many (append), over a cache that holds their keys already.

    Args:
        q: `[B, Sq, Hq, D]`, bf16 or fp16: the last Sq positions of each sequence.
        k_cache, v_cache: `[pages, page_size, Hk, D]` (page_size >= 1; paged attention: Kwon et al. 2023); without
            page_table `[B, S, Hk, D]`. As q or e4m3.
        page_table: int32 `[B, max_pages]`: token j of sequence b lies in page `page_table[b, j // page_size]`. Entries
            that no query needs may hold anything.
        seqused_k: int32 `[B]`, the length of each sequence, its queries included; what lies past it is not read. None:
            all that the table, or the cache, can hold.
        max_seqlen_k: the host's bound on the lengths; None: what the table can hold.
        fresh_tokens: only the newest so many tokens of a sequence may still be being written by the kernel before this
            one; None: all. Older tokens, lengths and page table are then read while that kernel still runs. It must not
            be one that lets its successor start before its own turn has come: a norm, or a product of `linear`,
            `fused_mlp` or the MoE. (In practice it is `rope_and_cache`.) None is always right. Without effect on the
            CPU.
        batch_invariant: fix the split of the keys, so that a request's bits depend on its own length and the room for
            it alone (max_pages * page_size), not on its neighbours. On the CPU they never do. On the GPU it costs what
            the best split for the batch would have gained: on an H200, 32 heads of 64 in bf16, a sequence of 1024 keys
            takes 9.1 us instead of 5.3, 16 of 256 keys 10.9 instead of 9.8, 64 of 1024 keys 134 instead of 123.
        The others, the result and the errors: those of `flash_attn_func`.
    """
    return _attention(
        _with_kvcache, out, return_lse, window_size, q, k_cache, v_cache, None, None, None, max_seqlen_k, seqused_k,
        page_table,
        mask_and_scales=(causal, prefix_len, softmax_scale, softcap, learnable_sink, k_scale, v_scale),
        hints=(num_splits, fresh_tokens, batch_invariant), workspace=workspace,
    )  # fmt: skip


def last_kernel() -> str:
    """The kernel that this thread's latest call of the three functions ran: "cpu" for CPU arrays; on CUDA
    "FlashAttentionPlain" or, for many queries, "FlashAttentionFwd" or, for up to 16 a sequence,
    "FlashAttentionDecodeSm90" or "FlashAttentionDecodeSm90PersistentSplitFused", which splits the keys and joins the
    parts; "" before any."""
    return str(_library.load().last_attention_kernel())


def merge_state_into(out: Array, lse: Array, out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> None:
    """The attention over two disjoint sets of keys, from that over each (FlashInfer: Ye et al. 2025).

    Args:
        out: as out_a; written. May be out_a or out_b.
        lse: as lse_a; written. May be lse_a or lse_b.
        out_a, out_b: `[B, S, H, D]` or `[total, H, D]`; bf16, fp16 or fp32; any strides, last dimension contiguous.
        lse_a, lse_b: fp32, `[B, H, S]` or `[H, total]`: natural log, as the attention functions return it. -inf: that
            part saw no key, and its out is not looked at; where both are: zeros and -inf.

    Raises:
        TypeError: a dtype that is not taken, or an immutable out or lse.
        ValueError: a shape, stride or device that does not fit.
    """
    _merge_state.call(out, lse, out_a, lse_a, out_b, lse_b)


def merge_state(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """(out, lse) of the attention over two disjoint sets of keys. Arguments and errors of `merge_state_into`."""
    out = new_array(out_a, shape_of("merge_state: out_a", out_a))
    lse = new_array(out_a, shape_of("merge_state: lse_a", lse_a), "float32")
    _merge_state.call(out, lse, out_a, lse_a, out_b, lse_b)
    return result(out, out_a), result(lse, out_a)
