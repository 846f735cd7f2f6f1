"""The products of a layer of experts against NumPy float64 of the same (quantized) operands, on every backend."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kestrel_kernels import _library, _moe_config
from kestrel_kernels.cute_moe import (
    get_cute_moe_block_m,
    invoke_cute_moe_down,
    invoke_cute_moe_down_fp8,
    invoke_cute_moe_up,
    invoke_cute_moe_up_fp8,
)
from support import BACKENDS, GATES, HALVES, HAS_JAX, Backend, assert_close, random, relative_error

MOE_GATES = {**GATES, "silu": GATES["silu_and_mul"]}


def align(ids: np.ndarray, experts: int, block_m: int, expert_map: Any = None) -> tuple[np.ndarray, ...]:
    """sorted_token_ids, expert_ids and num_tokens_post_pad, by the contract of moe_align_block_size."""
    flat = ids.reshape(-1)
    size = flat.size * block_m if flat.size < experts else flat.size + experts * (block_m - 1)
    ordered = np.full(size, flat.size, np.int32)
    blocks = np.zeros(-(-size // block_m), np.int32)
    used = 0
    for expert in range(experts):
        local = expert if expert_map is None else expert_map[expert]
        members = np.flatnonzero(flat == expert)
        if local < 0 or not members.size:
            continue
        ordered[used : used + members.size] = members
        count = -(-members.size // block_m)
        blocks[used // block_m : used // block_m + count] = local
        used += count * block_m
    return ordered, blocks, np.array([used], np.int32)


def draw_ids(tokens: int, slots: int, experts: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([rng.permutation(experts)[:slots] for _ in range(tokens)], np.int32).reshape(tokens, slots)


@dataclasses.dataclass
class Problem:
    """One layer's operands on a backend, e4m3 with scales where dtype is that."""

    backend: Backend
    dtype: str
    ids: np.ndarray
    experts: int
    hidden: int
    inner: int
    block_m: int = 16
    expert_map: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        tokens, slots = self.ids.shape
        local = self.experts if self.expert_map is None else int(np.max(self.expert_map)) + 1
        e, h, i = local, self.hidden, self.inner
        self.x, self.x_scale = self._operand((tokens, h), 1)
        self.w1, self.w1_scale = self._operand((e, i, h), 2, max(h, 1) ** -0.5)
        self.w2, self.w2_scale = self._operand((e, i, h), 3, max(h, 1) ** -0.5)
        self.mid, self.mid_scale = self._operand((tokens, slots, i), 4)
        self.w3, self.w3_scale = self._operand((e, h, i), 5, max(i, 1) ** -0.5)
        weights = np.random.default_rng(self.seed).random((tokens, slots))
        self.weights = self.backend.array(weights, "float32")
        self.aligned = align(self.ids, self.experts, self.block_m, self.expert_map)
        self.expert = self.ids if self.expert_map is None else np.asarray(self.expert_map)[self.ids]
        self.config: Any = self.block_m

    def _operand(self, shape: tuple[int, ...], seed: int, scale: float = 1.0) -> tuple[Any, Any]:
        values = random(shape, seed + 10 * self.seed, scale)
        if self.dtype != "float8_e4m3fn":
            return self.backend.array(values, self.dtype), None
        scales = np.random.default_rng(seed).uniform(0.5, 2, shape[:-1])
        return self.backend.array(values * 8 / scale, self.dtype), self.backend.array(scales * scale / 8, "float32")

    @property
    def out_dtype(self) -> str:
        return "bfloat16" if self.x_scale is not None else self.dtype

    @property
    def tail(self) -> list[Any]:
        ids = [self.ids, *self.aligned]
        return [self.weights, *(self.backend.array(a, "int32") for a in ids)]

    def values(self, operand: Any, scale: Any) -> np.ndarray:
        values = self.backend.numpy(operand)
        return values if scale is None else values * self.backend.numpy(scale)[..., None]

    # The answers: rows that were left out are NaN, and nothing in a sum.

    def _products(self, rows: Any, w: Any, scale: Any) -> np.ndarray:
        w = self.values(w, scale)
        out = np.full((*self.ids.shape, w.shape[1]), np.nan)
        for t, k in np.ndindex(*self.ids.shape):
            if self.expert[t, k] >= 0:
                out[t, k] = w[self.expert[t, k]] @ rows(t, k)
        return out

    def want_up(self, activation: str | None = None) -> np.ndarray:
        x = self.values(self.x, self.x_scale)
        a = self._products(lambda t, k: x[t], self.w1, self.w1_scale)
        g = self._products(lambda t, k: x[t], self.w2, self.w2_scale)
        return np.concatenate([a, g], -1) if activation is None else MOE_GATES[activation](a, g)

    def want_down(self, reduce: bool = False) -> np.ndarray:
        mid = self.values(self.mid, self.mid_scale)
        out = self._products(lambda t, k: mid[t, k], self.w3, self.w3_scale)
        out *= self.backend.numpy(self.weights)[..., None]
        return np.nansum(out, 1) if reduce else out

    # The calls, with the answer's NaN in `out` before.

    def up(self, activation: str | None = None, both: bool = False, **keywords: Any) -> np.ndarray:
        w = [self.w1, self.w2]
        scales = [self.w1_scale, self.w2_scale]
        if both:
            w, scales = ([self._join(*pair), None] for pair in (w, scales))
        if "out" not in keywords:
            width = self.inner * (1 if activation else 2)
            keywords["out"] = self.backend.poisoned((*self.ids.shape, width), self.out_dtype)
        keywords.setdefault("config", self.config)
        keywords["activation"] = activation
        if self.x_scale is None:
            got = invoke_cute_moe_up(self.x, *w, *self.tail, **keywords)
        else:
            got = invoke_cute_moe_up_fp8(self.x, self.x_scale, w[0], scales[0], w[1], scales[1], *self.tail, **keywords)
        return self.backend.numpy(got)

    def _join(self, a: Any, b: Any) -> Any:
        if a is None:
            return None
        host = np.concatenate([self.backend.bits(a), self.backend.bits(b)], 1)
        if host.dtype == np.uint8:  # CuPy's e4m3
            return self.backend.array(host, "uint8")
        return self.backend.array(host, host.dtype.name)

    def down(self, reduce: bool = False, **keywords: Any) -> np.ndarray:
        if "out" not in keywords:
            shape = (len(self.ids), self.hidden) if reduce else (*self.ids.shape, self.hidden)
            keywords["out"] = self.backend.poisoned(shape, self.out_dtype)
        keywords.setdefault("config", self.config)
        keywords["reduce"] = reduce
        if self.x_scale is None:
            got = invoke_cute_moe_down(self.mid, self.w3, *self.tail, **keywords)
        else:
            got = invoke_cute_moe_down_fp8(self.mid, self.mid_scale, self.w3, self.w3_scale, *self.tail, **keywords)
        return self.backend.numpy(got)

    def check(self, got: np.ndarray, want: np.ndarray) -> None:
        # Tensor cores keep 13 bits of a sum of e4m3 products, below its largest term: of terms up to 9 in some steps.
        coarse = self.dtype == "float8_e4m3fn" and self.backend.device == "cuda"
        assert_close(got, want, self.out_dtype, slack=5e-3 if coarse else 4e-5)
        known = want[~np.isnan(want)]
        if known.size > 4000 and np.linalg.norm(known):
            assert relative_error(got[~np.isnan(want)], known) < 2e-3

    def check_all(self) -> None:
        self.check(self.up(), self.want_up())
        self.check(self.up("silu_and_mul", both=True), self.want_up("silu_and_mul"))
        self.check(self.down(), self.want_down())
        self.check(self.down(reduce=True), self.want_down(reduce=True))


