"""Further tiles of the wgmma kernels, compiled on demand: for the tuner, with KESTREL_CUTE_MOE_JIT=1.

It takes an nvcc and a source checkout, the one that the package is imported from. A tile becomes a small library in a
cache folder, named by what it is made of; it is built under a name of its own and renamed, so that processes which
build the same one at once do each other no harm. A tile that ptxas refuses (a spill, a serialized wgmma) is none.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kestrel_kernels
from kestrel_kernels import _library
from kestrel_kernels._moe_config import DTYPES, SIZES, CuteMoeConfig

FLAGS = [
    *("-O3", "-DNDEBUG", "-std=c++20", "-shared", "--expt-relaxed-constexpr", "-DKESTREL_CUDA"),
    *("-gencode", "arch=compute_90a,code=sm_90a", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
    *("-Xptxas", "-v,--warn-on-spills,--warning-as-error"),
]
SOURCES = ("kestrel/cuda.cpp", "kestrel/cuda_tensor_map.cpp")  # what a launch needs, which the library does not show
SYMBOL = "kestrel_moe_tile"


def enabled() -> bool:
    return os.environ.get("KESTREL_CUTE_MOE_JIT") == "1"


@functools.cache
def root() -> Path:
    """The source checkout."""
    for folder in map(Path, kestrel_kernels.__path__):
        if (folder.parents[1] / "ops/moe/wgmma.cuh").exists():
            return folder.parents[1]
    raise ValueError(
        "KESTREL_CUTE_MOE_JIT: further tiles need the package from a source checkout, got an installed one"
    )


@functools.cache
def nvcc() -> str:
    for name in (os.environ.get("CUDACXX"), "/usr/local/cuda/bin/nvcc", "nvcc"):
        if name and (found := shutil.which(name)):
            return found
    raise ValueError("KESTREL_CUTE_MOE_JIT: further tiles need an nvcc, found none (CUDACXX names one)")


def cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kestrel-kernels" / "moe"


@functools.cache
def _tool() -> Any:
    """tools/moe_tiles.py, which writes the same sources for the build."""
    tools = str(root() / "tools")
    sys.path.insert(0, tools)
    try:
        return importlib.import_module("moe_tiles")
    finally:
        sys.path.remove(tools)


def source(config: CuteMoeConfig) -> str:
    tile = {name: getattr(config, name) for name in SIZES}
    launch = f"kestrel::cuda::{_tool().wgmma_launch(tile, config.dtype)}"
    for name in ("WgmmaTile", _tool().TYPES[config.dtype]):
        launch = launch.replace(f"<{name}", f"<kestrel::{name}").replace(f" {name}<", f" kestrel::cuda::{name}<")
    lines = [
        *_tool().wgmma_source(tile, config.dtype),
        f'extern "C" __attribute__((visibility("default"))) void* {SYMBOL}() {{',
        f"  return reinterpret_cast<void*>(&{launch});",
        "}",
    ]
    return "\n".join(lines) + "\n"


def check(config: CuteMoeConfig) -> None:
    """ValueError where no kernel can be made in such a tile."""
    if config.kernel_type != "wgmma":
        raise ValueError("the tiles of warp kernels are all compiled")
    groups = config.block_n // 128
    depth = 128 if config.dtype == "fp8" else 64
    for holds, what in (
        (config.block_n in (128, 256), "block_n must be 128 or 256"),
        (config.block_m % 32 == 0 and config.block_m <= 128, "block_m must be a multiple of 32 up to 128"),
        (config.block_k == depth, f"block_k must be {depth}"),
        (config.num_warps == 4 + 4 * groups, f"num_warps must be {4 + 4 * groups}"),
        (config.num_stages >= 2, "num_stages must be 2 or more"),
    ):
        if not holds:
            raise ValueError(what)


def candidates(dtype: str) -> Iterator[CuteMoeConfig]:
    """What is worth a trial beside the compiled tiles: as many stages as fit, and one less."""
    depth = 128 if dtype == "fp8" else 64
    for block_n, heights in ((128, (32, 64)), (256, (32, 64, 96, 128))):
        groups = block_n // 128
        for block_m in heights:
            most_rows = block_m + (16 if groups == 2 else 0)  # of a tile: ops/moe/wgmma.h
            fit = ((200 if groups == 2 else 96) << 10) // (groups * 16384 + most_rows * 128)
            for stages in (fit, fit - 1):
                yield CuteMoeConfig(block_m, block_n, depth, 4 + 4 * groups, stages, dtype, "wgmma")


@functools.cache
def _made_of() -> str:
    """The sources and the compiler."""
    version = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(" ".join([version, *FLAGS]).encode())
    for folder in ("kestrel", "ops/moe", "ops/activation"):
        for path in sorted((root() / folder).rglob("*")):
            if path.suffix in (".h", ".cuh", ".cpp", ".cu"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def build(config: CuteMoeConfig) -> Path:
    """The tile's library, compiled where the cache has none.

    Raises:
        ValueError: there is no such tile, it does not compile, or the means to compile it are lacking.
    """
    check(config)
    text = source(config)
    name = hashlib.sha256((_made_of() + text).encode()).hexdigest()[:24]
    done, failed = cache() / f"{name}.so", cache() / f"{name}.failed"
    if failed.exists():
        raise ValueError(failed.read_text())
    if done.exists():
        return done
    cache().mkdir(parents=True, exist_ok=True)
    include = Path(sys.modules["tvm_ffi"].__file__ or "").parent / "include"
    lib = _library.folder("lib")
    with tempfile.TemporaryDirectory(dir=cache()) as own:
        (made := Path(own) / "tile.cu").write_text(text)
        draft = Path(own) / "tile.so"
        command = [
            nvcc(), *FLAGS, f"-I{root()}", f"-isystem={include}", str(made), *(str(root() / s) for s in SOURCES),
            f"-L{lib}", "-lkestrel", "-o", str(draft),
        ]  # fmt: skip
        ran = subprocess.run(command, capture_output=True, text=True)
        problems = [line for line in (ran.stdout + ran.stderr).splitlines() if "error" in line or "(C75" in line]
        serialized = [line for line in problems if "(C75" in line and "(C7519)" not in line]
        if ran.returncode or serialized:
            (note := Path(own) / "note").write_text((serialized or problems or [f"nvcc: {ran.returncode}"])[0][:300])
            os.replace(note, failed)
            raise ValueError(failed.read_text())
        os.replace(draft, done)
    return done


_loaded: dict[CuteMoeConfig, tuple[int, Any]] = {}


def tile_of(config: CuteMoeConfig) -> int:
    """The number of a further tile, in this process."""
    if config not in _loaded:
        _library.load()
        library = ctypes.CDLL(str(build(config)))
        function = getattr(library, SYMBOL)
        function.restype = ctypes.c_void_p
        sizes = [getattr(config, name) for name in SIZES]
        index = _library.load().moe_add_tile(*sizes, 1 << DTYPES.index(config.dtype), function())
        _loaded[config] = (index, library)
    return _loaded[config][0]
