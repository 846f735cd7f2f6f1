from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kestrel_kernels._bench.entry import Entry, Maker, Set
from kestrel_kernels._bench.ops.kv_cache_write import filled, to_e4m3_bits
from kestrel_kernels._bench.ops.rotary_embedding import cos_sin_table, rotate


class RopeAndCache(Entry):
    """Half of each head is rotated; an e4m3 cache in random order."""

    op = "rope_and_cache"
    pattern = r"(?P<tokens>\d+)x(?P<heads>\d+)x(?P<size>\d+) fp8 page1"
    function = "kv_cache_write.rope_and_cache"
    arguments = "positions q k v cos_sin k_cache v_cache slots kv_cache_dtype k_scale v_scale"
    outputs = "k_cache v_cache"
    tolerance = 3e-2  # the cache's three bits of mantissa
    small = ("1x1x4 fp8 page1", "3x3x12 fp8 page1", "5x2x64 fp8 page1")

    tokens: int
    heads: int
    size: int

    def inputs(self, make: Maker) -> Set:
        table, pages = max(1024, self.tokens), max(16, 2 * self.tokens)
        return {
            "positions": make.distinct(self.tokens, table),
            **{name: make.normal(self.tokens, self.heads, self.size) for name in "qkv"},
            "cos_sin": cos_sin_table(make, table, self.size // 2),
            "k_cache": make.empty(pages, 1, self.heads, self.size, dtype="float8_e4m3fn"),
            "v_cache": make.empty(pages, 1, self.heads, self.size, dtype="float8_e4m3fn"),
            "slots": make.distinct(self.tokens, pages),
            "kv_cache_dtype": "fp8",
            "k_scale": torch.full((1,), 0.25, device=make.device),
            "v_scale": torch.full((1,), 0.5, device=make.device),
        }

    @property
    def bytes(self) -> int:
        per_token = self.heads * self.size
        q, k_and_v = 2 * 2 * per_token // 2, 2 * (2 + 1) * per_token
        return self.tokens * (q + k_and_v + 4 * self.size // 2 + 8 + 8)

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        cos_sin = s["cos_sin"].double()[s["positions"]]
        q, k = rotate(s["q"].double(), cos_sin), rotate(s["k"].double(), cos_sin)
        return [q, k / s["k_scale"].double(), s["v"].double() / s["v_scale"].double()]

    def results(self, s: Set, returned: Any) -> Sequence[torch.Tensor]:
        return [s["q"], filled(s["k_cache"], s["slots"]), filled(s["v_cache"], s["slots"])]

    def eager(self, s: Set) -> Any:
        cos_sin = s["cos_sin"][s["positions"]]
        k = rotate(s["k"].float(), cos_sin)
        s["q"].copy_(rotate(s["q"].float(), cos_sin))
        for name, x in (("k", k), ("v", s["v"])):
            s[f"{name}_cache"][:, 0].view(torch.uint8)[s["slots"]] = to_e4m3_bits(x, 1 / s[f"{name}_scale"])
