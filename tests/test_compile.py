"""torch.compile: every op in one graph without a break, the same bits as eager; opcheck on every operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import kestrel_kernels as kk  # noqa: E402
from kestrel_kernels import _op  # noqa: E402
from kestrel_kernels.kv_cache_write import reshape_and_cache_flash, rope_and_cache  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else ["cpu"]


class Make:
    """Tensors on a device, the same ones on every run."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: str = "bfloat16") -> Any:
        values = torch.randn(shape, generator=self._generator)
        if dtype in ("int64", "int32"):
            values = torch.arange(values.numel()).reshape(shape)
        return values.to(getattr(torch, dtype)).to(self._device)


# op -> (function of tensors, tensors). Functions change nothing they are given but what they are called to change.
CALLS: dict[str, Callable[[Make], tuple[Callable[..., Any], list[Any]]]] = {
    "gelu_residual": lambda t: (kk.activation.gelu_residual, [t(4, 64)]),
    "silu_and_mul": lambda t: (kk.silu_and_mul, [t(4, 64)]),
    "gelu_and_mul": lambda t: (kk.gelu_and_mul, [t(4, 64)]),
    "gelu_tanh_and_mul": lambda t: (kk.gelu_tanh_and_mul, [t(4, 64)]),
    "layernorm": lambda t: (kk.layernorm, [t(4, 64), t(64), t(64)]),
    "layernorm_reload": lambda t: (
        lambda out, x, w, b: kk.layernorm_cuda.layernorm_bias_reload_cuda(out, x, w, b, 1e-5),
        [t(4, 64), t(4, 64), t(64), t(64)],
    ),
    "rmsnorm": lambda t: (lambda x, w, r: (kk.rmsnorm(x, w, residual=r), r), [t(4, 64), t(64), t(4, 64)]),
    "moe_sum": lambda t: (kk.moe_sum.moe_sum, [t(4, 8, 16)]),
    "moe_up": lambda t: (lambda *a: kk.invoke_cute_moe_up(*a), [t(4, 16), t(2, 6, 16), t(2, 6, 16), *_routing(t)]),
    "moe_up_fp8": lambda t: (
        lambda x, xs, w, ws, *a: kk.invoke_cute_moe_up_fp8(x, xs, w, ws, None, None, *a, activation="silu_and_mul"),
        [_e4m3(t, 4, 16), t(4, dtype="float32"), _e4m3(t, 2, 12, 16), t(2, 12, dtype="float32"), *_routing(t)],
    ),
    "moe_down": lambda t: (
        lambda *a: kk.invoke_cute_moe_down(*a, reduce=True), [t(4, 2, 16), t(2, 6, 16), *_routing(t)],
    ),
    "moe_down_fp8": lambda t: (
        lambda x, xs, w, ws, weights, _, ids, experts, used: kk.invoke_cute_moe_down_fp8(
            x, xs, w, ws, topk_weights=weights, sorted_token_ids=ids, expert_ids=experts, num_tokens_post_padded=used,
        ),
        [_e4m3(t, 8, 16), t(8, dtype="float32"), _e4m3(t, 2, 6, 16), t(2, 6, dtype="float32"), *_routing(t)],
    ),
    "fused_moe": lambda t: (
        lambda x, u, us, d, ds, w, ids, m: kk.fused_moe(x, u, d, w, ids, w_up_scale=us, w_down_scale=ds, expert_map=m),
        [t(4, 16), _e4m3(t, 2, 12, 16), t(2, 12, dtype="float32"), _e4m3(t, 2, 16, 6), t(2, 16, dtype="float32"),
         t(4, 2, dtype="float32"), t(4, 2, dtype="int32"), t(8, dtype="int32") % 2],
    ),
    "embedding": lambda t: (kk.embedding.embedding, [t(8, 16), t(3, dtype="int64")]),
    "fp8_quant_row": lambda t: (lambda x: _bits(kk.fp8_quant.fp8_quant(x)), [t(4, 64)]),
    "fp8_quant_tensor": lambda t: (lambda x: _bits(kk.fp8_quant.fp8_quant(x, mode="tensor")), [t(4, 64)]),
    "fp8_quant_static": lambda t: (lambda x: _bits(kk.fp8_quant.fp8_quant(x, scale=0.5)), [t(4, 64)]),
    "linear": lambda t: (
        lambda x, w, b, r: kk.linear(x, w, b, r, activation="gelu_tanh"), [t(4, 64), t(32, 64), t(32), t(4, 32)],
    ),
    "fused_mlp": lambda t: (kk.fused_mlp.fused_mlp, [t(4, 8), t(16, 8), t(16), t(8, 16), t(8), t(4, 8)]),
    "topk_fwd": lambda t: (lambda s: kk.topk_fwd(s, 8, softmax=True), [t(4, 64)]),
    "topk_router": lambda t: (lambda s, b: kk.topk_router(s, 8, scoring="sigmoid", bias=b), [t(4, 64), t(64)]),
    "sample_top_k": lambda t: (lambda s, n: kk.sample_top_k(s, 8, 0.7, 3, n), [t(4, 64), t(1, dtype="int64")]),
    "moe_align_block_size": lambda t: (
        lambda ids, s, e, n: kk.moe_align_block_size(ids, 6, 2, s, e, n),
        [t(4, 2, dtype="int32"), *(t(n, dtype="int32") for n in (14, 7, 1))],
    ),
    "moe_lora_align_block_size": lambda t: (
        lambda ids, m, s, e, n: kk.moe_lora_align_block_size(ids, m, 6, 2, s, e, n),
        [t(4, 2, dtype="int32"), t(4, dtype="int32") % 2, t(2, 14, dtype="int32"), t(2, 7, dtype="int32"),
         t(2, dtype="int32")],
    ),
    "rotary_embedding": lambda t: (
        lambda p, q, k, c: kk.rotary_embedding.rotary_embedding(p, q, k, 16, c),
        [t(3, dtype="int64"), t(3, 4, 16), t(3, 2, 16), t(8, 16, dtype="float32")],
    ),
    "tau_tail_apply_into": lambda t: (
        kk.tau_tail_apply_into, [t(1, 3, 3 * 2 * 8), t(1, 3, 4), t(8, 2), t(1, 3, dtype="int64")],
    ),
    "reshape_and_cache_flash": lambda t: (
        lambda k, v, kc, vc, s, scale: reshape_and_cache_flash(k, v, kc, vc, s, "fp8", scale, 0.5),
        [t(3, 2, 16), t(3, 2, 16), t(4, 1, 2, 16, dtype="uint8"), t(4, 1, 2, 16, dtype="uint8"),
         t(3, dtype="int64"), t(1, dtype="float32").abs()],
    ),
    "rope_and_cache": lambda t: (
        lambda p, q, k, v, c, kc, vc, s: rope_and_cache(p, q, k, v, c, kc, vc, s, "auto", None, None),
        [t(3, dtype="int64"), t(3, 4, 16), t(3, 2, 16), t(3, 2, 16), t(8, 16, dtype="float32"),
         t(4, 1, 2, 16), t(4, 1, 2, 16), t(3, dtype="int64")],
    ),
    "flash_attn_func": lambda t: (
        lambda q, k, v: kk.flash_attn_func(q, k, v, causal=True, return_lse=True),
        [t(2, 5, 4, 16), t(2, 7, 2, 16), t(2, 7, 2, 16)],
    ),
    "flash_attn_varlen_func": lambda t: (
        lambda q, k, v, c: kk.flash_attn_varlen_func(q, k, v, c, c, 3, 3, causal=True),
        [t(3, 4, 16), t(3, 2, 16), t(3, 2, 16), t(4, dtype="int32")],
    ),
    "flash_attn_with_kvcache": lambda t: (
        lambda q, k, v, pages, used: kk.flash_attn_with_kvcache(q, k, v, page_table=pages, seqused_k=used, k_scale=0.5),
        [t(1, 1, 4, 16), t(6, 1, 2, 16), t(6, 1, 2, 16), t(1, 6, dtype="int32"), t(1, dtype="int32") + 4],
    ),
    "merge_state": lambda t: (
        kk.merge_state, [t(1, 4, 2, 8), t(1, 2, 4, dtype="float32"), t(1, 4, 2, 8), t(1, 2, 4, dtype="float32")],
    ),
}  # fmt: skip


