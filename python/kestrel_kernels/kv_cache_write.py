"""Writes of keys and values into a paged cache (the layout of PagedAttention, Kwon et al. 2023, arXiv:2309.06180).

Caches are `[pages, page_size, H, D]`, of any strides with a contiguous last dimension: a permuted view of
`[pages, H, page_size, D]` storage is one. Slot s is page `s // page_size`, offset `s % page_size`.
"""

from __future__ import annotations

from kestrel_kernels._op import Array, Op

__all__ = ["reshape_and_cache_flash", "rope_and_cache"]

_reshape_and_cache_flash = Op(
    "reshape_and_cache_flash",
    "key value key_cache value_cache slot_mapping kv_cache_dtype k_scale v_scale",
    writes="key_cache value_cache",
)
_rope_and_cache = Op(
    "rope_and_cache",
    "positions q k v cos_sin_cache k_cache v_cache slot_mapping kv_cache_dtype k_scale v_scale interleaved tok_qv_lin "
    "tau_pos_table",
    writes="q k_cache v_cache",
)


def reshape_and_cache_flash(
    key: Array,
    value: Array,
    key_cache: Array,
    value_cache: Array,
    slot_mapping: Array,
    kv_cache_dtype: str,
    k_scale: Array | float | None,
    v_scale: Array | float | None,
) -> None:
    """Writes each token's key and value into its slot of the caches; tokens with a negative slot are skipped.

    Where two tokens name one slot, the later one's stay on the CPU, either one's on CUDA.

    Args:
        key, value: `[T, H, D]`, bf16 or fp16; tokens and heads of any stride.
        key_cache, value_cache: `[pages, page_size, H, D]`; written.
        slot_mapping: `[T]`, int64 or int32, below pages * page_size.
        kv_cache_dtype: `"auto"`: caches have the dtype of key and take its bits as they are. `"fp8"` or `"fp8_e4m3"`:
            caches are float8_e4m3fn (or its bits as uint8) and take e4m3(x * (1 / scale)), rounded to nearest even,
            saturated at +-448.
        k_scale, v_scale: the factor from stored to true values: fp32, one element or one per head `[H]`, or a number.
            Not looked at with `"auto"`, where they may be None.

    Raises:
        TypeError: a dtype that is not taken, or an immutable cache.
        ValueError: a shape, stride, alignment, device, mode or slot that does not fit.
    """
    _reshape_and_cache_flash.call(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale)


def rope_and_cache(
    positions: Array,
    q: Array,
    k: Array,
    v: Array,
    cos_sin_cache: Array,
    k_cache: Array,
    v_cache: Array,
    slot_mapping: Array,
    kv_cache_dtype: str,
    k_scale: Array | float | None,
    v_scale: Array | float | None,
    interleaved: bool = False,
    tok_qv_lin: Array | None = None,
    tau_pos_table: Array | None = None,
) -> None:
    """`tau_tail_apply_into` (where tau is given), `rotary_embedding` and `reshape_and_cache_flash` in one.

    The same bits as those three in that order, intermediate roundings included, but k and v are not changed.

    Args:
        positions: `[T]` or `[B, S]`, int64 or int32, rows of cos_sin_cache and of tau_pos_table.
        q: `[T, Hq, D]` or `[B, S, Hq, D]`, bf16 or fp16, of any strides with a contiguous last dimension; changed.
        k, v: as q, with Hk heads.
        cos_sin_cache, interleaved: as `rotary_embedding`.
        k_cache, v_cache: `[pages, page_size, Hk, D]`; written.
        slot_mapping, kv_cache_dtype, k_scale, v_scale: as `reshape_and_cache_flash`, slot_mapping `[T]` with T = B * S.
        tok_qv_lin: `[T, 2*H]` or `[B, S, 2*H]`, dtype of q; needs Hq = Hk = H.
        tau_pos_table: `[P, H]`, dtype of q, or fp32. Both of these or neither.

    Raises:
        TypeError: a dtype that is not taken, or an immutable q or cache.
        ValueError: a shape, stride, alignment, device, mode, position or slot that does not fit.
    """
    _rope_and_cache.call(
        positions, q, k, v, cos_sin_cache, k_cache, v_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale,
        interleaved, tok_qv_lin, tau_pos_table,
    )  # fmt: skip
