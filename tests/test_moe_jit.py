"""Further tiles, compiled on demand; they are run by the tests of every tile where there is a GPU."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kestrel_kernels import _moe_config, _moe_jit
from kestrel_kernels.cute_moe import CuteMoeConfig
from support import Backend
from test_cute_moe import Problem, draw_ids

TILE = CuteMoeConfig(64, 128, 64, 8, 3, "bf16", "wgmma")
BUILD = f"from kestrel_kernels import _library, _moe_jit; _library.load(); print(_moe_jit.build(_moe_jit.{TILE!r}))"


def _has_nvcc() -> bool:
    try:
        return bool(_moe_jit.nvcc() and _moe_jit.root())
    except ValueError:
        return False


needs_nvcc = pytest.mark.skipif(not _has_nvcc(), reason="no nvcc, or no source checkout")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@needs_nvcc
def test_two_processes_at_once(cache: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    runs = [
        subprocess.Popen([sys.executable, "-c", BUILD], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {run.communicate()[0].strip() for run in runs}
    folder = cache / "kestrel-kernels/moe"
    assert [str(p) for p in folder.iterdir()] == list(paths)


@needs_nvcc
def test_used_as_a_config(backend: Backend, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    problem = Problem(backend, "bfloat16", draw_ids(100, 3, 4), 4, 192, 128, 64)
    monkeypatch.delenv("KESTREL_CUTE_MOE_JIT", raising=False)
    if TILE not in _moe_jit._loaded:
        with pytest.raises(ValueError, match="must be a compiled tile, the nearest are"):
            problem.up(config=TILE)
    monkeypatch.setenv("KESTREL_CUTE_MOE_JIT", "1")
    before = problem.up()
    problem.config = TILE
    problem.check_all()
    assert np.allclose(problem.up(), before, rtol=2**-7, atol=1e-4)
    assert TILE not in _moe_config.tiles()  # no choice names it


def test_tiles_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KESTREL_CUTE_MOE_JIT", "1")
    problem = Problem(Backend("numpy"), "bfloat16", draw_ids(5, 2, 4), 4, 40, 24)
    for changes, message in (
        ({"block_n": 64}, "block_n must be 128 or 256"),
        ({"block_m": 48}, "block_m must be a multiple of 32 up to 128"),
        ({"block_k": 32}, "block_k must be 64"),
        ({"num_warps": 4}, "num_warps must be 8"),
        ({"num_stages": 1}, "num_stages must be 2 or more"),
        ({"kernel_type": "warp"}, "the tiles of warp kernels are all compiled"),
    ):
        with pytest.raises(ValueError, match=rf"^CuteMoeConfig: must be a tile that compiles \({message}\), got "):
            problem.up(config=dataclasses.replace(TILE, **changes))  # type: ignore[arg-type]


@needs_nvcc
def test_a_tile_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, and from then on without a second trial."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    deep = dataclasses.replace(TILE, num_stages=20)
    with pytest.raises(ValueError, match="static assertion failed"):
        _moe_jit.build(deep)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    with pytest.raises(ValueError, match="static assertion failed"):
        _moe_jit.build(deep)


@pytest.mark.parametrize("dtype", _moe_config.DTYPES)
def test_candidates(dtype: str) -> None:
    found = list(_moe_jit.candidates(dtype))
    assert found and len(set(found)) == len(found)
    for tile in found:
        _moe_jit.check(tile)
