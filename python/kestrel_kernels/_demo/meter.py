"""Calls of ops that are bound once and run many times, each one timed; and what the machine could do at best."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import perf_counter, perf_counter_ns

import numpy as np

from kestrel_kernels._op import as_tensor
from kestrel_kernels.fused_linear_residual_ops import linear_into


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
        self.nanoseconds = [0] * len(calls)
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
    cores: int


def measure_roof(seconds: float = 0.2) -> Roof:
    """The best of many short copies (larger than the caches) and of many products, for `seconds` each."""
    cores = len(os.sched_getaffinity(0))
    source, target = np.ones(64 << 20, np.uint8), np.ones(64 << 20, np.uint8)
    with ThreadPoolExecutor(cores) as pool:  # NumPy copies without the interpreter's lock
        pieces = np.array_split(target, cores), np.array_split(source, cores)
        copy = _best(lambda: list(pool.map(np.copyto, *pieces)), seconds)
    a, c = np.ones((512, 512), np.float32), np.empty((512, 512), np.float32)
    product = _best(lambda: np.matmul(a, a, out=c), seconds)
    own = partial(linear_into, as_tensor(c), as_tensor(a), as_tensor(a))  # NumPy's library may not be the faster one
    return Roof(2 * source.nbytes / copy, 2 * 512**3 / min(product, _best(own, seconds)), cores)


def _best(run: Callable[[], object], seconds: float) -> float:
    times: list[float] = []
    end = perf_counter() + seconds
    while len(times) < 5 or perf_counter() < end:
        start = perf_counter()
        run()
        times.append(perf_counter() - start)
    return min(times)


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "CPU")
    except OSError:
        return "CPU"
