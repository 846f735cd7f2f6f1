"""Each op once at tiny and odd sizes, for compute-sanitizer: `python -m kestrel_kernels._bench.small [OP...]`.

Inputs are made, and answers compared, on the CPU, so that on the device only our kernels and copies run. With
PYTORCH_NO_CUDA_MEMORY_CACHING=1 each tensor is an allocation of its own and memcheck sees its exact end. Every case
runs twice: tensors as they come, and tensors that begin one element into their allocation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from kestrel_kernels._bench.entry import Entry, Maker, Set, entries, frobenius

_SLACK = 2.5  # a few elements: one rounding may be twice the mean of many


def _place(tensor: torch.Tensor, device: str, shift: int) -> torch.Tensor:
    whole = torch.empty(tensor.numel() + shift, dtype=tensor.dtype, device=device)
    return whole[shift:].view(tensor.shape).copy_(tensor)


def _to_host(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_to_host, value))
    return value.cpu() if isinstance(value, torch.Tensor) else value


def run(entry: Entry, device: str, shift: int) -> float:
    """The error of one call, over what is allowed."""
    host = entry.inputs(Maker("cpu"))
    want = [r.double() for r in entry.reference(host)]
    entry.poison(host)
    s: Set = {k: _place(v, device, shift) if isinstance(v, torch.Tensor) else v for k, v in host.items()}
    returned = entry.bound(s)()
    got = entry.results({k: _to_host(v) for k, v in s.items()}, _to_host(returned))
    return frobenius(got, want) / (_SLACK * entry.tolerance)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m kestrel_kernels._bench.small", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    args = parser.parse_args(argv)
    right: dict[str, int] = {}
    missing, wrong = [op for op in args.ops if op not in entries()], []
    for op, kind in entries().items():
        if args.ops and op not in args.ops:
            continue
        for case in kind.small:
            entry = kind(case)
            try:
                if not entry.exists:
                    raise NotImplementedError
                for shift in (0, 1):
                    error = run(entry, args.device, shift)
                    if error <= 1:
                        right[op] = right.get(op, 0) + 1
                    else:
                        wrong.append(f"{op} {case}, {shift} off: {error:.3g} times the error allowed")
            except NotImplementedError:
                missing.append(op)
                break
            except Exception as error:
                wrong.append(f"{op} {case}: {type(error).__name__}: {error}")
    print(f"right on {args.device}:", ", ".join(f"{op} ({n} calls)" for op, n in right.items()) or "nothing ran")
    if missing:
        print("no kernel or no bench entry yet:", ", ".join(missing))
    for line in wrong:
        print("WRONG", line)
    return 1 if wrong or not right else 0


if __name__ == "__main__":
    sys.exit(main())
