from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

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
        return [torch.nn.functional.gelu(a) * (b + 1)]

    def eager(self, s: Set) -> Any:
        a, b = s["x"].chunk(2, -1)
        return torch.nn.functional.gelu(a) * (b + 1)

    def single_torch_op(self, s: Set) -> Any:
        return torch.nn.functional.gelu(s["x"])

    def peers(self) -> Mapping[str, Peer]:
        def flashinfer_gate(s: Set) -> None:  # the same bytes; its gate is gelu(a) * b
            flashinfer.gelu_and_mul(s["x"], out=s["out"])

        try:
            import flashinfer
        except ImportError:
            return {}
        return {"flashinfer gelu_and_mul": flashinfer_gate}
