from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from kestrel_kernels._bench.entry import Entry, Maker, Peer, Set


class Linear(Entry):
    """Rows, outputs, inputs of the layer."""

    op = "linear"
    pattern = r"(?P<rows>\d+)x(?P<features>\d+)x(?P<width>\d+)"
    function = "fused_linear_residual_ops.linear_into"
    arguments = "out x w"
    products = "bf16"
    resident: ClassVar[tuple[str, ...]] = ("x",)  # few rows: only the weights go round
    small: ClassVar[tuple[str, ...]] = ("1x1x1", "3x5x7", "1x64x96", "17x130x72")

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

    def peers(self) -> Mapping[str, Peer]:
        """The product alone, which is the whole of this op but not of those below."""
        if not torch.cuda.is_available():
            return {}
        return {"cublas": lambda s: torch.mm(s["x"], s["w"].t(), out=s["out"])}


class FusedLinearResidual(Linear):
    op = "fused_linear_residual"
    resident: ClassVar[tuple[str, ...]] = ()
    function = "fused_linear_residual_ops.fused_linear_bias_residual_into"
    arguments = "x w b residual out"
    bare = ("cublas",)

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


# Of a product in two halves, or of the whole: the formula of each activation.
_GATES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "gelu_residual": lambda a, b: F.gelu(a) * (b + 1),
    "silu_and_mul": lambda a, b: F.silu(a) * b,
    "gelu_and_mul": lambda a, b: F.gelu(a) * b,
    "gelu_tanh_and_mul": lambda a, b: F.gelu(a, approximate="tanh") * b,
}
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
    "silu": F.silu,
}


class LinearActivation(FusedLinearResidual):
    """With bias, an activation or gate by name, and residual."""

    op = "linear_activation"
    pattern = Linear.pattern + r" (?P<activation>\w+)"
    function = "fused_linear_residual_ops.linear_into"
    arguments = "out x w b residual activation"
    small = (
        "1x1x1 gelu", "3x5x7 silu", "5x64x96 gelu_tanh",
        "1x1x1 silu_and_mul", "3x5x7 gelu_residual", "5x64x96 gelu_and_mul", "17x72x24 gelu_tanh_and_mul",
    )  # fmt: skip

    activation: str

    @property
    def _halves(self) -> int:
        return 2 if self.activation in _GATES else 1

    def inputs(self, make: Maker) -> Set:
        return {
            **super().inputs(make),
            "w": make.normal(self._halves * self.features, self.width, scale=self.width**-0.5),
            "b": make.normal(self._halves * self.features),
            "activation": self.activation,
        }

    @property
    def bytes(self) -> int:
        return super().bytes + 2 * (self._halves - 1) * self.features * (self.width + 1)

    @property
    def operations(self) -> int:
        return super().operations * self._halves

    def _layer(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        product = F.linear(x, w, b)
        if self.activation in _GATES:
            return _GATES[self.activation](*product.chunk(2, -1)) + residual
        return _ACTIVATIONS[self.activation](product) + residual

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        return [self._layer(*(s[name].double() for name in ("x", "w", "b", "residual")))]

    def eager(self, s: Set) -> Any:
        return self._layer(*(s[name] for name in ("x", "w", "b", "residual")))

    def peers(self) -> Mapping[str, Peer]:
        return {}
