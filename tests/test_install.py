"""The installed package: its command line, its stubs, its two libraries, and a C++ program built on it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kestrel_kernels
import pytest
from kestrel_kernels import _info, _library
from support import needs_cmake

ROOT = Path(__file__).parents[1]
LIBRARIES = ("libkestrel.so", "libkestrel_ffi.so")


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def run_python(code: str, **options: object) -> str:
    """Runs code in a fresh interpreter that finds the package where this one does."""
    path = os.pathsep.join(p for p in sys.path if p)
    return run(sys.executable, "-c", code, env={**os.environ, "PYTHONPATH": path}, **options)


def info(flag: str, capsys: pytest.CaptureFixture[str]) -> Path:
    assert _info.main([flag]) == 0
    return Path(capsys.readouterr().out.strip())


def needed(library: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-dW", library)))


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert _info.main([]) == 0
    table = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[0] != " ")
    assert table["version"] == kestrel_kernels.__version__
    assert Path(table["library"]).is_file()
    assert re.search(r"(AVX-512|AVX2|SSE2|baseline), \d+ thread", table["CPU"])
    assert re.search(r"^kernels +(none in this build|\d+)", table["CUDA"])


def test_info_paths(capsys: pytest.CaptureFixture[str]) -> None:
    assert (info("--cmake-dir", capsys) / "KestrelKernelsConfig.cmake").is_file()
    assert (info("--include-dir", capsys) / "dlpack" / "dlpack.h").is_file()
    assert (info("--lib-dir", capsys) / "libkestrel.so").is_file()


def test_info_asks_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own tool, whose complaints are no GPUs."""
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _info.gpus() == []
    for status, found in ((0, ["0, NVIDIA H200, 9.0, 580.0"]), (9, [])):
        tool.write_text(f"#!/bin/sh\necho 0, NVIDIA H200, 9.0, 580.0\nexit {status}\n")
        tool.chmod(0o755)
        assert _info.gpus() == found


def test_info_without_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert _info.main(["attention", "--case", "b1 kv740 h32 d64 bf16 page1"]) == 2
    assert capsys.readouterr().err == "kestrel-kernels info: the bench, whose cases these are, needs torch\n"


def test_info_without_a_build(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kestrel_kernels, "__path__", ["/nowhere"])
    assert _info.main(["--cmake-dir"]) == 1
    assert "the package was not built" in capsys.readouterr().err


def test_files() -> None:
    """Headers of every op, no sources, no tests."""
    include = _library.folder("include")
    ops = {folder.name for folder in (ROOT / "ops").iterdir() if (folder / f"{folder.name}.h").is_file()}
    assert ops <= {header.stem for header in (include / "kestrel").iterdir()}
    installed = [path.suffix for path in include.rglob("*") if path.is_file()]
    assert set(installed) == {".h"}
    suffixes = {path.suffix for path in Path(kestrel_kernels.__file__).parent.rglob("*") if path.is_file()}
    assert not suffixes & {".cu", ".cuh", ".cpp", ".o", ".a"}


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_need_no_gpu_stack(library: str) -> None:
    """cudart is inside, cuBLASLt comes on first use, the driver is found at run time."""
    allowed = {"libkestrel.so", "libtvm_ffi.so", "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6"}
    allowed |= {"libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2"}
    if library == "libkestrel.so":
        allowed -= {"libkestrel.so", "libtvm_ffi.so"}
    assert needed(_library.folder("lib") / library) <= allowed


def test_exported_symbols() -> None:
    """The C++ library shows kestrel:: alone; whatever else is inside cannot meet a second copy in the process."""
    symbols = run("nm", "-DC", "--defined-only", _library.folder("lib") / "libkestrel.so").splitlines()
    names = [line.split(maxsplit=2)[2] for line in symbols]
    ours = re.compile(r"(typeinfo for |typeinfo name for |vtable for |guard variable for )?kestrel::")
    assert [name for name in names if not ours.match(name)] == []
    assert any(name.startswith("kestrel::silu_and_mul(") for name in names)
    assert not any(name.startswith(("kestrel::cpu::", "kestrel::cuda::")) for name in names)


@needs_cmake
def test_consumer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = info("--cmake-dir", capsys)
    run("cmake", "-S", ROOT / "tests" / "consumer", "-B", tmp_path, "-G", "Ninja", f"-DKestrelKernels_DIR={package}")
    run("cmake", "--build", tmp_path)
    message = run(tmp_path / "consumer", env={"PATH": os.defpath})
    assert message == "silu_and_mul: out must have shape [3, 37], got [3, 38]\n"
    loaded = run("ldd", tmp_path / "consumer")
    assert "libkestrel.so" in loaded
    assert "not found" not in loaded
    assert not re.search(r"^\s*lib\w*(python|tvm|torch|cuda|cublas)", loaded, re.MULTILINE)


