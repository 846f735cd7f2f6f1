"""Rows of a table by id: `table[ids]`, copied bit for bit."""

from __future__ import annotations

from kestrel_kernels._op import Array, ArrayT, Op, new_array, result, shape_of

__all__ = ["embedding", "embedding_into"]

_embedding = Op("embedding", "out table ids", writes="out")


def embedding_into(out: Array, table: Array, ids: Array) -> None:
    """out[..., :] = table[ids[...], :].

    Args:
        out: `[..., N]`, dtype of table; rows of any stride; written. It must share no memory with table.
        table: `[V, N]`, any dtype of whole bytes; rows of any stride.
        ids: `[...]`, int32 or int64, up to 5 dimensions (none: one row) that fold into two strides; each in
            `[0, V)`. On CUDA the row of another id becomes zeros.

    Raises:
        TypeError: a dtype that is not taken, or an immutable `out`.
        ValueError: a shape, stride, alignment or device that does not fit, or (on the CPU, and on CUDA with
            KESTREL_CHECK=1; before any write) an id outside `[0, V)`.
    """
    _embedding.call(out, table, ids)


def embedding(table: ArrayT, ids: Array) -> ArrayT:
    """table[ids]: table `[V, N]`, ids `[...]` int32 or int64 -> `[..., N]`. See `embedding_into`."""
    width = shape_of("embedding: table", table, 2)[-1]
    out = new_array(table, (*shape_of("embedding: ids", ids, 0), width))
    _embedding.call(out, table, ids)
    return result(out, table)
