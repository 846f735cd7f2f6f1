"""`kestrel-kernels tune moe`: the fastest tile of the products of experts for each number of tokens.

Every tile that is compiled for the dtype is checked against float64 and then measured as the bench does it: many calls
in one CUDA graph, on arguments that no cache holds. It makes each product alone, up with its gate, and both of a whole
layer (`fused_moe`), which decides between block sizes. The results file says what was measured; what it holds is not
measured again. With KESTREL_CUTE_MOE_JIT=1, a source checkout and an nvcc further tiles are compiled and measured too;
a config file names them once they stand in ops/moe/tiles.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kestrel_kernels import _library, _moe_config, _moe_jit
from kestrel_kernels._moe_config import KINDS, SIZES, CuteMoeConfig, tiles

if TYPE_CHECKING:
    from rich.console import Console

    from kestrel_kernels._bench.clock import Clock
    from kestrel_kernels._bench.ops.moe import MoeProduct

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
QUICK_TOKENS = (1, 4, 16, 64, 740, 2048)
ENTRIES = {"up": "moe_up", "down": "moe_down", "layer": "fused_moe"}
WRONG = "wrong result"
# Not worth a graph: a single call that takes as many times the best so far, and as many microseconds for its launch.
HOPELESS, LAUNCH = 3, 100
_EPILOG = """\
examples:
  kestrel-kernels tune moe --num-tokens 8 16 32 --quick --output results.json
  kestrel-kernels tune moe --experts 8 --hidden 4096 --inner 14336 --topk 2 --dtype bf16 fp8 --write-config
