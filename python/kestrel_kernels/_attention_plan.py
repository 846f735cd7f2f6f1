"""What attention's rules choose for a problem: kernel, tile, how a launch is spread. The library knows; Python asks."""

from __future__ import annotations

import json
from typing import Any

from kestrel_kernels import _library

Plan = dict[str, Any]
H200_SMS = 132

# Both in the order in which C++ numbers them.
_KEYS = {
    "boxes": "keys in boxes of the copy engine",
    "rows": "keys row by row",
    "e4m3": "keys row by row, converted to fp16",
}
_MERGES = ("block", "cluster", "grid")


def attention_plan(
    sms: int,
    batch: int,
    q_len: int,
    k_len: int,
    q_heads: int,
    k_heads: int,
    head_size: int,
    *,
    f16: bool = False,
    e4m3: bool = False,
    page_size: int = 0,
    packed: bool = False,
    causal: bool = False,
    prefix_len: int | None = None,
    window_size: tuple[int, int] = (-1, -1),
    num_splits: int = 0,
    batch_invariant: bool = False,
) -> Plan:
    """Of contiguous tensors that suit every kernel, on an sm_90 GPU of so many SMs. `packed`: lengths are totals."""
    prefix = -1 if prefix_len is None else prefix_len
    sizes = (sms, batch, q_len, k_len, q_heads, k_heads, head_size)
    plan = dict(
        _library.load().attention_plan(
            *(*sizes, f16, e4m3, page_size, packed, causal, prefix, *window_size, num_splits, batch_invariant)
        )
    )
    query = "f16" if f16 else "bf16"
    plan["compiled"] = _compiled(plan, query, "e4m3" if e4m3 else query, head_size)
    return plan


def _compiled(plan: Plan, query: str, key: str, head_size: int) -> str:
    """The kernel as C++ names it."""
    if "merge" in plan:
        sizes = [plan[name] for name in ("size", "heads", "batches")]
        of = [query, key, *sizes, _MERGES.index(plan["merge"]), str(plan["whole"]).lower(), plan["most_threads"]]
        tile = f"DecodeTile<{', '.join(map(str, of))}>"
        return f"decode_kernel<{f'Simple<{tile}>' if plan['simple'] else tile}>"
    if "keys" in plan:
        of = ["f16" if key == "e4m3" else query, query, plan["head_size"], list(_KEYS).index(plan["keys"])]
        of += [plan[name] for name in ("most_groups", "stages", "query_slots")]
        return f"prefill_kernel<PrefillTile<{', '.join(map(str, of))}>>"
    lanes = 8 if head_size <= 64 else 16 if head_size <= 128 else 32
    return f"attention_kernel<{query}, {key}, {lanes}, 8, unsigned int>"


def lines(plan: Plan) -> dict[str, str]:
    """For people to read."""
    made = _made_by_ptxas(plan["compiled"])
    shared = plan.get("shared_bytes", 0) + made.get("shared", 0)
    rows = {"kernel": plan["kernel"], "compiled as": plan["compiled"]}
    if "merge" in plan:
        heads = f"{plan['heads']} key head{'s' * (plan['heads'] > 1)}" if plan["heads"] else "rows of one key head"
        rows["tile"] = f"{heads} of {plan['size']}, {plan['batches']} x 16 keys in a warp's step"
        rows["launch"] = f"{plan['blocks']} blocks of {plan['threads']} threads"
        if plan["cluster"] > 1:
            rows["launch"] += f" in clusters of {plan['cluster']}"
        rows["splits"] = f"{plan['splits']} of each sequence"
        if plan["on_device"]:
            rows["splits"] += ", all being as long; planned on the device from the lengths there"
    elif "keys" in plan:
        rows["tile"] = f"heads of {plan['head_size']}, {plan['groups']} x 64 queries, {plan['stages']} x 64 keys"
        rows["tile"] += f", {_KEYS[plan['keys']]}"
        rows["launch"] = f"{plan['blocks']} blocks of {plan['threads']} threads"
        how = ("paired", "long and short rows in a block"), ("turns", "products in turn"), ("persistent", "persistent")
        rows["launch"] += "".join(f", {words}" for name, words in how if plan[name])
        rows["splits"] = "1 of each sequence"
    else:
        rows["tile"] = "1 query of 1 head in a block"
        rows["splits"] = "1 of each sequence"
    rows["shared memory"] = f"{shared:,} bytes" if shared or made else _UNKNOWN
    registers = str(made["registers"]) if made else ""
    if "group_registers" in plan:
        parts = (
            f"{plan['group_registers']} where queries are worked on, {plan['loader_registers']} where keys are loaded"
        )
        registers = f"{registers} at launch, then {parts}" if registers else parts
    rows["registers"] = registers or _UNKNOWN
    return rows


_UNKNOWN = "unknown: this build has no CUDA kernels"


def _made_by_ptxas(name: str) -> dict[str, int]:
    """Registers of a thread, static shared memory; nothing in a build without CUDA."""
    try:
        kernels = json.loads((_library.folder("lib") / "kernels.json").read_text())
    except FileNotFoundError:
        return {}
    return next((k for k in kernels if k["name"] == name and k["arch"].startswith("sm_90")), {})