def _e4m3(t: Make, *shape: int) -> Any:
    return t(*shape, dtype="float8_e4m3fn").view(torch.uint8)


def _routing(t: Make) -> list[Any]:
    """Four tokens, two assignments each, all of the first expert, in the block of 16 that the heuristic asks for."""
    ids = [t(*shape, dtype="int32") for shape in ((4, 2), (16,), (1,), (1,))]
    return [t(4, 2, dtype="float32"), ids[0], ids[1].clamp(max=8), ids[2], ids[3] + 16]


def _bits(quantized: tuple[Any, Any]) -> tuple[Any, Any | None]:
    scale = quantized[1]
    return quantized[0].view(torch.uint8), scale if isinstance(scale, torch.Tensor) else None


def _inputs(op: str, device: str) -> tuple[Callable[..., Any], list[Any]]:
    return CALLS[op](Make(device))


def _run(function: Callable[..., Any], tensors: list[Any]) -> list[Any]:
    """What a call returns and what it leaves in its arguments, as bits."""
    returned = function(*tensors)
    returned = returned if isinstance(returned, tuple) else (returned,)
    flat = [x for r in returned for x in (r if isinstance(r, tuple) else (r,)) if x is not None]
    return [x.contiguous().view(torch.uint8).clone() for x in [*flat, *tensors] if x is not None]


