"""Compiles every kernel ahead, without a GPU, and lists what ptxas made of them.

python -m scripts.precompile [--build FOLDER [--list]] [--json FILE]

Nothing is compiled at run time: this is the CUDA part of the package's own build, in a folder that is kept. CUDACXX and
KESTREL_KERNELS_CUDA_ARCH are respected. Shared memory is the static part; what a launch asks for comes on top.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclasses.dataclass
class Kernel:
    arch: str
    op: str
    name: str  # as in the source, with its template arguments: the tile
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0  # bytes stored and loaded


def parse(log: str, op: str) -> Iterator[Kernel]:
    """The kernels of one object, from what `ptxas -v` said of it."""
    kernel = None
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            kernel = Kernel(entry[2], op, entry[1])
        elif kernel and (stack := STACK.search(line)):
            kernel.stack, kernel.spills = int(stack[1]), int(stack[2]) + int(stack[3])
        elif kernel and (used := USED.search(line)):
            kernel.registers, kernel.shared = int(used[1]), int(used[2] or 0)
            yield kernel
            kernel = None  # device functions that follow have properties too


def demangle(names: list[str]) -> list[str]:
    """Names as in the source, without namespaces, parameters and casts of template arguments."""
    try:
        done = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True)
    except OSError:
        return names
    short = []
    for name in done.stdout.splitlines():
        name = re.sub(r"\(anonymous namespace\)|(?<=[(<, ])\((?:\w|::| )+\)(?=[\w-])", "", name)
        short.append(re.sub(r"\w*::|(?<=>) (?=>)", "", name).removeprefix("void "))
    return short


def build(folder: Path) -> None:
    """Configures and compiles the kernels; CMake and Ninja may lie beside this Python."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PATH": tools}
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DKESTREL_CUDA=ON", "-DKESTREL_PYTHON=OFF"]
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options]
    for command in (configure, ["cmake", "--build", str(folder), "--target", "kestrel_host"]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{done.stdout}{done.stderr}precompile: {' '.join(command)}: status {done.returncode}")


def kernels(folder: Path) -> list[Kernel]:
    """All kernels of a build, by the objects that the build names."""
    found: list[Kernel] = []
    for step in json.loads((folder / "compile_commands.json").read_text()):
        source = Path(step["file"])
        if source.suffix == ".cu":
            words = shlex.split(step["command"])
            log = Path(step["directory"], words[words.index("-o") + 1] + ".ptxas")
            found += parse(log.read_text(), source.parent.name)
    for kernel, name in zip(found, demangle([k.name for k in found]), strict=True):
        kernel.name = name
    return sorted(found, key=lambda k: (k.arch, k.op, k.name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "precompile", metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the list as JSON too")
    parser.add_argument("--list", action="store_true", help="build nothing: list what the folder's last build compiled")
    options = parser.parse_args()
    if not options.list:
        build(options.build)
    found = kernels(options.build)
    print(f"{'arch':<8}{'registers':>9}{'shared':>8}{'stack':>7}{'spills':>8}  {'op':<18}kernel<tile>")
    for k in found:
        print(f"{k.arch:<8}{k.registers:>9}{k.shared:>8}{k.stack:>7}{k.spills:>8}  {k.op:<18}{k.name}")
    spilled = sum(k.spills > 0 for k in found)
    print(f"{len(found)} kernels of {len({k.op for k in found})} ops, {spilled} with spills")
    if options.json:
        options.json.write_text("[\n" + ",\n".join(json.dumps(dataclasses.asdict(k)) for k in found) + "\n]\n")
    return int(not found or spilled > 0)


if __name__ == "__main__":
    sys.exit(main())
