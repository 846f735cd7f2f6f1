from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kestrel_kernels._bench.entry import Entry, Maker, Set


class Topk(Entry):
    op = "topk"
    pattern = r"(?P<rows>\d+)x(?P<width>\d+) k(?P<k>\d+) softmax"
    function = "topk.topk_fwd"
    arguments = "scores k softmax"
    outputs = ""  # it allocates them
    small = ("1x1 k1 softmax", "3x10 k3 softmax", "17x64 k8 softmax", "2x1000 k128 softmax")

    rows: int
    width: int
    k: int

    def inputs(self, make: Maker) -> Set:
        return {"scores": make.normal(self.rows, self.width), "k": self.k, "softmax": True}

    @property
    def bytes(self) -> int:
        return self.rows * (2 * self.width + (2 + 4) * self.k)

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        chosen = s["scores"].double().topk(self.k).values
        return [chosen.softmax(-1), chosen]

    def results(self, s: Set, returned: Any) -> Sequence[torch.Tensor]:
        values, ids = returned
        return [values, s["scores"].gather(-1, ids.long())]

    def eager(self, s: Set) -> Any:
        values, _ = s["scores"].topk(self.k)
        return values.float().softmax(-1).to(values.dtype), values