def test_every_op_is_here() -> None:
    kk.__dir__()  # imports every module of ops
    assert set(CALLS) == set(_op._ops)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", CALLS)
def test_full_graph(op: str, device: str) -> None:
    want = _run(*_inputs(op, device))
    function, tensors = _inputs(op, device)
    torch._dynamo.reset()
    got = _run(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors)
    assert len(got) == len(want) and all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", CALLS)
def test_opcheck(op: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own check of the operator: schema, what it changes, fake implementation, functionalization."""
    called: list[tuple[str, list[Any]]] = []
    original = _op.Op.call

    def record(self: _op.Op, *args: Any) -> None:
        original(self, *args)
        called.append((self.name, _op._compiled.flatten(self.operator_types(), args)))

    monkeypatch.setattr(_op.Op, "call", record)
    _run(*_inputs(op, device))
    assert [name for name, _ in called] == [op]
    # PyTorch cannot compare e4m3 tensors: their bits, which ops take as well.
    args = [a.view(torch.uint8) if getattr(a, "dtype", None) == torch.float8_e4m3fn else a for a in called[0][1]]
    torch.library.opcheck(getattr(torch.ops.kestrel, op).default, args)


def test_inductor() -> None:
    """Once through the whole compiler: ops between torch's own."""
    x, weight = Make("cpu")(4, 64), Make("cpu")(32)

    def block(x: Any, weight: Any) -> Any:
        return kk.rmsnorm(kk.silu_and_mul(x + 1), weight) * 2

    assert torch.equal(torch.compile(block, fullgraph=True)(x, weight), block(x, weight))


@pytest.mark.parametrize("dynamic", [False, True])
def test_choice_of_tiles(dynamic: bool) -> None:
    """In a graph, of any number of tokens; with a config of one's own, too."""
    make = Make("cpu")
    x, w_up, w_down = make(96, 16), make(2, 12, 16), make(2, 16, 6)
    weights, ids = make(96, 2, dtype="float32"), make(96, 2, dtype="int32") % 2
    sizes: dict[str, Any] = {"num_experts": 2, "hidden_size": 16, "intermediate_size": 6, "dtype": "bf16"}
    config = kk.get_cute_moe_config("up", 96, **sizes)

    def layer(x: Any, weights: Any, ids: Any) -> Any:
        with_config = kk.fused_moe(x, w_up, w_down, weights, ids, config=config)
        return kk.fused_moe(x, w_up, w_down, weights, ids) + with_config + kk.get_cute_moe_block_m(len(x), **sizes)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (4, 5, 96):
        some = x[:tokens], weights[:tokens], ids[:tokens]
        assert torch.equal(compiled(*some), layer(*some))
