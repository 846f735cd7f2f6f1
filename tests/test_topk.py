"""topk_fwd, topk_router, sample_top_k against NumPy float64, on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kestrel_kernels import topk
from support import BACKENDS, FLOATS, HAS_JAX, Backend, assert_close, random

NAN = np.nan


def order(x: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k best of each row: largest first, NaN above all, equal ones by index."""
    index = np.broadcast_to(np.arange(x.shape[-1]), x.shape)
    number = np.where(np.isnan(x), 0.0, x)
    return np.lexsort((index, -number, ~np.isnan(x)), axis=-1)[..., :k]


def softmax(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)


def take(x: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.take_along_axis(x, index, -1)


def check_topk(backend: Backend, x: np.ndarray, k: int, dtype: str) -> None:
    scores = backend.array(x, dtype)
    host = backend.numpy(scores)
    want = order(host, k)
    shape = (len(x), k)
    values, indices = backend.poisoned(shape, dtype), backend.poisoned(shape, "int32")
    topk.topk_fwd_into(values, indices, scores)
    assert np.array_equal(backend.numpy(indices), want)
    assert backend.bits(values).tobytes() == take(backend.bits(scores), want).tobytes()
    got = topk.topk_fwd(scores, k, softmax=True)
    assert np.array_equal(backend.numpy(got[1]), want)
    assert_close(backend.numpy(got[0]), softmax(take(host, want)), dtype, slack=1e-7)
    assert backend.bits(got[0]).dtype == backend.bits(scores).dtype


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("rows", "width", "k"),
    [(0, 8, 2), (1, 1, 1), (5, 64, 8), (3, 64, 64), (2, 128, 128), (3, 300, 7), (2, 1025, 1), (2, 2000, 128),
     (740, 64, 8), (3, 5000, 100), (2, 49152, 40), (1, 70001, 3), (3, 256, 32), (2, 512, 32), (9, 99, 31),
     (2, 66000, 128)],
)  # fmt: skip
def test_topk(backend: Backend, dtype: str, rows: int, width: int, k: int) -> None:
    check_topk(backend, random((rows, width), scale=3), k, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [1, 2, 33, 128])
@pytest.mark.parametrize("width", [128, 600, 9000])
def test_topk_orders_of_scores(backend: Backend, dtype: str, width: int, k: int) -> None:
    """Sorted rows, rows of equal scores, of few different ones, of zeros of both signs, of NaN and of infinities."""
    rng = np.random.default_rng(3)
    ordered = np.sort(rng.standard_normal(width))
    few = rng.integers(-2, 3, width).astype(float)
    zeros = np.where(rng.random(width) < 0.5, 0.0, -0.0)
    rows = [ordered, ordered[::-1], np.ones(width), few, zeros, np.full(width, NAN), np.full(width, -np.inf)]
    rows += [np.where(rng.random(width) < p, NAN, few) for p in (0.01, 0.5)]
    rows += [np.where(rng.random(width) < 0.3, np.inf, few), np.where(few == 0, -np.inf, few), -np.abs(ordered)]
    check_topk(backend, np.array(rows), k, dtype)


def test_topk_nan_of_either_sign(backend: Backend) -> None:
    bits = np.array(
        [[0x3F800000, 0xFFC00001, 0x7F800000, 0x7F800001, 0x00000000, 0x80000000, 1, 0x80000001]], np.uint32
    )
    values, indices = topk.topk_fwd(backend.array(bits.view(np.float32), "float32"), 8)
    assert backend.numpy(indices).tolist() == [[1, 3, 2, 0, 6, 4, 5, 7]]
    assert np.array_equal(backend.bits(values).view(np.uint32), bits[:, backend.numpy(indices)[0]])


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(0, 5), width=st.integers(1, 700), part=st.floats(0, 1), offset=st.integers(0, 5),
    gap=st.integers(0, 5), levels=st.integers(1, 1000), dtype=st.sampled_from(FLOATS),
    backend=st.sampled_from(BACKENDS),
)  # fmt: skip
def test_topk_odd_shapes(
    rows: int, width: int, part: float, offset: int, gap: int, levels: int, dtype: str, backend: Backend
) -> None:
    """Rows at any offset and stride, few or many different scores; what lies between outputs stays as it was."""
    k = 1 + int(part * (min(width, 128) - 1))
    x = np.random.default_rng(levels).integers(-levels, levels + 1, (rows, offset + width + gap)) / 8
    scores = backend.array(x, dtype)[:, offset : offset + width]
    values = backend.poisoned((rows, offset + k + gap), dtype)
    indices = backend.poisoned((rows, offset + k + gap), "int32")
    topk.topk_fwd_into(values[:, offset : offset + k], indices[:, offset : offset + k], scores)
    host = backend.numpy(scores)
    want = order(host, k)
    assert np.array_equal(backend.numpy(indices)[:, offset : offset + k], want)
    assert np.array_equal(backend.numpy(values)[:, offset : offset + k], take(host, want))
    outside = np.r_[0:offset, offset + k : offset + k + gap]
    assert np.isnan(backend.numpy(values)[:, outside]).all()
    assert (backend.numpy(indices)[:, outside] == np.iinfo(np.int32).max).all()


