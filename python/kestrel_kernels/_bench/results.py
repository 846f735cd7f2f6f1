"""The results file: {"gpu", "rows": [{"op", "case", "us", "warm_us", "floor_us", "peers", "rel_err", "commit", ...}]}.

Microseconds; `us` is cold; `peers` maps a name to its cold microseconds in the same run; `rel_err` is the Frobenius
norm of the error over that of the float64 answer; `bare`, where there, names the peers that do the op's matrix products
alone, without what the op fuses with them. A run replaces the rows of the cases it ran and keeps the others.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import kestrel_kernels
from kestrel_kernels._bench.entry import load_cases

Row = dict[str, Any]
FIELDS = ("op", "case", "us", "warm_us", "floor_us", "peers", "rel_err", "commit", "date")
OPTIONAL = ("bare",)


def floor_us(bytes_moved: float, bandwidth: float, operations: float = 0, peak: float = 1) -> float:
    return max(0.5, bytes_moved / bandwidth * 1e6, operations / peak * 1e6)


def rivals(row: Row) -> dict[str, float]:
    """The peers that do all of what the op does."""
    return {name: us for name, us in row["peers"].items() if name not in row.get("bare", ())}


def rounded(value: float) -> float:
    """Four digits: more would be noise in the file's history."""
    return float(f"{value:.4g}")


def merge(
    old: dict[str, Any] | None, gpu: str, rows: Sequence[Row], ran: Collection[tuple[str, str]]
) -> dict[str, Any]:
    """`rows` and those of `old` that were not run again, in the order of the cases."""
    kept = [r for r in (old or {}).get("rows", ()) if (r["op"], r["case"]) not in ran]
    order = {(c.op, c.name): i for i, c in enumerate(load_cases())}
    everything = sorted([*kept, *rows], key=lambda r: order.get((r["op"], r["case"]), len(order)))
    return {"gpu": gpu, "rows": everything}


def read(path: Path, gpu: str) -> dict[str, Any] | None:
    """What the file holds; ValueError where that is not this machine's."""
    if not path.exists() or not path.read_text().strip():
        return None
    try:
        found = json.loads(path.read_text())
        name, rows = found["gpu"], found["rows"]
        complete = all(set(FIELDS) <= set(row) for row in rows)
    except (json.JSONDecodeError, KeyError, TypeError):
        complete = False
    if not complete:
        raise ValueError(f"{path} is not a results file")
    if name != gpu:
        raise ValueError(f"{path} holds results of {name!r}, this is {gpu!r}: name another file")
    return found


def write(path: Path, results: dict[str, Any]) -> None:
    """A line per row, so that a history of them can be read. Whole or not at all."""
    rows = [
        {name: row[name] for name in (*FIELDS, *OPTIONAL) if name in FIELDS or name in row} for row in results["rows"]
    ]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    draft.write_text(f'{{"gpu": {json.dumps(results["gpu"])}, "rows": [\n{lines}\n]}}\n')
    os.replace(draft, path)


def commit() -> str:
    """Of the source tree that the package is used from ("+": with changes), else the installed version."""
    for folder in map(Path, kestrel_kernels.__path__):
        root = folder.parent.parent
        if (root / "benchmarks" / "cases.json").exists() and (root / ".git").exists():
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                head = _git(root, "rev-parse", "--short=12", "HEAD")
                changes = _git(root, "status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results", ":!README.md")
                return head + ("+" if changes else "")
    return kestrel_kernels.__version__


def _git(root: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()
