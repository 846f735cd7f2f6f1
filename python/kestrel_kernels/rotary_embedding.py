"""Rotary position embedding (RoFormer, Su et al. 2021, arXiv:2104.09864), in place."""

from __future__ import annotations

from kestrel_kernels._op import Array, Op

__all__ = ["rotary_embedding"]

_rotary_embedding = Op(
    "rotary_embedding", "positions query key head_size cos_sin_cache interleaved", writes="query key"
)


def rotary_embedding(
    positions: Array,
    query: Array,
    key: Array | None,
    head_size: int,
    cos_sin_cache: Array,
    interleaved: bool = False,
) -> None:
    """Rotates the first R elements of each head of query and key in place: (a, b) becomes
    (a cos - b sin, b cos + a sin), in fp32, rounded once. Elements past R stay as they are.

    Args:
        positions: `[T]` or `[B, S]`, int64 or int32, in [0, P).
        query: `[T, Hq, D]` or `[B, S, Hq, D]`, bf16, fp16 or fp32, of any strides with a contiguous last dimension;
            written.
        key: as query, with a head count of its own, or None; written.
        head_size: D.
        cos_sin_cache: fp32 `[P, R]`: R/2 cosines, then R/2 sines, of each position's angles; R even, R <= D.
        interleaved: False pairs elements (i, i + R/2) (GPT-NeoX), True (2i, 2i + 1) (GPT-J).

    Raises:
        TypeError: a dtype that is not taken, or an immutable query or key.
        ValueError: a shape, stride, alignment, device or position that does not fit.
    """
    _rotary_embedding.call(positions, query, key, head_size, cos_sin_cache, interleaved)
