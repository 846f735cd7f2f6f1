from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kestrel_kernels._bench.entry import Entry, Maker, Set


class TauTail(Entry):
    """Heads of 64; packed q, k, v of one sequence."""

    op = "tau_tail"
    pattern = r"(?P<tokens>\d+)x(?P<width>\d+)"
    function = "tau_tail_ops.tau_tail_apply_into"
    arguments = "qkv tok tau positions"
    outputs = ""
    tolerance = 4e-3  # the factor multiplies in place: no rounding but the last, in two of three parts
    small = ("1x192", "3x384", "17x576")

    tokens: int
    width: int

    @property
    def heads(self) -> int:
        return self.width // (3 * 64)

    def inputs(self, make: Maker) -> Set:
        table = max(1024, self.tokens)
        return {
            "qkv": make.normal(1, self.tokens, self.width),
            "tok": make.normal(1, self.tokens, 2 * self.heads),
            "tau": make.normal(table, self.heads, shift=1.0),
            "positions": make.distinct(self.tokens, table)[None],
        }

    @property
    def bytes(self) -> int:
        return self.tokens * (2 * 2 * 2 * self.width // 3 + 2 * 3 * self.heads + 8)

    def _scaled(self, s: Set, qkv: torch.Tensor, tok: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.unflatten(-1, (3, self.heads, 64)).unbind(-3)
        tok_q, tok_v = torch.tanh(tok).chunk(2, -1)
        tau = tau[s["positions"]]
        return torch.stack([q * (tok_q + tau)[..., None], k, v * (tok_v + tau)[..., None]], -3).flatten(-3)

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        return [self._scaled(s, s["qkv"].double(), s["tok"].double(), s["tau"].double())]

    def results(self, s: Set, returned: Any) -> Sequence[torch.Tensor]:
        return [s["qkv"]]

    def steady(self, s: Set) -> None:
        s["tok"].zero_()
        s["tau"].fill_(1)

    def eager(self, s: Set) -> Any:
        q, _, v = s["qkv"].unflatten(-1, (3, self.heads, 64)).unbind(-3)
        tok_q, tok_v = torch.tanh(s["tok"].float()).chunk(2, -1)
        tau = s["tau"][s["positions"]].float()
        q.copy_(q * (tok_q + tau)[..., None])
        v.copy_(v * (tok_v + tau)[..., None])
        return s["qkv"]
