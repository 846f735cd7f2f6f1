"""Installs a wheel under each Python given, or found on this machine, with NumPy alone, and runs an op there.

python tools/check_wheel.py WHEEL [PYTHON...]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CODE = """
import sys
import numpy as np
import kestrel_kernels
out = kestrel_kernels.silu_and_mul(np.ones((2, 8), np.float16))
assert out.shape == (2, 4) and abs(float(out[0, 0]) - 0.7310586) < 1e-3, out
assert 'torch' not in sys.modules
print('Python', sys.version.split()[0], 'NumPy', np.__version__, 'kestrel-kernels', kestrel_kernels.__version__)
"""


def contents(wheel: Path) -> None:
    """Fails where the wheel lacks a part of the package, or holds what belongs to the sources."""
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl"), wheel.name
    wanted = ["lib/libkestrel.so", "lib/libkestrel_ffi.so", "include/kestrel/tensor.h", "include/dlpack/dlpack.h"]
    wanted += ["lib/cmake/KestrelKernels/KestrelKernelsConfig.cmake", "py.typed", "__init__.pyi", "_info.py"]
    missing = [name for name in wanted if f"kestrel_kernels/{name}" not in names]
    assert not missing, f"the wheel lacks {missing}"
    strange = [n for n in names if n.endswith((".cu", ".cuh", ".cpp", ".o", ".a")) or n.startswith("tests/")]
    assert not strange, f"the wheel holds {strange}"
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {len(names)} files")


def pythons() -> list[str]:
    """Every Python >= 3.10 on the path and under pyenv, one for each minor version."""
    found: dict[int, str] = {}
    for minor in range(10, 20):
        versions = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
        if path := shutil.which(f"python3.{minor}", path="/usr/local/bin:/usr/bin"):
            found[minor] = path
        elif versions:
            found[minor] = str(versions[-1])
    return list(found.values())


def run_under(python: str, wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        inside = f"{folder}/bin/python"
        subprocess.run([inside, "-m", "pip", "install", "-q", str(wheel), "numpy"], check=True)
        subprocess.run([inside, "-c", CODE], check=True)


if __name__ == "__main__":
    contents(Path(sys.argv[1]))
    for python in sys.argv[2:] or pythons():
        run_under(python, Path(sys.argv[1]))
