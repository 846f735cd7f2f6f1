"""The table that a run prints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kestrel_kernels._bench.measure import HOST_TIME, Outcome
from kestrel_kernels._bench.results import Row, rivals


def figure(us: float | None) -> str:
    """Three digits, no exponent."""
    if us is None:
        return ""
    return f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 100 else f"{us:,.0f}"


def best_peer(row: Row) -> tuple[str, float] | None:
    return min(rivals(row).items(), key=lambda item: item[1], default=None)


def peers_cell(row: Row) -> str:
    peer = best_peer(row)
    shown = [f"{figure(peer[1])} {peer[0]}"] if peer else []
    shown += [f"{figure(row['peers'][name])} {name}, bare" for name in row.get("bare", ())]
    return "; ".join(shown)


def print_report(console: Console, outcomes: Sequence[Outcome], gpu: str, on_cuda: bool) -> None:
    table = Table(title=f"{gpu}, microseconds per call", title_justify="left", header_style="bold", pad_edge=False)
    table.add_column("op")
    table.add_column("case")
    for name in ("cold", "warm", "floor", "of floor", *(["target"] if on_cuda else []), "best peer"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    last = ""
    lost = missed = 0
    for outcome in outcomes:
        if not (row := outcome.row):
            continue
        host = row["op"] == HOST_TIME
        target = outcome.case.target_us if on_cuda else None
        over = target is not None and row["us"] > target
        peer = best_peer(row)
        beaten = not host and peer is not None and peer[1] < row["us"]  # one op of torch's is no rival, but a measure
        missed, lost = missed + over, lost + beaten
        verdict = Text(", ".join(["over target"] * over + ["peer wins"] * beaten) or "ok")
        verdict.stylize("red" if beaten else "yellow" if over else "green")
        cells = [
            row["op"] if row["op"] != last else "",
            row["case"],
            figure(row["us"]),
            "" if host else figure(row["warm_us"]),
            "" if host else figure(row["floor_us"]),
            "" if host else f"{100 * row['floor_us'] / row['us']:.0f}%",
            *([figure(target)] if on_cuda else []),
            peers_cell(row),
        ]
        if row["op"] != last and last:
            table.add_section()
        last = row["op"]
        table.add_row(*cells, verdict)
    if table.row_count:
        console.print(table)
        note = f"{table.row_count} cases, {lost} where a peer wins"
        console.print(note + (f", {missed} over their target" if on_cuda else ""))
    _print_rest(console, outcomes)


def _print_rest(console: Console, outcomes: Sequence[Outcome]) -> None:
    missing: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for outcome in outcomes:
        if outcome.missing:
            missing[outcome.missing][outcome.case.op] += 1
    for why, ops in missing.items():
        console.print(f"{why}: " + ", ".join(f"{op} ({count})" for op, count in ops.items()), style="dim")
    for outcome in outcomes:
        for note in outcome.notes:
            console.print(f"{outcome.case.op} {outcome.case.name}: {note}", style="dim", markup=False)
    for outcome in outcomes:
        if outcome.failure:
            text = f"FAILED {outcome.case.op} {outcome.case.name}: {outcome.failure}"
            console.print(text, style="bold red", markup=False)
