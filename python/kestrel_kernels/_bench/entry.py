"""What a bench entry is, and how entries are found.

An entry stands in `_bench/ops/<op>.py`, a class per op name of benchmarks/cases.json. An instance is one case: it
parses the case's name, makes sets of arguments, knows the bytes and operations that the op cannot avoid, the answer in
float64, and what others offer for the same thing.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from kestrel_kernels import _library

if TYPE_CHECKING:
    import torch

Set = dict[str, Any]  # one set of arguments: tensors and numbers by name
Peer = Callable[[Set], Any]


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    name: str
    target_us: float | None
    best_peer_us: float | None  # measured earlier, elsewhere than in the run at hand


@functools.cache
def load_cases() -> tuple[Case, ...]:
    rows = json.loads((_library.folder("benchmarks") / "cases.json").read_text())["rows"]
    return tuple(Case(r["op"], r["case"], r["at_or_below_us"], r["best_peer_us"]) for r in rows)


class Maker:
    """Makes the tensors of a set on one device. Values come from one seed: two runs see the same data."""

    def __init__(self, device: str, seed: int = 0) -> None:
        import torch

        self.device = device
        self._torch = torch
        self._generator = torch.Generator(device).manual_seed(seed)

    def dtype(self, name: str) -> torch.dtype:
        return getattr(self._torch, name)

    def normal(self, *shape: int, dtype: str = "bfloat16", scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        values = self._torch.randn(shape, generator=self._generator, device=self.device)
        return values.mul_(scale).add_(shift).to(self.dtype(dtype))

    def empty(self, *shape: int, dtype: str = "bfloat16") -> torch.Tensor:
        return self._torch.zeros(shape, dtype=self.dtype(dtype), device=self.device)

    def distinct(self, count: int, below: int, dtype: str = "int64") -> torch.Tensor:
        """`count` different integers in [0, below), in random order."""
        order = self._torch.randperm(below, generator=self._generator, device=self.device)
        return order[:count].to(self.dtype(dtype)).contiguous()


class Entry:
    """Base of the bench entries. Attributes that the pattern names become integers (or text) of the instance."""

    op: ClassVar[str] = ""
    pattern: ClassVar[str] = ""  # of the case's name; a named group per size
    function: str = ""  # below kestrel_kernels, "activation.gelu_residual_cuda"
    arguments: str = ""  # what it takes, by the names of the set, in order; "out=" is passed by keyword
    outputs: ClassVar[str] = "out"  # filled with NaN before the check
    tolerance: float = 3e-3  # of rel_err; rounding to bf16 alone gives 1.7e-3 over many elements
    products: str = ""  # "bf16" or "fp8" where matrix units do the work: the floor then counts operations
    small: ClassVar[tuple[str, ...]] = ()  # further cases, tiny and odd, for the tests and the sanitizer
    resident: ClassVar[tuple[str, ...]] = ()  # the same in each set: what the kernel before has just written
    bare: ClassVar[tuple[str, ...]] = ()  # peers that do the op's products alone: timed beside it, but no rivals
    compiles: ClassVar[bool] = True  # False where torch.compile takes minutes for `eager`
    host_case: ClassVar[str] = ""  # the case whose cost on the caller's thread is measured too

    def __init__(self, case: str) -> None:
        match = re.fullmatch(self.pattern, case)
        if not match:
            raise ValueError(f"{self.op}: a case is written like {self.pattern}, got {case!r}")
        self.case = case
        for name, text in match.groupdict().items():
            setattr(self, name, int(text) if text and text.isdigit() else text)

    # What every entry says of its op.

    def inputs(self, make: Maker) -> Set:
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        """Read and written at least, each array once (twice where it is changed in place)."""
        raise NotImplementedError

    @property
    def operations(self) -> int:
        return 0

    def reference(self, s: Set) -> Sequence[torch.Tensor]:
        """The right answer in float64, from the arguments before the call."""
        raise NotImplementedError

    def results(self, s: Set, returned: Any) -> Sequence[torch.Tensor]:
        """What `reference` is compared with, after the call."""
        return [s[name] for name in self.outputs.split()]

    def eager(self, s: Set) -> Any:
        """The same in plain PyTorch; compiled, it is a second peer."""
        raise NotImplementedError

    @property
    def eager_is_peer(self) -> bool:
        """False where it takes so long that the GPU is hot for the cases after it."""
        return True

    def peers(self) -> Mapping[str, Peer]:
        """From other libraries, those that can be imported."""
        return {}

    def add_for_peers(self, s: Set) -> None:
        """Puts into a set what peers need besides and is no part of what is timed."""

    def peer_results(self, returned: Any) -> Sequence[torch.Tensor]:
        """The same of what `eager` or a peer gave back."""
        return returned if isinstance(returned, tuple | list) else [returned]

    def steady(self, s: Set) -> None:
        """Changes a checked set so that calls which work in place can repeat for ever without overflow."""

    def single_torch_op(self, s: Set) -> Any:
        """One op of PyTorch's own with as many arguments: what a call costs there (`host_case`)."""
        raise NotImplementedError

    # What follows from it.

    @functools.cached_property
    def _call(self) -> Callable[..., Any]:
        module, _, name = self.function.rpartition(".")
        return getattr(importlib.import_module(f"kestrel_kernels.{module}"), name)

    @property
    def exists(self) -> bool:
        """False while the op's Python module is not written."""
        try:
            return bool(self._call)
        except (ImportError, AttributeError):
            return False

    def bound(self, s: Set) -> Callable[[], Any]:
        names = self.arguments.split()
        keywords = {name[:-1]: s[name[:-1]] for name in names if name.endswith("=")}
        return functools.partial(self._call, *(s[name] for name in names if not name.endswith("=")), **keywords)

    def poison(self, s: Set) -> None:
        for name in self.outputs.split():
            if (out := s.get(name)) is not None:
                poison(out)

    def relative_error(self, s: Set) -> float:
        """Of one call on this set, its outputs poisoned before."""
        want = [r.double() for r in self.reference(s)]
        self.poison(s)
        return frobenius(self.results(s, self.bound(s)()), want)

    def peer_error(self, s: Set, peer: Peer) -> float:
        """The same of a peer that gives its results back; 0 where it returns none to look at."""
        want = [r.double() for r in self.reference(s)]
        returned = peer(s)
        return 0.0 if returned is None else frobenius(self.peer_results(returned), want)


def frobenius(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """Norm of the difference over that of `want`, of all tensors together."""
    difference = sum(float(((g.double() - w) ** 2).sum()) for g, w in zip(got, want, strict=True))
    size = sum(float((w**2).sum()) for w in want)
    return (difference / size) ** 0.5 if size else difference**0.5


def poison(tensor: torch.Tensor) -> None:
    """NaN everywhere; in bytes 0x7f, which is NaN too where they are e4m3 bits; the largest number in integers."""
    import torch

    if tensor.dtype in (torch.uint8, torch.float8_e4m3fn):
        tensor.view(torch.uint8).fill_(0x7F)
    else:
        tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


def nbytes(s: Set) -> int:
    return sum(v.numel() * v.element_size() for v in s.values() if hasattr(v, "element_size"))


@functools.cache
def entries() -> dict[str, type[Entry]]:
    """Op name -> its entry."""
    from kestrel_kernels._bench import ops

    found: dict[str, type[Entry]] = {}
    for info in pkgutil.iter_modules(ops.__path__):
        module = importlib.import_module(f"{ops.__name__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Entry) and value.op:
                found[value.op] = value
    return found
