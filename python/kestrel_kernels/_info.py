"""`kestrel-kernels info`: what is installed, where it lies, and what it found on this machine."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import kestrel_kernels
from kestrel_kernels import _library


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table, or the one path that a flag asks for; 1 where the package's own files are missing."""
    parser = argparse.ArgumentParser(prog="kestrel-kernels info", description=__doc__)
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--cmake-dir", action="store_true", help="the folder for find_package(KestrelKernels)")
    one.add_argument("--include-dir", action="store_true", help="the folder of <kestrel/*.h> and <dlpack/dlpack.h>")
    one.add_argument("--lib-dir", action="store_true", help="the folder of libkestrel.so")
    options = parser.parse_args(argv)
    try:
        if options.cmake_dir:
            print(_cmake_dir())
        elif options.include_dir:
            print(_library.folder("include"))
        elif options.lib_dir:
            print(_library.folder("lib"))
        else:
            _print_table()
    except (ImportError, OSError) as error:
        print(f"kestrel-kernels info: {error}", file=sys.stderr)
        return 1
    return 0


def _cmake_dir() -> Path:
    return _library.folder("lib") / "cmake" / "KestrelKernels"


def _print_table() -> None:
    import tvm_ffi

    library = _library.load()
    threads = library.cpu_threads()
    rows = {
        "version": kestrel_kernels.__version__,
        "library": _library.folder("lib") / "libkestrel.so",
        "CPU": f"{library.cpu_level()}, {threads} thread{'s' * (threads != 1)}",
        "CUDA kernels": library.cuda_architectures() or "none in this build",
        "GPUs": "\n".join(gpus()) or "none seen",
        "tvm-ffi": tvm_ffi.__version__,
        "Python": sys.version.split()[0],
    }
    for name, value in rows.items():
        for i, line in enumerate(str(value).splitlines()):
            print(f"{'' if i else name:<14}{line}")


def gpus() -> list[str]:
    """The driver's list, asked by another process: this one starts no CUDA."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=index,name,compute_cap,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    return answer.stdout.splitlines() if answer.returncode == 0 else []


if __name__ == "__main__":
    sys.exit(main())
