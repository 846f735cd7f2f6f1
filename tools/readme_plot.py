#!/usr/bin/env python3
"""Draws the README's picture of the figures, benchmarks/results/h200.svg, from benchmarks/results/h200.json.

Run it after each bench whose results are committed; `--check` fails where the picture is of other results.
"""

from __future__ import annotations

import argparse
import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

from readme_table import HOST_TIME, ROOT, fastest_others, recorded_peers

OURS, OTHERS, INK, LINES = "#1f6fb2", "#c2571a", "#1c2430", "#e4e8ee"


def source(rows: list[dict[str, Any]], recorded: dict[tuple[str, str], float]) -> str:
    """What the picture holds of the results it was drawn from."""
    drawn = [(row["op"], row["case"], row["us"], row["floor_us"], fastest_others(row, recorded)) for row in rows]
    return "figures " + sha256(json.dumps(drawn).encode()).hexdigest()[:16]


def draw(file: Path, gpu: str, rows: list[dict[str, Any]], recorded: dict[tuple[str, str], float]) -> None:
    """A line for each op, a dot for each case: its speed over that of the fastest other, its share of the floor."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kestrel", "font.size": 9})
    ops = list(dict.fromkeys(row["op"] for row in rows))
    figure = Figure(figsize=(10, 1.2 + 0.27 * len(ops)), layout="constrained", facecolor="white")
    speed, share = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for side, recorded_only, label in (
        ("white", True, "recorded elsewhere"),
        (OURS, False, "measured in the same run"),
    ):
        points = [
            (min(us for _, us in found) / row["us"], ops.index(row["op"]))
            for row in rows
            if (found := fastest_others(row, recorded)) and (found[-1][0] == "recorded") == recorded_only
        ]
        colours = [OURS if ratio >= 1 else OTHERS for ratio, _ in points]
        speed.scatter(
            [ratio for ratio, _ in points], [at for _, at in points], s=22, linewidths=1.2, alpha=0.8, zorder=3,
            facecolors=side if recorded_only else colours, edgecolors=colours,
        )  # fmt: skip
        speed.scatter([], [], s=22, facecolors=side, edgecolors=OURS, label=f"the fastest other, {label}")
    speed.axvline(1, color=INK, lw=1, zorder=2)
    speed.set(xscale="log", xlabel="times as fast as the fastest other implementation (left of 1: slower)")
    ticks = [t for t in (0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if speed.get_xlim()[0] <= t <= speed.get_xlim()[1]]
    speed.set_xticks(ticks, [f"{t:g}" for t in ticks])
    speed.minorticks_off()
    speed.set_yticks(range(len(ops)), ops)
    speed.set_ylim(len(ops) - 0.5, -0.5)
    share.scatter(
        [100 * row["floor_us"] / row["us"] for row in rows], [ops.index(row["op"]) for row in rows], s=22, color=OURS,
        alpha=0.5, linewidths=0, zorder=3,
    )  # fmt: skip
    share.set(xlim=(0, 100), xlabel="% of what memory and matrix units allow (cold)")
    share.tick_params(left=False)
    for axes in (speed, share):
        axes.grid(color=LINES)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    figure.legend(*speed.get_legend_handles_labels(), frameon=False, loc="outside upper left", ncols=2)
    figure.suptitle(f"{gpu}: {len(rows)} cases", x=0.99, ha="right", fontsize=9, color=INK)
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Description": source(rows, recorded)})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="draw nothing; status 1 where the picture is out of date")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/h200.json", metavar="FILE")
    args = parser.parse_args(argv)
    picture = args.results.with_suffix(".svg")
    try:
        results, recorded = json.loads(args.results.read_text()), recorded_peers()
        rows = [row for row in results["rows"] if row["op"] != HOST_TIME]
        if args.check:
            if picture.exists() and source(rows, recorded) in picture.read_text():
                return 0
            print(f"{picture} is out of date: run tools/readme_plot.py", file=sys.stderr)
            return 1
        draw(picture, results["gpu"], rows, recorded)
    except (OSError, ValueError, KeyError) as error:
        print(f"readme_plot: {args.results}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
