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


class TopkRouter(Entry):
    """Without groups the softmax router, renormalized; with groups ("g8/4": 4 of 8) DeepSeek-V3's."""

    op = "topk_router"
    pattern = r"(?P<rows>\d+)x(?P<experts>\d+) k(?P<k>\d+)( g(?P<groups>\d+)/(?P<chosen>\d+))?"
    function = "topk.topk_router"
    arguments = "scores k scoring bias renormalize num_groups topk_groups scale"
    outputs = ""  # it allocates them
    small = ("1x1 k1", "3x10 k3", "17x64 k8", "5x256 k8 g8/4", "2x300 k100 g3/2")

    rows: int
    experts: int
    k: int
    groups: int | None
    chosen: int | None

    def inputs(self, make: Maker) -> Set:
        return {
            "scores": make.normal(self.rows, self.experts),
            "k": self.k,
            "scoring": "sigmoid" if self.groups else "softmax",
            "bias": make.normal(self.experts, dtype="float32", scale=0.1) if self.groups else None,
            "renormalize": True,
            "num_groups": self.groups or 1,
            "topk_groups": self.chosen or 1,
            "scale": 2.5 if self.groups else 1.0,
        }

    @property
    def bytes(self) -> int:
        return self.rows * (2 * self.experts + (4 + 4) * self.k) + (4 * self.experts if self.groups else 0)

    def _scored(self, s: Set, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight of each expert, and what it is chosen by."""
        scores = s["scores"].to(dtype)
        weights = scores.sigmoid() if self.groups else scores.softmax(-1)
        return weights, weights if s["bias"] is None else weights + s["bias"]

    def _routed(self, s: Set, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        weights, merits = self._scored(s, dtype)
        if self.groups and self.chosen:
            grouped = merits.unflatten(-1, (self.groups, -1))
            best = grouped.topk(2).values.sum(-1).topk(self.chosen).indices
            seen = torch.zeros_like(grouped[..., 0]).scatter(-1, best, 1).bool()
            merits = grouped.masked_fill(~seen[..., None], float("-inf")).flatten(-2)
        merits, ids = merits.topk(self.k)
        weights = weights.gather(-1, ids)
        return weights / weights.sum(-1, keepdim=True) * s["scale"], merits

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        return self._routed(s, torch.float64)

    def results(self, s: Set, returned: Any) -> Sequence[torch.Tensor]:
        weights, ids = returned
        return [weights, self._scored(s, torch.float64)[1].gather(-1, ids.long())]

    def eager(self, s: Set) -> Any:
        return self._routed(s, torch.float32)


class SampleTopK(Entry):
    """So cold that the best logit wins every draw: checked by the logit drawn, as fast as at any temperature."""

    op = "sample_top_k"
    pattern = r"(?P<rows>\d+)x(?P<width>\d+) k(?P<k>\d+)"
    function = "topk.sample_top_k_into"
    arguments = "ids logits k temperature seed offset"
    outputs = "ids"
    small = ("1x1 k1", "3x10 k3", "17x64 k40", "2x1000 k128")

    rows: int
    width: int
    k: int

    def inputs(self, make: Maker) -> Set:
        return {
            "logits": make.normal(self.rows, self.width),
            "k": self.k,
            "temperature": 1e-4,
            "seed": torch.full((1,), 7, device=make.device),
            "offset": torch.full((1,), 0, device=make.device),
            "ids": make.empty(self.rows, dtype="int32"),
        }

    @property
    def bytes(self) -> int:
        return self.rows * (2 * self.width + 4) + 16

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        self._logits = s["logits"]
        return [s["logits"].double().amax(-1)]

    def results(self, s: Set, returned: Any) -> Sequence[torch.Tensor]:
        return [s["logits"].gather(-1, s["ids"].long()[:, None])[:, 0]]

    def peer_results(self, returned: Any) -> Sequence[torch.Tensor]:
        return [self._logits.gather(-1, returned)[:, 0]]

    def eager(self, s: Set) -> Any:
        values, ids = s["logits"].topk(self.k)
        chances = (values.float() / s["temperature"]).softmax(-1)
        # The race that torch.multinomial runs, without its check, which synchronizes and cannot be captured.
        drawn = (chances / torch.empty_like(chances).exponential_()).argmax(-1, keepdim=True)
        return ids.gather(-1, drawn)
