"""Looks into a wheel, then installs it under each Python given, or found on this machine, and runs an op there.

python tools/check_wheel.py WHEEL [PYTHON...]

Each runs with NumPy alone, no GPU, no compiler, and the package in a folder that it cannot write to. Needs auditwheel.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LIMIT = 60 * 2**20  # bytes
MINORS = range(10, 14)
CODE = """
import os, sys, tempfile
import numpy as np
import kestrel_kernels
folder = kestrel_kernels.__path__[0]
assert folder.startswith(sys.prefix), folder
try:
    tempfile.TemporaryFile(dir=folder)
    sys.exit(f'{folder} is not read-only')
except PermissionError:
    pass
out = kestrel_kernels.silu_and_mul(np.ones((2, 8), np.float16))
assert out.shape == (2, 4) and abs(float(out[0, 0]) - 0.7310586) < 1e-3, out
assert 'torch' not in sys.modules
print('Python', sys.version.split()[0], 'NumPy', np.__version__, 'kestrel-kernels', kestrel_kernels.__version__)
"""


def contents(wheel: Path) -> None:
    """Fails where the wheel lacks a part of the package, or holds what belongs to the sources."""
    names = zipfile.ZipFile(wheel).namelist()
    wanted = ["lib/libkestrel.so", "lib/libkestrel_ffi.so", "include/kestrel/tensor.h", "include/dlpack/dlpack.h"]
    wanted += ["lib/cmake/KestrelKernels/KestrelKernelsConfig.cmake", "py.typed", "__init__.pyi", "_info.py"]
    missing = [name for name in wanted if f"kestrel_kernels/{name}" not in names]
    assert not missing, f"the wheel lacks {missing}"
    strange = [n for n in names if n.endswith((".cu", ".cuh", ".cpp", ".o", ".a", ".ptxas")) or n.startswith("tests/")]
    assert not strange, f"the wheel holds {strange}"
    libraries = [n for n in names if ".so" in Path(n).name and not n.startswith("kestrel_kernels/lib/")]
    assert not libraries, f"the wheel holds libraries of others: {libraries}"
    size = wheel.stat().st_size
    assert size < LIMIT, f"the wheel has {size / 2**20:.1f} MiB, more than {LIMIT >> 20}"
    print(f"{wheel.name}: {size / 2**20:.1f} MiB, {len(names)} files")


def platform(wheel: Path) -> None:
    """Fails where the tag is not manylinux, or promises more than the symbols that the libraries ask for."""
    assert "-py3-none-manylinux_" in wheel.name, f"{wheel.name}: not repaired by auditwheel"
    show = [sys.executable, "-m", "auditwheel", "show", "--json", str(wheel)]
    done = subprocess.run(show, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fits = json.loads(done.stdout)["sym_tag"]
    assert fits in wheel.name, f"{wheel.name}: its libraries ask for {fits}"


def works(python: str) -> bool:
    """Whether it is a Python that can make environments: a pyenv shim may be none."""
    try:
        return subprocess.run([python, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0
    except OSError:
        return False


def pythons() -> dict[int, str]:
    """A Python of each minor version, from the path or pyenv."""
    found = {}
    for minor in MINORS:
        folders = [*os.get_exec_path(), *map(str, sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin")))]
        candidates = (shutil.which(f"python3.{minor}", path=folder) for folder in folders)
        if python := next((path for path in candidates if path and works(path)), None):
            found[minor] = python
    return found


def run_under(python: str, wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        inside = f"{folder}/bin/python"
        subprocess.run([inside, "-m", "pip", "install", "-q", str(wheel), "numpy"], check=True)
        package = next(Path(folder).glob("lib/python*/site-packages/kestrel_kernels"))
        before = sorted(package.rglob("*"))
        folders = [package, *(path for path in before if path.is_dir())]
        for path in [package, *before]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        # root writes where it likes, unless that capability is taken away.
        drop = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
        environment = {"PATH": "/nowhere", "HOME": "/nowhere", "CUDA_VISIBLE_DEVICES": "-1"}
        command = [*drop, inside, "-I", "-c", CODE]
        try:
            subprocess.run([shutil.which(command[0]) or command[0], *command[1:]], check=True, env=environment)
            assert sorted(package.rglob("*")) == before
        finally:
            for path in folders:
                path.chmod(0o755)


if __name__ == "__main__":
    wheel = Path(sys.argv[1])
    contents(wheel)
    platform(wheel)
    here = dict(enumerate(sys.argv[2:])) or pythons()
    assert here, "no Python found"
    for python in here.values():
        run_under(python, wheel)
    if not sys.argv[2:]:
        missing = ", ".join(f"3.{minor}" for minor in MINORS if minor not in here)
        print(f"Checked under {len(here)} Pythons" + f"; not found here: {missing}" * bool(missing))
