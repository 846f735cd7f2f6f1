"""The layer of experts in one call against NumPy float64 of the same (quantized) operands, on every backend."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kestrel_kernels import _library, _moe_config, cute_moe, moe_align
from kestrel_kernels.cute_moe import fused_moe
from kestrel_kernels.moe_sum import moe_sum
from support import BACKENDS, CUDA_BACKENDS, HALVES, HAS_JAX, Backend, numpy_dtype, random, relative_error
from test_cute_moe import MOE_GATES, align, draw_ids

FP8 = "float8_e4m3fn"
DTYPES = (*HALVES, FP8)


def quantized(x: np.ndarray) -> np.ndarray:
    """fp8_quant's row mode: what the bits and the scale of each row stand for."""
    x = x.astype(np.float32)
    largest = np.max(np.abs(x), axis=-1, keepdims=True, initial=0)
    scale = np.maximum(largest / np.float32(448), np.float32(1e-6))
    bits = (x * (np.float32(1) / scale)).astype(ml_dtypes.float8_e4m3fn)
    return bits.astype(np.float64) * scale


@dataclasses.dataclass
class Layer:
    """Operands on a backend; weights e4m3 with scales where `dtype` is that, x then in `x_dtype`."""

    backend: Backend
    dtype: str
    ids: np.ndarray
    experts: int
    hidden: int
    inner: int
    block_m: int = 16
    expert_map: Any = None
    seed: int = 0
    x_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        e = self.experts if self.expert_map is None else int(np.max(self.expert_map)) + 1
        h, i = self.hidden, self.inner
        if self.dtype != FP8:
            self.x_dtype = self.dtype
        self.x = self.backend.array(random((len(self.ids), h), 1 + 10 * self.seed), self.x_dtype)
        self.w_up, self.w_up_scale = self._weights((e, 2 * i, h), 2)
        self.w_down, self.w_down_scale = self._weights((e, h, i), 3)
        self.weights = self.backend.array(np.random.default_rng(self.seed).random(self.ids.shape), "float32")

    def _weights(self, shape: tuple[int, ...], seed: int) -> tuple[Any, Any]:
        values = random(shape, seed + 10 * self.seed)
        depth = max(shape[-1], 1) ** -0.5
        if self.dtype != FP8:
            return self.backend.array(values * depth, self.dtype), None
        scales = np.random.default_rng(seed).uniform(0.5, 2, shape[:-1])
        return self.backend.array(values * 8, FP8), self.backend.array(scales * depth / 8, "float32")

    @property
    def out_dtype(self) -> str:
        return "bfloat16" if self.dtype == FP8 else self.dtype

    def values(self, operand: Any, scale: Any) -> np.ndarray:
        values = self.backend.numpy(operand)
        return values if scale is None else values * self.backend.numpy(scale)[..., None]

    def want(self, activation: str = "gelu_residual") -> np.ndarray:
        x = self.backend.numpy(self.x)
        if self.dtype == FP8:
            x = quantized(x)
        up, down = self.values(self.w_up, self.w_up_scale), self.values(self.w_down, self.w_down_scale)
        weights = self.backend.numpy(self.weights)
        out = np.zeros((len(self.ids), self.hidden))
        for t, k in np.ndindex(*self.ids.shape):
            expert = int(self.ids[t, k])
            known = 0 <= expert < (self.experts if self.expert_map is None else len(self.expert_map))
            if known and self.expert_map is not None:
                expert = int(self.expert_map[expert])
            if not known or expert < 0 or self.inner == 0:
                continue
            both = up[expert] @ x[t]
            gated = MOE_GATES[activation](both[: self.inner], both[self.inner :])
            mid = quantized(gated) if self.dtype == FP8 else gated.astype(numpy_dtype(self.dtype)).astype(np.float64)
            out[t] += weights[t, k] * (down[expert] @ mid)
        return out

    def arguments(self) -> dict[str, Any]:
        return {
            "w_up_scale": self.w_up_scale, "w_down_scale": self.w_down_scale, "config": self.block_m,
            "expert_map": None if self.expert_map is None else self.backend.array(self.expert_map, "int32"),
        }  # fmt: skip

    def call(self, activation: str = "gelu_residual", **changes: Any) -> Any:
        if "out" not in changes:
            changes["out"] = self.backend.poisoned((len(self.ids), self.hidden), self.out_dtype)
        ids = self.backend.array(self.ids, "int32")
        keywords = {**self.arguments(), "activation": activation, **changes}
        return fused_moe(self.x, self.w_up, self.w_down, self.weights, ids, **keywords)

    def run(self, activation: str = "gelu_residual", **changes: Any) -> np.ndarray:
        return self.backend.numpy(self.call(activation, **changes))

    def check(self, got: np.ndarray, want: np.ndarray) -> None:
        """Within one rounding, on a GPU, where parts may be rounded too, two; rows of no expert are zero."""
        assert got.shape == want.shape and not np.isnan(got).any()
        if not np.linalg.norm(want):
            assert not got.any()
            return
        # The rounding to bf16 is 1.7e-3 over many elements, 3.9e-3 at most; to f16 an eighth of that. Among few, one
        # that lies between two of e4m3's values and falls to the other side counts.
        limit = 2e-3 if got.size > 4000 else 1e-2 if self.dtype == FP8 else 4.2e-3
        if self.backend.device == "cuda":  # errors of many parts add up as their squares do
            limit *= 1.5
        assert relative_error(got, want) < (limit if self.out_dtype == "bfloat16" else limit / 4)

    def check_all(self) -> None:
        self.check(self.run(), self.want())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "slots", "experts", "hidden", "inner", "block_m"),
    [
        (1, 1, 1, 1, 1, 1),
        (1, 8, 64, 64, 32, 16),
        (5, 3, 7, 33, 21, 16),
        (40, 2, 3, 136, 40, 64),
        (67, 2, 4, 72, 24, 16),
        (150, 1, 2, 40, 17, 128),
        (9, 16, 16, 264, 136, 7),
        (40, 2, 512, 64, 32, 16),
        (0, 4, 8, 32, 16, 16),
        (3, 0, 4, 32, 16, 16),
        (3, 2, 4, 0, 8, 16),
        (3, 2, 4, 8, 0, 16),
        (2, 2, 3, 1088, 256, 16),
        (10, 2, 7, 1088, 64, 16),
    ],
)
def test_values(
    backend: Backend, dtype: str, tokens: int, slots: int, experts: int, hidden: int, inner: int, block_m: int
) -> None:
    Layer(backend, dtype, draw_ids(tokens, slots, experts), experts, hidden, inner, block_m).check_all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", MOE_GATES)
