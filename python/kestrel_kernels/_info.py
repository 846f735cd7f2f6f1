"""`kestrel-kernels info`: what is installed, where it lies, what it found on this machine; and which kernel attention
would run, in which tile."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import kestrel_kernels
from kestrel_kernels import _attention_plan, _library
from kestrel_kernels._attention_plan import H200_SMS

_EXAMPLES = ("causal h32 d64 s740", "b1 kv740 h32 d64 bf16 page1", "h32 d64 s5+17+33")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table, or the one path that a flag asks for; 1 where the package's own files are missing, 2 for a case
    that is none."""
    parser = argparse.ArgumentParser(prog="kestrel-kernels info", description=__doc__)
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--cmake-dir", action="store_true", help="the folder for find_package(KestrelKernels)")
    one.add_argument("--include-dir", action="store_true", help="the folder of <kestrel/*.h> and <dlpack/dlpack.h>")
    one.add_argument("--lib-dir", action="store_true", help="the folder of libkestrel.so")
    parser.add_argument("op", nargs="?", choices=["attention"], help="what its rules choose for the cases")
    parser.add_argument("--case", action="append", metavar="NAME", help=f'as in bench: "{_EXAMPLES[1]}"')
    parser.add_argument(
        "--sms", type=int, default=H200_SMS, metavar="N", help=f"SMs of the GPU (default: {H200_SMS}, an H200)"
    )
    options = parser.parse_args(argv)
    if bool(options.op) != bool(options.case):
        parser.error("attention and --case NAME must be given together")
    if options.sms < 1:
        parser.error(f"argument --sms: must be at least 1, got {options.sms}")
    try:
        if options.op:
            return _print_plans(options.case, options.sms)
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
    _print_rows(rows)


def _print_rows(rows: Mapping[str, object]) -> None:
    for name, value in rows.items():
        for i, line in enumerate(str(value).splitlines()):
            print(f"{'' if i else name:<14}{line}")


def _print_plans(cases: Sequence[str], sms: int) -> int:
    if not importlib.util.find_spec("torch"):
        print("kestrel-kernels info: the bench, whose cases these are, needs torch", file=sys.stderr)
        return 2
    from kestrel_kernels._bench.ops.attention import ENTRIES

    for i, case in enumerate(cases):
        kinds = [kind for kind in ENTRIES if re.fullmatch(kind.pattern, case)]
        if not kinds:
            like = " or ".join(f'"{example}"' for example in _EXAMPLES)
            print(
                f"kestrel-kernels info: --case must be written like {like}, got {case!r} (all that are measured: "
                "kestrel-kernels bench --list)",
                file=sys.stderr,
            )
            return 2
        rows = {"case": case, "GPU": f"{sms} SMs{', an H200: --sms for another' if sms == H200_SMS else ''}"}
        rows |= _attention_plan.lines(kinds[0](case).plan(sms))
        if i:
            print()
        _print_rows(rows)
    return 0


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
