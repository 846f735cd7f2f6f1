from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from kestrel_kernels._bench.entry import Entry, Maker, Set


class Embedding(Entry):
    """Rows x width, of a table of so many rows; no row twice."""

    op = "embedding"
    pattern = r"(?P<rows>\d+)x(?P<width>\d+) of (?P<table>\d+)"
    function = "embedding.embedding_into"
    arguments = "out table ids"
    small = ("1x1 of 1", "3x7 of 5", "5x64 of 16", "17x1000 of 20")

    rows: int
    width: int
    table: int

    def inputs(self, make: Maker) -> Set:
        return {
            "table": make.normal(self.table, self.width),
            "ids": make.distinct(self.rows, self.table),
            "out": make.empty(self.rows, self.width),
        }

    @property
    def bytes(self) -> int:
        return self.rows * (2 * 2 * self.width + 8)

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        return [s["table"].double()[s["ids"]]]

    def eager(self, s: Set) -> Any:
        return F.embedding(s["ids"], s["table"])
