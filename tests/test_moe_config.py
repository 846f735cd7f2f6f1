"""Which tile serves which layer: the compiled tiles, the tuned files, the rule."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kestrel_kernels import _moe_config
from kestrel_kernels.cute_moe import CuteMoeConfig, get_cute_moe_block_m, get_cute_moe_config
from support import Backend
from test_cute_moe import Problem, draw_ids


def every_choice() -> set[CuteMoeConfig]:
    """By the tuned files, and by the rule for shapes of any number of experts."""
    shapes = [(experts, 7, 5) for experts in (1, 8, 60, 64, 128, 512)]
    for path in _moe_config._folder.glob("*.json"):
        file = json.loads(path.read_text())
        shapes.append((file["num_experts"], file["hidden_size"], file["intermediate_size"]))
    reached = set()
    for (experts, hidden, inner), dtype in itertools.product(shapes, _moe_config.DTYPES):
        for tokens in [*range(70), *(2**n // 3 for n in range(6, 19))]:
            sizes: dict[str, Any] = {"num_experts": experts, "hidden_size": hidden, "intermediate_size": inner}
            up, down = (get_cute_moe_config(kind, tokens, **sizes, dtype=dtype) for kind in ("up", "down"))
            assert up.dtype == down.dtype == dtype
            assert up.block_m == down.block_m == get_cute_moe_block_m(tokens, **sizes, dtype=dtype)
            reached |= {up, down}
    return reached


def test_every_tile_is_reached() -> None:
    """And no more are there than tiles.json lists."""
    tiles = json.loads((Path(__file__).parent.parent / "ops/moe/tiles.json").read_text())["tiles"]
    listed = set()
    for tile in tiles:
        dtypes = tile.pop("dtypes")
        listed |= {CuteMoeConfig(**tile, dtype=dtype) for dtype in dtypes}
    assert set(_moe_config.tiles()) == listed
    assert every_choice() == listed


@pytest.fixture
def config_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty one, in use; afterwards the package's own again."""
    own = _moe_config._folder
    monkeypatch.setattr(_moe_config, "_folder", tmp_path)
    _moe_config.learn(tmp_path)
    yield tmp_path
    _moe_config.learn(own)


def test_config_files(config_folder: Path) -> None:
    tiles = [tile for tile in _moe_config.tiles() if tile.dtype == "fp8"]
    low = tiles[0]
    high = next(tile for tile in tiles if tile.block_m != low.block_m)

    def write(name: str, tokens: dict[int, tuple[CuteMoeConfig, CuteMoeConfig]], **changes: Any) -> None:
        def fields(config: CuteMoeConfig) -> dict[str, Any]:
            return {k: v for k, v in vars(config).items() if k != "dtype"}

        points = {str(n): {"up": fields(up), "down": fields(down)} for n, (up, down) in tokens.items()}
        shape = {"gpu": "G", "num_experts": 4, "hidden_size": 40, "intermediate_size": 24, "dtype": "fp8"}
        (config_folder / name).write_text(json.dumps({**shape, **changes, "tokens": points}))
        _moe_config.learn(config_folder)

    shape: dict[str, Any] = {"num_experts": 4, "hidden_size": 40, "intermediate_size": 24, "dtype": "fp8"}
    rule = get_cute_moe_config("up", 9, **shape)
    write("small.json", {64: (high, high), 8: (low, low)})
    for tokens, config in ((0, low), (8, low), (36, low), (37, high), (64, high), (99999, high)):
        assert get_cute_moe_block_m(tokens, **shape) == config.block_m
        assert get_cute_moe_config("down", tokens, **shape) == config
    assert get_cute_moe_config("up", 9, **shape | {"hidden_size": 41}) == rule  # no file
    write("other.json", {8: (high, high)}, gpu="another GPU")
    assert get_cute_moe_config("up", 8, **shape) in (low, high)  # none of the two is of this machine

    problem = Problem(Backend("numpy"), "float8_e4m3fn", draw_ids(100, 2, 4), 4, 40, 24, high.block_m)
    problem.check(problem.up(config=None), problem.want_up())

    with pytest.raises(ValueError, match=r"bad.json: up and down must share block_m, which they do not at 8 tokens"):
        write("bad.json", {8: (low, high)})
    with pytest.raises(ValueError, match=r"bad.json: a tile of 8 tokens is not compiled: 12x"):
        unknown = dataclasses.replace(low, block_m=12)
        write("bad.json", {8: (unknown, unknown)})
    assert get_cute_moe_block_m(99999, **shape) == high.block_m  # as before


def test_embedded_are_those_of_the_folder() -> None:
    """What C++ goes by before Python tells it anything."""
    shapes = [json.loads(path.read_text()) for path in _moe_config._folder.glob("*.json")]
    keys = [[f["num_experts"], f["hidden_size"], f["intermediate_size"], f["dtype"]] for f in shapes]
    program = f"""if True:
        from kestrel_kernels import _library, _moe_config
        keys = {[*keys, [5, 7, 9, "bf16"]]}
        embedded = [list(_library.load().moe_ranges(*key)) for key in keys]
        assert embedded == [list(_moe_config._ranges_of(*key)) for key in keys], "build again"
        """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_fp16_goes_by_the_file_of_bf16(config_folder: Path) -> None:
    tile = next(t for t in _moe_config.tiles() if t.dtype == "fp16" and t.block_m != 16)
    fields = {k: v for k, v in vars(tile).items() if k != "dtype"}
    file = {"gpu": "G", "num_experts": 4, "hidden_size": 40, "intermediate_size": 24, "dtype": "bf16"}
    (config_folder / "a.json").write_text(json.dumps({**file, "tokens": {"1": {"up": fields, "down": fields}}}))
    _moe_config.learn(config_folder)
    for dtype in ("bf16", "fp16"):
        got = get_cute_moe_config("up", 1, num_experts=4, hidden_size=40, intermediate_size=24, dtype=dtype)
        assert got == dataclasses.replace(tile, dtype=dtype)


def test_tiles_that_are_not_compiled() -> None:
    problem = Problem(Backend("numpy"), "bfloat16", draw_ids(5, 2, 4), 4, 40, 24)
    config = CuteMoeConfig(16, 7, 64, 8, 3, "bf16")
    with pytest.raises(
        ValueError, match=r"^CuteMoeConfig: must be a compiled tile, the nearest are 16x.*; got 16x7x64"
    ):
        problem.up(config=config)
    with pytest.raises(ValueError, match=r"^CuteMoeConfig: dtype must be bf16, as the operands, got fp8$"):
        problem.up(config=dataclasses.replace(config, dtype="fp8"))


def test_bad_configs() -> None:
    shape: dict[str, Any] = {"num_experts": 4, "hidden_size": 40, "intermediate_size": 24}
    with pytest.raises(ValueError, match="get_cute_moe_config: kind must be up or down, got 'gate'"):
        get_cute_moe_config("gate", 1, dtype="fp8", **shape)
    with pytest.raises(ValueError, match="get_cute_moe_config: dtype must be bf16, fp16 or fp8, got 'float8'"):
        get_cute_moe_block_m(1, dtype="float8", **shape)
    with pytest.raises(ValueError, match="CuteMoeConfig: block_m must be at least 1, got 0"):
        CuteMoeConfig(0, 32, 64, 4, 3, "fp8")
    with pytest.raises(ValueError, match="CuteMoeConfig: kernel_type must be warp or wgmma, got 'mma'"):
        CuteMoeConfig(16, 32, 64, 4, 3, "fp8", "mma")