DTYPES = (*HALVES, "float8_e4m3fn")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "slots", "experts", "hidden", "inner", "block_m"),
    [
        (1, 1, 1, 1, 1, 1),
        (1, 8, 64, 64, 32, 16),
        (5, 3, 7, 33, 21, 16),
        (40, 2, 3, 96, 40, 64),
        (67, 2, 4, 72, 24, 16),
        (150, 1, 2, 40, 17, 128),
        (9, 16, 16, 264, 136, 7),
        (40, 2, 512, 64, 32, 16),
        (0, 4, 8, 32, 16, 16),
        (3, 2, 4, 0, 8, 16),
        (3, 2, 4, 8, 0, 16),
    ],
)
def test_values(
    backend: Backend, dtype: str, tokens: int, slots: int, experts: int, hidden: int, inner: int, block_m: int
) -> None:
    Problem(backend, dtype, draw_ids(tokens, slots, experts), experts, hidden, inner, block_m).check_all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_m", [1, 16, 64, 128])
def test_routing(backend: Backend, dtype: str, block_m: int) -> None:
    """All tokens on one expert; experts with none; an expert twice for a token; ids that are none."""
    for ids in ([[3, 3]] * 20, [[0, 5]] * 3 + [[5, 1]], [[7, -1], [2**31 - 1, 0], [8, 9]]):
        given_ids = np.array(ids, np.int32)
        problem = Problem(backend, dtype, given_ids, 8, 48, 24, block_m)
        problem.expert = np.where((given_ids >= 0) & (given_ids < 8), given_ids, -1)
        problem.check_all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_expert_map(backend: Backend, dtype: str, ranks: int) -> None:
    """Of pretended ranks, each with its own experts: what is left out adds nothing. (The ranks' sums make the whole:
    test_fused_moe.)"""
    for rank in range(ranks):
        local = np.array([e // ranks if e % ranks == rank else -1 for e in range(8)])
        Problem(backend, dtype, draw_ids(6, 4, 8), 8, 40, 24, 16, local).check_all()


def test_deep(backend: Backend) -> None:
    """The relative error that fp8 products promise, over as many terms as a layer has."""
    problem = Problem(backend, "float8_e4m3fn", draw_ids(24, 4, 6), 6, 4096, 200)
    problem.check(problem.up(), problem.want_up())
    problem = Problem(backend, "float8_e4m3fn", draw_ids(24, 4, 6), 6, 200, 4096)
    problem.check(problem.down(), problem.want_down())
    problem.check(problem.down(reduce=True), problem.want_down(reduce=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile(backend: Backend, dtype: str) -> None:
    """Given as a config, at shapes that suit the tensor cores, and at those that suit no tile."""
    name = {"bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "fp8"}[dtype]
    for tile in _moe_config.tiles():
        if tile.dtype == name:
            for tokens, hidden, inner in ((5, 64, 128), (70, 192, 64), (9, 136, 72), (3, 33, 21)):
                problem = Problem(backend, dtype, draw_ids(tokens, 2, 4), 4, hidden, inner, tile.block_m)
                problem.config = tile
                problem.check_all()
                if backend.device == "cuda" and hidden % 16 == inner % 16 == 0:  # and by the kernel that was asked for
                    fits = tile.kernel_type != "warp" or tokens <= 64
                    for call in (problem.up, problem.down):
                        call()
                        assert _library.load().moe_last_kernel() == (tile.kernel_type if fits else "wgmma")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "slots", "experts", "hidden", "inner", "block_m"),
    [
        (1, 3, 5, 1088, 128, 16),
        (9, 2, 4, 1088, 576, 16),
        (64, 3, 6, 1088, 64, 64),
        (8, 2, 3, 1104, 40, 8),
        (11, 2, 3, 2120, 128, 32),
        (3, 2, 3, 64, 2112, 16),
        (4, 4, 8, 1088, 1024, 16),
        (12, 4, 5, 1088, 768, 16),
    ],
)
def test_few_tokens(
    backend: Backend, dtype: str, tokens: int, slots: int, experts: int, hidden: int, inner: int, block_m: int
) -> None:
    """What streams its weights to tensor cores on CUDA: one or two groups of columns, depths of one granule to many,
    whole and ending within one, sums in one kernel and in parts."""
    Problem(backend, dtype, draw_ids(tokens, slots, experts), experts, hidden, inner, block_m).check_all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "block_m"), [(40, 16), (350, 1), (600, 4)])
def test_order_of_blocks(backend: Backend, dtype: str, tokens: int, block_m: int) -> None:
    """An expert's blocks need not be neighbours in the list, nor their padding at its end."""
    problem = Problem(backend, dtype, draw_ids(tokens, 2, 3), 3, 64, 32, block_m)
    ordered, blocks, used = problem.aligned
    rng = np.random.default_rng(0)
    order = rng.permutation(used[0] // block_m)
    ordered[: used[0]] = rng.permuted(ordered[: used[0]].reshape(-1, block_m)[order], axis=1).reshape(-1)
    blocks[: len(order)] = blocks[order]
    problem.check_all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [6, 90])
def test_padding(backend: Backend, dtype: str, tokens: int) -> None:
    """The sentinel stands for a row behind the last one: NaN, were it read, and not to be written."""
    problem = Problem(backend, dtype, draw_ids(tokens, 2, 4), 4, 64, 48)
    up, down, total = problem.up("silu_and_mul"), problem.down(), problem.down(reduce=True)
    for name in ("x", "x_scale", "mid", "mid_scale", "weights"):
        setattr(problem, name, backend.before_nan(getattr(problem, name)))
    whole = backend.poisoned((tokens + 16, 2, 48), problem.out_dtype)
    assert np.array_equal(problem.up("silu_and_mul", out=whole[:tokens]), up)
    assert np.isnan(backend.numpy(whole)[tokens:]).all()
    whole = backend.poisoned((tokens + 16, 2, 64), problem.out_dtype)
    assert np.array_equal(problem.down(out=whole[:tokens]), down)
    assert np.isnan(backend.numpy(whole)[tokens:]).all()
    assert np.array_equal(problem.down(reduce=True), total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "inner"), [(1088, 512), (2176, 256), (1088, 1280)])
