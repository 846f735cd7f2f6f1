"""JAX arrays on a GPU: the results of PyTorch's tensors, ready when a call returns, whoever's stream it ran on.

On the CPU the same way through the package is taken by calling its devices GPUs.
"""
# ruff: noqa: E402 (torch and JAX first: without them there is nothing to test)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

import kestrel_kernels as kk
from kestrel_kernels import _jax
from kestrel_kernels._op import as_tensor
from kestrel_kernels.activation import gelu_residual_cuda
from kestrel_kernels.layernorm_cuda import layernorm_bias_cuda
from support import HAS_JAX_CUDA, Backend, random

needs_gpu = pytest.mark.skipif(not HAS_JAX_CUDA, reason="no CUDA device, or a JAX without CUDA")
on_gpu = [pytest.mark.cuda, needs_gpu]

# op -> (functional form, shapes of its arrays: bf16, or what it says)
FORMS: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "gelu_residual": (kk.activation.gelu_residual, [(4, 64)]),
    "layernorm": (kk.layernorm, [(4, 64), (64,), (64,)]),
    "rmsnorm": (kk.rmsnorm, [(4, 64), (64,)]),
    "moe_sum": (kk.moe_sum.moe_sum, [(4, 8, 16)]),
    "moe_down": (
        lambda x, w, weights, ids, e, n: kk.invoke_cute_moe_down(x, w, weights, None, ids, e, n + 16, reduce=True),
        [(4, 2, 16), (4, 8, 16), ("float32", 4, 2), ("int32", 16), ("int32", 1), ("int32", 1)],
    ),
    "embedding": (kk.embedding.embedding, [(8, 16), ("int32", 3)]),
    "fp8_quant_row": (kk.fp8_quant.fp8_quant, [(4, 64)]),
    "fp8_quant_tensor": (lambda x: kk.fp8_quant.fp8_quant(x, "tensor"), [(4, 64)]),
    "fp8_quant_static": (lambda x: kk.fp8_quant.fp8_quant(x, scale=0.5)[0], [(4, 64)]),
    "linear": (lambda x, w, b, r: kk.linear(x, w, b, r, "gelu_tanh"), [(4, 64), (32, 64), (32,), (4, 32)]),
    "linear_gate": (lambda x, w, b, r: kk.linear(x, w, b, r, "silu_and_mul"), [(4, 64), (64, 64), (64,), (4, 32)]),
    "fused_mlp": (kk.fused_mlp.fused_mlp, [(4, 8), (16, 8), (16,), (8, 16), (8,), (4, 8)]),
    "topk_fwd": (lambda s: kk.topk_fwd(s, 8, softmax=True), [(4, 64)]),
    "topk_router": (lambda s, b: kk.topk_router(s, 8, "sigmoid", b), [(4, 64), (64,)]),
    "sample_top_k": (lambda s: kk.sample_top_k(s, 8, 0.7, 3, 4), [(4, 64)]),
    "flash_attn_func": (
        lambda q, k, v: kk.flash_attn_func(q, k, v, return_lse=True),
        [(2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 16)],
    ),
    "merge_state": (kk.merge_state, [(1, 4, 2, 8), ("float32", 1, 2, 4), (1, 4, 2, 8), ("float32", 1, 2, 4)]),
    "no_rows": (kk.activation.gelu_residual, [(0, 64)]),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=on_gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        monkeypatch.setattr(_jax, "on_gpu", lambda array: True)
    return str(request.param)


def backends(device: str) -> tuple[Backend, Backend]:
    """JAX and torch."""
    return (Backend("jax-cuda"), Backend("torch-cuda")) if device == "cuda" else (Backend("jax"), Backend("torch"))


def arrays(backend: Backend, shapes: list[Any]) -> list[Any]:
    made = []
    for seed, shape in enumerate(shapes):
        dtype, sizes = (shape[0], shape[1:]) if isinstance(shape[0], str) else ("bfloat16", shape)
        values = random(sizes, seed)
        made.append(backend.array(np.abs(values) if dtype == "int32" else values, dtype))
    return made


@pytest.mark.parametrize("form", FORMS)
def test_functional_forms(form: str, device: str) -> None:
    function, shapes = FORMS[form]
    on_jax, on_torch = backends(device)
    got, want = (function(*arrays(b, shapes)) for b in (on_jax, on_torch))
    for g, w in zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]:
        assert isinstance(g, jax.Array) and g.devices() == arrays(on_jax, shapes)[0].devices()
        g, w = on_jax.bits(g), on_torch.bits(w)
        assert g.dtype == w.dtype and g.shape == w.shape and g.tobytes() == w.tobytes()


def test_into_forms(device: str) -> None:
    """JAX arrays are read beside another framework's output, and are no outputs themselves."""
    on_jax, on_torch = backends(device)
    shapes = [(4, 64), (64,), (64,)]
    want = kk.layernorm(*arrays(on_torch, shapes))
    out = torch.full_like(want, torch.nan)
    x, weight, bias = arrays(on_jax, shapes)
    layernorm_bias_cuda(out, x, weight, bias, 1e-5)
    assert torch.equal(out, want)
    layernorm_bias_cuda(as_tensor(out.zero_()), x, weight, bias, 1e-5)
    assert torch.equal(out, want)
    with pytest.raises(TypeError, match="layernorm: out must be writable, got a JAX array"):
        layernorm_bias_cuda(x, x, weight, bias, 1e-5)
    with pytest.raises(ValueError, match=r"layernorm: weight must have shape \[64\], got \[4, 64\]"):
        kk.layernorm(x, x, bias)


@pytest.mark.cuda
@needs_gpu
def test_ready_when_it_returns() -> None:
    """Of a slow op: JAX, which reads the result on a stream of its own, finds all of it there."""
    on_jax, on_torch = Backend("jax-cuda"), Backend("torch-cuda")
    shapes = [(1, 4096, 16, 64)] * 3
    q, k, v = arrays(on_torch, shapes)
    want = on_torch.bits(kk.flash_attn_func(q, k, v, causal=True))
    q, k, v = arrays(on_jax, shapes)
    busy = jax.numpy.ones((8192, 8192), "bfloat16", device=next(iter(q.devices())))
    for _ in range(3):
        for _ in range(20):
            busy = busy @ busy * 0.0
        out = kk.flash_attn_func(q + busy[0, 0], k, v, causal=True)  # waits for JAX's work, then for its own
        seen = jax.numpy.copy(out)
        assert on_jax.bits(seen).tobytes() == want.tobytes()


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("framework", ["torch", "cupy"])
def test_on_the_streams_of_others(framework: str) -> None:
    """An into form runs on the stream of its output, and JAX may reuse the memory of its inputs at once."""
    on_jax = Backend("jax-cuda")
    side = torch.cuda.Stream()
    out = torch.full((512, 1024), torch.nan, device="cuda", dtype=torch.bfloat16)
    other: Any = out
    if framework == "cupy":
        cupy = pytest.importorskip("cupy")
        other = cupy.from_dlpack(out.view(torch.int16)).view("bfloat16")
    torch.cuda.synchronize()
    for seed in range(5):
        x = on_jax.array(random((512, 2048), seed), "bfloat16")
        want = kk.activation.gelu_residual(x)
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            if framework == "torch":
                gelu_residual_cuda(out, x + 0)
            else:
                with cupy.cuda.ExternalStream(side.cuda_stream):
                    gelu_residual_cuda(other, x + 0)
        jax.numpy.zeros_like(x).block_until_ready()  # where x + 0 was, maybe
        assert np.array_equal(Backend("torch-cuda").bits(out), on_jax.bits(want))
