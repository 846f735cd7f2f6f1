"""Attention scaling by token and position on a packed QKV projection, in place."""

from __future__ import annotations

from kestrel_kernels._op import Array, Op

__all__ = ["tau_tail_apply_into"]

_tau_tail_apply_into = Op("tau_tail_apply_into", "qkv_out tok_qv_lin tau_pos_table position_ids", writes="qkv_out")


def tau_tail_apply_into(qkv_out: Array, tok_qv_lin: Array, tau_pos_table: Array, position_ids: Array) -> None:
    """Scales query and value heads in place: `q_h *= tanh(tok[h]) + tau[position, h]` and
    `v_h *= tanh(tok[H + h]) + tau[position, h]`, in fp32, rounded once; keys stay as they are.

    Args:
        qkv_out: `[B, S, 3*H*D]` or `[T, 3*H*D]`, bf16 or fp16: H*D elements of queries, of keys, of values; written.
        tok_qv_lin: `[B, S, 2*H]` or `[T, 2*H]`, dtype of qkv_out.
        tau_pos_table: `[P, H]`, dtype of qkv_out, or fp32.
        position_ids: `[B, S]` or `[T]`, int64 or int32, in [0, P).

    Raises:
        TypeError: a dtype that is not taken, or an immutable `qkv_out`.
        ValueError: a shape, stride, alignment, device or position that does not fit.
    """
    _tau_tail_apply_into.call(qkv_out, tok_qv_lin, tau_pos_table, position_ids)
