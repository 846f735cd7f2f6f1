from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from kestrel_kernels._bench.entry import Entry, Maker, Peer, Set


class Rmsnorm(Entry):
    op = "rmsnorm"
    pattern = r"(?P<rows>\d+)x(?P<width>\d+)"
    function = "norm.rmsnorm_into"
    arguments = "out x weight eps"
    small = ("1x1", "3x7", "5x64", "2x1152", "9x2048", "3x5000")
    host_case = "1x2048"

    rows: int
    width: int

    def inputs(self, make: Maker) -> Set:
        return {
            "x": make.normal(self.rows, self.width, scale=2.0),
            "weight": make.normal(self.width, shift=1.0),
            "eps": 1e-6,
            "out": make.empty(self.rows, self.width),
        }

    @property
    def bytes(self) -> int:
        return 2 * self.width * (2 * self.rows + 1)

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        return [F.rms_norm(s["x"].double(), (self.width,), s["weight"].double(), s["eps"])]

    def eager(self, s: Set) -> Any:
        return F.rms_norm(s["x"], (self.width,), s["weight"], s["eps"])

    def single_torch_op(self, s: Set) -> Any:
        return self.eager(s)

    def peers(self) -> Mapping[str, Peer]:
        try:
            import flashinfer
        except ImportError:
            return {}
        return {"flashinfer": lambda s: flashinfer.norm.rmsnorm(s["x"], s["weight"], s["eps"], out=s["out"])}


class RmsnormResidual(Rmsnorm):
    """residual += x, then the norm of that."""

    op = "rmsnorm_residual"
    arguments = "out x weight eps residual"
    host_case = ""

    def inputs(self, make: Maker) -> Set:
        return {**super().inputs(make), "residual": make.normal(self.rows, self.width)}

    @property
    def bytes(self) -> int:
        return 2 * self.width * (4 * self.rows + 1)

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        # The sum is stored, so the norm is that of the rounded sum.
        total = (s["residual"].double() + s["x"].double()).to(s["x"].dtype).double()
        return [F.rms_norm(total, (self.width,), s["weight"].double(), s["eps"]), total]

    def results(self, s: Set, returned: Any) -> Sequence[torch.Tensor]:
        return [s["out"], s["residual"]]

    def steady(self, s: Set) -> None:
        s["x"].mul_(0.01)

    def eager(self, s: Set) -> Any:
        residual = s["residual"].add_(s["x"])
        return F.rms_norm(residual, (self.width,), s["weight"], s["eps"]), residual

    def peers(self) -> Mapping[str, Peer]:
        try:
            import flashinfer
        except ImportError:
            return {}

        def fused_add(s: Set) -> None:  # writes the norm over x
            flashinfer.norm.fused_add_rmsnorm(s["x"], s["residual"], s["weight"], s["eps"])

        return {"flashinfer": fused_add}