def test_gates(backend: Backend, dtype: str, gate: str) -> None:
    layer = Layer(backend, dtype, draw_ids(40, 2, 4), 4, 128, 72)
    layer.check(layer.run(gate), layer.want(gate))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_m", [1, 16, 64])
def test_routing(backend: Backend, dtype: str, block_m: int) -> None:
    """All tokens on one expert; experts with none; an expert twice for a token; ids that are none."""
    for ids in ([[3, 3]] * 20, [[0, 5]] * 3 + [[5, 1]], [[7, -1], [2**31 - 1, 0], [8, -(2**31)]]):
        Layer(backend, dtype, np.array(ids, np.int32), 8, 48, 24, block_m).check_all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_expert_map(backend: Backend, dtype: str, ranks: int) -> None:
    """Over pretended ranks, each with its own experts, whose outputs sum to the whole."""
    whole = Layer(backend, dtype, draw_ids(20, 4, 8), 8, 136, 24)
    total = np.zeros((20, 136))
    for rank in range(ranks):
        local = np.array([e // ranks if e % ranks == rank else -1 for e in range(8)])
        part = Layer(backend, dtype, whole.ids, 8, 136, 24, expert_map=local)
        mine = np.arange(rank, 8, ranks)
        for name in ("w_up", "w_up_scale", "w_down", "w_down_scale"):
            if (weights := getattr(whole, name)) is not None:
                host = backend.bits(weights)[mine]
                setattr(part, name, backend.array(host, host.dtype.name))
        part.check_all()
        total += part.run()
    assert relative_error(total, whole.want()) < 4e-3
    nowhere = Layer(backend, dtype, whole.ids, 8, 136, 24)
    nowhere.expert_map = np.full(8, -1)
    assert not nowhere.run().any()
    assert np.array_equal(whole.run(expert_map=backend.array([], "int32")), whole.run())
    last = Layer(backend, dtype, whole.ids + 1016, 8, 136, 24)  # of as many as there may be
    last.expert_map = np.arange(1024) % 8
    last.check(last.run(), whole.want())


def test_deep(backend: Backend) -> None:
    """The relative error that fp8 promises, over as many terms as a layer has."""
    Layer(backend, FP8, draw_ids(8, 2, 3), 3, 2048, 264).check_all()
    Layer(backend, FP8, draw_ids(17, 2, 3), 3, 264, 2056, x_dtype="float16").check_all()


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(0, 20), slots=st.integers(1, 5), experts=st.integers(5, 9), hidden=st.integers(0, 70),
    inner=st.integers(0, 70), block_m=st.sampled_from([1, 3, 8, 16, 64]), dtype=st.sampled_from(DTYPES),
    gate=st.sampled_from(list(MOE_GATES)), seed=st.integers(0, 5), backend=st.sampled_from(BACKENDS),
)  # fmt: skip
def test_odd_shapes(
    tokens: int, slots: int, experts: int, hidden: int, inner: int, block_m: int, dtype: str, gate: str, seed: int,
    backend: Backend,
) -> None:  # fmt: skip
    layer = Layer(backend, dtype, draw_ids(tokens, slots, experts, seed), experts, hidden, inner, block_m, seed=seed)
    layer.check(layer.run(gate), layer.want(gate))


@pytest.mark.parametrize("dtype", HALVES)
def test_same_bits_as_the_steps(backend: Backend, dtype: str) -> None:
    layer = Layer(backend, dtype, draw_ids(30, 3, 5), 5, 72, 40)
    aligned = align(layer.ids, 5, 16)
    tail = [layer.weights, *(backend.array(a, "int32") for a in (layer.ids, *aligned))]
    keywords: dict[str, Any] = {"config": 16}
    mid = cute_moe.invoke_cute_moe_up(layer.x, layer.w_up, None, *tail, activation="silu_and_mul", **keywords)
    want = cute_moe.invoke_cute_moe_down(mid, layer.w_down, *tail, reduce=True, **keywords)
    assert np.array_equal(layer.run("silu_and_mul"), backend.numpy(want))


@pytest.mark.parametrize("dtype", HALVES)
def test_same_bits_as_the_steps_at_many_tokens(backend: Backend, dtype: str) -> None:
    """Where wgmma kernels make them the parts are those that `invoke_cute_moe_down` returns. Some are left out."""
    ids = draw_ids(90, 11, 13)
    ids[3], ids[4, 1], ids[5, 9] = -1, 99, 5
    nowhere = np.where(np.arange(13) == 5, -1, np.arange(13))
    layer = Layer(backend, dtype, ids, 13, 136, 72, expert_map=nowhere)
    got = layer.run("silu_and_mul")
    if _library.load().moe_last_kernel() != "wgmma":
        pytest.skip("another kernel")
    aligned = align(ids, 13, 16, nowhere)
    tail = [layer.weights, *(backend.array(a, "int32") for a in (ids, *aligned))]
    keywords: dict[str, Any] = {"config": 16}
    mid = cute_moe.invoke_cute_moe_up(layer.x, layer.w_up, None, *tail, activation="silu_and_mul", **keywords)
    parts = backend.array(np.zeros((90, 11, 136)), dtype)
    cute_moe.invoke_cute_moe_down(mid, layer.w_down, *tail, out=parts, **keywords)
    assert np.array_equal(got, backend.numpy(moe_sum(parts)))
    layer.check(got, layer.want("silu_and_mul"))


@pytest.mark.parametrize("inner", [24, 37, 1024, 1028, 2056, 5000])
def test_quantized_from_fp32(backend: Backend, inner: int) -> None:
    """Gated values as fp8_quant would have them without a rounding to bf16: the down product picks each one alone."""
    hidden = min(inner, 1032)
    layer = Layer(backend, FP8, np.zeros((2, 1), np.int32), 1, hidden, inner)
    picked = np.zeros((1, hidden, inner))
    picked[0, np.arange(hidden), inner - 1 - np.arange(hidden)] = 1
    layer.w_down = backend.array(picked, FP8)
    layer.w_down_scale = backend.array(np.ones((1, hidden)), "float32")
    layer.weights = backend.array(np.ones((2, 1)), "float32")
    got, want = layer.run("silu_and_mul"), layer.want("silu_and_mul")
    near = np.abs(got - want) <= 2.0**-8 * np.abs(want)
    assert np.mean(near) > 0.998  # the others lie between two of e4m3's values
    assert np.all(np.abs(got - want) <= 0.13 * np.abs(want) + 1e-4)


def test_smallest_scale(backend: Backend) -> None:
    """Gated values around 1e-5 and tokens of zeros: the scale stays at 1e-6."""
    layer = Layer(backend, FP8, draw_ids(40, 2, 4), 4, 136, 64)
    layer.w_up_scale = backend.array(backend.numpy(layer.w_up_scale) * 1e-5, "float32")
    layer.check(layer.run(), layer.want())
    x = backend.numpy(layer.x)
    x[7], x[8, 3], x[9, 4] = 0, np.inf, np.nan
    layer.x = backend.array(x, layer.x_dtype)
    got = layer.run()
    assert not got[7].any() and np.isnan(got[8:10]).all() and not np.isnan(got[10:]).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(backend: Backend, dtype: str) -> None:
    """Rows and experts of larger arrays, each with strides of its own; what lies between the outputs stays."""
    layer = Layer(backend, dtype, draw_ids(6, 2, 4), 4, 40, 24)
    plain = layer.run()

    def wider(array: Any, by: int) -> Any:
        host = backend.bits(array)
        whole = np.zeros((*host.shape[:-2], host.shape[-2] + by, host.shape[-1] + 1 + by), host.dtype)
        whole[..., : host.shape[-2], 1 : 1 + host.shape[-1]] = host
        return backend.array(whole, host.dtype.name)[..., : host.shape[-2], 1 : 1 + host.shape[-1]]

    for by, name in enumerate(("x", "w_up", "w_down", "weights")):
        setattr(layer, name, wider(getattr(layer, name), by))
    whole = backend.poisoned((6, 43), layer.out_dtype)
    got = layer.run(out=whole[:, 3:])
    assert np.array_equal(got, plain) or backend.device == "cuda"  # where alignment decides the order of a sum
    layer.check(got, layer.want())
    assert np.isnan(backend.numpy(whole)[:, :3]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_functional_form(backend: Backend, dtype: str) -> None:
    name = {"bfloat16": "bf16", "float16": "fp16", FP8: "fp8"}[dtype]
    sizes: dict[str, Any] = {"num_experts": 4, "hidden_size": 136, "intermediate_size": 24, "dtype": name}
    layer = Layer(backend, dtype, draw_ids(40, 2, 4), 4, 136, 24, cute_moe.get_cute_moe_block_m(40, **sizes))
    assert np.array_equal(layer.run(out=None, config=None), layer.run())
    out = backend.poisoned((40, 136), layer.out_dtype)
    assert layer.call(out=out) is out


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours(backend: Backend, dtype: str) -> None:
    """The same bits again, and for a token alone, among others and among NaN."""
    ids = draw_ids(50, 3, 5)
    whole = Layer(backend, dtype, ids, 5, 136, 72)
    want = whole.run()
    assert np.array_equal(whole.run(), want)
    for some in ([7], [3, 7, 9], list(range(7, 30))):
        part = Layer(backend, dtype, ids[some], 5, 136, 72)
        part.x, part.weights = whole.x[some], whole.weights[some]
        assert np.array_equal(part.run(), want[some])
    x = backend.numpy(whole.x)
    x[20] = np.nan
    whole.x = backend.array(x, whole.x_dtype)
    got, others = whole.run(), np.arange(50) != 20
    assert np.array_equal(got[others], want[others]) and np.isnan(got[20]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_in_every_tile(backend: Backend, dtype: str) -> None:
    """The same bits whether an expert has one row or so many that they fill several tiles, in blocks or in pairs."""
    name = {"bfloat16": "bf16", "float16": "fp16", FP8: "fp8"}[dtype]
    for tile in (tile for tile in _moe_config.tiles() if tile.dtype == name):
        ids = draw_ids(64 if tile.kernel_type == "warp" else 300, 2, 3)
        whole = Layer(backend, dtype, ids, 3, 192, 128)
        want = whole.run(config=tile)
        for some in ([7], list(range(20, 60))):
            part = Layer(backend, dtype, ids[some], 3, 192, 128)
            part.x, part.weights = whole.x[some], whole.weights[some]
            assert np.array_equal(part.run(config=tile), want[some])


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding(backend: Backend, dtype: str) -> None:
    """What stands behind the tokens, the sentinel's place in the lists, is neither read nor written."""
    layer = Layer(backend, dtype, draw_ids(90, 2, 4), 4, 64, 48)
    want = layer.run()
    layer.x, layer.weights = backend.before_nan(layer.x), backend.before_nan(layer.weights)
    whole = backend.poisoned((106, 64), layer.out_dtype)
    assert np.array_equal(layer.run(out=whole[:90]), want)
    assert np.isnan(backend.numpy(whole)[90:]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_poisoned_workspace(backend: Backend, dtype: str) -> None:
    """Of exactly the size that is asked for, full of NaN; with assignments that are left out."""
    ids = draw_ids(20, 3, 5)
    ids[3], ids[4, 1] = -1, 99
    layer = Layer(backend, dtype, ids, 5, 72, 37)
    size = cute_moe._layer_workspace_bytes(20, 3, 5, 72, 37, 16, dtype == FP8)
    whole = backend.array(np.full(size + 64, 0xFF), "uint8")
    start = -_address(whole) % 16
    out = backend.poisoned((20, 72), layer.out_dtype)
    cute_moe._fused_moe.call(
        out, whole[start : start + size], layer.x, layer.w_up, layer.w_up_scale, layer.w_down, layer.w_down_scale,
        layer.weights, backend.array(ids, "int32"), None, 16, -1, "gelu_residual",
    )  # fmt: skip
    assert np.array_equal(backend.numpy(out), layer.run())
    layer.check(backend.numpy(out), layer.want())
    rest = backend.bits(whole)
    assert (rest[:start] == 0xFF).all() and (rest[start + size :] == 0xFF).all()


@pytest.mark.cuda
@pytest.mark.skipif(not any(b.framework == "torch" for b in CUDA_BACKENDS), reason="no torch on a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_graph_with_other_routing(dtype: str) -> None:
    """Captured once, replayed with other ids: the bits of an eager call."""
    import torch

    backend = next(b for b in CUDA_BACKENDS if b.framework == "torch")
    layer = Layer(backend, dtype, draw_ids(20, 3, 8), 8, 136, 72)
    ids = backend.array(layer.ids, "int32")
    out = backend.poisoned((20, 136), layer.out_dtype)

    def call(to: Any) -> None:
        fused_moe(layer.x, layer.w_up, layer.w_down, layer.weights, ids, out=to, **layer.arguments())

    call(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(out)
    for other in (draw_ids(20, 3, 8, 1), np.full((20, 3), 5), np.full((20, 3), -1), layer.ids):
        ids.copy_(backend.array(other, "int32"))
        want = backend.poisoned((20, 136), layer.out_dtype)
        call(want)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out.view(torch.int16), want.view(torch.int16))
        layer.ids = other
        layer.check(backend.numpy(out), layer.want())


def _address(array: Any) -> int:
    if hasattr(array, "data_ptr"):
        return int(array.data_ptr())
    return int(array.data.ptr if hasattr(array.data, "ptr") else array.ctypes.data)


def test_workspace_bytes() -> None:
    """Python's and the library's."""
    library = _library.load()
    for shape in ((0, 8, 64, 2048, 1024, 16), (1, 8, 64, 2048, 1024, 16), (7, 3, 5, 33, 21, 7), (3, 0, 4, 8, 8, 1),
                  (16384, 8, 64, 2048, 1024, 128), (2000, 16, 512, 7, 9, 64)):  # fmt: skip
        for fp8 in (False, True):
            assert cute_moe._layer_workspace_bytes(*shape, fp8) == library.fused_moe_workspace_bytes(*shape, fp8)
    assert moe_align.workspace_bytes(8193, 3) > 0


@pytest.mark.skipif(not HAS_JAX, reason="JAX is not installed")
@pytest.mark.parametrize("dtype", ["bfloat16", FP8])
def test_jax(dtype: str) -> None:
    layer = Layer(Backend("jax"), dtype, draw_ids(5, 2, 4), 4, 40, 24)
    layer.check(layer.run(out=None), layer.want())
    with pytest.raises(TypeError, match="must be writable"):
        layer.run()


def test_whole_layer_takes_under_a_second() -> None:
    """64 experts, 4 tokens, on the CPU."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 0x70, (64, 2048, 2048), np.uint8)
    scales = np.full((64, 2048), 1e-4, np.float32)
    x = random((4, 2048)).astype(ml_dtypes.bfloat16)
    weights, ids = rng.random((4, 8), np.float32), draw_ids(4, 8, 64)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        fused_moe(x, bits, bits[:, :, :1024], weights, ids, w_up_scale=scales, w_down_scale=scales)
        times.append(time.perf_counter() - start)
    assert min(times) < 1


# Bad input.

BAD = [
    (TypeError, "x must be bfloat16 or float16, got float32", "x", ((5, 40), "float32")),
    (ValueError, r"x must have shape \[T, H\], got \[5, 1, 40\]", "x", ((5, 1, 40), "bfloat16")),
    (TypeError, "w_up must be bfloat16, got float16", "w_up", ((4, 48, 40), "float16")),
    (ValueError, r"w_up must have shape \[E, 2I, 40\], got \[4, 48, 41\]", "w_up", ((4, 48, 41), "bfloat16")),
    (ValueError, "w_up must be two halves high: an even number of rows, got 47", "w_up", ((4, 47, 40), "bfloat16")),
    (ValueError, r"w_down must have shape \[4, 40, 24\], got \[3, 40, 24\]", "w_down", ((3, 40, 24), "bfloat16")),
    (ValueError, r"w_down must have shape \[4, 40, 24\], got \[4, 40, 23\]", "w_down", ((4, 40, 23), "bfloat16")),
    (TypeError, "topk_weights must be float32, got bfloat16", "weights", ((5, 2), "bfloat16")),
    (ValueError, r"topk_weights must have shape \[5, K\], got \[4, 2\]", "weights", ((4, 2), "float32")),
    (ValueError, r"topk_ids must have shape \[5, 3\], got \[5, 2\]", "weights", ((5, 3), "float32")),
    (ValueError, "w_up_scale and w_down_scale must be given together", "w_up_scale", ((4, 48), "float32")),
]


@pytest.mark.parametrize(("error", "message", "name", "array"), BAD)
def test_bad_operands(backend: Backend, error: type[Exception], message: str, name: str, array: Any) -> None:
    layer = Layer(backend, "bfloat16", draw_ids(5, 2, 4), 4, 40, 24)
    out = backend.poisoned((5, 40), "bfloat16")
    setattr(layer, name, backend.array(random(array[0]), array[1]))
    with pytest.raises(error, match=f"^fused_moe: {message}"):
        layer.run(out=out)
    assert np.isnan(backend.numpy(out)).all()


def test_bad_input(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(backend, "bfloat16", draw_ids(5, 2, 4), 4, 40, 24)
    fp8 = Layer(backend, FP8, draw_ids(5, 2, 4), 4, 40, 24)
    out = backend.poisoned((5, 40), "bfloat16")

    def array(values: Any, dtype: str) -> Any:
        return backend.array(values, dtype)

    monkeypatch.setenv("KESTREL_CHECK", "1")
    for call, error, message in (
        (lambda: layer.run("gelu", out=out), ValueError, "activation must be gelu_residual, .* got gelu"),
        (lambda: layer.run("", out=out), ValueError, "activation must be gelu_residual, .* got none"),
        (lambda: layer.run(out=out[:, :39]), ValueError, r"out must have shape \[5, 40\], got \[5, 39\]"),
        (lambda: layer.run(out=array(np.zeros((5, 40)), "float16")), TypeError, "out must be bfloat16, got float16"),
        (lambda: layer.run(expert_map=array([0, 1, 2, 4], "int32"), out=out), ValueError,
         r"expert_map must lie in \[0, 4\) or be negative, got 4 at index 3"),
        (lambda: layer.run(expert_map=array(np.zeros(1025), "int32"), out=out), ValueError,
         "expert_map must be of 1 to 1024 experts, got 1025"),
        (lambda: layer.run(expert_map=array([0.0], "float32"), out=out), TypeError, "expert_map must be int32"),
        (lambda: layer.run(config=2**31, out=out), ValueError, "block_m must be from 1 to"),
        (lambda: fp8.run(w_down_scale=array(np.ones((4, 39)), "float32"), out=out), ValueError,
         r"w_down_scale must have shape \[4, 40\], got \[4, 39\]"),
        (lambda: fp8.run(w_up_scale=array(np.ones((4, 48)), "bfloat16"), out=out), TypeError,
         "w_up_scale must be float32, got bfloat16"),
    ):  # fmt: skip
        with pytest.raises(error, match=f"fused_moe: {message}"):
            call()
    layer.x = 3.0
    with pytest.raises(TypeError, match="fused_moe: x must be an array"):
        layer.run(out=out)
    assert np.isnan(backend.numpy(out)).all()


def test_map_beyond_the_weights(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the GPU, unchecked, such an expert adds nothing."""
    if backend.device != "cuda":
        return
    monkeypatch.delenv("KESTREL_CHECK", raising=False)
    layer = Layer(backend, "bfloat16", draw_ids(5, 2, 4), 4, 40, 24)
    got = layer.run(expert_map=backend.array([0, 1, 2, 2**31 - 1], "int32"))
    layer.ids = np.where(layer.ids == 3, -1, layer.ids)
    layer.check(got, layer.want())
