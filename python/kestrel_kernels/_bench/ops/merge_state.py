from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kestrel_kernels._bench.entry import Entry, Maker, Set


class MergeState(Entry):
    """Packed: out `[tokens, heads, D]`, lse `[heads, tokens]`."""

    op = "merge_state"
    pattern = r"(?P<tokens>\d+)x(?P<heads>\d+)x(?P<size>\d+)"
    function = "flash_attn.cute.merge_state_into"
    arguments = "out lse out_a lse_a out_b lse_b"
    outputs = "out lse"
    small = ("1x1x1", "3x3x7", "5x2x64", "17x4x72")

    tokens: int
    heads: int
    size: int

    def inputs(self, make: Maker) -> Set:
        states = {
            name: make.normal(self.tokens, self.heads, self.size)
            if name.startswith("out")
            else make.normal(self.heads, self.tokens, dtype="float32", scale=2.0)
            for name in ("out_a", "lse_a", "out_b", "lse_b")
        }
        return {
            **states,
            "out": make.empty(self.tokens, self.heads, self.size),
            "lse": make.empty(self.heads, self.tokens, dtype="float32"),
        }

    @property
    def bytes(self) -> int:
        return 3 * self.tokens * self.heads * (2 * self.size + 4)

    def _merged(self, s: Set, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        lse_a, lse_b = s["lse_a"].to(dtype), s["lse_b"].to(dtype)
        share = torch.sigmoid(lse_a - lse_b).t()[..., None]
        return torch.lerp(s["out_b"].to(dtype), s["out_a"].to(dtype), share), torch.logaddexp(lse_a, lse_b)

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        return self._merged(s, torch.float64)

    def eager(self, s: Set) -> Any:
        out, lse = self._merged(s, torch.float32)
        return out.to(s["out_a"].dtype), lse
