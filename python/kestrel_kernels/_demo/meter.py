"""Calls of ops that are bound once and run many times, and how long they took."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter_ns


@dataclass(frozen=True)
class Cost:
    """What a call must move at the least, and compute. Caching may save some of the bytes."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Call:
    op: str
    run: Callable[[], object]
    cost: Cost | Callable[[int], Cost]  # a function of the keys in the cache, for attention


class Program:
    """The calls of one forward pass. Running it makes no Python objects but the numbers of the clock."""

    def __init__(self, phase: str, calls: list[Call]) -> None:
        self.phase = phase
        self.calls = calls
        self.nanoseconds: list[float] = [0] * len(calls)
        self.keys: list[int] = []  # of each run

    def run(self, keys: int) -> None:
        nanoseconds = self.nanoseconds
        before = perf_counter_ns()
        for i, call in enumerate(self.calls):
            call.run()
            now = perf_counter_ns()
            nanoseconds[i] += now - before
            before = now
        self.keys.append(keys)

    def measure(self) -> None:
        """After the runs: finds the times of the calls where running did not."""


@dataclass
class Row:
    """All calls of an op in a phase."""

    phase: str
    op: str
    calls: int = 0
    seconds: float = 0.0
    bytes: int = 0
    flops: int = 0

    @property
    def intensity(self) -> float:
        """flop / byte"""
        return self.flops / self.bytes

    def share(self, roof: Roof) -> float:
        """The time that the roof allows at the least, over the time taken."""
        return max(self.bytes / roof.bandwidth, self.flops / roof.peak) / self.seconds

    def bound_by_memory(self, roof: Roof) -> bool:
        return self.intensity < roof.peak / roof.bandwidth


def rows(programs: Iterable[Program]) -> list[Row]:
    """In the order in which the ops first ran."""
    found: dict[tuple[str, str], Row] = {}
    for program in programs:
        for call, nanoseconds in zip(program.calls, program.nanoseconds, strict=True):
            row = found.setdefault((program.phase, call.op), Row(program.phase, call.op))
            row.calls += len(program.keys)
            row.seconds += nanoseconds * 1e-9
            for keys in program.keys:
                cost = call.cost if isinstance(call.cost, Cost) else call.cost(keys)
                row.bytes += cost.bytes
                row.flops += cost.flops
    return [row for row in found.values() if row.calls]


@dataclass(frozen=True)
class Roof:
    bandwidth: float  # byte/s, of a plain copy: read and written bytes
    peak: float  # flop/s, of a matrix product
