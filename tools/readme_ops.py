#!/usr/bin/env python3
"""Puts the table of ops into README.md, between two markers, from the modules' docstrings and `__all__`.

`make format` runs it; `--check` fails where the README is not up to date.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from stubs import modules, public_names

README = Path(__file__).resolve().parents[1] / "README.md"
PACKAGE = README.parent / "python" / "kestrel_kernels"
BEGIN = "<!-- ops: begin (made by tools/readme_ops.py) -->\n"
END = "<!-- ops: end -->\n"


def table() -> str:
    """A row for each module that defines ops; one that only renames another's is left out."""
    lines = ["| Module | What | Functions |", "|---|---|---|"]
    for module, file in modules(PACKAGE):
        tree = ast.parse(file.read_text())
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        names = [name for name in public_names(file) if name in defined]
        if names:
            first = " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split())
            lines.append(f"| `{module}` | {first} | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join([*lines, ""])


def main() -> int:
    text = README.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"README.md lacks {BEGIN.strip()} or {END.strip()}", file=sys.stderr)
        return 1
    new = before + BEGIN + table() + END + after
    if "--check" in sys.argv[1:]:
        if new != text:
            print("README.md: the table of ops is not up to date: run `make format`", file=sys.stderr)
        return int(new != text)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
