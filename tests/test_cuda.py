"""What holds on CUDA for every op alike: the caller's stream and device, graphs, dependent launches, checks on request.

Each test runs for each op.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import kestrel_kernels as kk
import pytest
import tvm_ffi
from kestrel_kernels import _op
from kestrel_kernels.activation import (
    gelu_and_mul_into,
    gelu_residual_cuda,
    gelu_tanh_and_mul_into,
    silu_and_mul_into,
)
from kestrel_kernels.embedding import embedding_into
from kestrel_kernels.flash_attn.cute import flash_attn_func
from kestrel_kernels.fp8_quant import (
    fp8_e4m3fn_rowwise_quant_cuda,
    fp8_e4m3fn_static_quant_cuda,
    fp8_e4m3fn_tensor_quant_cuda,
)
from kestrel_kernels.fused_linear_residual_ops import linear, linear_into
from kestrel_kernels.kv_cache_write import reshape_and_cache_flash, rope_and_cache
from kestrel_kernels.layernorm_cuda import layernorm_bias_cuda, layernorm_bias_reload_cuda
from kestrel_kernels.moe_align import moe_align_block_size, moe_lora_align_block_size
from kestrel_kernels.moe_sum import moe_sum
from kestrel_kernels.norm import rmsnorm_into
from kestrel_kernels.rotary_embedding import rotary_embedding
from support import CUDA_BACKENDS, assert_replays_repeat

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not CUDA_BACKENDS, reason="no CUDA device")]

ROWS, WIDTH = 96, 2048
Call = Callable[[Any, Any, Any], None]


def _cache_write(out: Any, x: Any, slots: Any) -> None:
    """Tokens of x into the pages of out, the key's and then the value's."""
    pages = out.reshape(2, ROWS, 1, 16, -1)
    tokens = x.reshape(ROWS, 16, -1)
    reshape_and_cache_flash(tokens, tokens, pages[0], pages[1], slots, "auto", None, None)


def _quant(form: Callable[[Any, Any, Any], None], scales: int) -> tuple[Call, int, int]:
    """The bits of x, then its scales, as the bytes of one row."""

    def call(out: Any, x: Any, _: Any) -> None:
        bits, scale = out[0, : ROWS * WIDTH // 2], out[0, ROWS * WIDTH // 2 :]
        form(bits.view(_dtype(out, "uint8")).reshape(ROWS, WIDTH), scale.view(_dtype(out, "float32")), x)

    return call, 1, ROWS * WIDTH // 2 + 2 * scales


def _quant_static(out: Any, x: Any, _: Any) -> None:
    fp8_e4m3fn_static_quant_cuda(out.view(_dtype(out, "uint8")), 0.02, x)


def _dtype(array: Any, name: str) -> Any:
    return getattr(torch, name) if isinstance(array, torch.Tensor) else name


def _arange(like: Any, *bounds: int) -> Any:
    """int32, on the device and the stream of `like`."""
    if isinstance(like, torch.Tensor):
        return torch.arange(*bounds, dtype=torch.int32, device=like.device)
    return importlib.import_module("cupy").arange(*bounds, dtype="int32")


def _table(x: Any, width: int) -> Any:
    """fp32 `[ROWS, width]`: each two elements of x as one."""
    return x.view(_dtype(x, "float32"))[:, :width]


def _rotary(out: Any, x: Any, slots: Any) -> None:
    out[...] = x
    heads = out.reshape(ROWS, 32, 64)
    rotary_embedding(slots, heads[:, :24], heads[:, 24:], 64, _table(x, 32))


def _tau(out: Any, x: Any, slots: Any) -> None:
    out[...] = x[:, :1536]
    kk.tau_tail_apply_into(out, x[:, 1536:1552], x[:, 1552:1560], slots)


def _rope_and_cache(out: Any, x: Any, slots: Any) -> None:
    """Queries, the cache of keys and that of values, with tau."""
    out[:ROWS] = x[:, :512]
    q, k, v = (part.reshape(ROWS, 8, 64) for part in (out[:ROWS], x[:, 512:1024], x[:, 1024:1536]))
    caches = out[ROWS:].reshape(2, ROWS, 1, 8, 64)
    rope_and_cache(
        slots, q, k, v, _table(x, 32), caches[0], caches[1], slots, "auto", None, None,
        tok_qv_lin=x[:, 1536:1552], tau_pos_table=x[:, 1552:1560],
    )  # fmt: skip


def _rmsnorm_residual(out: Any, x: Any, _: Any) -> None:
    """The norm of 2x into one half of out, the residual it becomes in the other."""
    out[ROWS:] = x
    rmsnorm_into(out[:ROWS], x, x[0], 1e-6, out[ROWS:])


def _merge_state(out: Any, x: Any, _: Any) -> None:
    """The two halves of x as states, with a router's weights, transposed, for logarithms."""
    a, b = (x[:, half].reshape(ROWS, 16, 64) for half in (slice(WIDTH // 2), slice(WIDTH // 2, WIDTH)))
    lse_a, lse_b = (kk.topk_router(x[:, some], 16)[0].T for some in (slice(16), slice(16, 32)))
    out[...] = kk.merge_state(a, lse_a, b, lse_b)[0].reshape(ROWS, -1)


def _topk(out: Any, x: Any, _: Any) -> None:
    out[...] = kk.topk_fwd(x, out.shape[1], softmax=True)[0]


def _topk_narrow(out: Any, x: Any, _: Any) -> None:
    out[...] = kk.topk_fwd(x[:, :64], out.shape[1], softmax=True)[0]


def _topk_router(out: Any, x: Any, _: Any) -> None:
    out[...] = kk.topk_router(x[:, :256], 8, "sigmoid", x[0, 256:512], True, 8, 4, 2.5)[0]


def _sample(out: Any, x: Any, _: Any) -> None:
    out[...] = kk.sample_top_k(x, 40, 1.0, 1, 2)[:, None]


def _align(experts: int, slots: int, loras: int = 0) -> tuple[Call, int, int]:
    """The best experts of each row of x as int32 in the bytes of one row: none of these is a NaN."""
    count = ROWS * slots
    places, rows = count + experts * 15, max(loras, 1)
    blocks = places // 16

    def call(out: Any, x: Any, _: Any) -> None:
        ids = kk.topk_fwd(x[:, :experts], slots)[1]
        ints = out[0].view(_dtype(out, "int32")).reshape(rows, -1)
        outs = (ints[:, :places], ints[:, places:-1], ints[:, -1])
        if loras:
            moe_lora_align_block_size(ids, ids[:, 0] % loras, experts, 16, *outs)
        else:
            moe_align_block_size(ids, experts, 16, outs[0][0], outs[1][0], outs[2])

    return call, 1, 2 * rows * (places + blocks + 1)


def _itself(x: Any) -> Any:
    return x


def _attention(out: Any, x: Any, _: Any, values: Callable[[Any], Any] = _itself) -> None:
    """Causal, the first half of x as queries, the second as keys and values."""
    q, k = (x[:, half].reshape(1, ROWS, 16, 64) for half in (slice(WIDTH // 2), slice(WIDTH // 2, WIDTH)))
    kk.flash_attn_func(q, k, values(k), causal=True, out=out.reshape(q.shape))


def _attention_varlen(out: Any, x: Any, _: Any, values: Callable[[Any], Any] = _itself) -> None:
    """Three sequences of 32."""
    q, k = (x[:, half].reshape(ROWS, 16, 64) for half in (slice(WIDTH // 2), slice(WIDTH // 2, WIDTH)))
    starts = _arange(x, 0, ROWS + 1, 32)
    kk.flash_attn_varlen_func(q, k, values(k), starts, starts, 32, 32, causal=True, out=out.reshape(q.shape))


def _attention_decode(out: Any, x: Any, _: Any) -> None:
    """Each row a query; query i over the first i + 1 of its pages."""
    q, k = (x[:, half].reshape(ROWS, 1, 16, 64) for half in (slice(WIDTH // 2), slice(WIDTH // 2, WIDTH)))
    pages = (_arange(x, ROWS * ROWS) * 5 % ROWS).reshape(ROWS, ROWS)
    used = _arange(x, 1, ROWS + 1)
    kk.flash_attn_with_kvcache(q, k, k, page_table=pages, seqused_k=used, out=out.reshape(q.shape))


def _linear(out: Any, x: Any, _: Any) -> None:
    """By cuBLASLt's epilogue. Parts of x are all there is: a product short enough for sums that cancel to be exact."""
    linear_into(out, x[:, :32], x[:64, 32:64], x[0, :64], x[:, 64:128])


def _linear_gate(out: Any, x: Any, _: Any) -> None:
    """A product into the workspace, then a kernel of ours."""
    linear_into(out, x[:, :32], x[:64, 32:64], x[0, :64], x[:, 64:96], "silu_and_mul")


def _fused_mlp(out: Any, x: Any, _: Any) -> None:
    out[...] = kk.fused_mlp.fused_mlp(x[:, :32], x[:64, 32:64], x[0, :64], x[:64, 64:128], x[1, :64], x[:, 128:192])


def _moe(up: bool, fp8: bool, reduce: bool = False) -> tuple[Call, int, int]:
    """Three experts, each with 32 assignments in a row, and one with none; their weights are parts of x too. Two
    assignments a token."""
    function = getattr(kk, f"invoke_cute_moe_{'up' if up else 'down'}{'_fp8' if fp8 else ''}")
    config = kk.CuteMoeConfig(32, 128, 128 if fp8 else 64, 8, 5, "fp8" if fp8 else "bf16", "wgmma")

    def call(out: Any, x: Any, _: Any) -> None:
        tokens, rows = x[: ROWS // 2, :64] if up else x[:, :64], x[:, 64:128]
        activations, weights = (kk.fp8_quant.fp8_quant(a) if fp8 else (a,) for a in (tokens, rows))
        operands = [*activations, *(w.reshape(4, 24, *w.shape[1:]) for w in weights)]
        if up:
            operands += [None] * len(weights)
        routing = [_table(x, 2)[: ROWS // 2], None, *(_arange(x, *b) for b in ((ROWS,), (3,), (ROWS, ROWS + 1)))]
        keywords = {"activation": "silu_and_mul"} if up else {"reduce": reduce}
        function(*operands, *routing, out=out, config=config, **keywords)

    return call, ROWS // 2 if reduce else ROWS, 12 if up else 24


def _fused_moe(fp8: bool) -> tuple[Call, int, int]:
    """Two assignments a token, of four experts and one that is none; the weights are parts of x too."""

    def call(out: Any, x: Any, _: Any) -> None:
        rows = [x[:, 64:128], x[:, 128:160].reshape(256, 12)]
        (up, *up_scale), (down, *down_scale) = (kk.fp8_quant.fp8_quant(r) if fp8 else (r,) for r in rows)
        scales = {"w_up_scale": up_scale[0].reshape(4, 24), "w_down_scale": down_scale[0].reshape(4, 64)} if fp8 else {}
        weights, ids = _table(x, 2)[: ROWS // 2], (_arange(x, ROWS) % 5).reshape(-1, 2)
        up, down = up.reshape(4, 24, 64), down.reshape(4, 64, 12)
        kk.fused_moe(x[: ROWS // 2, :64], up, down, weights, ids, out=out, **scales)

    return call, ROWS // 2, 64


# op -> (call(out, x, slots), rows of out); x is [ROWS, WIDTH] bf16, out as wide or half as wide
OPS: dict[str, tuple[Call, int, int]] = {
    "gelu_residual": (lambda out, x, _: gelu_residual_cuda(out, x), ROWS, WIDTH // 2),
    "silu_and_mul": (lambda out, x, _: silu_and_mul_into(out, x), ROWS, WIDTH // 2),
    "gelu_and_mul": (lambda out, x, _: gelu_and_mul_into(out, x), ROWS, WIDTH // 2),
    "gelu_tanh_and_mul": (lambda out, x, _: gelu_tanh_and_mul_into(out, x), ROWS, WIDTH // 2),
    "layernorm": (lambda out, x, _: layernorm_bias_cuda(out, x, x[0], x[1], 1e-5), ROWS, WIDTH),
    "layernorm_reload": (lambda out, x, _: layernorm_bias_reload_cuda(out, x, x[0], x[1], 1e-5), ROWS, WIDTH),
    "rmsnorm": (lambda out, x, _: rmsnorm_into(out, x, x[0], 1e-6), ROWS, WIDTH),
    "rmsnorm_residual": (_rmsnorm_residual, 2 * ROWS, WIDTH),
    "moe_sum": (lambda out, x, _: moe_sum(x.reshape(-1, 8, WIDTH), out), ROWS // 8, WIDTH),
    "moe_up": _moe(up=True, fp8=False),
    "moe_up_fp8": _moe(up=True, fp8=True),
    "moe_down": _moe(up=False, fp8=False),
    "moe_down_reduced": _moe(up=False, fp8=False, reduce=True),
    "moe_down_fp8": _moe(up=False, fp8=True),
    "fused_moe": _fused_moe(fp8=False),
    "fused_moe_fp8": _fused_moe(fp8=True),
    "rotary_embedding": (_rotary, ROWS, WIDTH),
    "tau_tail": (_tau, ROWS, 1536),
    "rope_and_cache": (_rope_and_cache, 3 * ROWS, 512),
    "kv_cache_write": (_cache_write, 2 * ROWS, WIDTH),
    "embedding": (embedding_into, ROWS, WIDTH),
    "fp8_quant_row": _quant(fp8_e4m3fn_rowwise_quant_cuda, ROWS),
    "fp8_quant_tensor": _quant(fp8_e4m3fn_tensor_quant_cuda, 1),
    "fp8_quant_static": (_quant_static, ROWS, WIDTH // 2),
    "topk": (_topk, ROWS, 128),
    "topk_narrow": (_topk_narrow, ROWS, 8),
    "topk_router": (_topk_router, ROWS, 8),
    "sample_top_k": (_sample, ROWS, 1),
    "moe_align": _align(64, 8),
    "moe_align_narrow": _align(64, 2),
    "moe_align_two_kernels": _align(200, 128),
    "moe_lora_align": _align(64, 8, 3),
    "merge_state": (_merge_state, ROWS, WIDTH // 2),
    "attention": (_attention, ROWS, WIDTH // 2),
    "attention_varlen": (_attention_varlen, ROWS, WIDTH // 2),
    "attention_decode": (_attention_decode, ROWS, WIDTH // 2),
    "linear": (_linear, ROWS, 64),
    "linear_gate": (_linear_gate, ROWS, 32),
    "fused_mlp": (_fused_mlp, ROWS, 64),
}


class Case:
    """An op with its tensors on a device, and what it gives for an x, worked out on a quiet device."""

    def __init__(self, op: str, device: str = "cuda:0") -> None:
        self._call, rows, width = OPS[op]
        self.x = torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16, device=device)
        self.out = torch.full((rows, width), torch.nan, dtype=torch.bfloat16, device=device)
        self.slots = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)).to(device)

    def call(self) -> None:
        self._call(self.out, self.x, self.slots)

    def fresh(self, seed: int) -> Any:
        return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)).to(self.x)

    def answer(self, x: Any) -> Any:
        out = torch.full_like(self.out, torch.nan)
        torch.cuda.synchronize()
        self._call(out, x, self.slots)
        torch.cuda.synchronize()
        assert not out.isnan().any()
        return out


def test_every_op_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()
    original = _op.Op.call

    def record(self: _op.Op, *args: Any) -> None:
        called.add(self.name)
        original(self, *args)

    monkeypatch.setattr(_op.Op, "call", record)
    for op in OPS:
        Case(op).call()
    kk.__dir__()  # imports every module of ops
    assert called == set(_op._ops)


@pytest.mark.parametrize("op", OPS)
def test_side_stream(op: str) -> None:
    """The work goes behind what stands on the caller's stream, which here is busy and fills x late."""
    case = Case(op)
    x = case.fresh(1)
    want = case.answer(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        case.x.copy_(x)
        case.call()
    stream.synchronize()
    assert torch.equal(case.out, want)


@pytest.mark.parametrize("op", OPS)
def test_cupy_stream(op: str) -> None:
    cupy = pytest.importorskip("cupy")
    case = Case(op)
    x = case.fresh(2)
    want = case.answer(x)
    call, _, _ = OPS[op]
    as_cupy = [cupy.from_dlpack(t.view(torch.int16)).view("bfloat16") for t in (case.out, case.x, x)]
    stream = cupy.cuda.Stream(non_blocking=True)
    with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
        torch.cuda._sleep(100_000_000)
    with stream:
        as_cupy[1][...] = as_cupy[2]
        call(as_cupy[0], as_cupy[1], cupy.from_dlpack(case.slots))
    stream.synchronize()
    assert torch.equal(case.out, want)


def test_raw_stream() -> None:
    """Tensors that are no framework's are worked on in the stream that tvm-ffi is told of, with their workspaces."""
    q, k, v, attended = (torch.zeros(1, n, 4, 64, device="cuda", dtype=torch.bfloat16) for n in (1, 64, 64, 1))
    x, w, product = (torch.zeros(n, 256, device="cuda", dtype=torch.bfloat16) for n in (1, 256, 1))
    tensors = (q, k, v, attended, x, w, product)
    q_raw, k_raw, v_raw, attended_raw, x_raw, w_raw, product_raw = (tvm_ffi.from_dlpack(t) for t in tensors)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for tensor in (q, k, v, x, w):
            tensor.normal_()
    with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda:0"), stream.cuda_stream):
        flash_attn_func(q_raw, k_raw, v_raw, out=attended_raw)
        linear_into(product_raw, x_raw, w_raw)
    stream.synchronize()
    assert torch.equal(attended, flash_attn_func(q, k, v))
    assert torch.equal(product, linear(x, w))


@pytest.mark.parametrize("op", OPS)
def test_graph(op: str) -> None:
    """Captured once, replayed on other contents; a thousand replays give the same bits."""
    case = Case(op)
    case.call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.call()
    for seed in range(3):
        x = case.fresh(seed)
        want = case.answer(x)
        case.x.copy_(x)
        case.out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(case.out, want)
    assert_replays_repeat(graph, (case.out.view(torch.int16), want.view(torch.int16)))


@pytest.mark.parametrize("op", OPS)
def test_two_graphs_at_once(op: str) -> None:
    """Captured on one stream, replayed on two: ops keep nothing on the device that they would share."""
    cases = [Case(op), Case(op)]
    graphs, wants = [], []
    for seed, case in enumerate(cases):
        x = case.fresh(seed)
        wants.append(case.answer(x))
        case.x.copy_(x)
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            for _ in range(50):
                case.call()
    torch.cuda.synchronize()
    for graph in graphs:
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(case.out, want) for case, want in zip(cases, wants, strict=True))


@pytest.mark.parametrize("rows", [1, 740, 9477])
def test_chain(rows: int) -> None:
    """Each kernel reads what the one before it wrote; dependent launches must not let it look early."""
    ends = []
    x = torch.randn(rows, WIDTH, device="cuda").bfloat16()
    weight, bias = (torch.rand(WIDTH, device="cuda").bfloat16() for _ in range(2))

    def chain(buffers: list[Any], between: Callable[[], None]) -> None:
        for i in range(24):
            layernorm_bias_cuda(buffers[(i + 1) % 3], buffers[i % 3], weight, bias, 1e-5)
            between()
            gelu_residual_cuda(buffers[i % 3][:, : WIDTH // 2], buffers[(i + 1) % 3])
            between()
            buffers[i % 3][:, WIDTH // 2 :].copy_(buffers[(i + 1) % 3][:, WIDTH // 2 :])
            between()
            buffers[(i + 1) % 3].copy_(buffers[i % 3])
            between()

    for captured in (False, True):
        buffers = [x.clone() for _ in range(3)]
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                chain(buffers, lambda: None)
            for buffer in buffers:
                buffer.copy_(x)
            graph.replay()
        else:
            chain(buffers, torch.cuda.synchronize)
        torch.cuda.synchronize()
        ends.append(buffers[0])
    assert torch.equal(*ends) and not ends[0].isnan().any()


@pytest.mark.parametrize("op", OPS)
def test_second_device(op: str) -> None:
    """Tensors on a device that is not the current one; the current one stays."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    first, second = Case(op, "cuda:0"), Case(op, "cuda:1")
    x = first.fresh(3)
    want = first.answer(x)
    second.x.copy_(x)
    second.call()
    assert torch.cuda.current_device() == 0
    assert torch.equal(second.out.cpu(), want.cpu())
    with pytest.raises(ValueError, match="must be on cuda:1 like x, got cuda:0"):
        gelu_residual_cuda(first.out[:, : WIDTH // 2], second.x)


@pytest.mark.parametrize("bad", [ROWS, 2**40, -1, -(2**40)])
def test_slots_out_of_range(bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are skipped, and nothing outside the caches changes; KESTREL_CHECK=1 names the first that is too large."""
    case = Case("kv_cache_write")
    guard = 4 * WIDTH
    memory = torch.full((case.out.numel() + 2 * guard,), 7.0, dtype=torch.bfloat16, device="cuda")
    case.out = memory[guard:-guard].view_as(case.out)
    case.x.copy_(case.fresh(4))
    case.slots[5] = bad
    monkeypatch.delenv("KESTREL_CHECK", raising=False)
    case.call()
    torch.cuda.synchronize()
    left_out = (case.out.view(2, ROWS, -1) == 7).all(-1).sum(-1)
    assert left_out.tolist() == [1, 1]
    assert (memory[:guard] == 7).all() and (memory[-guard:] == 7).all()
    monkeypatch.setenv("KESTREL_CHECK", "1")
    if bad < 0:
        case.call()
    else:
        with pytest.raises(
            ValueError, match=rf"slot_mapping must lie in \[0, 96\) or be negative, got {bad} at index 5"
        ):
            case.call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # under capture it is left out
        case.call()


@pytest.mark.parametrize("seqused", [[2**31 - 1, -5], [31, -(2**31)]])
def test_lengths_out_of_range(seqused: list[int]) -> None:
    """Attention cuts lengths and offsets to what the tensors hold; NaN lies beside them."""

    def ints(*values: int) -> Any:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    def among_nan(rows: int) -> Any:
        return torch.nn.functional.pad(torch.randn(rows, 2, 64, device="cuda"), [0] * 4 + [64] * 2, value=torch.nan)

    q, k, v = (among_nan(rows).bfloat16()[64:-64] for rows in (9, 30, 30))
    q2, k2, v2 = (x[None].expand(2, -1, -1, -1) for x in (q, k, v))
    got, want = (
        kk.flash_attn_with_kvcache(q2, k2, v2, seqused_k=ints(*used), causal=True) for used in (seqused, [30, 0])
    )
    assert torch.equal(got, want)

    def packed(starts_q: Any, starts_k: Any, used: Any) -> Any:
        out = torch.full_like(q, 7.0)
        return kk.flash_attn_varlen_func(q, k, v, starts_q, starts_k, 9, 30, seqused_k=used, out=out)

    end = 2**31 - 1
    want = packed(ints(0, 4, 9), ints(0, 5, 30), ints(5, 25))
    assert torch.equal(packed(ints(-3, 4, end), ints(-7, 5, end), None), want)
    assert torch.equal(packed(ints(-end, 4, end), ints(-end, 5, end), ints(end, end)), want)
    assert not packed(ints(0, 9, 9), ints(99, 120, 300), None).any()
    assert not packed(ints(0, 9, 9), ints(20, 5, 300), None).any()
    assert (packed(ints(9, 3, 0), ints(0, 5, 30), None) == 7).all()


def test_pages_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention masks their keys; KESTREL_CHECK=1 names the first."""
    monkeypatch.delenv("KESTREL_CHECK", raising=False)
    q, cache = (torch.randn(shape, device="cuda").bfloat16() for shape in ((1, 1, 2, 64), (40, 1, 2, 64)))
    good = torch.randperm(40, device="cuda").int()
    table = torch.stack([good, torch.tensor([-1, 40, 2**31 - 1, -(2**31)] * 10, device="cuda").int()], 1).reshape(1, -1)

    def attend(pages: Any) -> Any:
        return kk.flash_attn_with_kvcache(q, cache, cache, page_table=pages, return_lse=True)

    for got, want in zip(attend(table), attend(good[None]), strict=True):
        assert torch.allclose(got.float(), want.float(), rtol=2**-7, atol=1e-5)
    empty, lse = attend(table[:, 1::2].contiguous())
    assert not empty.any() and (lse == -torch.inf).all()
    monkeypatch.setenv("KESTREL_CHECK", "1")
    with pytest.raises(ValueError, match=r"page_table must hold pages in \[0, 40\), got -1 at \[0, 1\]"):
        attend(table)


@pytest.mark.parametrize("op", OPS)
def test_twins_agree(op: str) -> None:
    """CPU and CUDA round the same fp32 arithmetic: one unit of bf16 apart at most, but where terms cancel."""
    case = Case(op)
    x = case.fresh(5)
    want = case.answer(x).cpu()
    out = torch.full_like(want, torch.nan)
    OPS[op][0](out, x.cpu(), case.slots.cpu())
    units = (out.view(torch.int16).int() - want.view(torch.int16).int()).abs()
    if op.startswith("fp8_quant"):
        assert not units.any()
    elif op in ("fused_mlp", "moe_up_fp8", "moe_down_fp8"):
        # A unit of the hidden layer is more than one of what it adds up to; tensor cores cut off bits of e4m3 products.
        assert (out.double() - want.double()).norm() < 2e-3 * want.double().norm()
    elif attention := {"attention": _attention, "attention_varlen": _attention_varlen}.get(op):
        most = torch.full_like(out, torch.nan)  # the prefill kernel rounds weights to bf16 as well
        attention(most, x.cpu(), None, torch.abs)
        assert ((out.double() - want.double()).abs() <= 2**-7 * want.double().abs() + 2**-8 * most.double()).all()
    else:
        few = 1e-6 * max(1.0, want.abs().max().item())
        assert units.max() <= 1 or torch.allclose(out.float(), want.float(), rtol=2**-7, atol=few)
