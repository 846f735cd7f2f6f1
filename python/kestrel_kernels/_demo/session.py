"""A conversation of one turn: the prompt in one pass, then a token a pass, each drawn by sample_top_k."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from time import perf_counter

import numpy as np

from kestrel_kernels._demo.errors import DemoError
from kestrel_kernels._demo.meter import Call, Cost, Program, Row, rows
from kestrel_kernels._demo.model import Cache, Model, Pass
from kestrel_kernels._op import as_tensor
from kestrel_kernels.topk import sample_top_k_into


class Session:
    """Holds the sequence. The passes of one token are prepared once; nothing is allocated from token to token."""

    def __init__(self, model: Model, capacity: int, kv_cache_dtype: str = "auto", page_seed: int = 0) -> None:
        if capacity > model.config.context:
            raise DemoError(f"prompt and answer need {capacity} tokens; the model takes {model.config.context}")
        self.model = model
        self.cache = Cache(model.config, capacity, kv_cache_dtype, page_seed)
        self.passes: list[Program] = []
        self._rotary_table = as_tensor(model.rotary_table(capacity))
        self._step: Pass | None = None

    def append(self, ids: list[int], outputs: int = 1) -> np.ndarray:
        """Runs the tokens in one pass. Logits [outputs, vocabulary] of the last ones, good until the next pass."""
        if len(ids) == 1:
            if self._step is None:
                self._step = self._pass("decode", 1, 1)
            step = self._step
        else:
            step = self._pass("prefill", len(ids), outputs)
        step.run(ids)
        return step.logits

    def _pass(self, phase: str, tokens: int, outputs: int) -> Pass:
        made = Pass(phase, self.model, self.cache, self._rotary_table, tokens, outputs)
        self.passes.append(made.program)
        return made


class Generation:
    """Iterates over the tokens of an answer: until the model ends it, or `max_tokens`."""

    def __init__(
        self, session: Session, prompt: list[int], max_tokens: int, ends: set[int],
        temperature: float = 0.0, top_k: int = 40, seed: int = 0,
    ) -> None:  # fmt: skip
        self.session = session
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.ends = ends
        self.sampling = temperature, top_k, seed
        self.tokens = 0  # made so far, the end of the turn among them
        self.prefill_seconds = self.decode_seconds = 0.0

    def __iter__(self) -> Iterator[int]:
        start = perf_counter()
        logits = self.session.append(self.prompt)
        draw, chosen, offset = self._sampler("prefill", logits)
        draw.run(0)
        now = perf_counter()
        self.prefill_seconds = now - start
        if self.max_tokens > 1:
            # Prepared before the clock of the answer starts: it costs as much as several tokens.
            step = self.session._step = self.session._step or self.session._pass("decode", 1, 1)
            draw_step, chosen_step, offset_step = self._sampler("decode", step.logits)
        start = perf_counter()
        while True:
            self.tokens += 1
            token = int(chosen[0])
            if token in self.ends:
                return
            yield token
            if self.tokens >= self.max_tokens:
                return
            step.run(token)
            chosen, offset = chosen_step, offset_step
            offset[0] = self.tokens
            draw_step.run(0)
            self.decode_seconds = perf_counter() - start

    def _sampler(self, phase: str, logits: np.ndarray) -> tuple[Program, np.ndarray, np.ndarray]:
        temperature, top_k, seed = self.sampling
        chosen, offset = np.zeros(1, np.int32), np.zeros(1, np.int64)
        run = partial(
            sample_top_k_into, as_tensor(chosen), as_tensor(logits), top_k if temperature > 0 else 1, temperature,
            seed, as_tensor(offset),
        )  # fmt: skip
        program = Program(phase, [Call("sample_top_k", run, Cost(logits.nbytes, logits.size))])
        self.session.passes.append(program)
        return program, chosen, offset

    def rows(self) -> list[Row]:
        return rows(self.session.passes)
