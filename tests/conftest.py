from __future__ import annotations

import pytest
from support import BACKENDS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument `backend` runs for each one found here; those on a GPU are marked `cuda`."""
    if "backend" in metafunc.fixturenames:
        marks = {"cuda": [pytest.mark.cuda]}
        metafunc.parametrize("backend", [pytest.param(b, id=b.name, marks=marks.get(b.device, [])) for b in BACKENDS])
