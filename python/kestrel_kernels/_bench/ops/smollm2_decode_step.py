from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from kestrel_kernels._bench.entry import Entry, Maker, Set

_LAYERS, _HIDDEN, _HEADS, _KV_HEADS, _SIZE, _INNER, _VOCABULARY = 30, 576, 9, 3, 64, 1536, 49152
_EPS = 1e-5


class SmolLM2DecodeStep(Entry):
    """One token through SmolLM2-135M, from its id to the next one's: the calls of the demo on random weights."""

    op = "smollm2_decode_step"
    pattern = r"b(?P<batch>1)"
    function = "flash_attn.cute.flash_attn_with_kvcache"
    outputs = "logits"
    compiles = False
    tolerance = 6e-2  # 30 layers with eight roundings to bf16 each; PyTorch's bf16 is off by 3 to 5e-2

    keys = 128  # this token's included

    def inputs(self, make: Maker) -> Set:
        from kestrel_kernels._demo.device import open_device
        from kestrel_kernels._demo.gguf_model import Config, GGUFModel, weight_shapes
        from kestrel_kernels._demo.model import BF16, Cache, Model, Pass, Sampling

        config = Config(
            _LAYERS, _HIDDEN, _HEADS, _KV_HEADS, _SIZE, _SIZE, _INNER, _VOCABULARY, 8192, _EPS, 1e5, tied=True
        )
        random = np.random.default_rng(0)
        normal = random.standard_normal(1_000_003, np.float32)  # repeated: 135 million would take seconds

        def weight(shape: tuple[int, ...]) -> np.ndarray:
            values = np.resize(normal, shape)
            return (values * shape[-1] ** -0.5 if len(shape) > 1 else 1 + 0.1 * values).astype(BF16)

        weights = {name: weight(shape) for name, shape in weight_shapes(config).items()}
        device = open_device(make.device)
        model = Model(GGUFModel(config, {}, weights), device)
        cache = Cache(device, config, self.keys + 8, "auto", seed=0)
        table = model.rotary_table(cache.pages.size)
        step = Pass("decode", model, cache, table, 1, 1, Sampling())
        step.inputs.host["ids"][:] = 4711
        step.place(self.keys - 1)
        step.inputs.upload()
        s: Set = {name: torch.from_dlpack(tensor) for name, tensor in model.weights.items()}
        s["table"] = torch.from_dlpack(table)
        s["cache"] = torch.from_dlpack(device.tensor(cache.storage))[:, :, :, 0]
        s["pages"] = torch.from_numpy(cache.pages[: self.keys]).to(make.device)
        history = (_LAYERS, 2, self.keys - 1, _KV_HEADS, _SIZE)
        s["cache"][:, :, s["pages"][:-1]] = make.normal(*history)
        s["logits"] = torch.from_dlpack(device.tensor(step.logits))
        s["id"] = 4711
        s["step"] = step
        return s

    @property
    def bytes(self) -> int:
        layer = _HIDDEN * ((_HEADS + 2 * _KV_HEADS) * _SIZE + _HEADS * _SIZE + 3 * _INNER)
        return 2 * (_LAYERS * (layer + 2 * self.keys * _KV_HEADS * _SIZE) + _VOCABULARY * _HIDDEN)

    def bound(self, s: Set) -> Callable[[], Any]:
        import tvm_ffi

        calls = [call.run for call in s["step"].program.calls]
        device = s["logits"].device

        def run() -> None:
            # Torch's stream: it is torch that captures, and none of the arguments is its tensor.
            on_stream: Any = contextlib.nullcontext()
            if device.type == "cuda":
                on_stream = tvm_ffi.use_raw_stream(tvm_ffi.device(str(device)), torch.cuda.current_stream().cuda_stream)
            with on_stream:
                for call in calls:
                    call()

        return run

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        return [_forward(s, self.keys, torch.float64)]

    def eager(self, s: Set) -> Any:
        return _forward(s, self.keys, torch.bfloat16)


def _forward(s: Set, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits `[1, vocabulary]`, everything in this dtype."""
    rotation = s["table"][keys - 1].to(dtype)
    cos, sin = rotation[: _SIZE // 2], rotation[_SIZE // 2 :]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

    def weight(name: str) -> torch.Tensor:
        return s[name].to(dtype)

    x = s["embedding"][s["id"]].to(dtype)[None]
    for i in range(_LAYERS):
        h = F.rms_norm(x, (_HIDDEN,), weight(f"{i}.attention_norm"), _EPS)
        heads = (h @ weight(f"{i}.qkv").T).view(-1, _SIZE)
        q, k, v = heads.split([_HEADS, _KV_HEADS, _KV_HEADS])
        k_history, v_history = s["cache"][i][:, s["pages"][:-1]].to(dtype)
        k, v = torch.cat([k_history, rotate(k)[None]]), torch.cat([v_history, v[None]])
        q, k, v = rotate(q)[None, :, None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]
        attended = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + attended.reshape(1, -1) @ weight(f"{i}.attention_out").T
        h = F.rms_norm(x, (_HIDDEN,), weight(f"{i}.mlp_norm"), _EPS)
        gate, up = (h @ weight(f"{i}.gate_up").T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ weight(f"{i}.down").T
    return F.rms_norm(x, (_HIDDEN,), weight("norm"), _EPS) @ weight("embedding").T
