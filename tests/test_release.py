"""What surrounds a release: the launcher of nvcc and the list of kernels made from what ptxas says; the workflows."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOG = """\
ptxas info    : 0 bytes gmem, 24 bytes cmem[4]
ptxas info    : Compiling entry function '_ZN7kestrel4cuda12_GLOBAL__N_16kernelINS_4bf16ENS1_4TileILi32ELi9EEEEEvPT_' for 'sm_90a'
ptxas info    : Function properties for _ZN7kestrel4cuda12_GLOBAL__N_16kernelINS_4bf16ENS1_4TileILi32ELi9EEEEEvPT_
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 95 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compile time = 23.983 ms
ptxas info    : Function properties for a_device_function
    32 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function 'plain' for 'sm_80'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 26 registers, used 0 barriers
"""  # noqa: E501
SERIALIZED = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"


def test_precompile_reads_ptxas() -> None:
    spec = importlib.util.spec_from_file_location("precompile", ROOT / "scripts" / "precompile.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["precompile"] = module
    spec.loader.exec_module(module)
    first, second = module.parse(LOG, "op")
    assert (first.arch, first.registers, first.shared, first.stack, first.spills) == ("sm_90a", 95, 1024, 16, 12)
    assert (second.arch, second.name, second.registers, second.shared) == ("sm_80", "plain", 26, 0)
    if shutil.which("c++filt"):
        assert module.demangle([first.name, second.name]) == ["kernel<bf16, Tile<32, 9>>", "plain"]


@pytest.mark.parametrize("said, status", [("", 0), ("ptxas warning : odd", 0), (SERIALIZED, 1)])
def test_launcher_of_nvcc(said: str, status: int, tmp_path: Path) -> None:
    """It keeps what ptxas said, prints what is of interest, and fails on a note that costs speed."""
    (tmp_path / "log").write_text(LOG + said)
    command = ["sh", str(ROOT / "cmake" / "nvcc.sh"), "sh", "-c", "cat log >&2", "nvcc", "-c", "-o", "x.o", "x.cu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (status, said)
    assert (tmp_path / "x.o.ptxas").read_text().strip() == (LOG + said).strip()


def test_version_stands_once() -> None:
    """No release note, workflow or source repeats it."""
    text = (ROOT / "pyproject.toml").read_text()
    version = text.split('version = "', 1)[1].split('"', 1)[0]
    files = [ROOT / "CMakeLists.txt", ROOT / "Makefile", ROOT / "RELEASING.md", ROOT / "README.md"]
    for folder in ("python", "kestrel", "ops", "tools", "scripts", ".github"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".h", ".cpp", ".cu", ".yml")]
    assert [
        path for path in files if f'"{version}"' in path.read_text() or f"kernels=={version}" in path.read_text()
    ] == []
