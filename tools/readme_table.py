#!/usr/bin/env python3
"""Puts the table of figures into README.md, between two markers, from benchmarks/results/h200.json.

Run it after each bench whose results are committed; `--check` fails where the README is not up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- figures: begin (made by tools/readme_table.py) -->"
END = "<!-- figures: end -->"
HOST_TIME = "host_time"
CASES = ROOT / "benchmarks/cases.json"


def figure(us: float) -> str:
    return f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 100 else f"{us:,.0f}"


def recorded_peers() -> dict[tuple[str, str], float]:
    """The fastest that others were seen to do, for each case where one was."""
    rows = json.loads(CASES.read_text())["rows"]
    return {(row["op"], row["case"]): row["best_peer_us"] for row in rows if row["best_peer_us"] is not None}


def fastest_others(row: dict[str, Any], recorded: dict[tuple[str, str], float]) -> list[tuple[str, float]]:
    """The fastest other implementation of the same run, then what was recorded of one elsewhere if that is less."""
    rivals = {name: us for name, us in row["peers"].items() if name not in row.get("bare", ())}
    found = [min(rivals.items(), key=lambda item: item[1])] if rivals else []
    place = row["op"], row["case"]
    if place in recorded and recorded[place] < min(rivals.values(), default=float("inf")):
        found.append(("recorded", recorded[place]))
    return found


def table(results: dict[str, Any], recorded: dict[tuple[str, str], float]) -> str:
    """Markdown. Losses are shown as such: the faster of ours and the best peer is bold."""
    rows = [r for r in results["rows"] if r["op"] != HOST_TIME]
    host = [r for r in results["rows"] if r["op"] == HOST_TIME]
    any_bare = any(row.get("bare") for row in rows)
    lines = [
        f"<details><summary>All {len(rows)} cases, in microseconds</summary>",
        "",
        f"{results['gpu']}, microseconds per call. Cold: no input is in a cache (of linear, no weights are); warm: the "
        "same inputs again and again; floor: what the bandwidth of memory and the matrix units allow. Best peer: the "
        "fastest other implementation in the same run, and one recorded at another time where that was faster"
        + ("; bare product: the matrix products alone, without what the op does besides." if any_bare else "."),
        "",
        "| op | case | cold | warm | floor | of floor | best peer |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        shown = fastest_others(row, recorded)
        fastest = min([row["us"], *(us for _, us in shown)])
        bold = {
            us: f"**{figure(us)}**" if us == fastest else figure(us) for us in (row["us"], *(us for _, us in shown))
        }
        ours = bold[row["us"]]
        bare = [f"bare product {figure(row['peers'][name])} {name}" for name in row.get("bare", ())]
        other = "; ".join([*(f"{bold[us]} {name}" for name, us in shown), *bare])
        share = f"{100 * row['floor_us'] / row['us']:.0f}%"
        cells = (row["op"], row["case"], ours, figure(row["warm_us"]), figure(row["floor_us"]), share, other)
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "</details>"]
    if host:
        calls = "; ".join(
            f"{row['case'].partition(' ')[0]} {figure(row['us'])}"
            + "".join(f" ({name}: {figure(us)})" for name, us in row["peers"].items())
            for row in host
        )
        lines += ["", f"Host time of one eager call on CUDA tensors, microseconds: {calls}."]
    return "\n".join(lines)


def with_table(readme: str, text: str) -> str:
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no pair of markers: {BEGIN!r}, {END!r}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where the README would change")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/h200.json", metavar="FILE")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    args = parser.parse_args(argv)
    try:
        results = json.loads(args.results.read_text()) if args.results.exists() else None
        text = table(results, recorded_peers()) if results else "No results are committed yet."
        old = args.readme.read_text()
        new = with_table(old, text)
    except (OSError, ValueError, KeyError) as error:
        print(f"readme_table: {args.readme}, {args.results}: {error}", file=sys.stderr)
        return 2
    if old == new:
        return 0
    if args.check:
        print(f"{args.readme} is out of date: run tools/readme_table.py", file=sys.stderr)
        return 1
    args.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
