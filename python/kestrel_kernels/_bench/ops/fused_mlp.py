from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from kestrel_kernels._bench.entry import Entry, Maker, Peer, Set


class FusedMlp(Entry):
    op = "fused_mlp"
    pattern = r"(?P<rows>\d+)x(?P<width>\d+)x(?P<inner>\d+)"
    function = "fused_mlp.fused_mlp_gelu_bias_residual_cuda"
    arguments = "out hidden x w1 b1 w2 b2 residual"
    outputs = "out hidden"
    products = "bf16"
    bare = ("cublas",)
    small = ("1x1x1", "3x5x7", "17x72x130")

    rows: int
    width: int
    inner: int

    def inputs(self, make: Maker) -> Set:
        return {
            "x": make.normal(self.rows, self.width),
            "w1": make.normal(self.inner, self.width, scale=self.width**-0.5),
            "b1": make.normal(self.inner),
            "w2": make.normal(self.width, self.inner, scale=self.inner**-0.5),
            "b2": make.normal(self.width),
            "residual": make.normal(self.rows, self.width),
            "hidden": make.empty(self.rows, self.inner),
            "out": make.empty(self.rows, self.width),
        }

    @property
    def bytes(self) -> int:
        return 2 * (3 * self.rows * self.width + 2 * self.width * self.inner + self.width + self.inner)

    @property
    def operations(self) -> int:
        return 4 * self.rows * self.width * self.inner

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        d = {name: s[name].double() for name in ("x", "w1", "b1", "w2", "b2", "residual")}
        hidden = F.gelu(F.linear(d["x"], d["w1"], d["b1"]), approximate="tanh")
        return [d["residual"] + F.linear(hidden, d["w2"], d["b2"])]

    def results(self, s: Set, returned: Any) -> Sequence[torch.Tensor]:
        return [s["out"]]

    def eager(self, s: Set) -> Any:
        hidden = F.gelu(F.linear(s["x"], s["w1"], s["b1"]), approximate="tanh")
        return s["residual"] + F.linear(hidden, s["w2"], s["b2"])

    def peers(self) -> Mapping[str, Peer]:
        def products(s: Set) -> Any:
            torch.mm(s["x"], s["w1"].t(), out=s["hidden"])
            return torch.mm(s["hidden"], s["w2"].t(), out=s["out"])

        return {"cublas": products} if torch.cuda.is_available() else {}
