"""What the writers of generated sources share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[1]


def fail(path: Path, what: str) -> NoReturn:
    raise SystemExit(f"{path.relative_to(ROOT)}: {what}")


def write(folder: Path, files: Mapping[str, Sequence[str]]) -> None:
    """These files, by their lines, and no others. One whose contents would not change is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()
    for name, lines in files.items():
        path, text = folder / name, "\n".join([*lines, ""])
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
