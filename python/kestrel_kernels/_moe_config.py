"""The tiles of the products of experts, and which of them serves which layer at how many tokens.

The library knows both: the tiles it was compiled in, and the ranges of token counts of a layer's sizes, by the tuned
points of `configs/*.json` or by a rule. Python asks it once for each layer, outside of any graph, and picks the range.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from operator import index
from pathlib import Path
from typing import Any

from kestrel_kernels import _library
from kestrel_kernels._op import constant_in_graphs

DTYPES = ("bf16", "fp16", "fp8")
KINDS = ("up", "down")
SIZES = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
KERNELS = ("warp", "wgmma")


@dataclasses.dataclass(frozen=True)
class CuteMoeConfig:
    """Which kernel makes a product, and in which tile: one of those that are compiled, for which see
    `get_cute_moe_config` and `kestrel-kernels tune moe --list`.

    Attributes:
        block_m: assignments of a block of the alignment; up and down share it.
        block_n: rows of the weights.
        block_k: elements of the depth in a step.
        num_warps: warps of a block.
        num_stages: steps that are on their way from memory.
        dtype: "bf16", "fp16" or "fp8".
        kernel_type: "warp" (mma.sync), for up to 64 tokens: more go to wgmma; or "wgmma". Operands that neither takes
            (rows that do not lie at multiples of 16 bytes, odd sizes) go to a plain kernel.

    Raises:
        ValueError: a size below 1, or another name; where it is used, a tile that is not compiled.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    dtype: str
    kernel_type: str = "warp"

    def __post_init__(self) -> None:
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"CuteMoeConfig: {name} must be at least 1, got {getattr(self, name)}")
        check_name("CuteMoeConfig: dtype", self.dtype, DTYPES)
        check_name("CuteMoeConfig: kernel_type", self.kernel_type, KERNELS)

    def __str__(self) -> str:
        """ "16x128x64 8 warps 4 stages wgmma bf16"."""
        return (
            f"{self.block_m}x{self.block_n}x{self.block_k} {self.num_warps} warps {self.num_stages} stages "
            f"{self.kernel_type} {self.dtype}"
        )


def check_name(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"{what} must be {', '.join(known[:-1])} or {known[-1]}, got {name!r}")


_tiles: dict[CuteMoeConfig, int] = {}
_numbers: dict[tuple[tuple[int, ...], str, str], int] = {}
_fields: dict[tuple[int, str], tuple[Any, ...]] = {}
_ranges: dict[tuple[int, int, int, str], tuple[int, ...]] = {}
_folder = Path(__file__).parent / "configs"
_learned: Path | None = None  # the folder whose files the library knows


def tiles() -> dict[CuteMoeConfig, int]:
    """Every tile of the build, once for each of its dtypes -> its number."""
    if not _tiles:
        library = _library.load()
        for i in range(library.moe_tile_count()):
            m, n, k, warps, stages, wgmma, dtypes = library.moe_tile(i)
            for bit, dtype in enumerate(DTYPES):
                if dtypes >> bit & 1:
                    _tiles[CuteMoeConfig(m, n, k, warps, stages, dtype, KERNELS[wgmma])] = i
    return _tiles


def nearest(config: CuteMoeConfig, count: int = 3) -> list[CuteMoeConfig]:
    """The compiled tiles of a config's dtype that are most like it."""

    def distance(tile: CuteMoeConfig) -> tuple[float, ...]:
        ratios = (getattr(tile, name) / getattr(config, name) for name in SIZES)
        apart = sum(max(ratio, 1 / ratio) - 1 for ratio in ratios)
        return (tile.block_m != config.block_m, tile.kernel_type != config.kernel_type, apart)

    return sorted((tile for tile in tiles() if tile.dtype == config.dtype), key=distance)[:count]


@constant_in_graphs
def tile_of(sizes: tuple[int, ...], dtype: str, kernel_type: str) -> int:
    """The number of a config's tile.

    Raises:
        ValueError: it is not compiled.
    """
    key = (sizes, dtype, kernel_type)
    if (tile := _numbers.get(key)) is not None:
        return tile
    config = CuteMoeConfig(*sizes, dtype, kernel_type)  # type: ignore[call-arg, arg-type]
    tile = tiles().get(config)
    if tile is None and os.environ.get("KESTREL_CUTE_MOE_JIT") == "1":
        from kestrel_kernels import _moe_jit

        try:
            return _moe_jit.tile_of(config)
        except ValueError as problem:
            raise ValueError(f"CuteMoeConfig: must be a tile that compiles ({problem}), got {config}") from None
    if tile is None:
        like = "; ".join(map(str, nearest(config)))
        raise ValueError(f"CuteMoeConfig: must be a compiled tile, the nearest are {like}; got {config}")
    _numbers[key] = tile
    return tile


@constant_in_graphs
def _fields_of(tile: int, dtype: str) -> tuple[Any, ...]:
    """The fields of a tile's config."""
    if not _fields:
        _fields.update({(i, config.dtype): dataclasses.astuple(config) for config, i in tiles().items()})
    return _fields[tile, dtype]


