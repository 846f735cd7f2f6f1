from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kestrel_kernels._bench.entry import Entry, Maker, Set


class MoeSum(Entry):
    op = "moe_sum"
    pattern = r"(?P<tokens>\d+)x(?P<slots>\d+)x(?P<width>\d+)"
    function = "moe_sum.moe_sum"
    arguments = "x out"
    small = ("1x1x1", "3x8x7", "5x8x64", "2x3x1000")

    tokens: int
    slots: int
    width: int

    def inputs(self, make: Maker) -> Set:
        return {"x": make.normal(self.tokens, self.slots, self.width), "out": make.empty(self.tokens, self.width)}

    @property
    def bytes(self) -> int:
        return 2 * self.tokens * (self.slots + 1) * self.width

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        return [s["x"].double().sum(1)]

    def eager(self, s: Set) -> Any:
        return torch.sum(s["x"], 1)
