"""The command `kestrel-kernels`. Each subcommand is a module with `main(argv)`, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": ("kestrel_kernels._demo.command", "a language model answers a prompt through the ops of this package"),
    "info": ("kestrel_kernels._info", "versions, folders for builds against the package, what this machine offers"),
    "bench": ("kestrel_kernels._bench", "time the ops against their floor and against other libraries"),
    "tune": ("kestrel_kernels._tune", "find the fastest tiles of the products of experts for a model's shape"),
}


def _parser() -> argparse.ArgumentParser:
    from kestrel_kernels import __version__

    listing = "\n".join(f"  {name:8}{what}" for name, (_, what) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="kestrel-kernels",
        usage="kestrel-kernels [-h] [--version] COMMAND ...",
        description=f"Inference kernels for NVIDIA Hopper GPUs, with CPU twins.\n\ncommands:\n{listing}",
        epilog="'kestrel-kernels COMMAND --help' says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kestrel-kernels {__version__}")
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS, metavar="COMMAND")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status; 2 for bad arguments, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = _parser().parse_args(argv[:1]).command
    if isinstance(sys.stdout, io.TextIOWrapper):  # an output that lacks a character shows '?', and goes on
        sys.stdout.reconfigure(errors="replace")
    try:
        return importlib.import_module(COMMANDS[command][0]).main(argv[1:]) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output is gone: what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