def learn(folder: Path) -> None:
    """Makes the tuned files of a folder those that choices go by; all or none of them.

    One for each model shape, dtype and GPU, which `kestrel-kernels tune moe --write-config` writes:

    `{"gpu": "NVIDIA H200", "num_experts": E, "hidden_size": H, "intermediate_size": I, "dtype": "fp8",`
    `"tokens": {"1": {"up": {"block_m": 16, ..., "kernel_type": "warp"}, "down": {...}}, ...}}`

    Raises:
        ValueError: a file names a tile that is not compiled, or two block sizes for one token count.
    """
    global _learned
    found = []
    for path in sorted(folder.glob("*.json")):
        file = json.loads(path.read_text())
        points: list[int] = []
        for tokens, configs in sorted(file["tokens"].items(), key=lambda item: int(item[0])):
            up, down = (CuteMoeConfig(**configs[kind], dtype=file["dtype"]) for kind in KINDS)
            if up.block_m != down.block_m:
                raise ValueError(f"{path}: up and down must share block_m, which they do not at {tokens} tokens")
            for tile in (up, down):
                if tile not in tiles():
                    raise ValueError(f"{path}: a tile of {tokens} tokens is not compiled: {tile}")
            points += [int(tokens), tiles()[up], tiles()[down]]
        shape = (file["num_experts"], file["hidden_size"], file["intermediate_size"], file["dtype"])
        found.append((file["gpu"], *shape, points))
    library = _library.load()
    library.moe_forget()
    for entry in found:
        library.moe_learn(*entry)
    _ranges.clear()
    _learned = folder


@constant_in_graphs
def _ranges_of(experts: int, hidden: int, inner: int, dtype: str) -> tuple[int, ...]:
    """(first token count, tile of up, tile of down) in turn, ascending."""
    key = (experts, hidden, inner, dtype)
    if key not in _ranges:
        if _learned != _folder:
            learn(_folder)
        _ranges[key] = tuple(_library.load().moe_ranges(*key))
    return _ranges[key]


def choose(tokens: int, experts: int, hidden: int, inner: int, dtype: str) -> tuple[int, int]:
    """The tiles of up and down."""
    ranges = _ranges_of(index(experts), index(hidden), index(inner), dtype)  # in a graph: of these sizes alone
    at = len(ranges) - 3
    while at > 0 and tokens < ranges[at]:
        at -= 3
    return ranges[at + 1], ranges[at + 2]


def get_cute_moe_config(
    kind: str, num_tokens: int, *, num_experts: int, hidden_size: int, intermediate_size: int, dtype: str
) -> CuteMoeConfig:
    """The config of a product: from the tuned file of this shape, by the nearest token count (of two as near the
    smaller); where there is no file by a heuristic, for any shape. fp16 goes by the file of bf16. Of the files of
    several GPUs, the one of the present GPU is taken, and any where there is none of it.

    Args:
        kind: "up" or "down".
        num_tokens: T.
        num_experts: those whose weights are here.
        hidden_size: H.
        intermediate_size: I.
        dtype: "bf16", "fp16" or "fp8".

    Raises:
        ValueError: another kind or dtype.
    """
    check_name("get_cute_moe_config: kind", kind, KINDS)
    check_name("get_cute_moe_config: dtype", dtype, DTYPES)
    up, down = choose(num_tokens, num_experts, hidden_size, intermediate_size, dtype)
    return CuteMoeConfig(*_fields_of(up if kind == "up" else down, dtype))


def get_cute_moe_block_m(
    num_tokens: int, *, num_experts: int, hidden_size: int, intermediate_size: int, dtype: str
) -> int:
    """The block size to align for, which up and down share. Arguments and errors of `get_cute_moe_config`."""
    check_name("get_cute_moe_config: dtype", dtype, DTYPES)
    up, _ = choose(num_tokens, num_experts, hidden_size, intermediate_size, dtype)
    block_m: int = _fields_of(up, dtype)[0]
    return block_m


def block_and_tile(config: Any, tokens: int, experts: int, hidden: int, inner: int, dtype: str) -> tuple[int, int]:
    """What the library takes for `config=`: the block size, and a tile or -1, where it is to choose.

    Raises:
        ValueError: a config of another dtype than the operands', or one that is not compiled.
    """
    if config is None:
        return _fields_of(choose(tokens, experts, hidden, inner, dtype)[0], dtype)[0], -1
    if isinstance(config, int):
        return config, -1
    if not isinstance(config, CuteMoeConfig):
        raise TypeError(f"CuteMoeConfig: config must be one, a block size or None, got {type(config).__name__}")
    if config.dtype != dtype:
        raise ValueError(f"CuteMoeConfig: dtype must be {dtype}, as the operands, got {config.dtype}")
    sizes = (config.block_m, config.block_n, config.block_k, config.num_warps, config.num_stages)
    return config.block_m, tile_of(tuple(map(index, sizes)), dtype, config.kernel_type)


def dtype_of(array: Any) -> str:
    """Of 16-bit operands."""
    return "bf16" if "bfloat16" in str(array.dtype) else "fp16"