Exit status: 0, 1 where a tile's result is wrong, 2 where the command cannot run, 3 at the end of --gpu-time-limit.
"""


@dataclasses.dataclass(frozen=True)
class Layer:
    experts: int
    hidden: int
    inner: int
    topk: int
    dtype: str

    def case(self, tokens: int) -> str:
        return f"{tokens} {self.dtype} E{self.experts} H{self.hidden} I{self.inner} k{self.topk}"


@dataclasses.dataclass(frozen=True)
class Key:
    """One measurement."""

    layer: Layer
    tokens: int
    kind: str  # "up", "down", or "layer": both products in this tile
    config: CuteMoeConfig


@dataclasses.dataclass(frozen=True)
class Result:
    us: float  # cold; of a hopeless tile of a single call
    rel_err: float
    right: bool
    note: str = ""


class Results:
    """The file: {"gpu", "rows": [a line for each measurement]}, written whole after each."""

    def __init__(self, path: Path | None, gpu: str) -> None:
        self.path, self.gpu = path, gpu
        self.rows: dict[Key, Result] = {}
        if path is None or not path.exists() or not path.read_text().strip():
            return
        try:
            found = json.loads(path.read_text())
            name = found["gpu"]
            for row in found["rows"]:
                self._add(dict(row))
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{path} is not a results file of the tuner") from None
        if name != gpu:
            raise ValueError(f"{path} holds results of {name!r}, this is {gpu!r}: name another file")

    def _add(self, row: dict[str, Any]) -> None:
        layer = Layer(*(row.pop(f.name) for f in dataclasses.fields(Layer)))
        config = CuteMoeConfig(**row.pop("tile"), dtype=layer.dtype)
        key = Key(layer, row.pop("tokens"), row.pop("kind"), config)
        self.rows[key] = Result(**row)

    def put(self, key: Key, result: Result) -> None:
        self.rows[key] = result
        if self.path is None:
            return
        rows = []
        for k, r in self.rows.items():
            fields = {**vars(k.layer), "tokens": k.tokens, "kind": k.kind, "tile": tile_fields(k.config), **vars(r)}
            rows.append("  " + json.dumps(fields))
        _write(self.path, f'{{"gpu": {json.dumps(self.gpu)}, "rows": [\n' + ",\n".join(rows) + "\n]}\n")


def tile_fields(config: CuteMoeConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in (*SIZES, "kernel_type")}


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(text)
    os.replace(draft, path)


class Tuner:
    """Measures, and remembers the best of each product."""

    def __init__(self, clock: Clock, results: Results) -> None:
        self.clock, self.results = clock, results
        self._prepared: tuple[Any, ...] = ()

    def measure(self, key: Key) -> Result:
        import torch

        from kestrel_kernels._bench.entry import frobenius

        entry, sets, want = self._prepare(key)
        best = min((r.us for k, r in self.results.rows.items() if self._rivals(k, key) and r.right), default=1e30)
        tiled = [entry.tiled(s, key.config) for s in sets]
        try:
            with torch.no_grad():
                entry.poison(tiled[0])
                error = frobenius(entry.results(tiled[0], entry.bound(tiled[0])()), want)
                if not error <= entry.tolerance:
                    return Result(0.0, _rounded(error), False, WRONG)
                made_by = _library.load().moe_last_kernel()
                if self.clock.device == "cuda" and made_by != key.config.kernel_type:
                    return Result(0.0, _rounded(error), False, f"does not take this shape: the {made_by} kernel did it")
                calls = [entry.bound(s) for s in tiled]
                once = self.clock.once(calls[0])
                if once > HOPELESS * best + LAUNCH:
                    return Result(_rounded(once), _rounded(error), True, "a single call")
                return Result(_rounded(self.clock.cold(calls)), _rounded(error), True)
        except (RuntimeError, ValueError) as problem:
            return Result(0.0, 0.0, False, (str(problem).strip().splitlines() or [type(problem).__name__])[0][:300])

    @staticmethod
    def _rivals(a: Key, b: Key) -> bool:
        return (a.layer, a.tokens, a.kind) == (b.layer, b.tokens, b.kind)

    def _prepare(self, key: Key) -> tuple[MoeProduct, list[Any], list[Any]]:
        """The product, its sets of arguments, and the answer for the first; kept for the next tile."""
        from kestrel_kernels._bench.entry import Maker, entries, nbytes

        what = (key.layer, key.tokens, key.kind)
        if not self._prepared or self._prepared[0] != what:
            self._prepared = ()  # memory for the next
            entry: Any = entries()[ENTRIES[key.kind]](key.layer.case(key.tokens))
            make = Maker(self.clock.device)
            first = entry.inputs(make)
            count = self.clock.sets_for(nbytes(first), entry.bytes)
            sets = [first, *(entry.inputs(make) for _ in range(count - 1))]
            self._prepared = (what, (entry, sets, [r.double() for r in entry.reference(first)]))
        prepared: tuple[MoeProduct, list[Any], list[Any]] = self._prepared[1]
        return prepared


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


@dataclasses.dataclass(frozen=True)
class Winner:
    tokens: int
    up: CuteMoeConfig
    down: CuteMoeConfig
    up_us: float
    down_us: float
    layer_us: float  # in one of the two tiles


def winners(rows: dict[Key, Result], layer: Layer, tiles: Collection[CuteMoeConfig] | None = None) -> list[Winner]:
    """For each token count the best tile of either product (of those named), of the block size in which the layer takes
    the least; where a layer is missing, both products. Counts for which a product has no right result have none."""
    best: dict[tuple[int, int, str], tuple[float, CuteMoeConfig]] = {}
    for key, result in rows.items():
        if key.layer == layer and result.right and (tiles is None or key.config in tiles):
            place = (key.tokens, key.config.block_m, key.kind)
            if place not in best or result.us < best[place][0]:
                best[place] = (result.us, key.config)
    blocks: dict[int, list[Winner]] = {}
    for tokens, block_m in sorted({place[:2] for place in best}):
        up, down, both = (best.get((tokens, block_m, kind)) for kind in ENTRIES)
        if up and down:
            new = Winner(tokens, up[1], down[1], up[0], down[0], both[0] if both else math.inf)
            blocks.setdefault(tokens, []).append(new)
    found = []
    for some in blocks.values():
        layers = all(w.layer_us < math.inf for w in some)
        found.append(min(some, key=lambda w: w.layer_us if layers else w.up_us + w.down_us))
    return found


def config_path(folder: Path, layer: Layer, gpu: str) -> Path:
    """One for each model shape, dtype and GPU."""
    shape = f"E{layer.experts}_H{layer.hidden}_I{layer.inner}"
    return folder / f"{shape}_{layer.dtype}_{gpu.replace(' ', '_').replace('/', '_')}.json"


def write_config(folder: Path, layer: Layer, gpu: str, won: Sequence[Winner]) -> Path:
    """A line for each token count, over what an older file says of others."""
    path = config_path(folder, layer, gpu)
    head = {
        "gpu": gpu, "num_experts": layer.experts, "hidden_size": layer.hidden, "intermediate_size": layer.inner,
        "dtype": layer.dtype, "topk": layer.topk,
    }  # fmt: skip
    old = json.loads(path.read_text()) if path.exists() else {}
    points: dict[int, Any] = {int(n): both for n, both in old.get("tokens", {}).items()}
    points |= {w.tokens: {"up": tile_fields(w.up), "down": tile_fields(w.down)} for w in won}
    lines = [f'  "{n}": {json.dumps(points[n])}' for n in sorted(points)]
    _write(path, json.dumps(head)[:-1] + ', "tokens": {\n' + ",\n".join(lines) + "\n}}\n")
    return path


def keys(layers: Sequence[Layer], tokens: Sequence[int], further: Sequence[CuteMoeConfig]) -> Iterator[Key]:
    """The present choice first: what is far from it is given up early."""
    for layer in layers:
        candidates = [tile for tile in (*tiles(), *further) if tile.dtype == layer.dtype]
        for count in tokens:
            chosen = _moe_config.choose(count, layer.experts, layer.hidden, layer.inner, layer.dtype)
            for kind, tile in zip(ENTRIES, (*chosen, chosen[0]), strict=True):
                first = next(c for c in candidates if tiles().get(c) == tile)
                others = [c for c in candidates if c != first]
                yield from (Key(layer, count, kind, config) for config in (first, *others))


def compile_further(dtypes: Collection[str]) -> list[CuteMoeConfig]:
    """The tiles beyond those of the build which compile; ValueError where none can be compiled here."""
    _moe_jit.root()
    _moe_jit.nvcc()
    wanted = [tile for dtype in dtypes for tile in _moe_jit.candidates(dtype) if tile not in tiles()]
    found = []
    for i, tile in enumerate(wanted):
        print(f"\rtile {i + 1} of {len(wanted)}: {tile!s:<48}", end="", file=sys.stderr, flush=True)
        try:
            _moe_jit.build(tile)
            found.append(tile)
        except ValueError as problem:
            print(f"\r{tile} does not compile: {problem}", file=sys.stderr)
    print(f"\r{len(found)} further tiles{'':<48}", file=sys.stderr)
    return found


def print_winners(console: Console, layer: Layer, gpu: str, won: Sequence[Winner]) -> None:
    from rich.table import Table

    title = f"{gpu}, E{layer.experts} H{layer.hidden} I{layer.inner} k{layer.topk} {layer.dtype}, microseconds"
    table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False)
    for name in ("tokens", "up", "", "down", "", "layer"):
        table.add_column(name, justify="left" if name in KINDS else "right", no_wrap=True)
    for w in won:
        whole = "" if w.layer_us == math.inf else f"{w.layer_us:.4g}"
        table.add_row(str(w.tokens), str(w.up), f"{w.up_us:.4g}", str(w.down), f"{w.down_us:.4g}", whole)
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "kestrel-kernels tune", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("moe",), metavar="moe", help="what to tune")
    parser.add_argument("--num-tokens", type=_positive, nargs="+", metavar="T", help="default: 1 to 16384")
    parser.add_argument("--experts", type=_positive, default=64, metavar="E")
    parser.add_argument("--hidden", type=_positive, default=2048, metavar="H")
    parser.add_argument("--inner", type=_positive, default=1024, metavar="I")
    parser.add_argument("--topk", type=_positive, default=8, metavar="K", help="experts of a token")
    parser.add_argument("--dtype", choices=("bf16", "fp8"), nargs="+", default=["bf16"], help="fp16 goes by bf16")
    parser.add_argument("--quick", action="store_true", help="fewer token counts (unless given) and repetitions")
    parser.add_argument("--output", type=Path, metavar="FILE", help="results; what it holds is not measured again")
    parser.add_argument(
        "--write-config", type=Path, nargs="?", const=_moe_config._folder, metavar="FOLDER",
        help="put the winners into FOLDER (default: the package's configs)",
    )  # fmt: skip
    parser.add_argument("--gpu-time-limit", type=float, metavar="SECONDS", help="begin no measurement after as long")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda; cpu: the twins, for a trial"
    )
    parser.add_argument("--list", action="store_true", help="list the compiled tiles, and end")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text}")
    return int(text)


def _give_up(message: str) -> int:
    print(f"kestrel-kernels tune: {message}", file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.topk > args.experts:
        return _give_up(f"--topk must be at most --experts, got {args.topk} of {args.experts}")
    if args.list:
        for tile in tiles():
            print(tile)
        return 0
    for module in ("torch", "rich"):
        if not importlib.util.find_spec(module):
            return _give_up(f"needs {module}: pip install 'kestrel-kernels[bench]' torch")
    import torch

    on_cuda = args.device == "cuda"
    if on_cuda and not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9):
        return _give_up("needs a Hopper GPU; --device cpu runs it over the CPU twins, to which all tiles are alike")
    if args.write_config and not on_cuda:
        return _give_up("--write-config needs figures of a GPU")
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from kestrel_kernels._bench.clock import make_clock

    try:
        further = compile_further(dict.fromkeys(args.dtype)) if _moe_jit.enabled() and args.device == "cuda" else []
    except ValueError as error:
        return _give_up(str(error))
    clock = make_clock(args.device)
    if args.quick:
        clock.hurry()
    try:
        results = Results(args.output, clock.name)
    except ValueError as error:
        return _give_up(str(error))
    layers = [Layer(args.experts, args.hidden, args.inner, args.topk, dtype) for dtype in dict.fromkeys(args.dtype)]
    counts = sorted(set(args.num_tokens or (QUICK_TOKENS if args.quick else TOKENS)))
    todo = list(keys(layers, counts, further))
    tuner = Tuner(clock, results)
    started = time.monotonic()
    left = 0
    console = Console(width=None if sys.stdout.isatty() else 160)
    progress = Progress(
        TextColumn("{task.description:<64}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
    with progress:
        task = progress.add_task("", total=len(todo))
        for i, key in enumerate(todo):
            if key not in results.rows:
                if args.gpu_time_limit is not None and time.monotonic() - started > args.gpu_time_limit:
                    left = sum(k not in results.rows for k in todo[i:])
                    break
                progress.update(task, description=f"{key.tokens} tokens {key.kind} {key.config}")
                results.put(key, tuner.measure(key))
            progress.advance(task)
    todo_keys = set(todo)
    failed = {key: result for key, result in results.rows.items() if not result.right and key in todo_keys}
    for layer in layers:
        begun = {key.tokens for key in todo if key.layer == layer and key not in results.rows}
        complete = {key: r for key, r in results.rows.items() if key.tokens in set(counts) - begun}
        won = winners(complete, layer)
        print_winners(console, layer, clock.name, won)
        if args.write_config and (written := winners(complete, layer, tiles())):
            console.print(f"wrote {write_config(args.write_config, layer, clock.name, written)}", markup=False)
            missing = dict.fromkeys(tile for w in won for tile in (w.up, w.down) if tile not in tiles())
            for tile in missing:
                console.print(f"faster, but not in ops/moe/tiles.json: {tile}", markup=False)
    for key, result in failed.items():
        text = f"{key.layer.case(key.tokens)} {key.kind}, {key.config}: {result.note}"
        if result.note == WRONG:
            console.print(f"FAILED {text}, rel_err {result.rel_err}", style="bold red", markup=False)
        else:
            console.print(f"left out: {text}", style="dim", markup=False)
    print(f"{time.monotonic() - started:.0f} s" + (f", results in {args.output}" if args.output else ""))
    if left:
        goes_on = f"; the same command goes on from {args.output}" if args.output else ""
        print(f"the time limit is over with {left} measurements to go{goes_on}")
        return 3
    return int(any(result.note == WRONG for result in failed.values()))
