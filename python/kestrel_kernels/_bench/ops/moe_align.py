from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from kestrel_kernels._bench.entry import Entry, Maker, Set

BLOCK = 64


class MoeAlign(Entry):
    """Experts drawn uniformly without replacement; blocks of 64."""

    op = "moe_align"
    pattern = r"(?P<tokens>\d+) E(?P<experts>\d+) k(?P<slots>\d+)"
    function = "moe_align.moe_align_block_size"
    arguments = "topk_ids num_experts block_size sorted_token_ids expert_ids num_tokens_post_pad"
    outputs = "sorted_token_ids expert_ids num_tokens_post_pad"
    tolerance = 1e-12  # integers
    small: ClassVar[tuple[str, ...]] = (
        "1 E1 k1", "3 E10 k3", "40 E64 k8", "50 E100 k6", "140 E30 k8", "200 E600 k6", "1100 E70 k8", "3 E1024 k8",
    )  # fmt: skip

    tokens: int
    experts: int
    slots: int

    def inputs(self, make: Maker) -> Set:
        ids = make.normal(self.tokens, self.experts, dtype="float32").argsort(-1)[:, : self.slots]
        count = ids.numel()
        places = count + min(count, self.experts) * (BLOCK - 1)
        return {
            "topk_ids": ids.int().contiguous(),
            "num_experts": self.experts,
            "block_size": BLOCK,
            "sorted_token_ids": make.empty(places, dtype="int32"),
            "expert_ids": make.empty(places // BLOCK, dtype="int32"),
            "num_tokens_post_pad": make.empty(1, dtype="int32"),
        }

    @property
    def bytes(self) -> int:
        count = self.tokens * self.slots
        places = count + min(count, self.experts) * (BLOCK - 1)
        return 4 * (count + places + places // BLOCK + 1)

    def _ids(self, s: Set) -> list[torch.Tensor]:
        """For each list of the answer, the ids that count in it; the others are out of range."""
        return [s["topk_ids"].flatten()]

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        length, blocks = s["sorted_token_ids"].shape[-1], s["expert_ids"].shape[-1]
        lists: list[list[int]] = []
        for ids in (x.tolist() for x in self._ids(s)):
            order: list[int] = []
            experts: list[int] = []
            for expert in range(self.experts):
                group = [i for i, e in enumerate(ids) if e == expert]
                padding = -len(group) % BLOCK
                order += group + [len(ids)] * padding
                experts += [expert] * ((len(group) + padding) // BLOCK)
            total = len(order)
            order += [len(ids)] * (length - total)
            lists.append(order + experts + [0] * (blocks - len(experts)) + [total])
        return torch.tensor(lists, device=s["topk_ids"].device).split([length, blocks, 1], dim=1)

    def results(self, s: Set, returned: Any) -> Sequence[torch.Tensor]:
        return [s[name].view(len(self._ids(s)), -1) for name in self.outputs.split()]

    def peer_results(self, returned: Any) -> Sequence[torch.Tensor]:
        return [torch.stack(lists) for lists in zip(*returned, strict=True)]

    def eager(self, s: Set) -> Any:
        return [self._aligned(s, ids) for ids in self._ids(s)]

    def _aligned(self, s: Set, ids: torch.Tensor) -> list[torch.Tensor]:
        length = s["sorted_token_ids"].shape[-1]
        counts = torch.zeros(self.experts + 1, dtype=torch.int64, device=ids.device)
        counts = counts.scatter_add(0, ids.long(), torch.ones_like(ids, dtype=torch.int64))
        blocks = (counts[:-1] + BLOCK - 1) // BLOCK
        ends = blocks.cumsum(0)
        sorted_ids, order = ids.sort(stable=True)
        before = (ends - blocks) * BLOCK - (counts.cumsum(0)[:-1] - counts[:-1])
        places = torch.nn.functional.pad(before, (0, 1), value=length)[sorted_ids.long()]
        places = (places + torch.arange(ids.numel(), device=ids.device)).clamp(max=length)
        out = torch.full((length + 1,), ids.numel(), dtype=torch.int32, device=ids.device)
        block = torch.arange(s["expert_ids"].shape[-1], device=ids.device)
        experts = torch.searchsorted(ends, block, right=True)
        return [
            out.scatter(0, places, order.int())[:length],
            experts.masked_fill(block >= ends[-1], 0).int(),
            (ends[-1:] * BLOCK).int(),
        ]


class MoeLoraAlign(MoeAlign):
    """Tokens to LoRAs in turn, every last one to none."""

    op = "moe_lora_align"
    pattern = MoeAlign.pattern + r" l(?P<loras>\d+)"
    function = "moe_align.moe_lora_align_block_size"
    arguments = "topk_ids token_lora_mapping num_experts block_size sorted_token_ids expert_ids num_tokens_post_pad"
    small = ("1 E1 k1 l1", "50 E70 k6 l3", "130 E70 k8 l2", "1100 E8 k8 l2")

    loras: int

    def inputs(self, make: Maker) -> Set:
        s = super().inputs(make)
        mapping = torch.arange(self.tokens, dtype=torch.int32, device=make.device) % (self.loras + 1)
        s["token_lora_mapping"] = mapping.masked_fill(mapping == self.loras, -1)
        for name in self.outputs.split():
            s[name] = s[name].repeat(self.loras, 1)
        s["num_tokens_post_pad"] = s["num_tokens_post_pad"].flatten()
        return s

    @property
    def bytes(self) -> int:
        count = self.tokens * self.slots
        return self.loras * (super().bytes - 4 * count) + 4 * count + 4 * self.tokens

    def _ids(self, s: Set) -> list[torch.Tensor]:
        ids, mapping = s["topk_ids"], s["token_lora_mapping"][:, None]
        return [ids.where(mapping == lora, self.experts).flatten() for lora in range(self.loras)]
