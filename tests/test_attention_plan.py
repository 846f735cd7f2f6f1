"""Which kernel serves which attention, in which tile: tiles.json, the rules, `kestrel-kernels info attention`."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from kestrel_kernels import _info, _library
from kestrel_kernels._attention_plan import H200_SMS, Plan, attention_plan
from kestrel_kernels._bench.ops.attention import ENTRIES
from kestrel_kernels.flash_attn import cute

TILES = json.loads((Path(__file__).parents[1] / "ops/attention/tiles.json").read_text())
CASES = json.loads((_library.folder("benchmarks") / "cases.json").read_text())["rows"]
NAMES = [row["case"] for row in CASES if row["op"] in {kind.op for kind in ENTRIES}]


def decode_plans() -> list[tuple[bool, Plan]]:
    """Whether of e4m3 keys, and the plan: of many problems, on an H200."""
    plans = []
    for sizes in itertools.product(
        *((1, 3, 16, 64, 256), (1, 5), (1, 200, 300, 2000, 3000, 8192, 70000)),
        *(((32, 32), (9, 3), (32, 8)), (48, 64, 96, 128, 192, 256)),
    ):
        batch, q_len, k_len, heads, size = sizes
        if batch * k_len * size > 640_000_000:  # 32 bits do not reach a cache's end
            continue
        for e4m3, splits in itertools.product((False, True), (0, 1, 5)):
            plan = attention_plan(
                H200_SMS, batch, q_len, k_len, *heads, size, e4m3=e4m3, page_size=1, num_splits=splits
            )
            plans.append((e4m3, plan))
    return plans


def test_every_decode_tile_is_reached() -> None:
    """And launched with no more than it is compiled for."""
    reached = set()
    for e4m3, plan in decode_plans():
        row = TILES["decode"][plan["tile"]]
        assert plan["threads"] <= row["most_threads"]
        assert plan["blocks"] > 0 and plan["cluster"] <= 16 and 1 <= plan["splits"] <= 64
        assert plan["shared_bytes"] <= 227 << 10
        reached.add((plan["tile"], plan["merge"], "e4m3" if e4m3 else "16 bit"))
    listed = set()
    for i, row in enumerate(TILES["decode"]):
        listed |= {(i, *pair) for pair in itertools.product(row["merges"], row["keys"])}
    assert reached == listed


def test_every_prefill_tile_is_reached() -> None:
    reached = set()
    for size, page, e4m3, sms in itertools.product((48, 64, 72, 80, 96, 128, 256), (0, 1), (False, True), (8, 132)):
        plan = attention_plan(sms, 2, 300, 300, 4, 2, size, e4m3=e4m3, page_size=page, causal=True)
        assert plan["groups"] <= plan["most_groups"] and plan["shared_bytes"] <= 227 << 10
        assert plan["group_registers"] * 128 * plan["most_groups"] + plan["loader_registers"] * 128 <= 1 << 16
        reached.add(plan["tile"])
    assert reached == set(range(len(TILES["prefill"])))


def test_batch_invariant_plans() -> None:
    """All that a sequence's bits follow from is the same whatever its neighbours."""
    for k_len, heads, size, e4m3 in itertools.product(
        (700, 5000, 20000), ((32, 32), (32, 8)), (64, 128, 256), (False, True)
    ):
        plans = [
            attention_plan(H200_SMS, batch, 1, k_len, *heads, size, e4m3=e4m3, page_size=1, batch_invariant=True)
            for batch in (1, 8, 200)
        ]
        assert len({(p["compiled"], p["threads"], p["splits"]) for p in plans}) == 1


def test_kernels() -> None:
    """By the number of queries, the head size and what the tiles are for."""
    problem: dict[str, Any] = {"page_size": 1, "causal": True}
    kernels = [attention_plan(132, 1, n, 740, 32, 32, 64, **problem)["kernel"] for n in (1, 16, 17, 740)]
    assert [k.startswith("FlashAttentionDecodeSm90") for k in kernels] == [True, True, False, False]
    assert kernels[2:] == ["FlashAttentionFwd"] * 2
    for n in (1, 740):
        assert attention_plan(132, 1, n, 740, 32, 32, 44)["kernel"] == "FlashAttentionPlain"


@pytest.mark.parametrize("heads", [(32, 32), (32, 8)])
@pytest.mark.parametrize("batch", [16, 64, 300])
def test_long_sequences_are_split_in_large_batches(batch: int, heads: tuple[int, int]) -> None:
    """However many blocks there are without: lengths on the device may lie far apart."""
    plan = attention_plan(H200_SMS, batch, 1, 32768, *heads, 64, page_size=16, causal=True)
    assert plan["merge"] == "grid" and plan["on_device"]


def info(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, str]]:
    assert _info.main(["attention", *arguments]) == 0
    blocks = capsys.readouterr().out.strip().split("\n\n")
    return [{line[:14].strip(): line[14:] for line in block.splitlines()} for block in blocks]


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    (rows,) = info(capsys, "--case", "b1 kv740 h32 d64 bf16 page1")
    assert rows["kernel"].startswith("FlashAttentionDecodeSm90") and "132 SMs" in rows["GPU"]
    assert {"tile", "splits", "shared memory", "registers"} <= set(rows)
    (few,) = info(capsys, "--case", "b1 kv740 h32 d64 bf16 page1", "--sms", "16")
    assert few["splits"] != rows["splits"]
    assert len(info(capsys, "--case", "causal h32 d64 s740", "--case", "h3 d72 s33+2")) == 2


@pytest.mark.parametrize("case", ["b1 kv740", "layernorm", ""])
def test_info_of_no_case(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _info.main(["attention", "--case", case]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"got {case!r}" in error
    assert len(info(capsys, *(word for example in _info._EXAMPLES for word in ("--case", example)))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention"], "attention and --case NAME must be given together"),
        (["--case", "causal h32 d64 s740"], "attention and --case NAME must be given together"),
        (["attention", "--case", "causal h32 d64 s740", "--sms", "0"], "argument --sms: must be at least 1, got 0"),
    ],
)
def test_info_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _info.main(arguments)
    assert capsys.readouterr().err.endswith(f"kestrel-kernels info: error: {message}\n")


def test_registers_of_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    """The build's list of kernels names those that the plans name."""
    built = "90" in _library.load().cuda_architectures()
    for rows in info(capsys, *(word for name in NAMES for word in ("--case", name))):
        assert re.match(r"[\d,]+ bytes", rows["shared memory"])
        assert re.match(r"\d+" if built else r"unknown|\d+ where", rows["registers"]), rows


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_plan_is_what_runs() -> None:
    from kestrel_kernels._bench.entry import Maker

    device = torch.cuda.get_device_properties(0)
    if (device.major, device.minor) != (9, 0):
        pytest.skip("plans are those of sm_90")
    for kind in ENTRIES:
        for case in (
            *kind.small,
            *(name for name in NAMES if re.fullmatch(kind.pattern, name) and "32768" not in name),
        ):
            entry = kind(case)
            if entry.bytes > 100e6:
                continue
            entry.bound(entry.inputs(Maker("cuda")))()
            assert cute.last_kernel() == entry.plan(device.multi_processor_count)["kernel"], case
