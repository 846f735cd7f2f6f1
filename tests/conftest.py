from __future__ import annotations

from typing import Any

import pytest
from support import BACKENDS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument `backend` runs for each one found here; those on a GPU are marked `cuda`."""
    if "backend" in metafunc.fixturenames:
        marks = {"cuda": [pytest.mark.cuda]}
        metafunc.parametrize("backend", [pytest.param(b, id=b.name, marks=marks.get(b.device, [])) for b in BACKENDS])


class NameFailuresAtOnce:
    """So that a run that is cut short has told of them."""

    def __init__(self, terminal: Any) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.terminal.ensure_newline()
            self.terminal.write_line(f"FAILED {report.nodeid} ({report.when})")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal:  # workers of xdist have none
        config.pluginmanager.register(NameFailuresAtOnce(terminal))
