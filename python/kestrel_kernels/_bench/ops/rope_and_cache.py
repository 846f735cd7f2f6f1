from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kestrel_kernels._bench.entry import Entry, Maker, Set
from kestrel_kernels._bench.ops.kv_cache_write import filled, to_e4m3_bits
from kestrel_kernels._bench.ops.rotary_embedding import cos_sin_table, rotate


class RopeAndCache(Entry):
    """Half of each head is rotated; a cache in random order, in e4m3 or as the tokens; with tau where the case says."""

    op = "rope_and_cache"
    pattern = r"(?P<tokens>\d+)x(?P<heads>\d+)x(?P<size>\d+) (?P<dtype>fp8|bf16) page1( (?P<tau>tau))?"
    function = "kv_cache_write.rope_and_cache"
    arguments = (
        "positions q k v cos_sin k_cache v_cache slots kv_cache_dtype k_scale v_scale tok_qv_lin= tau_pos_table="
    )
    outputs = "k_cache v_cache"
    tolerance = 3e-2  # the cache's three bits of mantissa
    small = (
        "1x1x4 fp8 page1",
        "3x3x12 fp8 page1",
        "5x2x64 fp8 page1",
        "5x2x64 bf16 page1",
        "3x3x12 bf16 page1 tau",
        "5x2x64 fp8 page1 tau",
    )

    tokens: int
    heads: int
    size: int
    dtype: str
    tau: str | None

    def inputs(self, make: Maker) -> Set:
        dtype = "float8_e4m3fn" if self.dtype == "fp8" else "bfloat16"
        table, pages = max(1024, self.tokens), max(16, 2 * self.tokens)
        return {
            "positions": make.distinct(self.tokens, table),
            **{name: make.normal(self.tokens, self.heads, self.size) for name in "qkv"},
            "cos_sin": cos_sin_table(make, table, self.size // 2),
            "k_cache": make.empty(pages, 1, self.heads, self.size, dtype=dtype),
            "v_cache": make.empty(pages, 1, self.heads, self.size, dtype=dtype),
            "slots": make.distinct(self.tokens, pages),
            "kv_cache_dtype": "fp8" if self.dtype == "fp8" else "auto",
            "k_scale": torch.full((1,), 0.25, device=make.device),
            "v_scale": torch.full((1,), 0.5, device=make.device),
            "tok_qv_lin": make.normal(self.tokens, 2 * self.heads) if self.tau else None,
            "tau_pos_table": make.normal(table, self.heads, shift=1.0) if self.tau else None,
        }

    @property
    def bytes(self) -> int:
        per_token = self.heads * self.size
        q = 2 * 2 * (per_token if self.tau else per_token // 2)
        k_and_v = 2 * (2 + (1 if self.dtype == "fp8" else 2)) * per_token
        tau = 2 * 3 * self.heads if self.tau else 0
        return self.tokens * (q + k_and_v + tau + 4 * self.size // 2 + 8 + 8)

    def _scaled(self, s: Set, dtype: torch.dtype) -> list[torch.Tensor]:
        """q, k and v, with tau on q and v."""
        q, k, v = (s[name].to(dtype) for name in "qkv")
        if not self.tau:
            return [q, k, v]
        of_q, of_v = torch.tanh(s["tok_qv_lin"].to(dtype)).chunk(2, -1)
        tau = s["tau_pos_table"][s["positions"]].to(dtype)
        return [q * (of_q + tau)[..., None], k, v * (of_v + tau)[..., None]]

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        cos_sin = s["cos_sin"].double()[s["positions"]]
        q, k, v = self._scaled(s, torch.float64)
        scales = [s[name].double() if self.dtype == "fp8" else 1 for name in ("k_scale", "v_scale")]
        return [rotate(q, cos_sin), rotate(k, cos_sin) / scales[0], v / scales[1]]

    def results(self, s: Set, returned: Any) -> Sequence[torch.Tensor]:
        return [s["q"], filled(s["k_cache"], s["slots"]), filled(s["v_cache"], s["slots"])]

    def steady(self, s: Set) -> None:
        if self.tau:
            s["tok_qv_lin"].zero_()
            s["tau_pos_table"].fill_(1)

    def eager(self, s: Set) -> Any:
        cos_sin = s["cos_sin"][s["positions"]]
        q, k, v = self._scaled(s, torch.float32)
        s["q"].copy_(rotate(q, cos_sin))
        for name, x in (("k", rotate(k, cos_sin)), ("v", v)):
            cache = s[f"{name}_cache"][:, 0]
            if self.dtype == "fp8":
                cache.view(torch.uint8)[s["slots"]] = to_e4m3_bits(x, 1 / s[f"{name}_scale"])
            else:
                cache[s["slots"]] = x.to(cache.dtype)
