from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kestrel_kernels._bench.entry import Entry, Maker, Peer, Set


def to_e4m3_bits(x: torch.Tensor, reciprocal: torch.Tensor) -> torch.Tensor:
    return (x.float() * reciprocal).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


def filled(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The values at these slots of a cache of page size 1, `[T, H, D]` in float32."""
    if cache.dtype != torch.float8_e4m3fn:
        return cache[slots, 0].float()
    return cache[:, 0].view(torch.uint8)[slots].view(torch.float8_e4m3fn).float()


class KvCacheWrite(Entry):
    """A cache, in e4m3 or as the tokens, twice as large as what is written, in random order."""

    op = "kv_cache_write"
    pattern = r"(?P<tokens>\d+)x(?P<heads>\d+)x(?P<size>\d+) (?P<dtype>fp8|bf16) page1"
    function = "kv_cache_write.reshape_and_cache_flash"
    arguments = "key value key_cache value_cache slots kv_cache_dtype k_scale v_scale"
    outputs = "key_cache value_cache"
    tolerance = 3e-2  # three bits of mantissa: 2.6e-2 by rounding alone
    small = (
        "1x1x1 fp8 page1",
        "3x3x7 fp8 page1",
        "5x2x64 fp8 page1",
        "17x4x72 fp8 page1",
        "3x3x7 bf16 page1",
        "5x2x64 bf16 page1",
    )
    host_case = "1x32x64 fp8 page1"

    tokens: int
    heads: int
    size: int
    dtype: str

    def inputs(self, make: Maker) -> Set:
        pages = max(16, 2 * self.tokens)
        dtype = "float8_e4m3fn" if self.dtype == "fp8" else "bfloat16"
        return {
            "key": make.normal(self.tokens, self.heads, self.size),
            "value": make.normal(self.tokens, self.heads, self.size),
            "key_cache": make.empty(pages, 1, self.heads, self.size, dtype=dtype),
            "value_cache": make.empty(pages, 1, self.heads, self.size, dtype=dtype),
            "slots": make.distinct(self.tokens, pages),
            "kv_cache_dtype": "fp8" if self.dtype == "fp8" else "auto",
            "k_scale": torch.full((1,), 0.25, device=make.device),
            "v_scale": torch.full((1,), 0.5, device=make.device),
        }

    @property
    def bytes(self) -> int:
        return self.tokens * (2 * (2 + (1 if self.dtype == "fp8" else 2)) * self.heads * self.size + 8)

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        if self.dtype != "fp8":
            return [s["key"], s["value"]]
        return [s["key"].double() / s["k_scale"].double(), s["value"].double() / s["v_scale"].double()]

    def results(self, s: Set, returned: Any) -> Sequence[torch.Tensor]:
        return [filled(s["key_cache"], s["slots"]), filled(s["value_cache"], s["slots"])]

    def eager(self, s: Set) -> Any:
        for name in ("key", "value"):
            cache = s[f"{name}_cache"][:, 0]
            if self.dtype == "fp8":
                cache.view(torch.uint8)[s["slots"]] = to_e4m3_bits(s[name], 1 / s[f"{name[0]}_scale"])
            else:
                cache[s["slots"]] = s[name]

    def single_torch_op(self, s: Set) -> Any:
        return torch.add(s["key"], s["value"])

    def peers(self) -> Mapping[str, Peer]:
        if self.dtype != "fp8":
            return {}
        try:
            from vllm import _custom_ops
        except ImportError:
            return {}

        def vllm(s: Set) -> None:
            _custom_ops.reshape_and_cache_flash(
                s["key"], s["value"], s["key_cache"].view(torch.uint8), s["value_cache"].view(torch.uint8), s["slots"],
                "fp8", s["k_scale"], s["v_scale"],
            )  # fmt: skip

        return {"vllm": vllm}
