"""Writing step by step under transformers, from any mixture of teacher and student.

One idea: one prompt at a time, its answers side by side in one batch that shares the prompt's keys
and values; at every step both models say their next-token logits, one mixture is drawn from, and
both read the same token. Models that remember in another way than by keys and values (Mamba, short
convolutions, linear attention) read each whole text again for every token. Slow and plain: it is
what other engines are compared with.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from stillroom.cache_schemas.errors import TeacherError
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.generation.writers import Answer, Writers, answer_key, draw, mixture
from stillroom.pipeline.record import Example
from stillroom.pipeline.teacher.facts import model_shape
from stillroom.pipeline.teacher.images import Pictures
from stillroom.pipeline.teacher.overrides import check_applicable
from stillroom.pipeline.teacher.reference.engine import load_model
from stillroom.pipeline.teacher.reference.images import ImageInputs, is_image_text


class ReferenceGenerator:
    """See `writers.Generator`."""

    def __init__(self, writers: Writers):
        self._writers = writers
        self._models = [(part, _Reader(m, writers.pictures)) for part, m in writers.models()]
        self._vocab_size = min(reader.vocab_size for _, reader in self._models)
        contexts = [model_shape(model).context for _, model in writers.models()]
        self._context = min((one for one in contexts if one), default=0)

    def served(self) -> list[Any]:
        """See `Generator.served`."""
        return []

    def close(self) -> None:
        """Forget the models."""
        self._models = []

    @torch.inference_mode()
    def answer(self, prompts: Iterable[Example]) -> Iterator[list[Answer]]:
        """See `Generator.answer`."""
        for prompt in prompts:
            yield self._answers(prompt)

    def _answers(self, prompt: Example) -> list[Answer]:
        settings, most = self._writers.settings, self._room(prompt)
        keys = [answer_key(settings.seed, prompt, number) for number in range(settings.n)]
        logits = [(part, reader.begin(prompt, settings.n)) for part, reader in self._models]
        tokens, logprobs = [], []
        running = torch.ones(settings.n, dtype=torch.bool)  # answers that have not ended
        for step in range(most):
            # [n, V]; heads may be padded to different widths.
            b = mixture([(part, z[:, : self._vocab_size]) for part, z in logits], settings)
            drawn = draw(b, keys, step)
            tokens.append(drawn.cpu())
            logprobs.append(b.gather(1, drawn[:, None])[:, 0].log().float().cpu())
            running &= ~torch.isin(tokens[-1], torch.tensor(self._writers.stop_ids))
            if not running.any() or step + 1 == most:
                break
            logits = [(part, reader.go_on(drawn)) for part, reader in self._models]
        return self._cut(torch.stack(tokens, 1).numpy(), torch.stack(logprobs, 1).numpy())

    def _room(self, prompt: Example) -> int:
        """Tokens of an answer: what was asked for, or what the models still attend to."""
        length, most = len(prompt.token_ids), self._writers.settings.max_tokens
        if self._context:
            most = min(most, self._context - length)
        if not length or most < 1:
            raise TeacherError(
                f"a prompt of {length:,} tokens",
                expected=f"1 to {self._context - 1:,}" if self._context else "1 or more",
                where=self._writers.teacher.model,
                remedy="Ask with another prompt.",
            )
        return most

    def _cut(self, tokens: np.ndarray, logprobs: np.ndarray) -> list[Answer]:
        """Each row up to the token that ends it."""
        ends = np.isin(tokens, self._writers.stop_ids)
        answers = []
        for row in range(len(tokens)):
            ended = ends[row].any()
            length = int(np.argmax(ends[row])) + 1 if ended else tokens.shape[1]
            ids = tokens[row, :length].astype(np.int32)
            answers.append(Answer(ids, logprobs[row, :length], bool(ended)))
        return answers


class _Reader:
    """One model with the keys and values of what it has read."""

    def __init__(self, model: Teacher, pictures: Pictures | None):
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        check_applicable(model)
        self._model: Any = load_model(model).to(self._device).eval()
        self._past: Any = None
        self._texts = torch.empty(0, 0, dtype=torch.long)
        self._images = None
        self._name = model.model
        if pictures is not None and is_image_text(self._model.config):
            config = self._model.config
            self._images = ImageInputs(model, config, pictures)

    @property
    def vocab_size(self) -> int:
        """Columns of the head."""
        return self._model.config.get_text_config().vocab_size

    def begin(self, prompt: Example, copies: int) -> torch.Tensor:
        """Read a prompt once for all its answers: next-token logits [copies, V]."""
        ids = torch.tensor(prompt.token_ids, dtype=torch.long, device=self._device)[None]
        out = self._model(
            input_ids=ids, use_cache=True, logits_to_keep=1, **self._image_inputs(prompt)
        )
        past: Any = getattr(out, "past_key_values", None)
        if _is_keys_and_values(past):
            past.batch_repeat_interleave(copies)
        elif prompt.images:
            raise TeacherError("does not write about images", where=self._name)
        self._past = past if _is_keys_and_values(past) else None
        self._texts = ids.repeat(copies, 1)
        return out.logits[:, -1].expand(copies, -1)

    def go_on(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read one more token of every answer: next-token logits [N, V]."""
        read = tokens[:, None].to(self._device)
        if self._past is None:
            self._texts = torch.cat([self._texts, read], dim=1)
            again = [self._model(input_ids=text[None], use_cache=False) for text in self._texts]
            return torch.cat([out.logits[:, -1] for out in again])
        out = self._model(
            input_ids=read,
            past_key_values=self._past,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def _image_inputs(self, prompt: Example) -> dict[str, torch.Tensor]:
        if not prompt.images:
            return {}
        if self._images is None:
            raise TeacherError("reads no images and the prompts have some", where=self._name)
        return self._images.for_model(prompt, self._model)


def _is_keys_and_values(past: Any) -> bool:
    """Whether a model's memory is nothing but keys and values, which can be repeated."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(past, "layers", ())
    return bool(layers) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
    )
