from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from kestrel_kernels._bench.entry import Entry, Maker, Peer, Set


class GeluResidual(Entry):
    op = "gelu_residual"
    pattern = r"(?P<rows>\d+)x(?P<width>\d+)"
    function = "activation.gelu_residual_cuda"
    arguments = "out x"
    small = ("1x1", "3x7", "5x64", "2x1000", "33x130")
    host_case = "1x1024"

    rows: int
    width: int

    def inputs(self, make: Maker) -> Set:
        return {"x": make.normal(self.rows, 2 * self.width), "out": make.empty(self.rows, self.width)}

    @property
    def bytes(self) -> int:
        return 2 * self.rows * 3 * self.width

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        a, b = s["x"].double().chunk(2, -1)
        return [F.gelu(a) * (b + 1)]

    def eager(self, s: Set) -> Any:
        a, b = s["x"].chunk(2, -1)
        return F.gelu(a) * (b + 1)

    def single_torch_op(self, s: Set) -> Any:
        return F.gelu(s["x"])

    def peers(self) -> Mapping[str, Peer]:
        def flashinfer_gate(s: Set) -> None:  # the same bytes; its gate is gelu(a) * b
            flashinfer.gelu_and_mul(s["x"], out=s["out"])

        try:
            import flashinfer
        except ImportError:
            return {}
        return {"flashinfer gelu_and_mul": flashinfer_gate}


class SiluAndMul(GeluResidual):
    op = "silu_and_mul"
    function = "activation.silu_and_mul_into"
    host_case = ""

    def _gate(self, a: torch.Tensor) -> torch.Tensor:
        return F.silu(a)

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        a, b = s["x"].double().chunk(2, -1)
        return [self._gate(a) * b]

    def eager(self, s: Set) -> Any:
        a, b = s["x"].chunk(2, -1)
        return self._gate(a) * b

    def peers(self) -> Mapping[str, Peer]:
        try:
            import flashinfer
        except ImportError:
            return {}
        function = getattr(flashinfer, self.op)
        return {"flashinfer": lambda s: function(s["x"], out=s["out"])}


class GeluAndMul(SiluAndMul):
    op = "gelu_and_mul"
    function = "activation.gelu_and_mul_into"

    def _gate(self, a: torch.Tensor) -> torch.Tensor:
        return F.gelu(a)


class GeluTanhAndMul(SiluAndMul):
    op = "gelu_tanh_and_mul"
    function = "activation.gelu_tanh_and_mul_into"

    def _gate(self, a: torch.Tensor) -> torch.Tensor:
        return F.gelu(a, approximate="tanh")
