#!/usr/bin/env python3
"""The whole check on a Hopper GPU: CUDA tests, compute-sanitizer at small sizes, bench.

    python tools/check_gpu.py                            everything; results into benchmarks/results/<gpu>.json
    python tools/check_gpu.py --only tests bench --pytest tests/test_layernorm.py -x    some steps (--pytest comes last)
    python tools/check_gpu.py --ops layernorm --out /tmp/check    one op; results and logs elsewhere

Uses the package that this Python imports, with torch, pytest and, for the sanitizer steps, the CUDA toolkit.
Exit status: 0, 1 where a step failed, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"tests": 900, "memcheck": 400, "racecheck": 400, "bench": 400}  # seconds
SANITIZER_FOUND = 77  # exit status


@dataclasses.dataclass
class Step:
    name: str
    status: str
    seconds: float = 0.0
    note: str = ""


def gpu_name() -> str | None:
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return asked.stdout.strip().splitlines()[0] if asked.stdout.strip() else None


def file_name(gpu: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> h100.json"""
    model = re.search(r"\b[A-Z]+\d+\w*", gpu)
    return (model.group() if model else re.sub(r"\W+", "-", gpu)).lower() + ".json"


def sanitizer() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    return shutil.which("compute-sanitizer") or next(
        (tool for home in homes if home and (tool := shutil.which("compute-sanitizer", path=f"{home}/bin"))), None
    )


def run(name: str, command: list[str], limit: float, log: Path | None, environment: dict[str, str]) -> Step:
    """Runs a step in a process group of its own, its output here and in the log; ends the group at the limit."""
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, start_new_session=True, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    late = threading.Event()

    def end() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, end)
    timer.start()
    last = ""
    assert process.stdout is not None
    with open(log or os.devnull, "w") as copy:
        for line in process.stdout:
            print(line, end="", flush=True)
            copy.write(line)
            last = line.strip() or last
    code = process.wait()
    timer.cancel()
    seconds = time.monotonic() - start
    if late.is_set():
        return Step(name, "FAILED", seconds, f"ended at its limit of {limit:.0f} s")
    return Step(
        name, "ok" if code == 0 else "FAILED", seconds, last[:100] if code == 0 else f"status {code}: {last[:80]}"
    )


def sanitize(tool: str, args: argparse.Namespace, limit: float, log: Path | None) -> Step:
    command = sanitizer()
    if command is None:
        return Step(tool, "FAILED", note="compute-sanitizer not found: put the CUDA toolkit's bin on PATH")
    options = ["--tool", tool, "--error-exitcode", str(SANITIZER_FOUND), "--print-limit", "20"]
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]  # torch asks the driver questions that may be answered with an error
    calls = [sys.executable, "-m", "kestrel_kernels._bench.small", *args.ops]
    # An allocation per tensor: an access past a tensor's end is one past an allocation's end.
    return run(tool, [command, *options, *calls], limit, log, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def tests(args: argparse.Namespace, limit: float, log: Path | None) -> Step:
    return run("tests", [sys.executable, "-m", "pytest", "-q", "-m", "cuda", *args.pytest], limit, log, {})


def bench(args: argparse.Namespace, gpu: str, limit: float, log: Path | None) -> Step:
    kept = ROOT / "benchmarks" / "results" / file_name(gpu)
    results = args.out / kept.name if args.out else kept
    if results != kept and kept.exists() and not results.exists():
        shutil.copy(kept, results)  # so that a run of some ops replaces their rows only
    command = [sys.executable, "-m", "kestrel_kernels._bench", *args.ops, "--device", "cuda", "--json", str(results)]
    command += ["--peers", args.peers] + (["--commit", args.commit] if args.commit else [])
    return run("bench", command, limit, log, {})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(LIMITS), default=list(LIMITS), help="steps to run")
    parser.add_argument("--ops", nargs="+", default=[], metavar="OP", help="ops of the sanitizer and the bench")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="results and logs go there; the repository stays as it is"
    )
    parser.add_argument("--limit", type=float, metavar="S", help=f"seconds for each step (default: {LIMITS})")
    parser.add_argument(
        "--pytest", nargs=argparse.REMAINDER, default=[], metavar="ARG", help="more for pytest: files, -k, -n"
    )
    parser.add_argument("--peers", default="auto", help="as in `kestrel-kernels bench`")
    parser.add_argument("--commit", metavar="TEXT", help="as in `kestrel-kernels bench`")
    args = parser.parse_args(argv)
    gpu = gpu_name()
    if gpu is None:
        print("check_gpu: nvidia-smi finds no GPU", file=sys.stderr)
        return 2
    if args.out:
        args.out = args.out.resolve()
        args.out.mkdir(parents=True, exist_ok=True)
    steps = []
    for name in LIMITS:
        if name not in args.only:
            continue
        limit = args.limit or LIMITS[name]
        log = args.out / f"{name}.log" if args.out else None
        if name == "tests":
            steps.append(tests(args, limit, log))
        elif name == "bench":
            steps.append(bench(args, gpu, limit, log))
        else:
            steps.append(sanitize(name, args, limit, log))
    print(f"\n{gpu}")
    for step in steps:
        print(f"{step.name:<10} {step.status:<7} {step.seconds:6.0f} s  {step.note}")
    return int(any(step.status != "ok" for step in steps))


if __name__ == "__main__":
    sys.exit(main())
