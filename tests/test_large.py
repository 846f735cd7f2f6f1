"""Element counts past 2^31, on a GPU with the memory for it; on the CPU the same tests at a small size.

Inputs repeat a pattern of 97 rows. So must the results, bit for bit, and their first 97 rows must be right: an offset
that wraps at a power of two lands in another row of the pattern.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import kestrel_kernels as kk
import pytest
from kestrel_kernels.activation import gelu_residual_cuda, silu_and_mul_into
from kestrel_kernels.embedding import embedding_into
from kestrel_kernels.flash_attn import cute
from kestrel_kernels.fp8_quant import (
    fp8_e4m3fn_rowwise_quant_cuda,
    fp8_e4m3fn_static_quant_cuda,
    fp8_e4m3fn_tensor_quant_cuda,
)
from kestrel_kernels.fused_linear_residual_ops import linear_into
from kestrel_kernels.fused_mlp import fused_mlp_gelu_bias_residual_cuda
from kestrel_kernels.kv_cache_write import reshape_and_cache_flash, rope_and_cache
from kestrel_kernels.layernorm_cuda import layernorm_bias_cuda, layernorm_bias_reload_cuda
from kestrel_kernels.moe_sum import moe_sum
from kestrel_kernels.norm import rmsnorm_into
from kestrel_kernels.rotary_embedding import rotary_embedding

torch = pytest.importorskip("torch")
F = torch.nn.functional

PERIOD = 97
NEEDED = 24 << 30  # bytes of free memory
FP8 = torch.float8_e4m3fn
WEIGHTS_ROUNDED = 2**-7  # of values of about 3: what attention may lose where its weights are bf16


class Large:
    """A device, and the element count that an array has to pass there."""

    def __init__(self, device: str, elements: int) -> None:
        self.device, self.elements = device, elements
        self._generator = torch.Generator(device).manual_seed(0)

    def rows(self, width: int) -> int:
        """So many that they hold more than `elements`; a multiple of the period."""
        return (self.elements // width // PERIOD + 2) * PERIOD

    def normal(self, *shape: int, dtype: Any = torch.bfloat16) -> Any:
        return torch.randn(shape, generator=self._generator, device=self.device).to(dtype)

    def repeated(self, pattern: Any, rows: int, dim: int = 0) -> Any:
        counts = [1] * pattern.ndim
        counts[dim] = rows // PERIOD
        return pattern.repeat(counts)

    def unwritten(self, *shape: int, dtype: Any = torch.bfloat16) -> Any:
        """NaN, and in bytes 0x7f, which is NaN in e4m3."""
        if dtype.itemsize == 1:
            return torch.full(shape, 0x7F, dtype=torch.uint8, device=self.device).view(dtype)
        return torch.full(shape, torch.nan if dtype.is_floating_point else -1, dtype=dtype, device=self.device)

    def positions(self, rows: int) -> Any:
        return torch.arange(rows, device=self.device) % PERIOD

    def angles(self, width: int) -> Any:
        """cos_sin_cache `[97, width]`."""
        angles = self.normal(PERIOD, width // 2, dtype=torch.float32)
        return torch.cat([angles.cos(), angles.sin()], -1)


@pytest.fixture(
    params=[
        pytest.param(("cpu", 2**16), id="small"),
        pytest.param(("cuda", 2**31), id="large", marks=[pytest.mark.cuda, pytest.mark.large]),
    ]
)
def large(request: pytest.FixtureRequest) -> Iterator[Large]:
    device, elements = request.param
    if device == "cuda" and not (torch.cuda.is_available() and torch.cuda.mem_get_info()[0] >= NEEDED):
        pytest.skip("no CUDA device with 24 GiB of free memory")
    yield Large(device, elements)
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def assert_repeats(array: Any) -> None:
    """Rows i and i + 97 hold the same bits."""
    bits = array.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[array.dtype.itemsize])
    first = bits[:PERIOD]
    for part in bits.split(max(1, 2**28 // first.numel()) * PERIOD):
        assert (part.unflatten(0, (-1, PERIOD)) == first).all()


def assert_right(array: Any, want: Any, tolerance: float = 2**-7, slack: float = 1e-3) -> None:
    """The first period as in `want`, up to rounding, and all others like it."""
    torch.testing.assert_close(array[:PERIOD].double(), want.double(), rtol=tolerance, atol=slack)
    assert_repeats(array)


def e4m3(x: Any, scale: Any) -> Any:
    """The bits."""
    r = 1 / torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    return (x.float() * r).clamp(-448, 448).to(FP8).view(torch.uint8)


def rotated(x: Any, cos_sin: Any) -> Any:
    """GPT-NeoX pairs of x `[97, heads, D]`, rounded as x."""
    cos, sin = cos_sin[:, None].chunk(2, -1)
    width = cos.shape[-1]
    a, b, rest = x[..., :width].float(), x[..., width : 2 * width].float(), x[..., 2 * width :]
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], -1)


@pytest.mark.parametrize("op", [gelu_residual_cuda, silu_and_mul_into])
def test_activation(large: Large, op: Callable[..., None]) -> None:
    """The result alone is past 2^31, x past 2^32."""
    rows = large.rows(1024)
    pattern = large.normal(PERIOD, 2048)
    out = large.unwritten(rows, 1024)
    op(out, large.repeated(pattern, rows))
    a, b = pattern.double().chunk(2, -1)
    assert_right(out, F.gelu(a) * (b + 1) if op is gelu_residual_cuda else F.silu(a) * b)


@pytest.mark.parametrize("op", [layernorm_bias_cuda, layernorm_bias_reload_cuda])
@pytest.mark.parametrize("width", [1152, 999])
def test_layernorm(large: Large, op: Callable[..., None], width: int) -> None:
    rows = large.rows(width)
    pattern, weight, bias = large.normal(PERIOD, width), large.normal(width), large.normal(width)
    out = large.unwritten(rows, width)
    op(out, large.repeated(pattern, rows), weight, bias, 1e-5)
    assert_right(out, F.layer_norm(pattern.double(), (width,), weight.double(), bias.double(), 1e-5))


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("width", [1152, 999])
def test_rmsnorm(large: Large, width: int, with_residual: bool) -> None:
    rows = large.rows(width)
    pattern, other, weight = large.normal(PERIOD, width), large.normal(PERIOD, width), large.normal(width)
    out = large.unwritten(rows, width)
    residual = large.repeated(other, rows) if with_residual else None
    rmsnorm_into(out, large.repeated(pattern, rows), weight, 1e-6, residual)
    if residual is not None:
        pattern = pattern + other
        assert torch.equal(residual[:PERIOD], pattern)
        assert_repeats(residual)
    assert_right(out, F.rms_norm(pattern.double(), (width,), weight.double(), 1e-6))


@pytest.mark.parametrize("experts", [2, 8])
def test_moe_sum(large: Large, experts: int) -> None:
    tokens = large.rows(1024 if experts == 2 else 8 * 1024)  # of two, the sums are past 2^31 too
    pattern = large.normal(PERIOD, experts, 1024)
    out = large.unwritten(tokens, 1024)
    moe_sum(large.repeated(pattern, tokens), out)
    assert_right(out, pattern.double().sum(1))


def test_rotary_embedding(large: Large) -> None:
    tokens = large.rows(32 * 64)
    query, key, cos_sin = large.normal(PERIOD, 32, 64), large.normal(PERIOD, 2, 64), large.angles(32)
    queries, keys = large.repeated(query, tokens), large.repeated(key, tokens)
    rotary_embedding(large.positions(tokens), queries, keys, 64, cos_sin)
    assert_right(queries, rotated(query, cos_sin))
    assert_right(keys, rotated(key, cos_sin))


def test_tau_tail(large: Large) -> None:
    heads, tokens = 32, large.rows(3 * 32 * 64)
    packed, tok, tau = large.normal(PERIOD, 3, heads, 64), large.normal(PERIOD, 2, heads), large.normal(PERIOD, heads)
    qkv = large.repeated(packed.flatten(1), tokens)
    kk.tau_tail_apply_into(qkv, large.repeated(tok.flatten(1), tokens), tau, large.positions(tokens))
    factor = torch.tanh(tok.double()) + tau.double()[:, None]
    want = packed.double()
    want[:, 0] *= factor[:, 0, :, None]
    want[:, 2] *= factor[:, 1, :, None]
    assert_right(qkv, want.flatten(1))


@pytest.mark.parametrize("mode", ["auto", "fp8"])
def test_kv_cache_write(large: Large, mode: str) -> None:
    """Tokens and caches are past 2^31; token i goes to slot i + 97, and the first 97 stay as they are."""
    tokens = large.rows(16 * 128)
    pattern = large.normal(PERIOD, 16, 128)
    dtype = FP8 if mode == "fp8" else torch.bfloat16
    k_cache, v_cache = (large.unwritten(tokens + PERIOD, 1, 16, 128, dtype=dtype) for _ in range(2))
    untouched = k_cache[:PERIOD].clone()
    key = large.repeated(pattern, tokens)
    slots = torch.arange(tokens, device=large.device) + PERIOD
    reshape_and_cache_flash(key, key, k_cache, v_cache, slots, mode, 0.25, 0.5)
    for cache, scale in ((k_cache, 0.25), (v_cache, 0.5)):
        bits = cache.view(torch.uint8)
        assert torch.equal(bits[:PERIOD], untouched.view(torch.uint8))
        want = e4m3(pattern, scale) if mode == "fp8" else pattern.view(torch.uint8)
        assert torch.equal(bits[PERIOD : 2 * PERIOD, 0], want)
        assert_repeats(bits[PERIOD:])


def test_rope_and_cache(large: Large) -> None:
    tokens = large.rows(16 * 128)
    query, key, cos_sin = large.normal(PERIOD, 16, 128), large.normal(PERIOD, 16, 128), large.angles(64)
    q, k = large.repeated(query, tokens), large.repeated(key, tokens)
    k_cache, v_cache = (large.unwritten(tokens + PERIOD, 1, 16, 128, dtype=FP8) for _ in range(2))
    slots = torch.arange(tokens, device=large.device) + PERIOD
    rope_and_cache(large.positions(tokens), q, k, k, cos_sin, k_cache, v_cache, slots, "fp8", 0.25, 0.5)
    assert_right(q, rotated(query, cos_sin))
    assert torch.equal(v_cache[PERIOD : 2 * PERIOD, 0].view(torch.uint8), e4m3(key, 0.5))
    stored = k_cache[PERIOD : 2 * PERIOD, 0].float() * 0.25
    torch.testing.assert_close(stored, rotated(key, cos_sin).float(), rtol=2**-3, atol=2**-9)
    for cache in (k_cache, v_cache):
        bits = cache.view(torch.uint8)
        assert (bits[:PERIOD] == 0x7F).all()
        assert_repeats(bits[PERIOD:])


@pytest.mark.parametrize("width", [2048, 999])
def test_fp8_quant(large: Large, width: int) -> None:
    """The largest element stands last: one scale for the whole tensor has to see it."""
    rows = large.rows(width)
    pattern = large.normal(PERIOD, width)
    x = large.repeated(pattern, rows)
    bits = large.unwritten(rows, width, dtype=torch.uint8)
    scales = large.unwritten(rows, dtype=torch.float32)
    fp8_e4m3fn_rowwise_quant_cuda(bits, scales, x)
    want = pattern.float().abs().amax(-1) / 448
    assert_right(scales, want, 1e-6)
    assert torch.equal(bits[:PERIOD], e4m3(pattern, scales[:PERIOD, None]))
    assert_repeats(bits)

    for scale in (0.25, None):
        x[-1, -1] = 112.0
        bits.fill_(0x7F)
        if scale:
            fp8_e4m3fn_static_quant_cuda(bits, scale, x)
        else:
            found = large.unwritten(1, dtype=torch.float32)
            fp8_e4m3fn_tensor_quant_cuda(bits, found, x)
            assert found.item() == 0.25
        assert bits[-1, -1] == 0x7E
        bits[-1, -1] = bits[PERIOD - 1, -1]
        assert torch.equal(bits[:PERIOD], e4m3(pattern, 0.25))
        assert_repeats(bits)


@pytest.mark.parametrize("width", [64, 50000])
def test_topk(large: Large, width: int) -> None:
    rows = large.rows(width)
    pattern = large.normal(PERIOD, width)
    scores = large.repeated(pattern, rows)
    values, ids = kk.topk_fwd(scores, 8)
    assert torch.equal(values[:PERIOD], pattern.topk(8).values)
    assert torch.equal(pattern.gather(1, ids[:PERIOD].long()), values[:PERIOD])
    assert_repeats(values)
    assert_repeats(ids)
    for temperature in (0.0, 1e-5):  # both leave nothing but the best, of which there may be two
        drawn = kk.sample_top_k(scores, 8, temperature, 1, 2)
        best = scores.gather(1, drawn.long()[:, None])[:, 0]
        assert torch.equal(best[:PERIOD], pattern.amax(-1))
        assert_repeats(best)


def test_topk_router(large: Large) -> None:
    rows = large.rows(256)
    pattern = large.normal(PERIOD, 256)
    weights, ids = kk.topk_router(large.repeated(pattern, rows), 8)
    assert_right(weights, pattern.double().softmax(-1).topk(8).values, 1e-5)
    assert torch.equal(pattern.gather(1, ids[:PERIOD].long()), pattern.topk(8).values)
    assert_repeats(ids)


def test_embedding(large: Large) -> None:
    """Out of a table past 2^31, backwards, into an array past 2^31."""
    rows = large.rows(1024)
    pattern = large.normal(PERIOD, 1024)
    out = large.unwritten(rows, 1024)
    embedding_into(out, large.repeated(pattern, rows), torch.arange(rows - 1, -1, -1, device=large.device))
    assert torch.equal(out[:PERIOD], pattern.flip(0))
    assert_repeats(out)


def test_merge_state(large: Large) -> None:
    tokens = large.rows(16 * 64)
    out_a, out_b = (large.normal(PERIOD, 16, 64) for _ in range(2))
    lse_a, lse_b = (large.normal(16, PERIOD, dtype=torch.float32) for _ in range(2))
    out, lse = large.unwritten(tokens, 16, 64), large.unwritten(16, tokens, dtype=torch.float32)
    parts = [(large.repeated(o, tokens), large.repeated(s, tokens, dim=1)) for o, s in ((out_a, lse_a), (out_b, lse_b))]
    kk.merge_state_into(out, lse, *parts[0], *parts[1])
    share = torch.sigmoid(lse_a.double() - lse_b.double()).T[..., None]
    assert_right(out, share * out_a.double() + (1 - share) * out_b.double())
    assert_right(lse.T.contiguous(), torch.logaddexp(lse_a, lse_b).T, 1e-5)


def assert_near(array: Any, want: Any) -> None:
    """Each period as in `want`: of a product, whose last bits may depend on the row's place."""
    for part in array.split(max(1, 2**26 // want.numel()) * PERIOD):
        assert ((part.unflatten(0, (-1, PERIOD)).float() - want.float()).abs() < 0.05 * want.float().abs() + 0.05).all()


@pytest.mark.parametrize(("features", "depth"), [(8192, 16), (16, 8192)])
@pytest.mark.parametrize("activation", [None, "silu", "silu_and_mul"])
def test_linear(large: Large, features: int, depth: int, activation: str | None) -> None:
    """The result is past 2^31, or x is."""
    rows = large.rows(8192)
    halves = 2 if activation == "silu_and_mul" else 1
    x, w = large.normal(PERIOD, depth), large.normal(halves * features, depth) / depth**0.5
    b, residual = large.normal(halves * features), large.normal(PERIOD, features)
    out = large.unwritten(rows, features)
    linear_into(out, large.repeated(x, rows), w, b, large.repeated(residual, rows), activation)
    product = F.linear(x.float(), w.float(), b.float())
    if activation:
        a, *gate = product.chunk(halves, -1)
        product = F.silu(a) * (gate[0] if gate else 1)
    assert_near(out, product + residual.float())


def test_fused_mlp(large: Large) -> None:
    """The hidden layer is past 2^31."""
    rows, inner, width = large.rows(8192), 8192, 16
    x, residual = large.normal(PERIOD, width), large.normal(PERIOD, width)
    w1, w2 = large.normal(inner, width) / width**0.5, large.normal(width, inner) / inner**0.5
    b1, b2 = large.normal(inner), large.normal(width)
    out, hidden = large.unwritten(rows, width), large.unwritten(rows, inner)
    fused_mlp_gelu_bias_residual_cuda(
        out, hidden, large.repeated(x, rows), w1, b1, w2, b2, large.repeated(residual, rows)
    )
    want = F.gelu(F.linear(x.float(), w1.float(), b1.float()), approximate="tanh")
    assert_near(hidden, want)
    assert_near(out, residual.float() + F.linear(want, w2.float(), b2.float()))


def assert_ran(large: Large, kernel: str) -> None:
    assert cute.last_kernel() == "cpu" if large.device == "cpu" else cute.last_kernel().startswith(kernel)


@pytest.mark.parametrize(("queries", "kernel"), [(1, "FlashAttentionDecodeSm90"), (20, "FlashAttentionFwd")])
@pytest.mark.parametrize("fp8", [False, True])
def test_attention_caches(large: Large, fp8: bool, queries: int, kernel: str) -> None:
    """Caches past 2^31: NaN but for the pages at the start, around 2^31 elements and at the end."""
    heads, size = 8, 128
    pages, middle = large.rows(heads * size), large.elements // (heads * size)
    table = torch.tensor([[0, middle - 1, middle, pages - 1], [middle + 1, pages - 2, 1, middle - 2]]).int()
    caches = []
    for _ in range(2):
        cache = large.unwritten(pages, 1, heads, size, dtype=FP8 if fp8 else torch.bfloat16)
        for page in table.flatten().tolist():
            cache[page] = large.normal(1, heads, size).to(cache.dtype)
        caches.append(cache)
    q = large.normal(2, queries, heads, size)
    out, lse = kk.flash_attn_with_kvcache(q, caches[0], caches[1], page_table=table.to(large.device), return_lse=True)
    assert_ran(large, kernel)
    keys, values = (
        torch.stack([c[p].double() for p in table.flatten().tolist()]).view(2, 4, heads, size) for c in caches
    )
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), keys) * size**-0.5
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-4, atol=1e-4)
    want = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
    torch.testing.assert_close(out.double(), want, rtol=2**-7, atol=WEIGHTS_ROUNDED)


@pytest.mark.parametrize(("length", "kernel"), [(16, "FlashAttentionPlain"), (33, "FlashAttentionFwd")])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_prefill(large: Large, packed: bool, length: int, kernel: str) -> None:
    """Queries, keys and results past 2^31, in short sequences."""
    heads, size = 16, 64
    batch = large.rows(length * heads * size)
    query, key = large.normal(PERIOD, length, heads, size), large.normal(PERIOD, length, heads, size)
    q, k = large.repeated(query, batch), large.repeated(key, batch)
    out = large.unwritten(batch, length, heads, size)
    if packed:
        starts = torch.arange(0, (batch + 1) * length, length, device=large.device, dtype=torch.int32)
        q, k, flat = (x.flatten(0, 1) for x in (q, k, out))
        kk.flash_attn_varlen_func(q, k, k, starts, starts, length, length, causal=True, out=flat)
    else:
        kk.flash_attn_func(q, k, k, causal=True, out=out)
    assert_ran(large, kernel)
    heads_first = (x.double().transpose(1, 2) for x in (query, key, key))
    want = F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
    assert_right(out, want, slack=WEIGHTS_ROUNDED)