def test_among_many(backend: Backend, dtype: str, hidden: int, inner: int) -> None:
    """A token's bits are the same among many, where other kernels may take it, and alone."""
    ids = draw_ids(40, 2, 6)
    many, few = (Problem(backend, dtype, part, 6, hidden, inner) for part in (ids, ids[:2]))
    for call in (
        lambda p: p.up(),
        lambda p: p.up("silu_and_mul"),
        lambda p: p.down(),
        lambda p: p.down(reduce=True),
    ):
        np.testing.assert_array_equal(call(many)[:2], call(few))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("gate", MOE_GATES)
def test_gates(backend: Backend, dtype: str, gate: str) -> None:
    problem = Problem(backend, dtype, draw_ids(5, 2, 4), 4, 64, 37)
    problem.check(problem.up(gate), problem.want_up(gate))
    problem.check(problem.up(gate, both=True), problem.want_up(gate))


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(0, 20), slots=st.integers(1, 5), experts=st.integers(5, 9), hidden=st.integers(0, 70),
    inner=st.integers(0, 70), block_m=st.sampled_from([1, 3, 8, 16, 64]), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 5), backend=st.sampled_from(BACKENDS),
)  # fmt: skip
def test_odd_shapes(
    tokens: int,
    slots: int,
    experts: int,
    hidden: int,
    inner: int,
    block_m: int,
    dtype: str,
    seed: int,
    backend: Backend,
) -> None:
    ids = draw_ids(tokens, slots, experts, seed)
    Problem(backend, dtype, ids, experts, hidden, inner, block_m, seed=seed).check_all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 8])
