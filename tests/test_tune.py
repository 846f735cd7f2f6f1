"""The tuner, on the CPU twins: what it measures, what it keeps, whom it lets win, what it writes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("rich")

from kestrel_kernels import _moe_config, _tune
from kestrel_kernels._tune import Key, Layer, Result, Results, Tuner, winners
from kestrel_kernels.cute_moe import CuteMoeConfig, get_cute_moe_config

ROOT = Path(__file__).parents[1]
SMALL = ["moe", "--device", "cpu", "--experts", "4", "--hidden", "32", "--inner", "16", "--topk", "2", "--quick"]
LAYER = Layer(4, 32, 16, 2, "bf16")


def tiles(dtype: str) -> list[CuteMoeConfig]:
    return [tile for tile in _moe_config.tiles() if tile.dtype == dtype]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gc.collect", lambda: 0)  # takes longer than what is measured


def test_measures_every_tile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    output = tmp_path / "results.json"
    command = [*SMALL, "--num-tokens", "3", "--dtype", "bf16", "fp8", "--output", str(output)]
    assert _tune.main(command) == 0
    rows = json.loads(output.read_text())["rows"]
    measured = {(r["dtype"], r["tokens"], r["kind"], json.dumps(r["tile"])) for r in rows}
    assert len(rows) == len(measured) == 3 * (len(tiles("bf16")) + len(tiles("fp8")))
    assert all(r["right"] and r["us"] > 0 and r["rel_err"] < 6e-3 and not r["note"] for r in rows)
    table = capsys.readouterr().out
    assert "E4 H32 I16 k2 bf16" in table and "E4 H32 I16 k2 fp8" in table

    # What is there is not measured again; what is not, is.
    monkeypatch.setattr(Tuner, "measure", lambda *_: pytest.fail("measured again"))
    before = output.read_text()
    assert _tune.main(command) == 0
    assert output.read_text() == before
    assert capsys.readouterr().out.splitlines()[:-1] == table.splitlines()[:-1]  # but for the time it took
    asked: list[Key] = []

    def pretended(_: Tuner, key: Key) -> Result:
        asked.append(key)
        return Result(1.0, 1e-3, True)

    monkeypatch.setattr(Tuner, "measure", pretended)
    assert _tune.main([*SMALL, "--num-tokens", "3", "4", "--output", str(output)]) == 0
    assert {(key.layer, key.tokens) for key in asked} == {(LAYER, 4)} and len(asked) == 3 * len(tiles("bf16"))


def test_time_limit(tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "results.json"
    assert _tune.main([*SMALL, "--num-tokens", "3", "--output", str(output), "--gpu-time-limit", "0"]) == 3
    assert "measurements to go; the same command goes on from" in capsys.readouterr().out


def test_winners_of_finished_counts_alone(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """At the time limit: of a token count that is not finished nothing is said."""
    done: list[Key] = []

    def pretended(_: Tuner, key: Key) -> Result:
        done.append(key)
        return Result(1.0, 1e-3, True)

    monkeypatch.setattr(Tuner, "measure", pretended)
    monkeypatch.setattr(_tune, "time", SimpleNamespace(monotonic=lambda: len(done)))  # a second each
    limit = str(3 * len(tiles("bf16")) * 3 // 2)
    assert _tune.main([*SMALL, "--num-tokens", "3", "4", "--gpu-time-limit", limit]) == 3
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in table if line[1:2] in (["3"], ["4"])] == ["3"]


def test_a_hopeless_tile_is_called_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_tune, "HOPELESS", 0)
    monkeypatch.setattr(_tune, "LAUNCH", 0)
    output = tmp_path / "results.json"
    assert _tune.main([*SMALL, "--num-tokens", "3", "--output", str(output)]) == 0
    assert {row["note"] for row in json.loads(output.read_text())["rows"]} == {"a single call"}


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_a_wrong_tile_cannot_win(value: float, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from kestrel_kernels._bench.ops.moe import MoeProduct

    bad = tiles("bf16")[0]
    original = MoeProduct.bound

    def bound(self: MoeProduct, s: Any) -> Any:
        call = original(self, s)
        return (lambda: s["out"].fill_(value)) if s["config"] == bad else call

    monkeypatch.setattr(MoeProduct, "bound", bound)
    assert _tune.main([*SMALL, "--num-tokens", "3"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("FAILED 3 bf16 E4 H32 I16 k2" in line and str(bad) in line for line in lines) == 3
    assert not any(str(bad) in line and "FAILED" not in line for line in lines)


def test_winners_share_a_block_size() -> None:
    low = tiles("bf16")[0]
    high = next(tile for tile in tiles("bf16") if tile.block_m != low.block_m)
    slow = dataclasses.replace(low, block_n=low.block_n * 2)
    times = {
        (1, "up", low): 5.0, (1, "up", slow): 6.0, (1, "down", low): 4.0, (1, "up", high): 4.5, (1, "down", high): 5.0,
        (8, "up", low): 5.0, (8, "down", low): 4.0, (8, "up", high): 4.0, (8, "down", high): 4.0,
        (9, "up", low): 5.0,
    }  # fmt: skip
    rows = {Key(LAYER, n, kind, tile): Result(us, 1e-3, True) for (n, kind, tile), us in times.items()}
    rows[Key(LAYER, 8, "down", slow)] = Result(0.1, 1.0, False)
    found = {w.tokens: w for w in winners(rows, LAYER)}
    assert (found[1].up, found[1].down, found[8].up, found[8].down) == (low, low, high, high)
    assert set(found) == {1, 8}
    for us, tile in ((7.0, low), (9.0, high)):  # the layer decides between block sizes, where it is known of all
        assert {w.tokens: w.up for w in winners(rows, LAYER)}[8] == high
        rows[Key(LAYER, 8, "layer", tile)] = Result(us, 1e-3, True)
    assert {w.tokens: w.up for w in winners(rows, LAYER)}[8] == low


def test_written_configs_are_used(tmp_path: Path) -> None:
    low = tiles("bf16")[0]
    high = next(tile for tile in tiles("bf16") if tile.block_m != low.block_m)
    shape: dict[str, Any] = {"num_experts": 4, "hidden_size": 32, "intermediate_size": 16, "dtype": "bf16"}
    own = _moe_config._folder
    try:
        _tune.write_config(tmp_path, LAYER, "G 1", [_tune.Winner(1, high, high, 1.0, 1.0, 2.0)])
        path = _tune.write_config(tmp_path, LAYER, "G 1", [_tune.Winner(64, low, low, 1.0, 1.0, 2.0)])
        assert path.name == "E4_H32_I16_bf16_G_1.json" and [p.name for p in tmp_path.iterdir()] == [path.name]
        _moe_config.learn(tmp_path)
        _moe_config._folder = tmp_path
        for tokens, tile in ((1, high), (32, high), (33, low), (64, low)):
            assert get_cute_moe_config("up", tokens, **shape) == get_cute_moe_config("down", tokens, **shape) == tile
    finally:
        _moe_config._folder = own
        _moe_config.learn(own)


def test_results_file_of_another_machine(tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "results.json"
    Results(output, "another GPU").put(Key(LAYER, 1, "up", tiles("bf16")[0]), Result(1.0, 1e-3, True))
    assert _tune.main([*SMALL, "--num-tokens", "1", "--output", str(output)]) == 2
    assert "holds results of 'another GPU'" in capsys.readouterr().err
    output.write_text("[1]")
    assert _tune.main([*SMALL, "--num-tokens", "1", "--output", str(output)]) == 2
    assert "is not a results file of the tuner" in capsys.readouterr().err


def test_command(capsys: Any) -> None:
    import torch

    assert _tune.main(["moe", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tile) for tile in _moe_config.tiles()]
    assert _tune.main(["moe", "--topk", "9", "--experts", "8"]) == 2
    assert "--topk must be at most --experts, got 9 of 8" in capsys.readouterr().err
    assert _tune.main([*SMALL, "--num-tokens", "1", "--topk", "4", "--gpu-time-limit", "0"]) == 3  # of 4 experts
    assert _tune.main([*SMALL, "--write-config", "somewhere"]) == 2
    if not torch.cuda.is_available():
        assert _tune.main(["moe"]) == 2
        assert "needs a Hopper GPU; --device cpu" in capsys.readouterr().err
    for wrong in ("0", "8.5"):
        with pytest.raises(SystemExit):
            _tune.main(["moe", "--num-tokens", wrong])
        error = capsys.readouterr().err
        assert error.endswith(f"argument --num-tokens: must be an integer of at least 1, got {wrong}\n")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/grid_search_cute_moe.py", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--gpu-time-limit" in done.stdout
