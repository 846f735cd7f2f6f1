"""A conversation of one turn: the prompt in one pass, then a token a pass."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter

import numpy as np

from kestrel_kernels._demo.errors import DemoError
from kestrel_kernels._demo.meter import Row, rows
from kestrel_kernels._demo.model import Cache, Model, Pass, Sampling


class Session:
    """Holds the sequence. The pass of one token is prepared once; nothing is allocated from token to token."""

    def __init__(
        self, model: Model, capacity: int, kv_cache_dtype: str = "auto", page_seed: int = 0,
        sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
    ) -> None:  # fmt: skip
        if capacity > model.config.context:
            raise DemoError(f"prompt and answer need {capacity} tokens; the model takes {model.config.context}")
        self.model = model
        self.cache = Cache(model.device, model.config, capacity, kv_cache_dtype, page_seed)
        self.passes: list[Pass] = []
        self._sampling = sampling
        self._rotary_table = model.rotary_table(capacity)
        self._step: Pass | None = None

    def append(self, ids: list[int], outputs: int = 1) -> np.ndarray:
        """Runs the tokens in one pass. Logits [outputs, vocabulary] of the last ones, good until the next pass."""
        run = self.step() if len(ids) == 1 else self.prefill(len(ids), outputs)
        run.run(ids)
        return self.model.device.get(run.logits)

    def prefill(self, tokens: int, outputs: int = 1) -> Pass:
        return self._prepared("prefill", tokens, outputs)

    def step(self) -> Pass:
        if self._step is None:
            self._step = self._prepared("decode", 1, 1)
        return self._step

    def _prepared(self, phase: str, tokens: int, outputs: int) -> Pass:
        made = Pass(phase, self.model, self.cache, self._rotary_table, tokens, outputs, self._sampling)
        self.passes.append(made)
        return made


class Generation:
    """Iterates over the tokens of an answer: until the model ends it, or `max_tokens`."""

    def __init__(self, session: Session, prompt: list[int], max_tokens: int, ends: set[int]) -> None:
        self.session = session
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.ends = ends
        self.tokens = 0  # made so far, the end of the turn among them
        self.prefill_seconds = self.decode_seconds = 0.0
        # Prepared before the clock starts: it costs as much as several tokens.
        self._first = session.prefill(len(prompt))
        self._step = session.step() if max_tokens > 1 else None

    def __iter__(self) -> Iterator[int]:
        start = perf_counter()
        token = self._first.run(self.prompt)
        now = perf_counter()
        self.prefill_seconds = now - start
        start = now
        while True:
            self.tokens += 1
            if token in self.ends:
                return
            yield token
            if self.tokens >= self.max_tokens or self._step is None:
                return
            token = self._step.run(token, offset=self.tokens)
            self.decode_seconds = perf_counter() - start

    def rows(self) -> list[Row]:
        """What each op did. Ends the session: measuring may overwrite what it holds."""
        for made in self.session.passes:
            made.measure()
        return rows(made.program for made in self.session.passes)
