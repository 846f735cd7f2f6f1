from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kestrel_kernels._bench.entry import Entry, Maker, Peer, Set


def cos_sin_table(make: Maker, positions: int, rotated: int, base: float = 10000.0) -> torch.Tensor:
    """float32 `[positions, rotated]`: cosines, then sines."""
    half = torch.arange(0, rotated, 2, device=make.device, dtype=torch.float64)
    angles = torch.arange(positions, device=make.device, dtype=torch.float64)[:, None] * base ** (-half / rotated)
    return torch.cat([angles.cos(), angles.sin()], -1).float()


def rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """GPT-NeoX pairs of x `[tokens, heads, D]` by cos_sin `[tokens, R]`, in the dtype that the product has."""
    cos, sin = cos_sin[:, None].chunk(2, -1)
    width = cos.shape[-1]
    a, b, rest = x[..., :width], x[..., width : 2 * width], x[..., 2 * width :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest.to(cos.dtype)], -1)


class RotaryEmbedding(Entry):
    op = "rotary_embedding"
    pattern = r"(?P<tokens>\d+)x(?P<heads>\d+)x(?P<size>\d+) r(?P<rotated>\d+)"
    function = "rotary_embedding.rotary_embedding"
    arguments = "positions query key size cos_sin"
    outputs = ""
    small = ("1x1x2 r2", "3x3x10 r6", "5x4x64 r32", "17x2x64 r64")

    tokens: int
    heads: int
    size: int
    rotated: int

    def inputs(self, make: Maker) -> Set:
        table = max(1024, self.tokens)
        return {
            "positions": make.distinct(self.tokens, table),
            "query": make.normal(self.tokens, self.heads, self.size),
            "key": make.normal(self.tokens, self.heads, self.size),
            "size": self.size,
            "cos_sin": cos_sin_table(make, table, self.rotated),
        }

    @property
    def bytes(self) -> int:
        return self.tokens * (2 * 2 * 2 * self.heads * self.rotated + 4 * self.rotated + 8)

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        cos_sin = s["cos_sin"].double()[s["positions"]]
        return [rotate(s["query"].double(), cos_sin), rotate(s["key"].double(), cos_sin)]

    def results(self, s: Set, returned: Any) -> Sequence[torch.Tensor]:
        return [s["query"], s["key"]]

    def eager(self, s: Set) -> Any:
        cos_sin = s["cos_sin"][s["positions"]]
        for name in ("query", "key"):
            x = s[name][..., : self.rotated]
            x.copy_(rotate(x.float(), cos_sin))
        return s["query"], s["key"]

    def peers(self) -> Mapping[str, Peer]:
        try:
            from flashinfer.rope import apply_rope_with_cos_sin_cache_inplace
        except ImportError:
            return {}

        def flashinfer(s: Set) -> Any:
            apply_rope_with_cos_sin_cache_inplace(
                s["positions"], s["query"].flatten(1), s["key"].flatten(1), self.size, s["cos_sin"]
            )
            return s["query"], s["key"]

        return {"flashinfer": flashinfer}
