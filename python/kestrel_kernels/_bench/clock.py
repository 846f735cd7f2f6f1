"""How long a call takes: cold (its data in no cache), warm (the same data again), and on the caller's thread.

On CUDA many calls stand in one CUDA graph, captured from plain eager calls, so the launch overhead of the host is out
of the figure and dependent launches overlap as they do in a captured model. Cold calls go round over sets of arguments
that together exceed three times the L2; where that would take too many sets, each is used once and a read of a large
array empties the cache before each replay. A figure is the median of the replays (on a CPU, which others use too, the
least of several passes), divided by the calls.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

Call = Callable[[], Any]


class Clock:
    """Of one device. `name` is what the results are filed under."""

    device: str
    name: str
    cache: int  # bytes of the last cache
    most_sets: int
    most_bytes: int  # of all sets together

    def sets_for(self, set_bytes: int, touched: int) -> int:
        """How many sets, of which a call touches some bytes, go round before one comes from a cache."""
        wanted = -(-3 * self.cache // max(min(touched, set_bytes), 1)) + 1
        return max(2, min(wanted, self.most_sets, self.most_bytes // max(set_bytes, 1)))

    def time(self, calls: Sequence[Call]) -> tuple[float, float]:
        """Microseconds of a call, cold and warm; a call per set of arguments, the first of which serves the warm."""
        raise NotImplementedError

    def cold(self, calls: Sequence[Call]) -> float:
        """The first of them alone."""
        raise NotImplementedError

    def hurry(self) -> None:
        """From now on fewer repetitions."""
        raise NotImplementedError

    def once(self, call: Call) -> float:
        """Microseconds of a single call, its launch included: a first idea."""
        raise NotImplementedError

    def synchronize(self) -> None:
        pass

    def bandwidth(self) -> float:
        """Bytes per second from memory."""
        raise NotImplementedError

    def peak(self, products: str) -> float:
        """Operations per second of a large matrix product, sustained."""
        raise NotImplementedError

    def host_time(self, call: Call, batches: int = 31, batch: int = 200) -> float:
        """Microseconds of the caller's thread per call, back to back."""
        call()
        took = []
        with _no_garbage_collection():
            for _ in range(batches):
                self.synchronize()
                start = time.perf_counter_ns()
                for _ in range(batch):
                    call()
                took.append((time.perf_counter_ns() - start) / batch)
        self.synchronize()
        return statistics.median(took) / 1e3


class CudaClock(Clock):
    device = "cuda"
    most_sets = 400
    most_bytes = 12 << 30
    replays = 17

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        self.name = properties.name
        self.cache = getattr(properties, "L2_cache_size", 0) or 60 << 20
        self._stream = torch.cuda.Stream()
        self._peaks: dict[str, float] = {}
        self._far = torch.zeros(1 << 28, device="cuda")  # 1 GiB
        self._wake()
        self._flush_us = self._events(self._flush, 5)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def hurry(self) -> None:
        self.replays = 5

    def _wake(self, seconds: float = 0.4) -> None:
        """Until the clocks stand where they stay under load."""
        a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(10):
                a @ a
            torch.cuda.synchronize()

    def _flush(self) -> None:
        self._far.sum()

    def _events(self, call: Call, count: int) -> float:
        """Median microseconds on the device of single calls."""
        pairs = []
        for _ in range(count):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e3

    def _graph(self, calls: Sequence[Call], count: int) -> torch.cuda.CUDAGraph:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for call in calls[:2]:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # What a call returns stays alive for a round: results of functional forms rotate as the sets do.
        alive: collections.deque[Any] = collections.deque(maxlen=len(calls))
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            for i in range(count):
                alive.append(calls[i % len(calls)]())
        return graph

    def _replay(self, graph: torch.cuda.CUDAGraph, count: int, cold: bool) -> float:
        graph.replay()
        torch.cuda.synchronize()
        start = time.perf_counter()
        graph.replay()
        launch_us = (time.perf_counter() - start) * 1e6
        torch.cuda.synchronize()
        once_us = (time.perf_counter() - start) * 1e6
        for _ in range(min(50, int(5e3 / once_us))):
            graph.replay()
        torch.cuda.synchronize()
        # The device is kept busy while the host submits the graph: the events see no gap before its first kernel.
        flushes = min(12, 1 + int(1.5 * launch_us / self._flush_us))
        pairs = []
        for _ in range(self.replays if once_us < 1e5 else 5):
            for _ in range(flushes):
                self._flush()
            if not cold:
                graph.replay()
            pairs.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            pairs[-1][0].record()
            graph.replay()
            pairs[-1][1].record()
            torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in pairs) * 1e3 / count

    def time(self, calls: Sequence[Call]) -> tuple[float, float]:
        for call in calls[:3]:
            call()
        torch.cuda.synchronize()
        slow = self._events(calls[0], 5) > 500
        warm_count = 10 if slow else 100
        warm = self._replay(self._graph(calls[:1], warm_count), warm_count, cold=False)
        return self._cold(calls, slow), warm

    def cold(self, calls: Sequence[Call]) -> float:
        return self._cold(calls, self.once(calls[0]) > 500)

    def once(self, call: Call) -> float:
        return self._events(call, 3)

    def _cold(self, calls: Sequence[Call], slow: bool) -> float:
        rounds = max(1, -(-(10 if slow else 40) // len(calls)))
        count = rounds * len(calls)
        return self._replay(self._graph(calls, count), count, cold=True)

    def bandwidth(self) -> float:
        # The best that bulk copies were seen to read on an H200; elsewhere what a large sum reads.
        return 4.65e12 if "H200" in self.name else self._far.nbytes / self._flush_us * 1e6

    def peak(self, products: str) -> float:
        if products not in self._peaks:
            n = 8192
            a = torch.randn(n, n, device="cuda").to(torch.bfloat16)
            b = torch.randn(n, n, device="cuda").to(torch.bfloat16)
            if products == "fp8":
                one = torch.ones((), device="cuda")
                a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)

                def product() -> Any:
                    return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)
            else:

                def product() -> Any:
                    return a @ b.t()

            self._events(product, 20)
            self._peaks[products] = 2 * n**3 / self._events(product, 30) * 1e6
        return self._peaks[products]


