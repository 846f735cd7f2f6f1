"""What the ops did, as a table in the terminal and as one HTML page with a roofline plot (Williams et al. 2009)."""

from __future__ import annotations

import html
import io
import itertools
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from kestrel_kernels._demo.errors import DemoError
from kestrel_kernels._demo.meter import Roof, Row

_NOTE = (
    "GB/s counts the bytes that a call must move, TFLOP/s what it must compute. Roof: the time that the slower of "
    "the two takes at the machine's best, over the time taken; what lies in a cache can be faster than memory."
)


@dataclass
class Run:
    """What is shown besides the rows."""

    model: str
    prompt: str
    answer: str
    settings: str
    prompt_tokens: int
    tokens: int
    prefill_seconds: float
    decode_seconds: float
    load_seconds: float
    device: str
    roof: Roof
    rows: list[Row]

    @property
    def speed(self) -> str:
        prefill = f"{self.prompt_tokens} prompt tokens in {self.prefill_seconds * 1e3:.0f} ms"
        if self.tokens < 2 or not self.decode_seconds:
            return prefill
        rate = (self.tokens - 1) / self.decode_seconds
        return f"{prefill}, then {rate:.1f} tokens/s ({self.tokens} tokens); loaded in {self.load_seconds:.2f} s"

    @property
    def machine(self) -> str:
        return (
            f"{self.device}; roof: copy {self.roof.bandwidth / 1e9:.1f} GB/s, "
            f"matrix product {self.roof.peak / 1e12:.3f} TFLOP/s"
        )

    def sections(self) -> list[tuple[str, float, list[Row], float]]:
        """(phase, its wall time, its ops, what was spent outside of them)"""
        found = []
        for phase, wall in (("prefill", self.prefill_seconds), ("decode", self.decode_seconds)):
            if rows := [row for row in self.rows if row.phase == phase]:
                found.append((phase, wall, rows, max(wall - sum(row.seconds for row in rows), 0.0)))
        return found


_COLUMNS = ("op", "calls", "us/call", "ms", "share", "rate", "roof", "bound by")


def _cells(row: Row, wall: float, roof: Roof) -> tuple[str, ...]:
    memory = row.bound_by_memory(roof)
    rate = f"{row.bytes / row.seconds / 1e9:.1f} GB/s" if memory else f"{row.flops / row.seconds / 1e12:.3f} TFLOP/s"
    return (
        row.op,
        f"{row.calls:,}",
        f"{row.seconds / row.calls * 1e6:,.1f}",
        _milliseconds(row.seconds),
        f"{row.seconds / wall:.1%}",
        rate,
        f"{row.share(roof):.0%}",
        "memory" if memory else "arithmetic",
    )


def _rest(seconds: float, wall: float) -> tuple[str, ...]:
    return ("between ops", "", "", _milliseconds(seconds), f"{seconds / wall:.1%}", "", "", "")


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:,.0f}"


def print_table(run: Run, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    shown = len(_COLUMNS) - 1  # the unit of the rate says what the last column says
    for i, name in enumerate(_COLUMNS[:shown]):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for phase, wall, rows, rest in run.sections():
        table.add_section()
        table.add_row(phase, "", "", _milliseconds(wall), style="bold")
        for row in rows:
            table.add_row(*_cells(row, wall, run.roof)[:shown])
        table.add_row(*_rest(rest, wall)[:shown], style="dim")
    console.print(table)
    console.print(run.speed, style="bold", highlight=False)
    console.print(run.machine, style="dim", highlight=False)


def write_page(run: Run, path: Path) -> None:
    """One file: no scripts, no links, the plot inside as SVG."""
    try:
        path.write_text(_page(run), encoding="utf-8")
    except OSError as error:
        raise DemoError(f"report {path}: {error.strerror}") from None


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff;
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: 0 }
h2 { font-size: 1.15rem; margin-top: 2rem }
.muted { color: #5b6675; font-size: .9rem }
.talk { background: #f4f6f9; border-radius: .5rem; padding: .75rem 1rem; white-space: pre-wrap }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e4e8ee; white-space: nowrap }
th { border-bottom: 2px solid #aab4c2 }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left }
tr.phase td { font-weight: 600; background: #f4f6f9 }
tr.rest td { color: #5b6675 }
svg { width: 100%; height: auto }
.scroll { overflow-x: auto }
"""


def _page(run: Run) -> str:
    def line(cells: tuple[str, ...], kind: str = "td", style: str = "") -> str:
        return f"<tr{style}>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    body = []
    for phase, wall, rows, rest in run.sections():
        body.append(line((phase, "", "", _milliseconds(wall), "", "", "", ""), style=' class="phase"'))
        body += [line(_cells(row, wall, run.roof)) for row in rows]
        body.append(line(_rest(rest, wall), style=' class="rest"'))
    table = "\n".join(body)
    text = {
        name: html.escape(getattr(run, name)) for name in ("model", "prompt", "answer", "settings", "speed", "machine")
    }
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>kestrel-kernels demo: {text["model"]}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{text["model"]}</h1>
<p class="muted">{text["settings"]}<br>{text["machine"]}</p>
<div class="talk"><b>{text["prompt"]}</b>
{text["answer"]}</div>
<p>{text["speed"]}</p>
<h2>Every op, against the roof</h2>
<div class="scroll"><table>
<thead>{line(_COLUMNS, "th")}</thead>
<tbody>
{table}
</tbody>
</table></div>
<p class="muted">{_NOTE}</p>
<h2>Roofline</h2>
<p class="muted">What an op attains, over what it computes for each byte. The area of a dot is the time spent; ops that
compute nothing (embedding) are left out.</p>
{_plot(run)}
</body>
</html>
"""


def _plot(run: Run) -> str:
    """Attained flop/s over flop per byte, both logarithmic, below the two lines that the machine allows."""
    from matplotlib.figure import Figure

    rows = [row for row in run.rows if row.flops]
    roof = run.roof
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    ridge = roof.peak / roof.bandwidth
    left = min([row.intensity for row in rows] + [ridge]) / 3
    right = max([row.intensity for row in rows] + [ridge]) * 6
    line = f"roof: copy {roof.bandwidth / 1e9:.1f} GB/s, matrix product {roof.peak / 1e12:.3f} TFLOP/s"
    corners = [left * roof.bandwidth / 1e9, roof.peak / 1e9, roof.peak / 1e9]
    axes.plot([left, ridge, right], corners, color="#1c2430", lw=1.5, label=line)
    colours = {"prefill": "#c2571a", "decode": "#1f6fb2"}
    longest = max((row.seconds for row in rows), default=1.0)
    for phase, group in itertools.groupby(rows, key=lambda row: row.phase):
        members = list(group)
        axes.scatter(
            [row.intensity for row in members], [row.flops / row.seconds / 1e9 for row in members],
            s=[30 + 300 * row.seconds / longest for row in members], color=colours[phase], alpha=0.75, label=phase,
            edgecolors="white",
        )  # fmt: skip
        above = 5 if phase == "prefill" else -11
        for row in members:
            axes.annotate(row.op, (row.intensity, row.flops / row.seconds / 1e9), xytext=(7, above),
                          textcoords="offset points", color=colours[phase])  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(left, right), xlabel="flop per byte", ylabel="GFLOP/s")
    axes.set_ylim(bottom=axes.get_ylim()[0] / 2, top=roof.peak / 1e9 * 2)
    axes.grid(which="major", color="#e4e8ee")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg", metadata={"Date": None, "Creator": None})
    svg = drawing.getvalue()
    return svg[svg.index("<svg") :]