def route(
    x: np.ndarray,
    k: int,
    scoring: str,
    bias: np.ndarray | None,
    renormalize: bool,
    groups: int,
    best: int,
    scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    score = softmax(x) if scoring == "softmax" else 1 / (1 + np.exp(-x))
    choice = score + (0 if bias is None else bias)
    grouped = choice.reshape(len(x), groups, x.shape[-1] // groups)
    two = take(grouped, order(grouped, min(2, grouped.shape[-1]))).sum(-1)
    allowed = np.zeros((len(x), groups), bool)
    np.put_along_axis(allowed, order(two, best), True, -1)
    choice = np.where(np.repeat(allowed, grouped.shape[-1], -1), choice, -np.inf)
    ids = order(choice, k)
    weights = take(score, ids)
    return weights / (weights.sum(-1, keepdims=True) if renormalize else 1) * scale, ids


ROUTERS = {  # tokens, experts, k, scoring, bias, renormalize, num_groups, topk_groups, scale
    "mixtral": (9, 8, 2, "softmax", None, True, 1, 1, 1.0),
    "plain": (740, 64, 8, "softmax", None, False, 1, 1, 1.0),
    "deepseek-v3": (33, 256, 8, "sigmoid", "float32", True, 8, 4, 2.5),
    "sigmoid": (5, 100, 3, "sigmoid", None, False, 1, 1, 0.5),
    "softmax with bias": (5, 96, 6, "softmax", "bfloat16", True, 3, 2, 1.0),
    "groups of one": (7, 16, 4, "sigmoid", "float16", True, 16, 5, 1.0),
    "all groups": (7, 64, 8, "sigmoid", "float32", False, 8, 8, 1.0),
    "whole groups": (7, 32, 8, "sigmoid", "float32", True, 8, 2, 1.0),
    "many experts": (3, 4096, 128, "softmax", "float32", True, 1, 1, 1.0),
    "none": (0, 64, 8, "softmax", None, True, 1, 1, 1.0),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", ROUTERS)
def test_router(backend: Backend, case: str, dtype: str) -> None:
    tokens, experts, k, scoring, bias_dtype, renormalize, groups, best, scale = ROUTERS[case]
    scores = backend.array(random((tokens, experts), scale=2), dtype)
    # A large bias for low scores, so that choice and weights differ; no two experts' sums nearly equal.
    bias = backend.array(random((experts,), seed=5, scale=0.3), bias_dtype) if bias_dtype else None
    host_bias = None if bias is None else backend.numpy(bias)
    want = route(backend.numpy(scores), k, scoring, host_bias, renormalize, groups, best, scale)
    weights, ids = backend.poisoned((tokens, k), "float32"), backend.poisoned((tokens, k), "int32")
    topk.topk_router_into(weights, ids, scores, scoring, bias, renormalize, groups, best, scale)
    assert np.array_equal(backend.numpy(ids), want[1])
    assert_close(backend.numpy(weights), want[0], "float32", slack=1e-6)
    got = topk.topk_router(scores, k, scoring, bias, renormalize, groups, best, scale)
    assert backend.bits(got[0]).tobytes() == backend.bits(weights).tobytes()
    assert backend.bits(got[1]).tobytes() == backend.bits(ids).tobytes()


def test_router_ties_and_groups(backend: Backend) -> None:
    """Equal groups and equal experts: the lower index; a chosen group's worst expert before another group's best."""
    even = backend.array(np.zeros((2, 16)), "float32")
    weights, ids = topk.topk_router(even, 4, num_groups=4, topk_groups=2)
    assert backend.numpy(ids).tolist() == [[0, 1, 2, 3]] * 2
    assert np.array_equal(backend.numpy(weights), np.full((2, 4), 1 / 16))
    # Group 2 holds the single best expert, yet groups 0 and 1 have the better two.
    x = backend.array([[1, 1, -9, -9, 1, 1, -9, -9, 2, -9, -9, -9]], "float32")
    _, ids = topk.topk_router(x, 5, "sigmoid", num_groups=3, topk_groups=2)
    assert backend.numpy(ids).tolist() == [[0, 1, 4, 5, 2]]
    bias = backend.array([0] * 8 + [-np.inf] * 4, "float32")
    _, ids = topk.topk_router(x, 5, "sigmoid", bias, num_groups=3, topk_groups=3)
    assert backend.numpy(ids).tolist() == [[0, 1, 4, 5, 2]]


def test_router_special_values(backend: Backend) -> None:
    x = np.zeros((4, 8))
    x[0, 5] = NAN  # the whole softmax is NaN: the lowest indices
    x[1, 5] = -np.inf
    x[2] = -1e4  # a sigmoid that underflows: weights 0, not 0 / 0
    x[3, 6] = 1e4
    weights, ids = topk.topk_router(backend.array(x, "float32"), 2, renormalize=True)
    assert backend.numpy(ids).tolist() == [[0, 1], [0, 1], [0, 1], [6, 0]]
    want = np.array([[NAN, NAN], [0.5, 0.5], [0.5, 0.5], [1, 0]])
    assert np.array_equal(backend.numpy(weights), want, equal_nan=True)
    weights, ids = topk.topk_router(backend.array(x, "float32"), 2, "sigmoid", renormalize=True)
    assert backend.numpy(ids).tolist() == [[5, 0], [0, 1], [0, 1], [6, 0]]
    assert_close(backend.numpy(weights), np.array([[NAN, NAN], [0.5, 0.5], [0, 0], [2 / 3, 1 / 3]]), "float32")


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10, written from Salmon et al. 2011."""
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        mask = 0xFFFFFFFF
        counter = [b >> 32 ^ counter[1] ^ key[0], b & mask, a >> 32 ^ counter[3] ^ key[1], a & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return counter


def uniform(seed: int, counter: int) -> float:
    low, high = divmod(counter % 2**64, 2**32)[::-1]
    words = philox([low, high, 0, 0], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF])
    return (words[0] >> 8) / 2**24


def draw(logits: np.ndarray, k: int, temperature: float, seed: int, offset: int) -> np.ndarray:
    best = order(logits, k)
    cumulative = np.cumsum(softmax(take(logits, best) / temperature), -1)
    u = np.array([uniform(seed, offset + row) for row in range(len(logits))]).reshape(-1, 1)
    assert (np.abs(cumulative - u) > 1e-6).all(), "choose another seed: a draw on the edge"
    return take(best, np.argmax(cumulative > u, -1)[:, None])[:, 0]


def test_philox_known_answers() -> None:
    ones = 0xFFFFFFFF
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("rows", "width", "k", "temperature", "seed", "offset"),
    [(0, 9, 3, 1.0, 0, 0), (1, 1, 1, 1.0, 0, 0), (40, 128, 128, 1.5, 0, 0), (30, 700, 40, 0.7, 1234567890123, 99),
     (2, 49152, 40, 0.8, 7, 2**32 - 1), (9, 64, 8, 3.0, -2, 2**63 - 4), (9, 64, 8, 100.0, 2**64 - 1, 2**64 - 4),
     (3, 20, 9, 1.0, 2**63, 5)],
)  # fmt: skip
def test_sample(
    backend: Backend, dtype: str, rows: int, width: int, k: int, temperature: float, seed: int, offset: int
) -> None:
    """The token that the contract's uniform number and walk lead to; numbers and one-element arrays alike."""
    logits = backend.array(random((rows, width), scale=2), dtype)
    want = draw(backend.numpy(logits), k, temperature, seed, offset)
    ids = backend.poisoned((rows,), "int32")
    topk.sample_top_k_into(ids, logits, k, temperature, seed, offset)
    assert np.array_equal(backend.numpy(ids), want)
    words = np.array([seed % 2**64, offset % 2**64], np.uint64).view(np.int64)
    seeds, offsets = backend.array(words[0], "int64"), backend.array(words[1:, None], "int64")
    got = topk.sample_top_k(logits, k, backend.array([temperature], "float32"), seeds, offsets)
    assert type(got) is type(logits) and np.array_equal(backend.numpy(got), want)


def test_sample_does_not_depend_on_the_batch(backend: Backend) -> None:
    logits = backend.array(random((12, 500)), "bfloat16")
    together = backend.numpy(topk.sample_top_k(logits, 50, 1.0, 3, 100))
    alone = [backend.numpy(topk.sample_top_k(logits[i : i + 1], 50, 1.0, 3, 100 + i))[0] for i in range(12)]
    assert together.tolist() == alone
    strided = topk.sample_top_k(logits[::3], 50, 1.0, 3, 100)
    assert backend.numpy(strided)[0] == together[0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sample_distribution(backend: Backend, temperature: float) -> None:
    """Chi-square over 20000 draws of 10 tokens: 9 degrees of freedom, 27.9 is exceeded once in a thousand."""
    row = random((50,), seed=4)
    host = np.broadcast_to(row, (20000, 50)).copy()
    ids = backend.numpy(topk.sample_top_k(backend.array(host, "float32"), 10, temperature, 2024, 1))
    best = order(row, 10)
    expected = softmax(row[best] / temperature) * len(ids)
    observed = np.bincount(ids, minlength=50)
    assert observed.sum() == observed[best].sum() == len(ids)
    assert ((observed[best] - expected) ** 2 / expected).sum() < 27.9
    # Neighbouring rows are independent: the pairs' joint distribution of the two best tokens.
    pairs = (ids[:-1] == best[0]) & (ids[1:] == best[0])
    p = (expected[0] / len(ids)) ** 2
    assert abs(pairs.mean() - p) < 5 * np.sqrt(p / len(ids))


@pytest.mark.parametrize("dtype", FLOATS)
def test_sample_greedy(backend: Backend, dtype: str) -> None:
    """Temperature 0, and k = 1 at any temperature: the best, the first among equals."""
    x = random((6, 3000)).round(1)
    logits = backend.array(x, dtype)
    want = order(backend.numpy(logits), 1)[:, 0]
    zero = backend.array([0.0], "float32")
    cases = [(40, 0), (1, 0.0), (1, 5.0), (40, zero), (40, -0.0)]
    if backend.device != "cpu":  # where a temperature is not looked at before
        cases += [(40, backend.array([bad], "float32")) for bad in (-1.0, NAN)]
    for k, temperature in cases:
        assert np.array_equal(backend.numpy(topk.sample_top_k(logits, k, temperature, 1, 2)), want)
    unique = backend.array(np.eye(6, 50), dtype)  # a temperature so small that the best is all there is
    assert backend.numpy(topk.sample_top_k(unique, 40, 1e-30, 1, 2)).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("dtype", FLOATS)
def test_sample_special_values(backend: Backend, dtype: str) -> None:
    x = np.full((6, 300), -1.0)
    x[0, [7, 200]] = NAN  # NaN is the best
    x[1, [9, 11]] = np.inf
    x[2] = -np.inf
    x[3] = NAN
    x[4] = -np.inf
    x[4, 250] = -5.0  # all others have no weight
    x[5, 299] = 3.0e4
    for temperature in (0.0, 0.3, 10.0):
        for seed in range(5):
            ids = topk.sample_top_k(backend.array(x, dtype), 20, temperature, seed, 0)
            assert backend.numpy(ids).tolist() == [7, 9, 0, 0, 250, 299]


@pytest.mark.skipif(not HAS_JAX, reason="JAX is not installed")
def test_jax() -> None:
    backend = Backend("jax")
    x = backend.array(random((3, 64)), "bfloat16")
    values, indices = topk.topk_fwd(x, 4)
    assert type(values) is type(indices) is type(x)
    assert np.array_equal(backend.numpy(indices), order(backend.numpy(x), 4))
    weights, ids = topk.topk_router(x, 4)
    assert type(weights) is type(ids) is type(x) and np.array_equal(backend.numpy(ids), backend.numpy(indices))
    drawn = topk.sample_top_k(
        x, 4, backend.array([0.0], "float32"), 0, backend.array(3, "int32").astype("int32").item()
    )
    assert type(drawn) is type(x) and np.array_equal(backend.numpy(drawn), backend.numpy(ids)[:, 0])
    with pytest.raises(TypeError, match=r"^topk_fwd: values must be writable"):
        topk.topk_fwd_into(values, indices, x)


Bad = tuple[type[Exception], str, dict[str, object]]


def bad_topk(b: Backend) -> list[Bad]:
    return [
        (TypeError, "scores must be bfloat16, float16 or float32, got int32", {"scores": b.array([[1]], "int32")}),
        (TypeError, "values must be bfloat16, got float32", {"values": b.poisoned((4, 8), "float32")}),
        (TypeError, "indices must be int32, got int64", {"indices": b.poisoned((4, 8), "int64")}),
        (TypeError, "scores must be an array", {"scores": [[1.0]]}),
        (ValueError, "scores must have 2 dimensions", {"scores": b.array(random((64,)), "bfloat16")}),
        (ValueError, r"values must have shape \[4, k\], got \[5, 8\]", {"values": b.poisoned((5, 8), "bfloat16")}),
        (ValueError, r"indices must have shape \[4, 8\], got \[4, 7\]", {"indices": b.poisoned((4, 7), "int32")}),
        (ValueError, "k must be at most the 7 scores of a row, got 8", {"scores": b.array(random((4, 7)), "bfloat16")}),
        (ValueError, "scores must have a contiguous last", {"scores": b.array(random((4, 128)), "bfloat16")[:, ::2]}),
        (ValueError, "k must be from 1 to 128, got 129",
         {"values": b.poisoned((4, 129), "bfloat16"), "indices": b.poisoned((4, 129), "int32")}),
        (ValueError, "k must be from 1 to 128, got 0",
         {"values": b.poisoned((4, 0), "bfloat16"), "indices": b.poisoned((4, 0), "int32")}),
    ]  # fmt: skip


def bad_router(b: Backend) -> list[Bad]:
    return [
        (ValueError, 'scoring must be "softmax" or "sigmoid", got "relu"', {"scoring": "relu"}),
        (TypeError, "weights must be float32, got bfloat16", {"weights": b.poisoned((4, 8), "bfloat16")}),
        (TypeError, "ids must be int32, got int64", {"ids": b.poisoned((4, 8), "int64")}),
        (TypeError, "bias must be bfloat16, float16 or float32, got int32", {"bias": b.array(np.zeros(64), "int32")}),
        (ValueError, r"bias must have shape \[64\], got \[63\]", {"bias": b.array(np.zeros(63), "float32")}),
        (ValueError, "bias must have a contiguous last", {"bias": b.array(np.zeros(128), "float32")[::2]}),
        (ValueError, "num_groups must be a divisor of the number of experts, got 5", {"num_groups": 5}),
        (ValueError, "num_groups must be a divisor of the number of experts, got 0", {"num_groups": 0}),
        (ValueError, "topk_groups must be from 1 to num_groups, got 2", {"topk_groups": 2}),
        (ValueError, "topk_groups must be from 1 to num_groups, got 0", {"topk_groups": 0}),
        (ValueError, "k must be at most the experts of topk_groups groups, got 8", {"num_groups": 16}),
        (ValueError, "k must be at most the 7 scores of a row, got 8", {"scores": b.array(random((4, 7)), "bfloat16")}),
        (ValueError, r"weights must have shape \[4, k\], got \[3, 8\]", {"weights": b.poisoned((3, 8), "float32")}),
    ]  # fmt: skip


def bad_sample(b: Backend) -> list[Bad]:
    cases: list[Bad] = [
        (ValueError, "k must be from 1 to 128, got 0", {"k": 0}),
        (ValueError, "k must be from 1 to 128, got 129", {"k": 129}),
        (ValueError, "k must be at most the 64 scores of a row, got 65", {"k": 65}),
        (ValueError, "temperature must be finite and not negative, got -1", {"temperature": -1.0}),
        (ValueError, "temperature must be finite and not negative, got inf", {"temperature": np.inf}),
        (TypeError, "temperature must be float32, got float64", {"temperature": b.array([1.0], "float64")}),
        (ValueError, "temperature must be a number or hold one", {"temperature": b.array([1.0, 2.0], "float32")}),
        (TypeError, "seed must be int64, got float32", {"seed": b.array([1.0], "float32")}),
        (ValueError, "seed must be a number or hold one element, not several, got 0", {"seed": b.array([], "int64")}),
        (TypeError, "offset must be int64, got int32", {"offset": b.array([1], "int32")}),
        (ValueError, "offset must be a number or hold one", {"offset": b.array([1, 2], "int64")}),
        (TypeError, "ids must be int32, got int64", {"ids": b.poisoned((4,), "int64")}),
        (ValueError, r"ids must have shape \[4\], got \[4, 1\]", {"ids": b.poisoned((4, 1), "int32")}),
        (ValueError, "ids must have a contiguous last", {"ids": b.poisoned((8,), "int32")[::2]}),
        (TypeError, "logits must be bfloat16, float16 or float32", {"logits": b.array(random((4, 64)), "int32")}),
        (ValueError, "logits must have 2 dimensions", {"logits": b.array(random((64,)), "float32")}),
    ]  # fmt: skip
    if b.device == "cpu":  # a device's temperature is not looked at
        nan = b.array(NAN, "float32")
        cases.append((ValueError, "temperature must be finite and not negative, got nan", {"temperature": nan}))
    return cases


OPS: dict[str, tuple[Any, Any, dict[str, str], str]] = {
    "topk_fwd": (topk.topk_fwd_into, bad_topk, {"values": "bfloat16", "indices": "int32"}, "scores"),
    "topk_router": (topk.topk_router_into, bad_router, {"weights": "float32", "ids": "int32"}, "scores"),
    "sample_top_k": (topk.sample_top_k_into, bad_sample, {"ids": "int32"}, "logits"),
}


@pytest.mark.parametrize("op", OPS)
def test_bad_input(backend: Backend, op: str) -> None:
    into, cases, outputs, scores = OPS[op]
    for error, message, changes in cases(backend):
        shape = (4,) if op == "sample_top_k" else (4, 8)
        args: dict[str, object] = {name: backend.poisoned(shape, dtype) for name, dtype in outputs.items()}
        args[scores] = backend.array(random((4, 64)), "bfloat16")
        if op == "sample_top_k":
            args |= {"k": 8, "temperature": 1.0, "seed": 0, "offset": 0}
        args |= changes
        before = {name: backend.bits(args[name]).tobytes() for name in outputs}
        with pytest.raises(error, match=f"^{op}: {message}"):
            into(**args)
        assert {name: backend.bits(args[name]).tobytes() for name in outputs} == before


def test_bad_functional(backend: Backend) -> None:
    """k is checked before arrays of that width are made."""
    x = backend.array(random((4, 64)), "float32")
    for name, call in {
        "topk_fwd": lambda k: topk.topk_fwd(x, k),
        "topk_router": lambda k: topk.topk_router(x, k),
        "sample_top_k": lambda k: topk.sample_top_k(x, k, 1.0, 0, 0),
    }.items():
        for k in (0, -1, 129, 10**15):
            with pytest.raises(ValueError, match=f"^{name}: k must be from 1 to 128, got {k}$"):
                call(k)
        with pytest.raises(ValueError, match=f"^{name}: k must be at most the 64 scores of a row, got 65$"):
            call(65)
        with pytest.raises(TypeError, match=f"^{name}: k must be an int, got float$"):
            call(2.0)
    with pytest.raises(ValueError, match=r"^topk_fwd: scores must have at least 2 dimensions"):
        topk.topk_fwd(x[0], 2)
    with pytest.raises(TypeError, match=r"^sample_top_k: logits must be an array"):
        topk.sample_top_k([[1.0]], 1, 1.0, 0, 0)
