"""cuBLASLt: found and loaded without a GPU; where it is missing, the message says what was looked for."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kestrel_kernels import _library

# Without torch, which would bring its own copy into the process, and take seconds to import.
CHILD = """
import sys
sys.modules["torch"] = None
from kestrel_kernels import _library
print(*_library.cublaslt_info(*sys.argv[1:]))
"""


def wheel() -> Path | None:
    """The library in an installed nvidia-cublas wheel."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for file in ("cu13/lib/libcublasLt.so.13", "cublas/lib/libcublasLt.so.13", "cublas/lib/libcublasLt.so.12"):
            if (path := Path(folder) / file).exists():
                return path
    return None


def info(*arguments: str, folders: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([*(folders or []), *sys.path])
    command = [sys.executable, "-c", CHILD, *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)


@pytest.mark.skipif(wheel() is None, reason="nvidia-cublas is not installed")
def test_wheel() -> None:
    version, path = info().stdout.split()
    assert Path(path).samefile(str(wheel()))
    assert 120000 <= int(version) < 140000


@pytest.mark.skipif(wheel() is None, reason="nvidia-cublas is not installed")
def test_in_the_process() -> None:
    """One that is loaded already is taken, wherever it came from."""
    import ctypes

    ctypes.CDLL(str(wheel()))
    assert Path(_library.cublaslt_info()[1]).samefile(str(wheel()))


def test_missing() -> None:
    with pytest.raises(RuntimeError, match=r"^cuBLASLt 12 or newer was not found: install nvidia-cublas or") as caught:
        _library.cublaslt_info("libcublasLt.so.99")
    message = str(caught.value)
    assert "\n" not in message
    site = _library.folder("lib").parent.parent
    for place in (
        "in the process libcublasLt.so.99 (not loaded)",
        f"{site}/nvidia/cu13/lib/libcublasLt.so.99 (no such file)",
        f"{site}/nvidia/cublas/lib/libcublasLt.so.99 (no such file)",
        "by the loader libcublasLt.so.99 (",
        "/usr/local/cuda/lib64/libcublasLt.so.99 (no such file)",
    ):
        assert place in message
    if library := wheel():
        assert f"{library.parents[2]}/cu13/lib/libcublasLt.so.99 (no such file)" in message


def test_unusable(tmp_path: Path) -> None:
    """A file that is no library, or a library that is not cuBLASLt, is passed over and named."""
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    (folder / "libcublasLt.so.99").write_text("no library")
    message = info("libcublasLt.so.99", folders=[str(tmp_path)]).stderr.splitlines()[-1]
    assert message.startswith("RuntimeError: cuBLASLt 12 or newer was not found")
    assert f"{folder}/libcublasLt.so.99 ({folder}/libcublasLt.so.99: " in message
    shutil.copy(_library.folder("lib") / "libkestrel.so", folder / "libcublasLt.so.99")
    message = info("libcublasLt.so.99", folders=[str(tmp_path)]).stderr.splitlines()[-1]
    assert f"{folder}/libcublasLt.so.99 (version 0 is below 120000)" in message
