from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from kestrel_kernels._bench.entry import Entry, Maker, Set


class Linear(Entry):
    """Rows, outputs, inputs of the layer."""

    op = "linear"
    pattern = r"(?P<rows>\d+)x(?P<features>\d+)x(?P<width>\d+)"
    function = "fused_linear_residual_ops.linear_into"
    arguments = "out x w"
    products = "bf16"
    small = ("1x1x1", "3x5x7", "1x64x96", "17x130x72")

    rows: int
    features: int
    width: int

    def inputs(self, make: Maker) -> Set:
        return {
            "x": make.normal(self.rows, self.width),
            "w": make.normal(self.features, self.width, scale=self.width**-0.5),
            "out": make.empty(self.rows, self.features),
        }

    @property
    def bytes(self) -> int:
        return 2 * (self.rows * self.width + self.features * self.width + self.rows * self.features)

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.features * self.width

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        return [F.linear(s["x"].double(), s["w"].double())]

    def eager(self, s: Set) -> Any:
        return F.linear(s["x"], s["w"])


class FusedLinearResidual(Linear):
    op = "fused_linear_residual"
    function = "fused_linear_residual_ops.fused_linear_bias_residual_into"
    arguments = "x w b residual out"

    def inputs(self, make: Maker) -> Set:
        return {
            **super().inputs(make),
            "b": make.normal(self.features),
            "residual": make.normal(self.rows, self.features),
        }

    @property
    def bytes(self) -> int:
        return super().bytes + 2 * self.features * (self.rows + 1)

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        return [F.linear(s["x"].double(), s["w"].double(), s["b"].double()) + s["residual"].double()]

    def eager(self, s: Set) -> Any:
        return F.linear(s["x"], s["w"], s["b"]) + s["residual"]
