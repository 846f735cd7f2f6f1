"""Text to tokens and back: byte-level BPE (Sennrich et al. 2016; bytes as symbols, Radford et al. 2019) from the
vocabulary and merges of a GGUF file, digits split one by one, with the file's chat template.
"""

from __future__ import annotations

import codecs
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from kestrel_kernels._demo.errors import DemoError

_CONTROL, _USER_DEFINED = 3, 4  # token types of the GGUF format


def _symbols() -> dict[str, int]:
    """GPT-2's stand-in character for each byte: printable Latin-1 for itself, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


class Tokenizer:
    def __init__(self, saved: dict[str, Any]) -> None:
        """`saved`: tokens, types, merges, template, bos, eos, as `gguf_model.load` gives them."""
        tokens, types = saved["tokens"], saved["types"]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        merges = [tuple(merge.split(" ")) for merge in saved["merges"]]
        self._bpe = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        self._bpe.decoder = decoders.ByteLevel()
        whole = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
        self._bpe.add_tokens([AddedToken(t, special=kind == _CONTROL, normalized=False) for t, kind in whole])

        self._control = {vocabulary[token] for token, kind in whole if kind == _CONTROL}
        symbols, verbatim = _symbols(), {token for token, _ in whole}
        self._bytes = [
            token.encode() if token in verbatim else bytes(symbols[s] for s in token if s in symbols)
            for token in tokens
        ]
        self._template = saved["template"]
        self._names = {"bos_token": "" if saved["bos"] is None else tokens[saved["bos"]]}
        self._names["eos_token"] = tokens[saved["eos"]]
        # The end of a turn, and the end of a text where the model has that as well.
        self.ends = {saved["eos"], vocabulary.get("<|endoftext|>", saved["eos"])}

    def encode(self, text: str) -> list[int]:
        """Special tokens written out in the text become those tokens; none are added."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        stream = TextStream(self)
        return "".join(map(stream.push, ids)) + stream.close()

    def chat(self, prompt: str) -> list[int]:
        """The tokens of a conversation whose only turn is the prompt, up to where the answer begins."""

        def fail(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = fail
        try:
            text = environment.from_string(self._template).render(
                messages=[{"role": "user", "content": prompt}], add_generation_prompt=True, **self._names
            )
        except jinja2.TemplateError as error:
            raise DemoError(f"the model's chat template fails: {error}") from None
        return self.encode(text)


class TextStream:
    """Tokens in, text out. A character whose bytes are spread over tokens comes with the last of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        if token in self._tokenizer._control:
            return ""
        return self._utf8.decode(self._tokenizer._bytes[token])

    def close(self) -> str:
        """What an unfinished character leaves: U+FFFD or nothing."""
        return self._utf8.decode(b"", final=True)
