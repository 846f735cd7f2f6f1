from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from kestrel_kernels._bench.entry import Entry, Maker, Peer, Set
from kestrel_kernels.cute_moe import CuteMoeConfig, get_cute_moe_block_m

_ROUTING = "topk_weights topk_ids sorted_token_ids expert_ids num_tokens_post_pad"
_Cast = Callable[[torch.Tensor], torch.Tensor]


def align(ids: torch.Tensor, experts: int, block_m: int) -> dict[str, torch.Tensor]:
    """Assignments grouped by expert, each group padded to whole blocks."""
    flat = ids.flatten().long()
    counts = flat.bincount(minlength=experts)
    padded = (counts + block_m - 1) // block_m * block_m
    order = flat.argsort(stable=True)
    starts, first = padded.cumsum(0) - padded, counts.cumsum(0) - counts
    places = torch.arange(len(flat), device=ids.device) + (starts - first)[flat[order]]
    size = len(flat) * block_m if len(flat) < experts else len(flat) + experts * (block_m - 1)
    ordered = torch.full((size,), len(flat), dtype=torch.int32, device=ids.device)
    ordered[places] = order.int()
    blocks = torch.zeros(-(-size // block_m), dtype=torch.int32, device=ids.device)
    used = torch.arange(experts, device=ids.device).repeat_interleave(padded // block_m)
    blocks[: len(used)] = used.int()
    return {"sorted_token_ids": ordered, "expert_ids": blocks, "num_tokens_post_pad": padded.sum().int()[None]}


def gpu_peers(name: str, grouped: Peer) -> Mapping[str, Peer]:
    """The product in Triton and torch's own of groups, where they are."""
    if not torch.cuda.is_available():
        return {}
    found = {"grouped_mm": grouped}
    if importlib.util.find_spec("triton"):
        from kestrel_kernels._bench import moe_triton

        found["triton"] = getattr(moe_triton, name)
    return found


class MoeProduct(Entry):
    """Experts drawn uniformly, without replacement for a token."""

    pattern = r"(?P<tokens>\d+) (?P<dtype>bf16|fp8) E(?P<experts>\d+) H(?P<hidden>\d+) I(?P<inner>\d+) k(?P<slots>\d+)"

    tokens: int
    dtype: str
    experts: int
    hidden: int
    inner: int
    slots: int
    operands = ""  # x and the weights; in fp8 each is followed by its scale
    options = ""
    compiles = False  # `eager` is a loop over the experts

    def __init__(self, case: str) -> None:
        super().__init__(case)
        self.products = self.dtype
        names = self.operands.split()
        if self.dtype == "fp8":
            names = [part for name in names for part in (name, f"{name}_scale")]
        self.arguments = f"{' '.join(names)} {_ROUTING} out= config= {self.options}"
        self.function = f"cute_moe.invoke_cute_{self.op}{'_fp8' if self.dtype == 'fp8' else ''}"

    @property
    def eager_is_peer(self) -> bool:
        return self.tokens <= 64

    def _operand(self, make: Maker, name: str, *shape: int, scale: float = 1.0) -> Set:
        if self.dtype == "bf16":
            return {name: make.normal(*shape, scale=scale)}
        scales = make.normal(*shape[:-1], dtype="float32", shift=8.0).abs() * (scale / 64)
        return {name: make.normal(*shape, scale=8.0).to(torch.float8_e4m3fn), f"{name}_scale": scales}

    def _routing(self, make: Maker) -> Set:
        chosen = make.normal(self.tokens, self.experts, dtype="float32").topk(self.slots)
        return self.tiled({"topk_weights": chosen.values.softmax(-1), "topk_ids": chosen.indices.int()}, None)

    def tiled(self, s: Set, config: CuteMoeConfig | None) -> Set:
        """The same arguments with the ids aligned for a config; None: for the one that the package chooses."""
        sizes = {"num_experts": self.experts, "hidden_size": self.hidden, "intermediate_size": self.inner}
        block_m = config.block_m if config else get_cute_moe_block_m(self.tokens, **sizes, dtype=self.dtype)
        return {**s, **align(s["topk_ids"], self.experts, block_m), "config": config}

    @property
    def _assignments(self) -> int:
        return self.tokens * self.slots

    @property
    def _distinct(self) -> int:
        """Experts that some token is expected to have chosen."""
        return round(self.experts * (1 - (1 - self.slots / self.experts) ** self.tokens))

    @property
    def _size(self) -> int:
        return 2 if self.dtype == "bf16" else 1

    def _values(self, s: Set, name: str, cast: _Cast) -> torch.Tensor:
        values = cast(s[name])
        return values * cast(s[f"{name}_scale"])[..., None] if self.dtype == "fp8" else values

    def _shares(self, s: Set) -> Iterator[tuple[int, torch.Tensor]]:
        """Each expert with the assignments that are its own, as 0 and 1: without a look at them from the host."""
        for expert in range(self.experts):
            yield expert, (s["topk_ids"] == expert)[..., None]

    def _layer(self, s: Set, cast: _Cast) -> torch.Tensor:
        raise NotImplementedError

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        return [self._layer(s, torch.Tensor.double)]

    def eager(self, s: Set) -> Any:
        return self._layer(s, torch.Tensor.bfloat16)

    def _triton(self, s: Set) -> Set:
        """The lists that the peer in Triton works on."""
        from kestrel_kernels._bench.moe_triton import block_m

        height = block_m(self.tokens, self.slots, self.experts)
        return {**align(s["topk_ids"], self.experts, height), "block_m": height}

    def _groups(self, s: Set) -> Set:
        """What torch's grouped product takes: assignments by expert, and where each expert's end."""
        flat = s["topk_ids"].flatten().long()
        return {"order": flat.argsort(stable=True), "ends": flat.bincount(minlength=self.experts).cumsum(0).int()}

    def _grouped(self, s: Set, x: torch.Tensor, x_scale: torch.Tensor | None, name: str) -> torch.Tensor:
        ends = s["groups"]["ends"]
        if x_scale is None:
            return torch._grouped_mm(x, s[name].transpose(-2, -1), offs=ends)
        return torch._scaled_grouped_mm(
            x, s[name].transpose(-2, -1), x_scale, s[f"{name}_scale"], offs=ends, out_dtype=torch.bfloat16
        )

    def add_for_peers(self, s: Set) -> None:
        """On a GPU: their lists, as ours stand in the set already."""
        if s["out"].is_cuda:
            s["groups"] = self._groups(s)
            with contextlib.suppress(ImportError):
                s["triton"] = self._triton(s)


class MoeUp(MoeProduct):
    """With the gate in its epilogue."""

    op = "moe_up"
    operands = "hidden_states w1 w2"
    options = "activation="
    small = ("1 bf16 E1 H1 I1 k1", "3 fp8 E5 H7 I9 k2", "17 bf16 E4 H40 I24 k3", "33 fp8 E8 H64 I32 k8")

    def inputs(self, make: Maker) -> Set:
        shape, scale = (self.experts, self.inner, self.hidden), self.hidden**-0.5
        return {
            **self._operand(make, "hidden_states", self.tokens, self.hidden),
            **self._operand(make, "w1", *shape, scale=scale),
            **self._operand(make, "w2", *shape, scale=scale),
            **self._routing(make),
            "out": make.empty(self.tokens, self.slots, self.inner),
            "activation": "gelu_residual",
        }

    def peers(self) -> Mapping[str, Peer]:
        def grouped(s: Set) -> torch.Tensor:
            """The rows gathered, both products, the gate; the results are those of the assignments in order."""
            order = s["groups"]["order"]
            rows = order // self.slots
            x = s["hidden_states"][rows]
            scale = s["hidden_states_scale"][rows] if self.dtype == "fp8" else None
            gated = F.gelu(self._grouped(s, x, scale, "w1")) * (self._grouped(s, x, scale, "w2") + 1)
            s["out"].view(-1, self.inner)[order] = gated
            return s["out"]

        return gpu_peers("up", grouped)

    @property
    def bytes(self) -> int:
        weights = self._distinct * 2 * self.inner * self.hidden
        return self._size * (weights + self.tokens * self.hidden) + 2 * self._assignments * self.inner

    @property
    def operations(self) -> int:
        return 2 * self._assignments * 2 * self.inner * self.hidden

    def _layer(self, s: Set, cast: _Cast) -> torch.Tensor:
        x = self._values(s, "hidden_states", cast)
        w1, w2 = (self._values(s, name, cast) for name in ("w1", "w2"))
        out = x.new_zeros(self.tokens, self.slots, self.inner)
        for expert, share in self._shares(s):
            out += (F.gelu(x @ w1[expert].T) * (x @ w2[expert].T + 1))[:, None] * share
        return out


class MoeDown(MoeProduct):
    """With " reduce" summed over the experts of a token."""

    op = "moe_down"
    pattern = MoeProduct.pattern + r"( (?P<reduce>reduce))?"
    operands = "moe_out w3"
    options = "reduce="
    small = (
        "1 bf16 E1 H1 I1 k1", "3 fp8 E5 H7 I9 k2", "17 bf16 E4 H24 I40 k3", "33 fp8 E8 H64 I32 k8",
        "3 bf16 E5 H7 I9 k2 reduce", "17 fp8 E4 H24 I40 k3 reduce",
        "2 bf16 E1 H70000 I16 k1", "150 fp8 E1 H35000 I16 k1",  # three tiles for a block, which has room for two
    )  # fmt: skip

    reduce: str | None

    def inputs(self, make: Maker) -> Set:
        rows = (self.tokens,) if self.reduce else (self.tokens, self.slots)
        return {
            **self._operand(make, "moe_out", self.tokens, self.slots, self.inner),
            **self._operand(make, "w3", self.experts, self.hidden, self.inner, scale=self.inner**-0.5),
            **self._routing(make),
            "out": make.empty(*rows, self.hidden),
            "reduce": self.reduce is not None,
        }

    def peers(self) -> Mapping[str, Peer]:
        def grouped(s: Set) -> torch.Tensor:
            order = s["groups"]["order"]
            scale = s["moe_out_scale"].flatten()[order] if self.dtype == "fp8" else None
            product = self._grouped(s, s["moe_out"].view(-1, self.inner)[order], scale, "w3")
            s["out"].view(-1, self.hidden)[order] = (product * s["topk_weights"].flatten()[order, None]).bfloat16()
            return s["out"]

        return {} if self.reduce else gpu_peers("down", grouped)

    @property
    def bytes(self) -> int:
        weights = self._distinct * self.inner * self.hidden
        rows = self.tokens if self.reduce else self._assignments
        return self._size * (weights + self._assignments * self.inner) + 2 * rows * self.hidden

    @property
    def operations(self) -> int:
        return 2 * self._assignments * self.inner * self.hidden

    def _layer(self, s: Set, cast: _Cast) -> torch.Tensor:
        x, w3 = (self._values(s, name, cast) for name in ("moe_out", "w3"))
        out = x.new_zeros(self.tokens, self.slots, self.hidden)
        for expert, share in self._shares(s):
            out += x @ w3[expert].T * share
        out *= s["topk_weights"][..., None]
        return out.sum(1) if self.reduce else out


class FusedMoe(MoeProduct):
    """A whole layer, align to sum."""

    op = "fused_moe"
    options = "activation= w_up_scale= w_down_scale= config="
    small = (
        "1 bf16 E1 H1 I1 k1", "3 fp8 E5 H7 I9 k2", "17 bf16 E4 H40 I24 k3", "33 fp8 E8 H64 I32 k8",
        "1100 fp8 E8 H16 I16 k8",
    )  # fmt: skip

    def __init__(self, case: str) -> None:
        super().__init__(case)
        self.function = "cute_moe.fused_moe"
        if self.dtype == "fp8":
            # Tensor cores sum e4m3 products to 13 bits. A gated value that is off by 2^-13 lies, one time in 2^9.5, on
            # the other side between two values of e4m3, which are 2^-3.5 apart in the mean, and is then off by as
            # much: sqrt(2^-13 2^-3.5) = 3.3e-3 of the whole, 3.7e-3 with the rounding to bf16.
            self.tolerance = 6e-3
        self.arguments = f"x w_up w_down topk_weights topk_ids out= {self.options}"

    def inputs(self, make: Maker) -> Set:
        routing = self._routing(make)
        return {
            "x": make.normal(self.tokens, self.hidden),
            "w_up_scale": None,
            "w_down_scale": None,
            **self._operand(make, "w_up", self.experts, 2 * self.inner, self.hidden, scale=self.hidden**-0.5),
            **self._operand(make, "w_down", self.experts, self.hidden, self.inner, scale=self.inner**-0.5),
            **{name: routing[name] for name in ("topk_weights", "topk_ids", "config")},
            "out": make.empty(self.tokens, self.hidden),
            "activation": "gelu_residual",
        }

    def peers(self) -> Mapping[str, Peer]:
        """Without the alignment."""
        return {name: peer for name, peer in gpu_peers("layer", self.eager).items() if name == "triton"}

    @property
    def bytes(self) -> int:
        weights = self._distinct * 3 * self.inner * self.hidden
        return self._size * weights + 2 * 2 * self.tokens * self.hidden

    @property
    def operations(self) -> int:
        return 2 * self._assignments * 3 * self.inner * self.hidden

    def eager(self, s: Set) -> Any:
        """In fp32: what is rounded to bf16 between the products lies elsewhere between two values of e4m3."""
        return self._layer(s, torch.Tensor.float).to(s["out"].dtype)

    def _quantized(self, x: torch.Tensor) -> torch.Tensor:
        """In bf16 as it is rounded between the products, in fp8 as e4m3 with a scale for each row."""
        if self.dtype == "bf16":
            return x.bfloat16().to(x.dtype)
        # bf16 values are often halfway between two of e4m3: the last bit of the scale decides which. On CUDA, torch
        # divides by a number as it multiplies by its reciprocal, and rounds twice; by a tensor it divides.
        values = x.float()
        scale = (values.abs().amax(-1, keepdim=True) / values.new_full((), 448)).clamp_min(1e-6)
        return (values * (1 / scale)).to(torch.float8_e4m3fn).to(x.dtype) * scale

    def _layer(self, s: Set, cast: _Cast) -> torch.Tensor:
        x = self._quantized(cast(s["x"]))
        up, down = (self._values(s, name, cast) for name in ("w_up", "w_down"))
        out = torch.zeros_like(x)
        for expert, share in self._shares(s):
            a, g = (x @ up[expert].T).chunk(2, -1)
            weight = (cast(s["topk_weights"])[..., None] * share).sum(1)
            out += self._quantized(F.gelu(a) * (g + 1)) @ down[expert].T * weight
        return out
