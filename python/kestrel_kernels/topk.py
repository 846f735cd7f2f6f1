"""The k best of each row, mixture-of-experts routing on them, and drawing a token from them.

One order everywhere: largest first; equal scores (-0.0 equals 0.0): lower index first; NaN counts as largest.
`1 <= k <= 128`, and no more than a row is wide. Scores are bf16, fp16 or fp32, rows of any stride; results are fresh
arrays of the caller's framework, or the given ones of the into forms, which must share no memory with the scores.
"""

from __future__ import annotations

from typing import Any

from kestrel_kernels._op import Array, ArrayT, Op, new_array, result, shape_of

__all__ = [
    "sample_top_k",
    "sample_top_k_into",
    "topk_fwd",
    "topk_fwd_into",
    "topk_router",
    "topk_router_into",
]

_topk_fwd = Op("topk_fwd", "values indices scores softmax", writes="values indices")
_topk_router = Op(
    "topk_router",
    "weights ids scores scoring bias renormalize num_groups topk_groups scale",
    writes="weights ids",
)
_sample_top_k = Op("sample_top_k", "ids logits k temperature seed offset", writes="ids")


def _rows(op: str, name: str, scores: Any, k: int) -> int:
    """The number of rows; k checked before arrays of that width are made."""
    if not hasattr(k, "__index__"):
        raise TypeError(f"{op}: k must be an int, got {type(k).__name__}")
    if not 1 <= k <= 128:
        raise ValueError(f"{op}: k must be from 1 to 128, got {k}")
    return shape_of(f"{op}: {name}", scores, 2)[0]


def _int64(word: Any) -> Any:
    """64 bits given as an unsigned number, such as torch.initial_seed() gives."""
    return word - 2**64 if type(word) is int and 2**63 <= word < 2**64 else word


def topk_fwd_into(values: Array, indices: Array, scores: Array, softmax: bool = False) -> None:
    """The k best scores of each row and where they are, k being the width of `values` and `indices`.

    Args:
        values: `[T, k]`, dtype of scores; written: the scores bit for bit or, with `softmax`, the softmax over the k
            chosen scores, in fp32, rounded once.
        indices: `[T, k]`, int32; written.
        scores: `[T, N]`, bf16, fp16 or fp32; any N, a vocabulary too.
        softmax: see values.

    Raises:
        TypeError: a dtype that is not taken, or an immutable output.
        ValueError: a shape, stride, alignment or device that does not fit, or k out of range.
    """
    _topk_fwd.call(values, indices, scores, softmax)


def topk_fwd(scores: ArrayT, k: int, softmax: bool = False) -> tuple[ArrayT, ArrayT]:
    """The k best of each row: scores `[T, N]` -> values `[T, k]` as scores, indices `[T, k]` int32.

    With `softmax`, values are the softmax over the k chosen scores. See `topk_fwd_into`.
    """
    shape = (_rows("topk_fwd", "scores", scores, k), k)
    values, indices = new_array(scores, shape), new_array(scores, shape, "int32")
    _topk_fwd.call(values, indices, scores, softmax)
    return result(values, scores), result(indices, scores)


def topk_router_into(
    weights: Array,
    ids: Array,
    scores: Array,
    scoring: str = "softmax",
    bias: Array | None = None,
    renormalize: bool = False,
    num_groups: int = 1,
    topk_groups: int = 1,
    scale: float = 1.0,
) -> None:
    """Chooses k experts for each token, k being the width of `weights` and `ids`.

    The scoring function is applied over all E experts, in fp32. Experts are chosen, and stand in the result, by
    score + bias, largest first; their weights are the scores without the bias.

    DeepSeek-V3's router (2024, arXiv:2412.19437) is `scoring="sigmoid"` with a bias, `renormalize=True`,
    `num_groups=8`, `topk_groups=4`, `scale=2.5`.

    Args:
        weights: `[T, k]`, fp32; written.
        ids: `[T, k]`, int32; written.
        scores: `[T, E]`, bf16, fp16 or fp32: the router's logits.
        scoring: "softmax" or "sigmoid".
        bias: `[E]`, bf16, fp16 or fp32, or None.
        renormalize: divide the weights by their sum over the chosen (where that is 0, they stay 0).
        num_groups: E is this many groups of neighbours; a group scores the sum of its two best score + bias.
        topk_groups: experts are chosen from this many of the best groups alone.
        scale: multiplies the weights, last.

    Raises:
        TypeError: a dtype that is not taken, or an immutable output.
        ValueError: a shape, stride, alignment or device that does not fit, an unknown scoring, num_groups that do not
            divide E, or k above the number of experts in topk_groups groups.
    """
    _topk_router.call(weights, ids, scores, scoring, bias, renormalize, num_groups, topk_groups, scale)


def topk_router(
    scores: ArrayT,
    k: int,
    scoring: str = "softmax",
    bias: Array | None = None,
    renormalize: bool = False,
    num_groups: int = 1,
    topk_groups: int = 1,
    scale: float = 1.0,
) -> tuple[ArrayT, ArrayT]:
    """k experts a token: scores `[T, E]` -> weights `[T, k]` fp32, ids `[T, k]` int32. See `topk_router_into`."""
    shape = (_rows("topk_router", "scores", scores, k), k)
    weights, ids = new_array(scores, shape, "float32"), new_array(scores, shape, "int32")
    _topk_router.call(weights, ids, scores, scoring, bias, renormalize, num_groups, topk_groups, scale)
    return result(weights, scores), result(ids, scores)


def sample_top_k_into(
    ids: Array,
    logits: Array,
    k: int,
    temperature: float | Array,
    seed: int | Array,
    offset: int | Array,
) -> None:
    """Draws one token for each row from the softmax of its k best logits / temperature.

    The draw of row r depends on that row, seed and `offset + r` alone (Philox4x32-10, Salmon et al. 2011; the C++
    header says how, to the bit): the same token alone, in a batch, on any device. A caller that draws again advances
    offset by T. A row whose best logit is NaN or infinite gives that one.

    Args:
        ids: `[T]`, int32; written.
        logits: `[T, N]`, bf16, fp16 or fp32.
        k: how many are considered; k = 1 or temperature 0 is argmax, one scan.
        temperature: at least 0 and finite; or one element, fp32.
        seed: 64 bits; or one element, int64.
        offset: 64 bits; or one element, int64. Tensors are read when the op runs, so a graph draws anew.

    Raises:
        TypeError: a dtype that is not taken, or an immutable `ids`.
        ValueError: a shape, stride, alignment or device that does not fit, k outside 1 to 128 or above N, or a
            temperature (on the CPU, or a number) that is negative, infinite or NaN.
    """
    _sample_top_k.call(ids, logits, k, temperature, _int64(seed), _int64(offset))


def sample_top_k(
    logits: ArrayT,
    k: int,
    temperature: float | Array,
    seed: int | Array,
    offset: int | Array,
) -> ArrayT:
    """One token for each row, of its k best: logits `[T, N]` -> ids `[T]` int32. See `sample_top_k_into`."""
    ids = new_array(logits, (_rows("sample_top_k", "logits", logits, k),), "int32")
    sample_top_k_into(ids, logits, k, temperature, seed, offset)
    return result(ids, logits)
