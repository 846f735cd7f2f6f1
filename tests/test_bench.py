"""The bench: cases, floors, results file, README table, and the command itself on the CPU."""
# ruff: noqa: E402 (torch first: without it there is nothing to test)

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import kestrel_kernels as kk
from kestrel_kernels import _bench, _op
from kestrel_kernels._bench import measure as measure_module
from kestrel_kernels._bench import report, results, small
from kestrel_kernels._bench.clock import CpuClock
from kestrel_kernels._bench.entry import Case, Entry, Maker, Set, entries, frobenius, load_cases, nbytes, poison
from kestrel_kernels._bench.measure import HOST_TIME, Outcome, measure
from rich.console import Console

ROOT = Path(__file__).parent.parent
CASES = load_cases()
OPS = [op for op, kind in entries().items() if kind.small]
H200 = 4.65e12


def load_tool(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def row(op: str = "gelu_residual", case: str = "1x1024", us: float = 0.8, **changes: Any) -> results.Row:
    made = {"op": op, "case": case, "us": us, "warm_us": 0.7, "floor_us": 0.5, "peers": {"torch": 1.5},
            "rel_err": 1.7e-3, "commit": "abc", "date": "2026-01-01"}  # fmt: skip
    return {**made, **changes}


# Cases and entries.


def test_cases_are_distinct_and_complete() -> None:
    assert len({(c.op, c.name) for c in CASES}) == len(CASES)
    assert all(case.target_us is None or case.target_us > 0 for case in CASES)  # None: nobody set a target
    installed = json.loads((ROOT / "benchmarks/cases.json").read_text())["rows"]
    assert [(r["op"], r["case"]) for r in installed] == [(c.op, c.name) for c in CASES]


@pytest.mark.parametrize("case", [c for c in CASES if c.op in entries()], ids=lambda c: f"{c.op} {c.name}")
def test_case_is_parsed(case: Case) -> None:
    """The sizes in the name are those of the entry, and no target lies below the floor's bytes."""
    entry = entries()[case.op](case.name)
    fixed = r"fp8|bf16|paged1" + ("|page1" if "page1" in entry.pattern else "")
    numbers = [int(n) for n in re.findall(r"\d+", re.sub(fixed, "", case.name))]
    assert [v for k, v in vars(entry).items() if k != "case" and isinstance(v, int)] == numbers
    assert case.target_us is None or results.floor_us(entry.bytes, H200) <= case.target_us


def test_model_step() -> None:
    """The one entry that is a model, not an op, and has no small cases: the calls of the demo against PyTorch's."""
    assert set(entries()) - set(OPS) == {"smollm2_decode_step"}
    entry = entries()["smollm2_decode_step"]("b1")
    s = entry.inputs(Maker("cpu"))
    assert entry.relative_error(s) <= entry.tolerance and entry.peer_error(s, entry.eager) <= entry.tolerance


def test_host_cases_name_an_entry() -> None:
    for case in CASES:
        if case.op == HOST_TIME:
            op, name = case.name.split(" ", 1)
            assert entries()[op].host_case == name


def test_case_of_another_form() -> None:
    with pytest.raises(ValueError, match="gelu_residual: a case is written like"):
        entries()["gelu_residual"]("12")


@pytest.mark.parametrize("op", OPS)
def test_entry_agrees_with_torch(op: str) -> None:
    """The float64 answer and the same op in plain PyTorch: two writings of one formula."""
    kind = entries()[op]
    for name in kind.small:
        entry = kind(name)
        assert entry.peer_error(entry.inputs(Maker("cpu")), entry.eager) <= 2.5 * entry.tolerance
        assert {n.rstrip("=") for n in entry.arguments.split()} <= set(entry.inputs(Maker("cpu")))


@pytest.mark.parametrize(
    ("op", "case", "expected"),
    [
        ("gelu_residual", "1x1024", 0.5),
        ("gelu_residual", "5920x1024", 5920 * (2048 + 1024) * 2 / 4.65e6),
        ("layernorm", "9477x1152", (9477 * 2 + 2) * 1152 * 2 / 4.65e6),
        ("rmsnorm_residual", "9477x1152", (9477 * 4 + 1) * 1152 * 2 / 4.65e6),
        ("kv_cache_write", "4096x32x64 fp8 page1", 4096 * (2 * 2048 * 3 + 8) / 4.65e6),
        ("moe_sum", "1024x8x2048", 1024 * 9 * 2048 * 2 / 4.65e6),
        ("linear", "1x2048x8192", (8192 + 2048 * 8192 + 2048) * 2 / 4.65e6),
    ],
)
def test_floor(op: str, case: str, expected: float) -> None:
    assert results.floor_us(entries()[op](case).bytes, H200) == pytest.approx(expected)


def test_floor_of_products() -> None:
    entry = entries()["fused_mlp"]("9477x1152x4304")
    assert entry.operations == 2 * 2 * 9477 * 1152 * 4304
    assert results.floor_us(entry.bytes, H200, entry.operations, 660e12) == pytest.approx(284.8, abs=0.1)


def test_bytes_are_no_more_than_twice_the_arguments() -> None:
    for op in OPS:
        kind = entries()[op]
        entry = kind(kind.small[-1])
        assert 0 < entry.bytes <= 2 * nbytes(entry.inputs(Maker("cpu"))) + 64


def test_small_cases_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert small.main(["--device", "cpu"]) == 0
    assert "right on cpu: gelu_residual (10 calls)" in capsys.readouterr().out


def test_small_cases_see_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(entries()["gelu_residual"], "bound", lambda self, s: lambda: None)  # writes nothing
    assert small.main(["--device", "cpu", "gelu_residual", "layernorm"]) == 1
    out = capsys.readouterr().out
    assert "right on cpu: layernorm (" in out and "WRONG gelu_residual " in out and "times the error allowed" in out
    assert small.main(["--device", "cpu", "no_such_op"]) == 1
    assert "right on cpu: nothing ran\nno kernel or no bench entry yet: no_such_op" in capsys.readouterr().out


def test_error_and_poison() -> None:
    """The norm of the difference over that of what is wanted, of all arrays together; and what makes it NaN."""
    want = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    assert frobenius([torch.tensor([3.0, 2.0]), torch.tensor([[4.0]])], want) == pytest.approx(0.4)
    assert frobenius([torch.tensor([3.0, 4.0])], [torch.zeros(2)]) == pytest.approx(5.0)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        poison(array := torch.zeros(3).to(dtype))
        assert array.float().isnan().all()
    for dtype, most in ((torch.uint8, 0x7F), (torch.int32, 2**31 - 1)):
        poison(array := torch.zeros(3, dtype=dtype))
        assert array.tolist() == [most] * 3


def test_small_cases_call_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the sanitizer sees each: an op without a bench entry fails here."""
    called = set()
    original = _op.Op.call

    def record(self: _op.Op, *args: Any) -> None:
        called.add(self.name)
        original(self, *args)

    monkeypatch.setattr(_op.Op, "call", record)
    assert small.main(["--device", "cpu"]) == 0
    kk.__dir__()  # imports every module of ops
    assert called == set(_op._ops)


# The results file.


def test_merge_replaces_what_ran() -> None:
    old = {"gpu": "G", "rows": [row(us=9), row(case="64x1024", us=8), row(op="layernorm", case="1x2048", us=7)]}
    ran = {("gelu_residual", "1x1024"), ("layernorm", "1x2048")}  # the second failed: no row
    new = results.merge(old, "G", [row(us=1)], ran)
    assert [(r["case"], r["us"]) for r in new["rows"]] == [("1x1024", 1), ("64x1024", 8)]
    assert [r["case"] for r in results.merge(None, "G", [row(case="64x1024"), row()], set())["rows"]] == [
        "1x1024",
        "64x1024",
    ]


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "h200.json"
    written = results.merge(None, "NVIDIA H200", [row(), row(case="64x1024", peers={})], set())
    results.write(path, written)
    assert results.read(path, "NVIDIA H200") == written
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(ValueError, match="holds results of 'NVIDIA H200', this is 'NVIDIA H100'"):
        results.read(path, "NVIDIA H100")
    assert results.read(tmp_path / "none.json", "G") is None
    path.write_text('{"rows": [')
    with pytest.raises(ValueError, match="not a results file"):
        results.read(path, "NVIDIA H200")


def test_bare_products_are_no_rivals(tmp_path: Path) -> None:
    """A peer that does the products alone is kept beside the others, but cannot be the best of them."""
    slower = row("fused_mlp", "729x1152x4304", us=38.0, peers={"torch": 43.0, "cublas": 36.0}, bare=["cublas"])
    assert results.rivals(slower) == {"torch": 43.0}
    assert report.peers_cell(slower) == "43.0 torch; 36.0 cublas, bare"
    written = results.merge(None, "G", [row(), slower], set())
    results.write(tmp_path / "g.json", written)
    assert results.read(tmp_path / "g.json", "G") == written
    for op in ("fused_linear_residual", "fused_mlp"):
        assert entries()[op].bare == ("cublas",)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a source tree; a plus where it has changes, but for those that a run makes; else the version."""

    def git(*args: str) -> str:
        names = ["-c", "user.name=n", "-c", "user.email=e"]
        return subprocess.run(["git", "-C", tmp_path, *names, *args], capture_output=True, text=True, check=True).stdout

    files = [tmp_path / name for name in ("benchmarks/cases.json", "python/kestrel_kernels/a.py", "README.md")]
    monkeypatch.setattr(kk, "__path__", [str(files[1].parent)])
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    assert results.commit() == kk.__version__
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    head = git("rev-parse", "--short=12", "HEAD").strip()
    files[2].write_text("2")
    assert results.commit() == head
    files[1].write_text("2")
    assert results.commit() == head + "+"


def test_report() -> None:
    """Who wins, what misses its target, what was not measured. A call's cost has no rival in one op of torch's."""

    def outcome(op: str, case: str, us: float, target: float | None, **changes: Any) -> Outcome:
        return Outcome(Case(op, case, target, None), row(op, case, us, **changes))

    outcomes = [
        outcome("gelu_residual", "1x1024", 1.0, 1.0),
        outcome("gelu_residual", "64x1024", 1234.5, 1.2, peers={"torch": 99.0, "cublas": 1.9}, bare=["cublas"]),
        outcome("fused_mlp", "729x1152x4304", 12.0, 11.9, peers={}),
        outcome(HOST_TIME, "layernorm 1x2048", 9.0, None, peers={"torch": 3.0}),
        Outcome(Case("moe_up", "1", None, None), missing="no kernel yet"),
        Outcome(Case("moe_up", "4", None, None), failure="wrong result", notes=["torch: slow"]),
    ]
    console = Console(width=200, file=io.StringIO(), record=True)
    report.print_report(console, outcomes, "NVIDIA H200", on_cuda=True)
    lines = [re.sub(r"[\s│]+", " ", line).strip() for line in console.export_text().splitlines()]
    assert "gelu_residual 1x1024 1.00 0.70 0.50 50% 1.00 1.50 torch ok" in lines
    assert "64x1024 1,234 0.70 0.50 0% 1.20 99.0 torch; 1.90 cublas, bare over target, peer wins" in lines
    assert "fused_mlp 729x1152x4304 12.0 0.70 0.50 4% 11.9 over target" in lines
    assert "host_time layernorm 1x2048 9.00 3.00 torch ok" in lines
    assert lines[-4:] == [
        "4 cases, 1 where a peer wins, 2 over their target", "no kernel yet: moe_up (1)", "moe_up 4: torch: slow",
        "FAILED moe_up 4: wrong result",
    ]  # fmt: skip
    assert report.best_peer(row(peers={"torch": 3.0, "cudnn": 2.0})) == ("cudnn", 2.0)


def test_bare_products_are_timed_unchecked(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def product(s: Set) -> Any:
        return torch.mm(s["x"], s["w"].t(), out=s["out"])

    for op, bare in (("linear", None), ("fused_linear_residual", ["cublas"])):
        monkeypatch.setattr(entries()[op], "peers", lambda self: {"cublas": product})
        monkeypatch.setattr(measure_module, "_compiled", lambda entry: entry.eager)
        outcome = measure(Case(op, "17x130x72", None, None), CpuClock(), "all", "")
        assert outcome.row and not outcome.notes
        assert outcome.row["peers"]["cublas"] > 0 and outcome.row.get("bare") == bare


def test_what_a_row_measures(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peers that were asked for; the floor of a product by its operations; sets made steady for repeated calls."""
    steady: list[Set] = []
    monkeypatch.setattr(Entry, "steady", lambda self, s: steady.append(s))
    monkeypatch.setattr(Entry, "peers", lambda self: {})
    monkeypatch.setattr(measure_module, "_compiled", lambda entry: entry.eager)
    monkeypatch.setattr(CpuClock, "peak", lambda self, products: 1e6)
    for op, case, eager in (
        ("fp8_quant_static", "3x33", ["torch"]),
        (HOST_TIME, "layernorm 1x2048", ["torch", "torch, one op"]),
    ):
        for peers, names in (("none", []), ("eager", eager), ("all", [*eager, "torch.compile"])):
            row = measure(Case(op, case, None, None), CpuClock(), peers, "").row
            assert row and sorted(row["peers"]) == names[: len(eager) if op == HOST_TIME else None]
    assert steady
    row = measure(Case("linear", "17x130x72", None, None), CpuClock(), "none", "").row
    assert row and row["floor_us"] == results.rounded(2 * 17 * 130 * 72)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("results/*.json")), ids=lambda p: p.name)
def test_committed_results(path: Path) -> None:
    found = json.loads(path.read_text())
    known = {(c.op, c.name) for c in CASES}
    assert found == results.read(path, found["gpu"])
    for r in found["rows"]:
        assert tuple(r) in (results.FIELDS, results.FIELDS + results.OPTIONAL)
        assert (r["op"], r["case"]) in known
        assert r["us"] > 0 and r["floor_us"] >= 0.5 and 0 <= r["rel_err"] < 0.05
        assert all(us > 0 for us in r["peers"].values())


# The command.


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuClock, "seconds", 0.01)
    monkeypatch.setattr(CpuClock, "most_bytes", 1 << 20)


def test_run_on_the_cpu(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cpu.json"
    command = ["gelu_residual", "--case", "1x1024", "--device", "cpu", "--json", str(path)]
    assert _bench.main([*command, "--commit", "one"]) == 0
    out = capsys.readouterr().out
    assert "gelu_residual" in out and "1x1024" in out and "torch" in out
    (only,) = json.loads(path.read_text())["rows"]
    assert tuple(only) == results.FIELDS
    assert only["commit"] == "one" and only["peers"]["torch"] > 0 and 0 < only["rel_err"] < 3e-3
    assert _bench.main([*command, "--case", "64x1024", "--peers", "none"]) == 0
    first, second = json.loads(path.read_text())["rows"]
    assert first["commit"] != "one" and first["peers"] == {} and second["case"] == "64x1024"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_op"], "no such op: no_such_op; known are gelu_residual"),
        (["--case", "7x7"], "no case has that name"),
        pytest.param(["--device", "cuda"], "torch sees no CUDA device",
                     marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")),
    ],
)  # fmt: skip
def test_usage_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _bench.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"kestrel-kernels bench: {message}")


def test_wrong_result_is_a_failure(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entries()["gelu_residual"], "eager", Entry.eager)  # not written: a peer's fault, not ours
    command = ["gelu_residual", "--case", "1x1024", "--device", "cpu"]
    assert _bench.main(command) == 0
    assert "torch: NotImplementedError" in capsys.readouterr().out
    monkeypatch.setattr(entries()["gelu_residual"], "eager", lambda self, s: torch.zeros_like(s["out"]))
    assert _bench.main(command) == 0
    assert "torch: rel_err 1.0e+00; left out" in capsys.readouterr().out
    monkeypatch.setattr(entries()["gelu_residual"], "bound", lambda self, s: lambda: None)  # writes nothing
    assert _bench.main(command) == 1
    assert "FAILED gelu_residual 1x1024: wrong result: rel_err nan" in capsys.readouterr().out


def test_missing_kernel_is_no_failure(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(self: Entry, s: Set) -> Any:
        def fail() -> None:
            raise NotImplementedError("layernorm: no CUDA kernel")

        return fail

    monkeypatch.setattr(entries()["gelu_residual"], "bound", call)
    outcome = measure(Case("gelu_residual", "1x1024", 1.0, None), CpuClock(), "none", "")
    assert outcome.missing and not outcome.failure and not outcome.row


# Tools.


def test_readme_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = load_tool("readme_table")
    readme, file = tmp_path / "README.md", tmp_path / "h200.json"
    rows = [row(), row(case="64x1024", us=2.0), row(HOST_TIME, "layernorm 1x2048", 3.4, peers={"torch": 9.0}),
            row("fused_mlp", "729x1152x4304", 2.0, peers={"torch": 4.0, "cublas": 1.9}, bare=["cublas"]),
            row("moe_up", "1 fp8 E64 H2048 I1024 k8", 12.0, peers={})]  # fmt: skip
    results.write(file, {"gpu": "NVIDIA H200", "rows": rows})
    readme.write_text(f"before\n{tool.BEGIN}\nstale\n{tool.END}\nafter\n")
    command = ["--readme", str(readme), "--results", str(file)]
    assert tool.main([*command, "--check"]) == 1
    assert tool.main(command) == 0
    assert tool.main([*command, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert "| gelu_residual | 1x1024 | **0.80** | 0.70 | 0.50 | 62% | 1.50 torch; 0.96 recorded |" in text
    assert "| gelu_residual | 64x1024 | 2.00 | 0.70 | 0.50 | 25% | 1.50 torch; **1.09** recorded |" in text  # a loss
    assert "| moe_up | 1 fp8 E64 H2048 I1024 k8 | 12.0 | 0.70 | 0.50 | 4% | **11.7** recorded |" in text
    assert "layernorm 3.40 (torch: 9.00)" in text
    assert (
        "| **2.00** | 0.70 | 0.50 | 25% | 4.00 torch; bare product 1.90 cublas |" in text
        and "; bare product: the" in text
    )
    readme.write_text("no markers")
    assert tool.main(command) == 2
    assert "no pair of markers" in capsys.readouterr().err


def test_readme_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    load_tool("readme_table")
    tool = load_tool("readme_plot")
    file = tmp_path / "h200.json"
    rows = [row(), row(case="64x1024", us=2.0), row("moe_up", "1 fp8 E64 H2048 I1024 k8", 12.0, peers={})]
    results.write(file, {"gpu": "NVIDIA H200", "rows": [*rows, row(HOST_TIME, "layernorm 1x2048", 3.4)]})
    command = ["--results", str(file)]
    assert tool.main([*command, "--check"]) == 1
    assert tool.main(command) == 0
    assert tool.main([*command, "--check"]) == 0
    picture = (tmp_path / "h200.svg").read_text()
    assert "NVIDIA H200: 3 cases" in picture and "moe_up" in picture
    results.write(file, {"gpu": "NVIDIA H200", "rows": [row(us=0.9)]})
    assert tool.main([*command, "--check"]) == 1
    assert "out of date" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["readme_table", "readme_plot"])
def test_readme_is_up_to_date(name: str) -> None:
    load_tool("readme_table")
    assert load_tool(name).main(["--check"]) == 0


def test_check_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = load_tool("check_gpu")
    assert tool.file_name("NVIDIA H200") == "h200.json"
    assert tool.file_name("NVIDIA H100 80GB HBM3") == "h100.json"
    monkeypatch.setattr(tool, "gpu_name", lambda: None)
    assert tool.main([]) == 2
    step = tool.run("late", [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"], 1.0, None, {})
    assert step.status == "FAILED" and "its limit of 1 s" in step.note and step.seconds < 20
    log = tmp_path / "log"
    assert tool.run("good", [sys.executable, "-c", "print('fine')"], 30, log, {}).status == "ok"
    assert log.read_text() == "fine\n"
    assert tool.run("bad", [sys.executable, "-c", "raise SystemExit(3)"], 30, None, {}).note.startswith("status 3")
