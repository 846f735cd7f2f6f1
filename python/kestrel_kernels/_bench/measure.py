"""One case: is the answer right, how long does it take, how long do others take."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from kestrel_kernels._bench import results
from kestrel_kernels._bench.clock import Clock
from kestrel_kernels._bench.entry import Case, Entry, Maker, Peer, Set, entries, nbytes

HOST_TIME = "host_time"  # the op whose cases are "<op> <case>": what a call costs the caller's thread


@dataclasses.dataclass
class Outcome:
    case: Case
    row: results.Row | None = None
    missing: str = ""  # why there is nothing to measure: "no kernel yet"
    failure: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)


class WrongResult(Exception):
    pass


def measure(case: Case, clock: Clock, peers: str, commit: str) -> Outcome:
    """`peers`: "none", "eager" or "all"."""
    outcome = Outcome(case)
    host = case.op == HOST_TIME
    op, name = case.name.split(" ", 1) if host else (case.op, case.name)
    if op not in entries():
        outcome.missing = "no bench entry yet"
        return outcome
    entry = entries()[op](name)
    if not entry.exists:
        outcome.missing = "no op yet"
        return outcome
    try:
        with torch.no_grad():
            outcome.row = (_host_row if host else _row)(entry, clock, peers, outcome.notes)
    except NotImplementedError:
        outcome.missing = "no kernel yet" if clock.device == "cuda" else "not implemented"
    except WrongResult as error:
        outcome.failure = str(error)
    except Exception as error:  # of this case alone: the others still run
        outcome.failure = f"{type(error).__name__}: {_first_line(error)}"
    if outcome.row:
        outcome.row |= {"op": case.op, "case": case.name, "commit": commit, "date": results.today()}
    return outcome


def check(entry: Entry, s: Set) -> float:
    error = entry.relative_error(s)
    if not error <= entry.tolerance:
        hint = ": an output holds NaN or was not written in full" if error != error else ""
        raise WrongResult(f"wrong result: rel_err {error:.2e}, at most {entry.tolerance:.1e} is right{hint}")
    return error


def _row(entry: Entry, clock: Clock, peers: str, notes: list[str]) -> results.Row:
    make = Maker(clock.device)
    first = entry.inputs(make)
    error = check(entry, first)
    kept = {name: first[name] for name in entry.resident}
    count = clock.sets_for(nbytes(first) - nbytes(kept), entry.bytes)
    sets = [first, *(entry.inputs(make) | kept for _ in range(count - 1))]
    for s in sets:
        entry.steady(s)
    cold, warm = clock.time([entry.bound(s) for s in sets])
    times: dict[str, float] = {}
    others = _peers(entry, peers)
    for s in sets if others else ():
        entry.add_for_peers(s)
    for name, peer in others.items():
        try:
            if name not in entry.bare and (fault := _fault(entry, entry.inputs(make), peer)):
                notes.append(f"{name}: {fault}; left out")
                continue
            times[name] = results.rounded(clock.cold([functools.partial(peer, s) for s in sets]))
        except Exception as problem:  # a peer is never our failure
            notes.append(f"{name}: {type(problem).__name__}: {_first_line(problem)}; left out")
    peak = clock.peak(entry.products) if entry.products else 1.0
    floor = results.floor_us(entry.bytes, clock.bandwidth(), entry.operations if entry.products else 0, peak)
    row: results.Row = {
        "us": results.rounded(cold),
        "warm_us": results.rounded(warm),
        "floor_us": results.rounded(floor),
        "peers": times,
        "rel_err": float(f"{error:.3g}"),
    }
    if bare := [name for name in entry.bare if name in times]:
        row["bare"] = bare
    return row


def _host_row(entry: Entry, clock: Clock, peers: str, notes: list[str]) -> results.Row:
    s = entry.inputs(Maker(clock.device))
    error = check(entry, s)
    us = results.rounded(clock.host_time(entry.bound(s)))
    times = {}
    if peers != "none":
        times["torch, one op"] = results.rounded(clock.host_time(functools.partial(entry.single_torch_op, s)))
        times["torch"] = results.rounded(clock.host_time(functools.partial(entry.eager, s)))
    return {"us": us, "warm_us": us, "floor_us": 0.5, "peers": times, "rel_err": float(f"{error:.3g}")}


def _peers(entry: Entry, which: str) -> dict[str, Peer]:
    if which == "none":
        return {}
    found: dict[str, Peer] = {"torch": entry.eager} if entry.eager_is_peer else {}
    if found and which == "all" and entry.compiles:
        torch.compiler.reset()  # each case compiles for its own shapes, and no limit of recompilations is met
        found["torch.compile"] = _compiled(entry)
    return found | dict(entry.peers())


def _compiled(entry: Entry) -> Peer:
    compiled: Callable[[Set], Any] = torch.compile(entry.eager, dynamic=False, fullgraph=True)
    return compiled


def _fault(entry: Entry, s: Set, peer: Peer) -> str:
    """What is wrong with a peer's answer; "" where it is right, or where it returns none to look at."""
    entry.add_for_peers(s)
    error = entry.peer_error(s, peer)
    return "" if error <= 5 * entry.tolerance else f"rel_err {error:.1e}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
