"""The README: its examples run as they stand there, its table of ops is up to date."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from kestrel_kernels import _library
from support import needs_cmake

ROOT = Path(__file__).parents[1]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_python_examples() -> None:
    pytest.importorskip("torch")
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, names)
    x, out, hidden = names["x"], names["out"], names["hidden"]
    assert (abs((out**2).mean(-1) - 1) < 1e-4).all() and out.shape == x.shape  # type: ignore[attr-defined, operator]
    assert str(hidden.dtype) == "torch.bfloat16" and hidden.shape == (4, 1536)  # type: ignore[attr-defined]


@needs_cmake
def test_cpp_example(tmp_path: Path) -> None:
    (program,) = blocks("cpp")
    (tmp_path / "main.cpp").write_text(program)
    (lines,) = blocks("cmake")
    start = "cmake_minimum_required(VERSION 3.20)\nproject(example LANGUAGES CXX)\n"
    rest = lines.replace("target_link", "add_executable(my_program main.cpp)\ntarget_link")
    (tmp_path / "CMakeLists.txt").write_text(start + rest)
    package = _library.folder("lib") / "cmake" / "KestrelKernels"
    build = tmp_path / "build"
    configure = ["cmake", "-S", str(tmp_path), "-B", str(build), "-G", "Ninja", f"-DKestrelKernels_DIR={package}"]
    for command in (configure, ["cmake", "--build", str(build)]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    (printed,) = re.findall(r"printf.*// (.*)", program)
    assert subprocess.run([build / "my_program"], capture_output=True, text=True, check=True).stdout.strip() == printed


def test_table_of_ops() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools/readme_ops.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_switches() -> None:
    """Every switch that the README names is read somewhere."""
    code = "".join(
        path.read_text()
        for folder in ("kestrel", "cmake", "python")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".cpp", ".cmake", ".py")
    )
    for name in set(re.findall(r"`(KESTREL_\w+)", (ROOT / "README.md").read_text())):
        assert name in code, name
