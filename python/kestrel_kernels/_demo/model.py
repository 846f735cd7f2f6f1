"""The forward pass of a Llama model: a list of op calls on buffers that are there already.

Per layer: rmsnorm, linear (q, k, v), rope_and_cache, attention on the paged cache, linear with the residual added,
rmsnorm, linear with SwiGLU, linear with the residual added. Sums into the residual stream are rounded once, by linear.
At the end of a pass the next token is drawn by sample_top_k.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from kestrel_kernels._demo.gguf_model import Config, GGUFModel
from kestrel_kernels._demo.meter import Call, Cost
from kestrel_kernels.embedding import embedding_into
from kestrel_kernels.flash_attn.cute import flash_attn_with_kvcache
from kestrel_kernels.fused_linear_residual_ops import linear_into
from kestrel_kernels.kv_cache_write import rope_and_cache
from kestrel_kernels.norm import rmsnorm_into
from kestrel_kernels.topk import sample_top_k_into

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


class Cache:
    """Keys and values of every layer in pages of one token, and where the tokens of the one sequence lie."""

    def __init__(self, device: Any, config: Config, pages: int, kv_cache_dtype: str, seed: int) -> None:
        shape = (config.layers, 2, pages, 1, config.kv_heads, config.head_dim)
        # NaN in every page that holds no token: a read past the sequence would be seen at once.
        self.storage = device.put(np.full(shape, np.nan, FP8 if kv_cache_dtype == "fp8" else BF16))
        self.kv_cache_dtype = kv_cache_dtype
        # Values are small: 32 times as large they keep out of e4m3's subnormals (mean cosine of the logits 0.9958 to
        # 0.9975 in SmolLM2). Keys fill its range as they are.
        self.k_scale, self.v_scale = (1.0, 1 / 32) if kv_cache_dtype == "fp8" else (1.0, 1.0)
        self.pages = np.random.default_rng(seed).permutation(pages)  # in the order in which tokens take them
        self.page_table = device.tensor(device.put(self.pages.astype(np.int32)[None]))
        self.length = 0


class Model:
    def __init__(self, model: GGUFModel, device: Any) -> None:
        """`device`: a `device.Cpu` or `cuda.Cuda`."""
        self.config = model.config
        self.device = device
        self.weights = {name: device.tensor(device.put(weight)) for name, weight in model.weights.items()}
        self.nbytes = {name: weight.nbytes for name, weight in model.weights.items()}

    def rotary_table(self, positions: int) -> Any:
        """fp32 [positions, rotary_dim]: cosines, then sines (Su et al. 2021)."""
        half = np.arange(self.config.rotary_dim // 2) * 2 / self.config.rotary_dim
        angles = np.arange(positions)[:, None] * self.config.rotary_base**-half
        table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        return self.device.tensor(self.device.put(table))


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0  # 0: the best token every time
    top_k: int = 40
    seed: int = 0


class Pass:
    """The forward pass for `tokens` tokens at once, onto `cache`; what follows the last `outputs` of them is drawn."""

    def __init__(
        self, phase: str, model: Model, cache: Cache, table: Any, tokens: int, outputs: int, sampling: Sampling
    ) -> None:
        device = model.device
        self.cache = cache
        self._device = device
        self.inputs = device.block(
            positions=(tokens, np.int64), slots=(tokens, np.int64), offset=(1, np.int64), ids=(tokens, np.int32),
            length=(1, np.int32),
        )  # fmt: skip
        self._outputs = device.block(chosen=(outputs, np.int32))
        self.inputs.host["slots"][:] = -1  # where a device runs the calls once to prepare them, nothing is stored
        self.logits = device.put(np.zeros((outputs, model.config.vocabulary), BF16))
        self._arange = np.arange(tokens)
        calls = self._forward(model, table, tokens, outputs)
        calls.append(self._draw(outputs, sampling))
        self.program = device.program(phase, calls, self.inputs, self._outputs)

    def run(self, ids: list[int] | int, offset: int = 0) -> int:
        """Appends the tokens to the cached sequence. The token drawn after the last one, the draw of this offset."""
        self.inputs.host["ids"][:] = ids
        self.inputs.host["offset"][0] = offset
        self.place(self.cache.length)
        self.cache.length += self._arange.size
        self.program.run(self.cache.length)
        return int(self._outputs.host["chosen"][-1])

    def place(self, length: int) -> None:
        """Makes the inputs those of tokens that follow `length` others."""
        host = self.inputs.host
        np.add(self._arange, length, out=host["positions"])
        np.take(self.cache.pages, host["positions"], out=host["slots"], mode="clip")
        host["length"][0] = length + self._arange.size

    def measure(self) -> None:
        """Finds the times of the calls, as they are in the middle run. The sequence is lost."""
        if keys := self.program.keys:
            self.place(keys[len(keys) // 2] - self._arange.size)
            self.program.measure()

    def _draw(self, outputs: int, sampling: Sampling) -> Call:
        logits = self.logits
        run = partial(
            sample_top_k_into, self._outputs.tensors["chosen"], self._device.tensor(logits),
            sampling.top_k if sampling.temperature > 0 else 1, sampling.temperature, sampling.seed,
            self.inputs.tensors["offset"],
        )  # fmt: skip
        return Call("sample_top_k", run, Cost(logits.nbytes, logits.size))

    def _forward(self, model: Model, table: Any, tokens: int, outputs: int) -> list[Call]:
        c, w, cache, device, inputs = model.config, model.weights, self.cache, model.device, self.inputs.tensors
        tensor = device.tensor
        calls: list[Call] = []
        q_width, kv_width = c.heads * c.head_dim, c.kv_heads * c.head_dim

        def buffer(*shape: int) -> Any:
            return device.put(np.zeros(shape, BF16))

        def norm(out: Any, x: Any, weight: str) -> None:
            run = partial(rmsnorm_into, tensor(out), tensor(x), w[weight], c.norm_eps)
            calls.append(Call("rmsnorm", run, Cost(x.nbytes + out.nbytes + model.nbytes[weight], 4 * x.size)))

        def linear(out: Any, x: Any, weight: str, residual: bool = False, gate: str | None = None) -> None:
            target = tensor(out)
            run = partial(
                linear_into, target, tensor(x), w[weight], None, target if residual else None, gate,
                workspace=device.workspace,
            )  # fmt: skip
            moved = x.nbytes + model.nbytes[weight] + out.nbytes * (1 + residual)
            calls.append(Call("linear", run, Cost(moved, len(x) * model.nbytes[weight])))  # 2 flop, 2 bytes a weight

        x, h = buffer(tokens, c.hidden), buffer(tokens, c.hidden)
        qkv, attended = buffer(tokens, q_width + 2 * kv_width), buffer(tokens, q_width)
        gated = buffer(tokens, c.intermediate)
        heads = qkv.reshape(tokens, -1, c.head_dim)
        q, k, v = heads[:, : c.heads], heads[:, c.heads : c.heads + c.kv_heads], heads[:, c.heads + c.kv_heads :]
        q_t, k_t, v_t = tensor(q), tensor(k), tensor(v)
        batched = tensor(q[None]), tensor(attended.reshape(1, tokens, c.heads, c.head_dim))
        token_bytes = 2 * kv_width * cache.storage.itemsize

        def attention_cost(keys: int) -> Cost:
            seen = tokens * keys - tokens * (tokens - 1) // 2
            return Cost(2 * q.nbytes + keys * (token_bytes + 4), 4 * c.heads * c.head_dim * seen)

        run = partial(embedding_into, tensor(x), w["embedding"], inputs["ids"])
        calls.append(Call("embedding", run, Cost(2 * x.nbytes + 4 * tokens, 0)))
        for i in range(c.layers):
            keys, values = tensor(cache.storage[i, 0]), tensor(cache.storage[i, 1])
            norm(h, x, f"{i}.attention_norm")
            linear(qkv, h, f"{i}.qkv")
            run = partial(
                rope_and_cache, inputs["positions"], q_t, k_t, v_t, table, keys, values, inputs["slots"],
                cache.kv_cache_dtype, cache.k_scale, cache.v_scale, interleaved=True,
            )  # fmt: skip
            moved = 2 * q.nbytes + k.nbytes + v.nbytes + tokens * (token_bytes + c.rotary_dim * 4 + 16)
            calls.append(Call("rope_and_cache", run, Cost(moved, 3 * (q.size + k.size))))
            run = partial(
                flash_attn_with_kvcache, batched[0], keys, values, page_table=cache.page_table,
                seqused_k=inputs["length"], causal=True, k_scale=cache.k_scale, v_scale=cache.v_scale, out=batched[1],
                fresh_tokens=tokens, workspace=device.workspace,
            )  # fmt: skip
            calls.append(Call("attention", run, attention_cost))
            linear(x, attended, f"{i}.attention_out", residual=True)
            norm(h, x, f"{i}.mlp_norm")
            linear(gated, h, f"{i}.gate_up", gate="silu_and_mul")
            linear(x, gated, f"{i}.down", residual=True)
        norm(h[-outputs:], x[-outputs:], "norm")
        linear(self.logits, h[-outputs:], "embedding" if c.tied else "output")
        return calls
