from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kestrel_kernels._bench.entry import Entry, Maker, Set
from kestrel_kernels._bench.ops.kv_cache_write import to_e4m3_bits


class Fp8QuantRow(Entry):
    op = "fp8_quant_row"
    pattern = r"(?P<rows>\d+)x(?P<width>\d+)"
    function = "fp8_quant.fp8_e4m3fn_rowwise_quant_cuda"
    arguments = "bits scale x"
    outputs = "bits scale"
    tolerance = 3e-2  # three bits of mantissa: 2.6e-2 by rounding alone
    small = ("1x1", "3x7", "5x64", "2x1000")

    rows: int
    width: int
    scales = property(lambda self: self.rows)

    def inputs(self, make: Maker) -> Set:
        return {
            "x": make.normal(self.rows, self.width),
            "bits": make.empty(self.rows, self.width, dtype="uint8"),
            "scale": make.empty(self.scales, dtype="float32"),
        }

    @property
    def bytes(self) -> int:
        return 3 * self.rows * self.width + 4 * self.scales

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        return [s["x"].double()]

    def results(self, s: Set, returned: Any) -> Sequence[torch.Tensor]:
        return [s["bits"].view(torch.float8_e4m3fn).double() * s["scale"].double()[:, None]]

    def eager(self, s: Set) -> Any:
        absmax = s["x"].abs().amax(-1).float() if self.scales > 1 else s["x"].abs().amax().float()[None]
        scale = (absmax / 448).clamp(min=1e-6)
        s["bits"].copy_(to_e4m3_bits(s["x"], (1 / scale)[:, None]))
        s["scale"].copy_(scale)


class Fp8QuantTensor(Fp8QuantRow):
    op = "fp8_quant_tensor"
    function = "fp8_quant.fp8_e4m3fn_tensor_quant_cuda"
    scales = property(lambda self: 1)


class Fp8QuantStatic(Fp8QuantRow):
    op = "fp8_quant_static"
    function = "fp8_quant.fp8_e4m3fn_static_quant_cuda"
    outputs = "bits"
    scales = property(lambda self: 1)

    def inputs(self, make: Maker) -> Set:
        return {**super().inputs(make), "scale": torch.full((1,), 0.02, device=make.device)}

    def eager(self, s: Set) -> Any:
        s["bits"].copy_(to_e4m3_bits(s["x"], 1 / s["scale"]))
