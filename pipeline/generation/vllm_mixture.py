"""Writing from a mixture of teacher and student under vLLM: two engines, one coin for each token.

One idea: to draw from a p + (1 - a) q, toss a coin that says p with probability a, then draw from
what it says. The coins of an answer follow from its seed alone, so they are known beforehand, and
all tokens that one model draws in a row are one request to its engine, which finds everything
before them in its prefix cache. A finished answer is read once by each engine, which gives log p
and log q of every token, and so log b, whichever of the two drew it.

A nucleus of the mixture is not a mixture of nuclei, nor its mode a mixture of modes: top_p < 1 and
temperature 0 are refused.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.config import Capture, Teacher
from stillroom.pipeline.generation.vllm_serving import ServedWriter
from stillroom.pipeline.generation.writers import Answer, Writers, answer_key
from stillroom.pipeline.record import Example
from stillroom.pipeline.teacher.facts import model_shape
from stillroom.pipeline.teacher.rows import draw_key
from stillroom.pipeline.teacher.sweep.definition import uniforms
from stillroom.pipeline.teacher.vllm.engine import requests_for

IN_FLIGHT_ANSWERS = 512
MEMORY = 0.9
"""Share of an accelerator's memory for all models together, unless engine_args say otherwise."""


class VllmMixture:
    """See `writers.Generator`."""

    def __init__(self, writers: Writers):
        models = writers.models()
        _check(writers, [model for _, model in models])
        self._writers = writers
        self._models: list[_Model] = []
        try:
            for share, model in models:
                self._models.append(_Model(share, model, writers))
        except BaseException:  # one of two would be left running
            self.close()
            raise

    def served(self) -> list[ServedWriter]:
        """See `Generator.served`."""
        return [model.served for model in self._models]

    def close(self) -> None:
        """End both engines."""
        for model in self._models:
            model.close()
        self._models = []

    def answer(self, prompts: Iterable[Example]) -> Iterator[list[Answer]]:
        """See `Generator.answer`."""
        source, asked, number = iter(prompts), deque(), self._writers.settings.n
        ahead = max(1, IN_FLIGHT_ANSWERS // number)
        while True:
            while len(asked) < ahead and (prompt := next(source, None)) is not None:
                asked.append([self._begin(prompt, i) for i in range(number)])
            if not asked:
                return
            while any(draft.answer is None for draft in asked[0]):
                for model in self._models:
                    model.step()
            yield [draft.answer for draft in asked.popleft()]

    def _begin(self, prompt: Example, number: int) -> "_Draft":
        settings = self._writers.settings
        key = answer_key(settings.seed, prompt, number)
        points = uniforms(torch.arange(settings.max_tokens), draw_key(key, "coins"))
        draft = _Draft(prompt, key, (points >= self._models[0].share).numpy())
        self._go_on(draft)
        return draft

    def _go_on(self, draft: "_Draft") -> None:
        """Let the model whose turn it is draw until the other's turn."""
        start = len(draft.tokens)
        # The tokens in a row that this model draws, up to the first that is the other's.
        others = np.flatnonzero(draft.coins[start:] != draft.coins[start])
        length = int(others[0]) if len(others) else len(draft.coins) - start
        model = self._models[int(draft.coins[start])]
        seed = draw_key(draft.key, f"token {start}")
        model.write(draft.text(), length, seed, partial(self._written, draft))

    def _written(self, draft: "_Draft", output: Any) -> None:
        (found,) = output.outputs
        draft.tokens += found.token_ids
        draft.ended = draft.tokens[-1] in self._writers.stop_ids
        if not draft.ended and len(draft.tokens) < len(draft.coins):
            self._go_on(draft)
            return
        text = draft.text()
        for model in self._models:
            model.read(text, partial(self._weighed, draft, model.share))

    def _weighed(self, draft: "_Draft", share: float, logprobs: np.ndarray) -> None:
        draft.parts.append(np.log(share) + logprobs)  # nats
        if len(draft.parts) == len(self._models):
            behaviour = np.logaddexp(*draft.parts).astype(np.float32)  # log(a p + (1 - a) q)
            ids = np.asarray(draft.tokens, dtype=np.int32)
            draft.answer = Answer(ids, behaviour, draft.ended)


@dataclass(slots=True)
class _Draft:
    """An answer in the making.

    Attributes:
        coins: bool [max_tokens], False where the first model draws.
        tokens: drawn so far.
        parts: log(share) + log probability of every token, of each model that has read them.
    """

    prompt: Example
    key: int
    coins: np.ndarray
    tokens: list[int] = field(default_factory=list)
    parts: list[np.ndarray] = field(default_factory=list)
    ended: bool = False
    answer: Answer | None = None

    def text(self) -> Example:
        """The prompt and what was drawn, drawn tokens under the loss mask."""
        ids = np.concatenate([self.prompt.token_ids, np.asarray(self.tokens, dtype=np.int32)])
        mask = np.arange(len(ids)) >= len(self.prompt.token_ids)
        return replace(self.prompt, token_ids=ids.astype(np.int32), loss_mask=mask)


class _Model:
    """One engine, what it has been asked, and who waits for it."""

    def __init__(self, share: float, model: Teacher, writers: Writers):
        self.share, self._temperature = share, writers.settings.temperature
        kept = Capture(k=1, temperatures=(self._temperature,), entropy=False)
        self._requests = requests_for(kept, model)
        self._columns = sorted({1.0, self._temperature})
        needed = self._requests.engine_arguments()
        if torch.cuda.is_available() and "gpu_memory_utilization" not in model.engine_args:
            needed["gpu_memory_utilization"] = MEMORY / 2  # two engines, one device
        self.served = ServedWriter(model, writers, needed)
        self._waiting: dict[str, Callable[[Any], None]] = {}

    def close(self) -> None:
        """End vLLM and its workers."""
        self.served.close()

    def step(self) -> None:
        """One scheduler step, if anything was asked; tells those whose answer is finished."""
        if self._waiting:
            for output in self.served.step():
                self._waiting.pop(output.request_id)(output)

    def write(self, text: Example, length: int, seed: int, tell: Callable[[Any], None]) -> None:
        """Draw at most `length` tokens after a text; `tell` gets vLLM's output."""
        self._ask(text, self.served.sampling(length, seed), tell)

    def read(self, text: Example, tell: Callable[[np.ndarray], None]) -> None:
        """`tell` gets float64 [n], log probability of each token under the text's loss mask."""
        self._ask(text, self._requests.sampling(text), lambda out: tell(self._logprobs(text, out)))

    def _logprobs(self, text: Example, output: Any) -> np.ndarray:
        said = self._requests.signals(text, output)
        lse = said["lse"].astype(np.float64)
        one, own = (lse[:, self._columns.index(t)] for t in (1.0, self._temperature))
        return (said["token_logprob"] + one) / self._temperature - own  # z / T - lse_T

    def _ask(self, text: Example, sampling: Any, tell: Callable[[Any], None]) -> None:
        self._waiting[self.served.ask(text, sampling)] = tell


def _check(writers: Writers, models: list[Teacher]) -> None:
    """Refuse what coins cannot do.

    Raises:
        ConfigError: the mixture is cut or sharpened as a whole, or the vocabularies differ.
    """
    settings = writers.settings
    if settings.top_p < 1 or settings.temperature == 0:
        name = "temperature" if settings.temperature == 0 else "top_p"
        raise ConfigError(
            f"{name} = {getattr(settings, name):g} acts on the whole mixture, and no engine of "
            "vLLM has the whole",
            expected="top_p = 1 and temperature > 0 for a mixture",
            where=f"[generate] {name}",
            remedy="Use `--engine reference` for it.",
        )
    sizes = [model_shape(model).vocab_size for model in models]
    if len(set(sizes)) > 1:
        raise ConfigError(
            f"the heads of teacher and student have {sizes[0]} and {sizes[1]} words",
            expected="heads of one size, so that both can read what either draws",
            where="[generate] student",
            remedy="Use `--engine reference`, which draws from the words that both have.",
        )