@needs_cmake
@pytest.mark.skipif(not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()), reason="needs nvcc")
def test_other_architectures(tmp_path: Path) -> None:
    """GPUs that are not Hopper's have what needs no Hopper; kernels that do are left empty there, not in the way."""
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    assert "CUDA kernels for 90a 80," in run(*configure, "-DKESTREL_KERNELS_CUDA_ARCH=9.0, 8.0;90a")
    for wrong in ("7.5", "8.0+PTX", "Hopper"):
        done = subprocess.run([*configure, f"-DKESTREL_KERNELS_CUDA_ARCH={wrong}"], capture_output=True, text=True)
        assert "KESTREL_KERNELS_CUDA_ARCH must be numbers from 80 on" in done.stderr
    run(*configure, "-DKESTREL_KERNELS_CUDA_ARCH=80 100")
    kernels = ("gen/ops/attention/prefill_72", "gen/ops/moe/wgmma_32x128_5_fp8", "ops/moe/warp_bf16")
    run("ninja", "-C", tmp_path, *(f"CMakeFiles/kestrel_host.dir/{kernel}.cu.o" for kernel in kernels))


def test_import_loads_nothing() -> None:
    code = """
        import sys, kestrel_kernels
        dir(kestrel_kernels), kestrel_kernels.silu_and_mul, kestrel_kernels.activation
        print(*sorted({"torch", "numpy", "tvm_ffi", "jax", "cupy", "ml_dtypes"} & set(sys.modules)))
        print(any("libkestrel" in line for line in open("/proc/self/maps")))
    """
    assert run_python("\n".join(line.strip() for line in code.splitlines())) == "\nFalse\n"


def copy_package(to: Path) -> None:
    """The package in one folder: an editable install has two."""
    for folder in kestrel_kernels.__path__:
        shutil.copytree(
            folder, to / "kestrel_kernels", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )


@pytest.mark.skipif(len(list(kestrel_kernels.__path__)) > 1, reason="an editable install comes before any other copy")
def test_read_only_folder(tmp_path: Path) -> None:
    """Nothing is written beside the package, and no compiler is asked."""
    copy_package(tmp_path)
    files = sorted(tmp_path.rglob("*"))
    for path in files:
        path.chmod(0o555 if path.is_dir() else 0o444)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
sys.dont_write_bytecode = True
import numpy, kestrel_kernels
assert kestrel_kernels.__file__.startswith({str(tmp_path)!r})
print(kestrel_kernels.silu_and_mul(numpy.ones((1, 2), 'f4'))[0, 0])
"""
    try:
        assert run_python(code).startswith("0.73105")
        assert sorted(tmp_path.rglob("*")) == files
    finally:
        for path in files:
            path.chmod(0o755)


def test_names_at_run_time() -> None:
    """Every public function stands in the package too, unless a module has its name, and says what it does."""
    for name in dir(kestrel_kernels):
        value = getattr(kestrel_kernels, name)
        if not name.startswith("_") and callable(value):
            assert value.__doc__, f"{name} has no docstring"
    out = run_python("import kestrel_kernels; help(kestrel_kernels.silu_and_mul)")
    assert "silu_and_mul(x: 'ArrayT') -> 'ArrayT'" in out
    assert "Shazeer" in out


def test_names_for_type_checkers(tmp_path: Path) -> None:
    """The stub that the build makes agrees with what the package finds at run time, and carries signatures."""
    stub = tmp_path / "stub.txt"
    run(sys.executable, ROOT / "tools" / "stubs.py", stub)
    installed = [path for folder in kestrel_kernels.__path__ if (path := Path(folder) / "__init__.pyi").is_file()]
    assert [path.read_text() for path in installed] == [stub.read_text()]
    stated = set(re.findall(r" as (\w+)$", stub.read_text(), re.MULTILINE))
    modules = {m for m in vars(kestrel_kernels)["_MODULES"] if "." not in m}
    assert stated == modules | set(vars(kestrel_kernels)["_names"]())
    pytest.importorskip("mypy")
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import kestrel_kernels\n"
        "reveal_type(kestrel_kernels.silu_and_mul)\n"
        "reveal_type(kestrel_kernels.activation.gelu_residual_cuda)\n"
        "reveal_type(kestrel_kernels.__version__)\n"
    )
    mypy = [sys.executable, "-m", "mypy", "--config-file=", "--ignore-missing-imports", "--no-incremental", str(probe)]
    copy_package(tmp_path)
    text = run(*mypy, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(tmp_path)})
    assert re.search(r'"def \[ArrayT\] \(x: ArrayT.*\) -> ArrayT', text)
    assert re.search(r'"def \(out: Any, x: Any\)"', text)
    assert '"builtins.str"' in text or '"str"' in text
