"""Attention in float64, written from the contract: one score at a time allowed or not by predicates on positions."""

from __future__ import annotations

import numpy as np


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    prefix_len: int | None = None,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: np.ndarray | None = None,
    softcap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """One sequence: q [Sq, Hq, D], k and v [Sk, Hk, D] -> out [Sq, Hq, D], lse [Hq, Sq]."""
    (len_q, heads, width), (len_k, k_heads, _) = q.shape, k.shape
    scale = 1 / np.sqrt(width) if softmax_scale is None else softmax_scale
    position = np.arange(len_q)[:, None] + len_k - len_q
    key = np.arange(len_k)[None, :]
    seen = np.ones((len_q, len_k), bool)
    if causal or prefix_len is not None:
        seen = key <= position
    if prefix_len is not None:
        seen |= (key < prefix_len) & (position < prefix_len)
    left, right = (None if w == -1 else w for w in window_size)
    if left is not None:
        seen &= key >= position - left
    if right is not None:
        seen &= key <= position + right

    out, lse = np.zeros(q.shape), np.full((heads, len_q), -np.inf)
    for h in range(heads):
        group = h // (heads // k_heads)
        for i in range(len_q):
            see = seen[i]
            scores = k[see, group] @ q[i, h] * scale * k_scale
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            everything = scores if learnable_sink is None else np.append(scores, learnable_sink[h])
            if everything.size:
                top = everything.max()
                total = np.exp(everything - top).sum()
                lse[h, i] = top + np.log(total)
                out[i, h] = np.exp(scores - top) / total @ v[see, group] * v_scale
    return out, lse
