from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from kestrel_kernels._attention_plan import Plan, attention_plan
from kestrel_kernels._bench.entry import Entry, Maker, Peer, Set


def paged_cache(make: Maker, s: Set, lengths: Sequence[int], heads: int, size: int, page: int, dtype: str) -> Set:
    """Caches of sequences of these lengths, in pages of random order, each page used once; NaN past the last key of
    each sequence, and no page behind it in the table."""
    counts = [-(-n // page) for n in lengths]
    pages = sum(counts)
    table = torch.full((len(lengths), max(counts)), -1, dtype=torch.int32, device=make.device)
    for row, used in zip(table, make.distinct(pages, pages, "int32").split(counts), strict=True):
        row[: len(used)] = used
    for name in ("k_cache", "v_cache"):
        values = make.normal(pages, page, heads, size)
        for i, n in enumerate(lengths):
            if n % page:
                values[int(table[i, n // page]), n % page :] = float("nan")
        s[name] = values.to(torch.float8_e4m3fn) if dtype == "fp8" else values
    s["page_table"] = table
    s["seqused_k"] = torch.tensor(lengths, dtype=torch.int32, device=make.device)
    for name, scale in (("k_scale", 0.5), ("v_scale", 2.0)):
        s[name] = torch.full((1,), scale, device=make.device) if dtype == "fp8" else None
    return s


def gathered(s: Set, name: str, keys: int) -> torch.Tensor:
    """The cache as a user of PyTorch would read it, `[batch, keys, heads, D]`."""
    cache = s[f"{name}_cache"]
    scale = s[f"{name}_scale"]
    if scale is None:
        return cache[s["page_table"].long()].flatten(1, 2)[:, :keys]
    stored = cache.view(torch.uint8)[s["page_table"].long()].flatten(1, 2)[:, :keys].view(torch.float8_e4m3fn)
    return (stored.float() * scale).to(torch.bfloat16)


def true_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """float64, sequence by sequence: q `[batch, S, Hq, D]`; `seen` `[S, keys]` bool."""
    out = []
    groups = q.shape[2] // k.shape[2]
    for q1, k1, v1 in zip(q.double(), k.double(), v.double(), strict=True):
        k1, v1 = k1.repeat_interleave(groups, 1), v1.repeat_interleave(groups, 1)
        scores = torch.einsum("shd,thd->hst", q1, k1) * q.shape[-1] ** -0.5
        if seen is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        out.append(torch.einsum("hst,thd->shd", scores.softmax(-1), v1))
    return torch.stack(out)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: Any) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **more).transpose(1, 2)


def by_backends(attend: Peer) -> dict[str, Peer]:
    """What calls PyTorch's attention, by FlashAttention and by cuDNN."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def by(backend: SDPBackend) -> Peer:
        def peer(s: Set) -> Any:
            with sdpa_kernel(backend):
                return attend(s)

        return peer

    return {"flash": by(SDPBackend.FLASH_ATTENTION), "cudnn": by(SDPBackend.CUDNN_ATTENTION)}


class AttentionEntry(Entry):
    def plan(self, sms: int) -> Plan:
        """Which kernel serves the case, and how its launch is spread, on a Hopper GPU of so many SMs."""
        raise NotImplementedError


class AttentionPrefill(AttentionEntry):
    """Checked on at most 128 of the queries: all of them in float64 would not fit."""

    op = "attention_prefill"
    pattern = (
        r"(?P<mask>causal|full|prefix(?P<prefix>\d+)) h(?P<heads>\d+) d(?P<size>\d+)( b(?P<batch>\d+))? "
        r"s(?P<tokens>\d+)( paged1 (?P<dtype>bf16|fp8))?"
    )
    function = "flash_attn.cute.flash_attn_func"
    arguments = "q k v causal= out="
    products = "bf16"
    small = (
        "causal h2 d64 s5",
        "full h1 d72 b2 s33",
        "causal h1 d8 s1",
        "causal h1 d256 s130",
        "prefix7 h2 d64 s17 paged1 fp8",
        "prefix70 h1 d128 s90 paged1 bf16",
        "prefix70 h1 d256 s90 paged1 fp8",
    )

    mask: str
    prefix: int | None
    heads: int
    size: int
    batch: int | None
    tokens: int
    dtype: str | None

    def __init__(self, case: str) -> None:
        super().__init__(case)
        if self.dtype:
            self.function = "flash_attn.cute.flash_attn_with_kvcache"
            self.arguments = "q k_cache v_cache page_table= seqused_k= prefix_len= k_scale= v_scale= out="

    def plan(self, sms: int) -> Plan:
        return attention_plan(
            *(sms, self.batch or 1, self.tokens, self.tokens, self.heads, self.heads, self.size),
            e4m3=self.dtype == "fp8",
            page_size=1 if self.dtype else 0,
            causal=self.mask == "causal",
            prefix_len=self.prefix,
        )

    def inputs(self, make: Maker) -> Set:
        batch = self.batch or 1
        shape = (batch, self.tokens, self.heads, self.size)
        s: Set = {"q": make.normal(*shape), "out": make.empty(*shape)}
        if self.dtype:
            s["prefix_len"] = self.prefix
            s["seen"] = self._seen(torch.arange(self.tokens, device=make.device))
            return paged_cache(make, s, [self.tokens] * batch, self.heads, self.size, 1, self.dtype)
        return {**s, "k": make.normal(*shape), "v": make.normal(*shape), "causal": self.mask == "causal"}

    def _seen(self, queries: torch.Tensor) -> torch.Tensor | None:
        """`[queries, keys]`: which keys these queries see."""
        if self.mask == "full":
            return None
        keys = torch.arange(self.tokens, device=queries.device)
        return keys <= queries.clamp(min=(self.prefix or 1) - 1)[:, None]

    @property
    def bytes(self) -> int:
        per_element = 2 + 2 + 2 * (1 if self.dtype == "fp8" else 2)
        return (self.batch or 1) * self.tokens * self.heads * self.size * per_element

    @property
    def operations(self) -> int:
        n, prefix = self.tokens, self.prefix or 0
        pairs = n * n if self.mask == "full" else (n * (n + 1) - prefix * (prefix + 1)) // 2 + prefix * prefix
        return 4 * (self.batch or 1) * self.heads * self.size * pairs

    def _queries(self, s: Set) -> torch.Tensor:
        return torch.linspace(0, self.tokens - 1, min(self.tokens, 128), device=s["q"].device).long()

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        k, v = (gathered(s, x, self.tokens) for x in "kv") if self.dtype else (s["k"], s["v"])
        self._sampled = self._queries(s)
        return [true_attention(s["q"][:, self._sampled], k, v, self._seen(self._sampled))]

    def results(self, s: Set, returned: Any) -> Sequence[torch.Tensor]:
        return [s["out"][:, self._sampled.to(s["out"].device)]]

    def peer_results(self, returned: Any) -> Sequence[torch.Tensor]:
        return [returned[:, self._sampled]]

    def eager(self, s: Set) -> Any:
        if self.dtype:
            return sdpa(s["q"], gathered(s, "k", self.tokens), gathered(s, "v", self.tokens), attn_mask=s["seen"])
        return sdpa(s["q"], s["k"], s["v"], is_causal=s["causal"])

    def peers(self) -> Mapping[str, Peer]:
        return {} if self.dtype else by_backends(self.eager)


class AttentionDecode(AttentionEntry):
    """One query token per sequence; sequences of one length, or ("kv128-32768") of lengths that fall by a constant
    factor from the one to the other. "invariant": batch_invariant."""

    op = "attention_decode"
    pattern = (
        r"b(?P<batch>\d+) kv((?P<least>\d+)-)?(?P<keys>\d+) h(?P<heads>\d+)(/(?P<kv_heads>\d+))? d(?P<size>\d+) "
        r"(?P<dtype>bf16|fp8) page(?P<page>\d+)( fresh(?P<fresh>\d+))?( (?P<invariant>invariant))?"
    )
    function = "flash_attn.cute.flash_attn_with_kvcache"
    arguments = "q k_cache v_cache page_table= seqused_k= causal= k_scale= v_scale= fresh_tokens= batch_invariant= out="
    compiles = False  # what a gather costs, compiled or not, is no rival to anybody
    small = (
        "b2 kv5 h4/2 d64 bf16 page1",
        "b1 kv37 h2 d72 fp8 page16",
        "b3 kv1 h2 d64 bf16 page1",
        "b2 kv33 h4 d128 bf16 page1 fresh1",
        "b2 kv2100 h1 d64 bf16 page1",
        "b5 kv3-2100 h2 d64 bf16 page16",
        "b2 kv700 h2 d64 fp8 page1 invariant",
        "b3 kv100 h4/2 d256 bf16 page16",
        "b1 kv300 h2 d144 fp8 page1",
    )

    batch: int
    least: int | None
    keys: int
    heads: int
    kv_heads: int | None
    size: int
    dtype: str
    page: int
    fresh: int | None
    invariant: str | None

    @property
    def _lengths(self) -> list[int]:
        if self.least is None or self.batch == 1:
            return [self.keys] * self.batch
        return [round(self.keys * (self.least / self.keys) ** (i / (self.batch - 1))) for i in range(self.batch)]

    def plan(self, sms: int) -> Plan:
        return attention_plan(
            *(sms, self.batch, 1, self.keys, self.heads, self.kv_heads or self.heads, self.size),
            e4m3=self.dtype == "fp8",
            page_size=self.page,
            causal=True,
            batch_invariant=self.invariant is not None,
        )

    def inputs(self, make: Maker) -> Set:
        shape = (self.batch, 1, self.heads, self.size)
        s: Set = {"q": make.normal(*shape), "out": make.empty(*shape), "fresh_tokens": self.fresh, "causal": True}
        s["batch_invariant"] = self.invariant is not None
        return paged_cache(make, s, self._lengths, self.kv_heads or self.heads, self.size, self.page, self.dtype)

    @property
    def bytes(self) -> int:
        per_key = 2 * (self.kv_heads or self.heads) * self.size * (1 if self.dtype == "fp8" else 2)
        pages = sum(-(-n // self.page) for n in self._lengths)
        return sum(self._lengths) * per_key + self.batch * (2 * 2 * self.heads * self.size + 4) + 4 * pages

    def _sequences(self, s: Set) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for i, n in enumerate(self._lengths):
            own = {**s, "page_table": s["page_table"][i : i + 1, : -(-n // self.page)]}
            yield s["q"][i : i + 1], gathered(own, "k", n), gathered(own, "v", n)

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        return [torch.cat([true_attention(q, k, v, None) for q, k, v in self._sequences(s)])]

    def eager(self, s: Set) -> Any:
        if self.least is not None:
            return torch.cat([sdpa(q, k, v) for q, k, v in self._sequences(s)])
        return sdpa(s["q"], gathered(s, "k", self.keys), gathered(s, "v", self.keys))

    def peers(self) -> Mapping[str, Peer]:
        """On keys that lie one after another already, without a page table."""
        if self.dtype == "fp8" or self.least is not None:
            return {}
        found = by_backends(lambda s: sdpa(s["q"], s["k"], s["v"]))
        return {f"{name}, no pages": peer for name, peer in found.items()}

    def add_for_peers(self, s: Set) -> None:
        if self.peers():
            s |= {name: gathered(s, name, self.keys) for name in "kv"}


class AttentionVarlen(AttentionEntry):
    """Packed sequences of these lengths ("s5+1+17"), each causal in itself."""

    op = "attention_varlen"
    pattern = r"h(?P<heads>\d+) d(?P<size>\d+) s(?P<lengths>\d+(\+\d+)+)"
    function = "flash_attn.cute.flash_attn_varlen_func"
    arguments = "q k v starts starts longest longest causal= out="
    products = "bf16"
    small = ("h1 d8 s1+1", "h2 d64 s5+0+17", "h3 d72 s33+2")

    heads: int
    size: int
    lengths: str

    @property
    def _lengths(self) -> list[int]:
        return [int(n) for n in self.lengths.split("+")]

    def plan(self, sms: int) -> Plan:
        total = sum(self._lengths)
        return attention_plan(
            *(sms, len(self._lengths), total, total, self.heads, self.heads, self.size), packed=True, causal=True
        )

    def inputs(self, make: Maker) -> Set:
        shape = (sum(self._lengths), self.heads, self.size)
        starts = torch.tensor([0, *self._lengths], device=make.device).cumsum(0).int()
        return {
            **{name: make.normal(*shape) for name in "qkv"},
            "out": make.empty(*shape),
            "starts": starts,
            "longest": max(self._lengths),
            "causal": True,
        }

    @property
    def bytes(self) -> int:
        return 4 * 2 * sum(self._lengths) * self.heads * self.size + 4 * (len(self._lengths) + 1)

    @property
    def operations(self) -> int:
        return 4 * self.heads * self.size * sum(n * (n + 1) // 2 for n in self._lengths)

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        sequences = zip(*(s[name].split(self._lengths) for name in "qkv"), strict=True)
        return [
            torch.cat([true_attention(q[None], k[None], v[None], _lower(len(q), q.device))[0] for q, k, v in sequences])
        ]

    def eager(self, s: Set) -> Any:
        sequences = zip(*(s[name].split(self._lengths) for name in "qkv"), strict=True)
        return torch.cat([sdpa(q[None], k[None], v[None], is_causal=True)[0] for q, k, v in sequences])


ENTRIES: tuple[type[AttentionEntry], ...] = (AttentionPrefill, AttentionDecode, AttentionVarlen)


def _lower(size: int, device: torch.device) -> torch.Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).tril()
