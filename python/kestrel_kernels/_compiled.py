"""Ops inside torch.compile: each is an operator of `torch.library`, made when a graph first needs it.

The operator's schema is what the C++ declaration says (types) and what the Python module says (names, what is written).
All ops are into forms and return nothing, so a fake implementation has nothing to do; functional forms allocate with
torch itself. Eager calls never come here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kestrel_kernels import _library

if TYPE_CHECKING:
    from kestrel_kernels._op import Op

NAMESPACE = "kestrel"


def types_of(name: str) -> str:
    """The types of the arguments as torch.library writes them; `value float` is a number or a tensor that holds it."""
    return str(getattr(_library.load(), f"{name}_types")())


def schema_of(name: str, arguments: Sequence[str], writes: frozenset[str], types: str) -> str:
    stated: list[str] = []
    for argument, kind in zip(arguments, types.split(","), strict=True):
        if kind.startswith("value "):
            stated += [f"Tensor? {argument}", f"{kind.removeprefix('value ')}? {argument}_number"]
        else:
            alias = f"(a{len(stated)}!)" if argument in writes else ""
            stated.append(f"{kind.replace('Tensor', 'Tensor' + alias, 1)} {argument}")
    return f"{name}({', '.join(stated)}) -> ()"


def call(name: str, types: str, args: Sequence[Any]) -> None:
    """In a graph: the op's operator."""
    import torch

    getattr(getattr(torch.ops, NAMESPACE), name).default(*flatten(types, args))


def flatten(types: str, args: Sequence[Any]) -> list[Any]:
    """The arguments of an op as its operator takes them: a value becomes a tensor or None, and a number or None."""
    flat: list[Any] = []
    for kind, arg in zip(types.split(","), args, strict=True):
        if kind.startswith("value "):
            number = isinstance(arg, (int, float))
            flat += [None if number else arg, arg if number else None]
        else:
            flat.append(arg)
    return flat


def unflatten(types: str, flat: Sequence[Any]) -> list[Any]:
    rest = iter(flat)
    args = []
    for kind in types.split(","):
        arg = next(rest)
        if kind.startswith("value "):
            number = next(rest)
            arg = number if arg is None else arg
        args.append(arg)
    return args


@functools.cache
def _library_of_ops() -> Any:
    import torch

    return torch.library.Library(NAMESPACE, "FRAGMENT")


def register(op: Op, arguments: Sequence[str], writes: frozenset[str]) -> str:
    """Makes the op's operator; returns the types that `flatten` wants."""
    import torch

    types = types_of(op.name)
    library = _library_of_ops()
    library.define(schema_of(op.name, arguments, writes, types))

    def run(*flat: Any) -> None:
        op.call(*unflatten(types, flat))

    for device in ("CPU", "CUDA"):
        library.impl(op.name, run, device)
    torch.library.register_fake(f"{NAMESPACE}::{op.name}", lambda *_: None, lib=library)
    return types