def test_strides(backend: Backend, dtype: str, offset: int) -> None:
    """Rows and experts of larger arrays, each with strides of its own; what lies between the outputs stays."""
    problem = Problem(backend, dtype, draw_ids(6, 2, 4), 4, 40, 24)
    plain_up, plain_down = problem.up(), problem.down()

    def wider(array: Any, by: int) -> Any:
        host = problem.backend.bits(array)
        whole = np.zeros((*host.shape[:-2], host.shape[-2] + by, host.shape[-1] + offset + by), host.dtype)
        whole[..., : host.shape[-2], offset : offset + host.shape[-1]] = host
        of = backend.array(whole, host.dtype.name)
        return of[..., : host.shape[-2], offset : offset + host.shape[-1]]

    for by, name in enumerate(("x", "w1", "w2", "mid", "w3")):
        setattr(problem, name, wider(getattr(problem, name), by))
    whole = backend.poisoned((6, 2, 48 + offset), problem.out_dtype)
    got = problem.up(out=whole[..., offset:])
    assert np.array_equal(got, plain_up) or backend.device == "cuda"  # where alignment decides the order of a sum
    problem.check(got, problem.want_up())
    assert np.isnan(backend.numpy(whole)[..., :offset]).all()
    got = problem.down()
    assert np.array_equal(got, plain_down) or backend.device == "cuda"
    problem.check(got, problem.want_down())
    problem.check(problem.down(reduce=True), problem.want_down(reduce=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_low_level_form(backend: Backend, dtype: str) -> None:
    """Told apart by num_tokens_post_padded; C given, flat, or allocated."""
    problem = Problem(backend, dtype, draw_ids(5, 3, 4), 4, 40, 24)
    weights, _, ordered, blocks, used = problem.tail
    keywords = {
        "topk_weights": weights, "sorted_token_ids": ordered, "expert_ids": blocks, "num_tokens_post_padded": used,
        "config": problem.config,
    }  # fmt: skip
    fp8 = problem.x_scale is not None
    up: Any = invoke_cute_moe_up_fp8 if fp8 else invoke_cute_moe_up
    down: Any = invoke_cute_moe_down_fp8 if fp8 else invoke_cute_moe_down
    both, both_scale = (problem._join(*p) for p in ((problem.w1, problem.w2), (problem.w1_scale, problem.w2_scale)))
    flat, flat_scale = problem.mid.reshape(15, 24), problem.mid_scale.reshape(15) if fp8 else None
    up_operands = [problem.x, problem.x_scale, both, both_scale] if fp8 else [problem.x, both]
    down_operands = [flat, flat_scale, problem.w3, problem.w3_scale] if fp8 else [flat, problem.w3]
    for call, operands, want, width in ((up, up_operands, problem.up(), 48), (down, down_operands, problem.down(), 40)):
        assert np.array_equal(backend.numpy(call(*operands, None, **keywords)), want)
        assert np.array_equal(backend.numpy(call(*operands, **keywords)), want)
        for shape in ((5, 3, width), (15, width)):
            out = backend.poisoned(shape, problem.out_dtype)
            assert call(*operands, out, **keywords) is out
            assert np.array_equal(backend.numpy(out).reshape(want.shape), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_functional_form(backend: Backend, dtype: str) -> None:
    """Without out and config: the block size is that of get_cute_moe_block_m."""
    name = {"bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "fp8"}[dtype]
    block_m = get_cute_moe_block_m(40, num_experts=4, hidden_size=40, intermediate_size=24, dtype=name)
    problem = Problem(backend, dtype, draw_ids(40, 2, 4), 4, 40, 24, block_m)
    problem.check(problem.up(out=None, config=None), problem.want_up())
    problem.check(problem.down(out=None, config=None, reduce=True), problem.want_down(reduce=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours(backend: Backend, dtype: str) -> None:
    """The same bits again, and for a token alone, among others and among NaN."""
    ids = draw_ids(50, 3, 5)
    whole = Problem(backend, dtype, ids, 5, 136, 72)
    up, down, total = whole.up("silu_and_mul"), whole.down(), whole.down(reduce=True)
    assert np.array_equal(whole.up("silu_and_mul"), up)
    assert np.array_equal(whole.down(reduce=True), total)
    for some in ([7], [3, 7, 9], list(range(7, 30))):
        part = Problem(backend, dtype, ids[some], 5, 136, 72)
        for name in ("x", "x_scale", "mid", "mid_scale", "weights"):
            if (array := getattr(whole, name)) is not None:
                setattr(part, name, array[some])
        part.w1, part.w2, part.w3 = whole.w1, whole.w2, whole.w3
        assert np.array_equal(part.up("silu_and_mul"), up[some])
        assert np.array_equal(part.down(), down[some])
        assert np.array_equal(part.down(reduce=True), total[some])
    if dtype == "float8_e4m3fn":
        return
    x, mid = (backend.numpy(a) for a in (whole.x, whole.mid))
    x[20], mid[20] = np.nan, np.nan
    whole.x, whole.mid = backend.array(x, dtype), backend.array(mid, dtype)
    others = np.arange(50) != 20
    assert np.array_equal(whole.up("silu_and_mul")[others], up[others])
    got = whole.down(reduce=True)
    assert np.array_equal(got[others], total[others]) and np.isnan(got[20]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_in_every_tile(backend: Backend, dtype: str) -> None:
    """The same bits whether an expert has one row or so many that they fill several tiles, in blocks or in pairs."""
    name = {"bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "fp8"}[dtype]
    for tile in (tile for tile in _moe_config.tiles() if tile.dtype == name):
        ids = draw_ids(64 if tile.kernel_type == "warp" else 300, 2, 3)
        whole = Problem(backend, dtype, ids, 3, 192, 128, tile.block_m)
        whole.config = tile
        want = [whole.up("silu_and_mul"), whole.down(), whole.down(reduce=True)]
        for some in ([7], list(range(20, 60))):
            part = Problem(backend, dtype, ids[some], 3, 192, 128, tile.block_m)
            part.config = tile
            for field in ("x", "x_scale", "mid", "mid_scale", "weights"):
                if (array := getattr(whole, field)) is not None:
                    setattr(part, field, array[some])
            for got, right in zip([part.up("silu_and_mul"), part.down(), part.down(reduce=True)], want, strict=True):
                assert np.array_equal(got, right[some])


def test_all_e4m3_values(backend: Backend) -> None:
    """Each of the 256 weights alone: exact but for the rounding to bf16, of which three bits of mantissa need none."""
    bits = np.arange(256, dtype=np.uint8)
    w3 = np.zeros((1, 256, 40), np.uint8)
    w3[0, :, 37] = bits
    one = np.array(1.0).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    mid = np.full((1, 1, 40), 0, np.uint8)
    mid[..., 37] = one
    ones = [backend.array(np.ones(shape), "float32") for shape in ((1, 1), (1, 256), (1, 1))]
    aligned = [backend.array(a, "int32") for a in (np.zeros((1, 1)), *align(np.zeros((1, 1)), 1, 16))]
    got = invoke_cute_moe_down_fp8(
        backend.array(mid, "uint8"), ones[0], backend.array(w3, "uint8"), ones[1], ones[2], *aligned,
        out=backend.poisoned((1, 1, 256), "bfloat16"), config=16,
    )  # fmt: skip
    want = bits.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert np.array_equal(backend.numpy(got)[0, 0], want, equal_nan=True)


@pytest.mark.skipif(not HAS_JAX, reason="JAX is not installed")
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_jax(dtype: str) -> None:
    problem = Problem(Backend("jax"), dtype, draw_ids(5, 2, 4), 4, 40, 24)
    problem.check(problem.up("silu_and_mul", out=None), problem.want_up("silu_and_mul"))
    problem.check(problem.down(reduce=True, out=None), problem.want_down(reduce=True))
    with pytest.raises(TypeError, match="must be writable"):
        problem.up()


# Bad input.

BAD_UP = [
    (TypeError, "moe_up: hidden_states must be bfloat16 or float16, got float32", {"x": ((5, 40), "float32")}),
    (TypeError, "moe_up: w1 must be bfloat16, got float16", {"w1": ((4, 24, 40), "float16")}),
    (ValueError, r"moe_up: w1 must have shape \[E, I, 40\], got \[4, 24, 41\]", {"w1": ((4, 24, 41), "bfloat16")}),
    (ValueError, r"moe_up: w2 must have shape \[4, 24, 40\], got \[4, 23, 40\]", {"w2": ((4, 23, 40), "bfloat16")}),
    (TypeError, "moe_up: topk_weights must be float32, got bfloat16", {"weights": ((5, 2), "bfloat16")}),
    (ValueError, r"moe_up: hidden_states must have shape \[4, 40\], got \[5, 40\]", {"weights": ((4, 2), "float32")}),
]


@pytest.mark.parametrize(("error", "message", "changes"), BAD_UP)
def test_bad_up(backend: Backend, error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    problem = Problem(backend, "bfloat16", draw_ids(5, 2, 4), 4, 40, 24)
    out = backend.poisoned((5, 2, 48), "bfloat16")
    for name, (shape, dtype) in changes.items():
        setattr(problem, name, backend.array(random(shape), dtype))
    if "weights" in changes and changes["weights"][0][0] == 4:
        problem.ids = problem.ids[:4]
    with pytest.raises(error, match=f"^{message}"):
        problem.up(out=out)
    assert np.isnan(backend.numpy(out)).all()


def test_bad_input(backend: Backend) -> None:
    problem = Problem(backend, "bfloat16", draw_ids(5, 2, 4), 4, 40, 24)
    fp8 = Problem(backend, "float8_e4m3fn", draw_ids(5, 2, 4), 4, 40, 24)
    out = backend.poisoned((5, 2, 48), "bfloat16")
    for call, error, message in (
        (lambda: problem.up("gelu", out=out), ValueError, "moe_up: activation must be gelu_residual, .* got gelu"),
        (lambda: problem.up(out=out[:, :, :47]), ValueError, r"moe_up: out must have shape \[5, 2, 48\]"),
        (lambda: problem.up(out=out[:, :, ::2]), ValueError, r"moe_up: out must have shape \[5, 2, 48\]"),
        (lambda: problem.up("silu_and_mul", out=out[:, :, ::2]), ValueError, "out must have a contiguous last"),
        (lambda: problem.down(out=out), ValueError, r"moe_down: out must have shape \[5, 2, 40\], got \[5, 2, 48\]"),
        (lambda: problem.down(True, out=out[..., :40]), ValueError, r"moe_down: out must have shape \[5, 40\]"),
        (lambda: fp8.up(out=out.reshape(5, 96)), ValueError, r"moe_up_fp8: out must have shape \[10, 48\]"),
    ):
        with pytest.raises(error, match=message):
            call()
    fp8.x_scale = fp8.x_scale[:4]
    with pytest.raises(ValueError, match="moe_up_fp8: hidden_scale must be one scale for each row, got 4"):
        fp8.up(out=out)
    fp8.mid_scale = backend.array(np.ones((5, 2)), "bfloat16")
    with pytest.raises(TypeError, match="moe_down_fp8: moe_out_scale must be float32, got bfloat16"):
        fp8.down(out=out[..., :40])
    with pytest.raises(TypeError, match="moe_up: hidden_states must be an array"):
        invoke_cute_moe_up(3.0, *[problem.w1, problem.w2], *problem.tail)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="missing"):
        invoke_cute_moe_up(problem.x, problem.w1)  # type: ignore[call-overload]
    assert np.isnan(backend.numpy(out)).all()


@pytest.mark.parametrize(
    ("which", "index", "value", "message"),
    [
        (0, 3, 11, r"sorted_token_ids must lie in \[0, 11\), got 11 at index 3"),
        (0, 0, -1, r"sorted_token_ids must lie in \[0, 11\), got -1 at index 0"),
        (1, 1, 4, r"expert_ids must lie in \[0, 4\) or be negative, got 4 at index 1"),
        (2, 0, 2**31 - 1, r"num_tokens_post_pad must lie in \[0, 71\), got 2147483647"),
        (2, 0, -1, r"num_tokens_post_pad must lie in \[0, 71\), got -1"),
    ],
)
def test_bad_indices(
    backend: Backend, which: int, index: int, value: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked on the CPU, and on request on the GPU; else skipped there."""
    problem = Problem(backend, "bfloat16", draw_ids(5, 2, 4), 4, 40, 24)
    problem.aligned[which][index] = value
    out = backend.poisoned((5, 2, 40), "bfloat16")
    monkeypatch.setenv("KESTREL_CHECK", "1")
    with pytest.raises(ValueError, match=f"moe_down: {message}"):
        problem.down(out=out)
    assert np.isnan(backend.numpy(out)).all()
    if backend.device == "cuda":
        monkeypatch.delenv("KESTREL_CHECK")
        got, want = problem.down(out=out), problem.want_down()
        written = ~np.isnan(got)
        if value != 2**31 - 1:  # then whatever stands behind the list's end is taken for padding
            assert_close(got[written], want[written], "bfloat16", slack=4e-5)


def test_unused_blocks_are_not_looked_at(backend: Backend) -> None:
    problem = Problem(backend, "bfloat16", draw_ids(5, 2, 4), 4, 40, 24)
    used = int(problem.aligned[2][0])
    problem.aligned[0][used:] = -7
    problem.aligned[1][used // 16 :] = 99
    problem.check_all()
