"""The forward pass of a Llama model: a list of op calls on buffers that are there already.

Per layer: rmsnorm, linear (q, k, v), rope_and_cache, attention on the paged cache, linear with the residual added,
rmsnorm, linear with SwiGLU, linear with the residual added. Sums into the residual stream are rounded once, by linear.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from kestrel_kernels._demo.gguf_model import Config, GGUFModel
from kestrel_kernels._demo.meter import Call, Cost, Program
from kestrel_kernels._op import as_tensor
from kestrel_kernels.embedding import embedding_into
from kestrel_kernels.flash_attn.cute import flash_attn_with_kvcache
from kestrel_kernels.fused_linear_residual_ops import linear_into
from kestrel_kernels.kv_cache_write import rope_and_cache
from kestrel_kernels.norm import rmsnorm_into

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


class Cache:
    """Keys and values of every layer in pages of one token, and where the tokens of the one sequence lie."""

    def __init__(self, config: Config, pages: int, kv_cache_dtype: str, seed: int) -> None:
        shape = (config.layers, 2, pages, 1, config.kv_heads, config.head_dim)
        # NaN in every page that holds no token: a read past the sequence would be seen at once.
        self.storage = np.full(shape, np.nan, FP8 if kv_cache_dtype == "fp8" else BF16)
        self.kv_cache_dtype = kv_cache_dtype
        # Values are small: 32 times as large they keep out of e4m3's subnormals (mean cosine of the logits 0.9958 to
        # 0.9975 in SmolLM2). Keys fill its range as they are.
        self.k_scale, self.v_scale = (1.0, 1 / 32) if kv_cache_dtype == "fp8" else (1.0, 1.0)
        self.pages = np.random.default_rng(seed).permutation(pages)  # in the order in which tokens take them
        self.page_table = self.pages.astype(np.int32)[None]
        self.length = np.zeros(1, np.int32)

    @property
    def capacity(self) -> int:
        return self.pages.size


class Model:
    def __init__(self, model: GGUFModel) -> None:
        self.config = model.config
        self.weights = {name: as_tensor(weight) for name, weight in model.weights.items()}
        self.nbytes = {name: weight.nbytes for name, weight in model.weights.items()}

    def rotary_table(self, positions: int) -> np.ndarray:
        """fp32 [positions, rotary_dim]: cosines, then sines (Su et al. 2021)."""
        half = np.arange(self.config.rotary_dim // 2) * 2 / self.config.rotary_dim
        angles = np.arange(positions)[:, None] * self.config.rotary_base**-half
        return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


class Pass:
    """The forward pass for `tokens` tokens at once, onto `cache`. Logits of the last `outputs` of them."""

    def __init__(self, phase: str, model: Model, cache: Cache, table: Any, tokens: int, outputs: int = 1) -> None:
        c = model.config
        self.cache = cache
        self.ids = np.zeros(tokens, np.int32)
        self.positions = np.zeros(tokens, np.int64)
        self.slots = np.zeros(tokens, np.int64)
        self.logits = np.zeros((outputs, c.vocabulary), BF16)
        self._arange = np.arange(tokens)
        self.program = Program(phase, self._calls(model, table, tokens, outputs))

    def run(self, ids: list[int] | int) -> None:
        """Appends the tokens to the cached sequence; `logits` then holds what comes after each of the last ones."""
        length = self.cache.length
        self.ids[:] = ids
        np.add(self._arange, length[0], out=self.positions)
        length[0] += len(self.ids)
        np.take(self.cache.pages, self.positions, out=self.slots, mode="clip")
        self.program.run(int(length[0]))

    def _calls(self, model: Model, table: Any, tokens: int, outputs: int) -> list[Call]:
        c, w, cache = model.config, model.weights, self.cache
        calls: list[Call] = []
        q_width, kv_width = c.heads * c.head_dim, c.kv_heads * c.head_dim

        def buffer(*shape: int) -> np.ndarray:
            return np.zeros(shape, BF16)

        def norm(out: np.ndarray, x: np.ndarray, weight: str) -> None:
            run = partial(rmsnorm_into, as_tensor(out), as_tensor(x), w[weight], c.norm_eps)
            calls.append(Call("rmsnorm", run, Cost(x.nbytes + out.nbytes + model.nbytes[weight], 4 * x.size)))

        def linear(
            out: np.ndarray, x: np.ndarray, weight: str, residual: bool = False, gate: str | None = None
        ) -> None:
            target = as_tensor(out)
            run = partial(linear_into, target, as_tensor(x), w[weight], None, target if residual else None, gate)
            moved = x.nbytes + model.nbytes[weight] + out.nbytes * (1 + residual)
            calls.append(Call("linear", run, Cost(moved, len(x) * model.nbytes[weight])))  # 2 flop, 2 bytes a weight

        x, h = buffer(tokens, c.hidden), buffer(tokens, c.hidden)
        qkv, attended = buffer(tokens, q_width + 2 * kv_width), buffer(tokens, q_width)
        gated = buffer(tokens, c.intermediate)
        heads = qkv.reshape(tokens, -1, c.head_dim)
        q, k, v = heads[:, : c.heads], heads[:, c.heads : c.heads + c.kv_heads], heads[:, c.heads + c.kv_heads :]
        q_t, k_t, v_t = as_tensor(q), as_tensor(k), as_tensor(v)
        batched = as_tensor(q[None]), as_tensor(attended.reshape(1, tokens, c.heads, c.head_dim))
        positions, slots = as_tensor(self.positions), as_tensor(self.slots)
        page_table, length = as_tensor(cache.page_table), as_tensor(cache.length)
        token_bytes = 2 * kv_width * cache.storage.itemsize

        def attention_cost(keys: int) -> Cost:
            seen = tokens * keys - tokens * (tokens - 1) // 2
            return Cost(2 * q.nbytes + keys * (token_bytes + 4), 4 * c.heads * c.head_dim * seen)

        run = partial(embedding_into, as_tensor(x), w["embedding"], as_tensor(self.ids))
        calls.append(Call("embedding", run, Cost(2 * x.nbytes + self.ids.nbytes, 0)))
        for i in range(c.layers):
            keys, values = as_tensor(cache.storage[i, 0]), as_tensor(cache.storage[i, 1])
            norm(h, x, f"{i}.attention_norm")
            linear(qkv, h, f"{i}.qkv")
            run = partial(
                rope_and_cache, positions, q_t, k_t, v_t, table, keys, values, slots, cache.kv_cache_dtype,
                cache.k_scale, cache.v_scale, interleaved=True,
            )  # fmt: skip
            moved = 2 * q.nbytes + k.nbytes + v.nbytes + tokens * (token_bytes + c.rotary_dim * 4 + 16)
            calls.append(Call("rope_and_cache", run, Cost(moved, 3 * (q.size + k.size))))
            run = partial(
                flash_attn_with_kvcache, batched[0], keys, values, page_table=page_table, seqused_k=length,
                causal=True, k_scale=cache.k_scale, v_scale=cache.v_scale, out=batched[1],
            )  # fmt: skip
            calls.append(Call("attention", run, attention_cost))
            linear(x, attended, f"{i}.attention_out", residual=True)
            norm(h, x, f"{i}.mlp_norm")
            linear(gated, h, f"{i}.gate_up", gate="silu_and_mul")
            linear(x, gated, f"{i}.down", residual=True)
        norm(h[-outputs:], x[-outputs:], "norm")
        linear(self.logits, h[-outputs:], "embedding" if c.tied else "output")
        return calls
