"""`kestrel-kernels bench`: every op at its cases, cold and warm, against its floor, its target and its peers."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kestrel_kernels._bench.entry import Case, entries, load_cases

_EPILOG = """\
cold: many calls in one CUDA graph over rotating arguments that no cache holds; warm: over the same arguments.
floor: the larger of 0.5 us, bytes / memory bandwidth and, for products, operations / the peak measured at start.
Exit status: 0, 1 where a result is wrong or a call fails, 2 where the command cannot run.
"""
_LARGE_OPERATIONS, _LARGE_BYTES = 20e9, 250e6  # what a CPU is spared unless asked for


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "kestrel-kernels bench", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to run (default: all); --list names them")
    parser.add_argument("--case", action="append", metavar="NAME", help="only cases of this name; may be repeated")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="put the rows into FILE, replacing those run before")
    parser.add_argument(
        "--peers",
        choices=("auto", "all", "eager", "none"),
        default="auto",
        help="eager: torch and the libraries found; all: torch.compile too; auto: all on CUDA, eager on a CPU",
    )
    parser.add_argument(
        "--large", action="store_true", help="on a CPU, run the cases of more than 20 GFLOP or 250 MB too"
    )
    parser.add_argument("--commit", metavar="TEXT", help="what the rows say was measured (default: asks git)")
    parser.add_argument("--list", action="store_true", help="list ops and cases, and end")
    args = parser.parse_args(argv)

    cases = load_cases()
    known = list(dict.fromkeys(c.op for c in cases))
    if unknown := [op for op in args.ops if op not in known]:
        return _give_up(f"no such op: {', '.join(unknown)}; known are {', '.join(known)}")
    cases = tuple(c for c in cases if (not args.ops or c.op in args.ops) and (not args.case or c.name in args.case))
    if not cases:
        return _give_up("no case has that name; --list shows them")
    if args.list:
        for case in cases:
            print(f"{case.op}: {case.name}")
        return 0
    for module in ("torch", "rich"):
        if not importlib.util.find_spec(module):
            return _give_up(f"needs {module}: pip install 'kestrel-kernels[bench]' torch")
    return _run(args, cases)


def _give_up(message: str) -> int:
    print(f"kestrel-kernels bench: {message}", file=sys.stderr)
    return 2


def _run(args: argparse.Namespace, cases: Sequence[Case]) -> int:
    # A compiled peer is a kernel or two: starting a pool of compilers takes longer than compiling it.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from kestrel_kernels._bench import results
    from kestrel_kernels._bench.clock import make_clock
    from kestrel_kernels._bench.measure import Outcome, measure
    from kestrel_kernels._bench.report import print_report

    found = torch.cuda.is_available()
    if args.device == "cuda" and not found:
        return _give_up("torch sees no CUDA device")
    on_cuda = found and args.device != "cpu"
    clock = make_clock("cuda" if on_cuda else "cpu")
    peers = args.peers if args.peers != "auto" else "all" if on_cuda else "eager"
    try:
        old = results.read(args.json, clock.name) if args.json else None
    except ValueError as error:
        return _give_up(str(error))
    commit = args.commit or results.commit()

    started = time.monotonic()
    outcomes: list[Outcome] = []

    def save() -> None:
        if args.json:
            ran = {(o.case.op, o.case.name) for o in outcomes if not o.missing}
            results.write(args.json, results.merge(old, clock.name, [o.row for o in outcomes if o.row], ran))

    progress = Progress(
        TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
    interrupted = False
    with progress:
        task = progress.add_task("", total=len(cases))
        try:
            for case in cases:
                progress.update(task, description=f"{case.op} {case.name}")
                if not on_cuda and not args.large and _large(case):
                    outcomes.append(Outcome(case, missing="large for a CPU, --large runs them"))
                else:
                    outcomes.append(measure(case, clock, peers, commit))
                    save()
                progress.advance(task)
        except KeyboardInterrupt:
            interrupted = True
    width = None if sys.stdout.isatty() else 150
    print_report(Console(width=width), outcomes, clock.name, on_cuda)
    print(f"{time.monotonic() - started:.0f} s" + (f", rows in {args.json}" if args.json else ""))
    return 130 if interrupted else int(any(o.failure for o in outcomes))


def _large(case: Case) -> bool:
    if case.op not in entries():
        return False
    entry = entries()[case.op](case.name)
    return entry.operations > _LARGE_OPERATIONS or entry.bytes > _LARGE_BYTES
