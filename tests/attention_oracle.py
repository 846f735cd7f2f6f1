"""Attention in float64, written from the contract: one score at a time allowed or not by predicates on positions."""

from __future__ import annotations

from collections.abc import Callable

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
    rounded: Callable[[np.ndarray], np.ndarray] = lambda x: x,
) -> tuple[np.ndarray, np.ndarray]:
    """One sequence: q [Sq, Hq, D], k and v [Sk, Hk, D] -> out [Sq, Hq, D], lse [Hq, Sq]. `rounded` is applied to what
    two matrix products with a softmax between them would store: scores, weights, out."""
    (len_q, heads, width), (len_k, k_heads, _) = q.shape, k.shape
    scale = 1 / np.sqrt(width) if softmax_scale is None else softmax_scale
    position = np.arange(len_q)[:, None] + len_k - len_q
    key = np.arange(len_k)[None, :]
    seen = np.ones((len_q, len_k), bool)
    if causal or prefix_len is not None:
        seen &= key <= position
    if prefix_len is not None:
        seen |= (key < prefix_len) & (position < prefix_len)
    left, right = (None if w == -1 else w for w in window_size)
    if left is not None:
        seen &= key >= position - left
    if right is not None:
        seen &= key <= position + right

    out, lse = np.zeros(q.shape), np.zeros((heads, len_q))
    for h in range(heads):
        group = h // (heads // k_heads)
        scores = rounded(q[:, h] @ k[:, group].T) * scale * k_scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        if learnable_sink is not None:
            scores = np.hstack([scores, np.full((len_q, 1), learnable_sink[h])])
        counts = np.hstack([seen, np.ones((len_q, scores.shape[1] - len_k), bool)])
        top = np.max(scores, axis=1, where=counts, initial=-np.inf, keepdims=True)
        top[np.isneginf(top)] = 0
        weights = np.exp(scores - top, where=counts, out=np.zeros_like(scores))
        total = weights.sum(axis=1)
        with np.errstate(divide="ignore"):
            lse[h] = top[:, 0] + np.log(total)
        weights = rounded(weights / np.where(total == 0, 1, total)[:, None])
        for i in range(len_q):
            out[i, h] = weights[i, :len_k][seen[i]] @ v[seen[i], group] * v_scale
    return rounded(out), lse