class CpuClock(Clock):
    device = "cpu"
    most_sets = 16
    most_bytes = 1 << 29
    passes = 15
    seconds = 0.2  # per figure, about

    def __init__(self) -> None:
        self.name = _cpu_name()
        self.cache = min(_last_cache(), 64 << 20)
        self._far = torch.zeros(self.cache // 2)  # twice the cache
        self._bandwidth = 0.0
        self._peak = 0.0

    def hurry(self) -> None:
        self.passes, self.seconds, self.most_sets = 3, 0.05, 4

    def _passes(self, calls: Sequence[Call], count: int, cold: bool) -> float:
        took = []
        end = time.monotonic() + self.seconds
        for _ in range(self.passes):
            if cold:
                self._far.sum()
            start = time.perf_counter_ns()
            for j in range(count):
                calls[j % len(calls)]()
            took.append((time.perf_counter_ns() - start) / count)
            if len(took) > 1 and time.monotonic() > end:
                break
        return min(took) / 1e3

    def time(self, calls: Sequence[Call]) -> tuple[float, float]:
        calls[0]()
        count = max(1, min(200, int(self.seconds / 10 * 1e6 / self.once(calls[0]))))
        with _no_garbage_collection():
            warm = self._passes(calls[:1], count, cold=False)
        return self.cold(calls), warm

    def cold(self, calls: Sequence[Call]) -> float:
        count = max(2, min(len(calls), int(self.seconds / 3 * 1e6 / self.once(calls[0]))))
        with _no_garbage_collection():
            return self._passes(calls, count, cold=True)

    def once(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6

    def bandwidth(self) -> float:
        if not self._bandwidth:
            source = torch.zeros(1 << 25)
            target = torch.zeros(1 << 25)
            self._bandwidth = 2 * source.nbytes / self._passes([lambda: target.copy_(source)], 1, cold=False) * 1e6
        return self._bandwidth

    def peak(self, products: str) -> float:
        if not self._peak:
            for dtype in (torch.float32, torch.bfloat16):
                a = torch.randn(1024, 1024).to(dtype)
                us = self._passes([functools.partial(torch.matmul, a, a)], 1, cold=False)
                self._peak = max(self._peak, 2 * 1024**3 / us * 1e6)
        return self._peak


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {len(os.sched_getaffinity(0))} cores"
    return platform.processor() or platform.machine()


def _last_cache() -> int:
    with contextlib.suppress(ValueError, OSError):
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or 32 << 20
    return 32 << 20


def make_clock(device: str) -> Clock:
    return CudaClock() if device == "cuda" else CpuClock()
