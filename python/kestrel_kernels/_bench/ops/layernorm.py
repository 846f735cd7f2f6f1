from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from kestrel_kernels._bench.entry import Entry, Maker, Set


class Layernorm(Entry):
    op = "layernorm"
    pattern = r"(?P<rows>\d+)x(?P<width>\d+)"
    function = "layernorm_cuda.layernorm_bias_cuda"
    arguments = "out x weight bias eps"
    small = ("1x1", "3x7", "5x64", "2x1152", "9x2048", "3x5000")
    host_case = "1x2048"

    rows: int
    width: int

    def inputs(self, make: Maker) -> Set:
        return {
            "x": make.normal(self.rows, self.width, scale=2.0, shift=0.5),
            "weight": make.normal(self.width, shift=1.0),
            "bias": make.normal(self.width),
            "eps": 1e-5,
            "out": make.empty(self.rows, self.width),
        }

    @property
    def bytes(self) -> int:
        return 2 * self.width * (2 * self.rows + 2)

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        return [F.layer_norm(s["x"].double(), (self.width,), s["weight"].double(), s["bias"].double(), s["eps"])]

    def eager(self, s: Set) -> Any:
        return F.layer_norm(s["x"], (self.width,), s["weight"], s["bias"], s["eps"])

    def single_torch_op(self, s: Set) -> Any:
        return self.eager(s)


class LayernormReload(Layernorm):
    """Reads x again for its last pass, out of a cache: the same bytes from memory."""

    op = "layernorm_reload"
    function = "layernorm_cuda.layernorm_bias_reload_cuda"
    host_case = ""
