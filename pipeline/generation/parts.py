"""The parts of a generation: answered prompts on disk, each committed by one rename.

One idea: a part is a file of finished examples, whole or absent, so what is missing is what is not
there. Who answers is not decided here.
"""

import secrets
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from stillroom.pipeline.cache.storage.disk import Disk
from stillroom.pipeline.corpus.files import ExampleFile, Split
from stillroom.pipeline.generation.writers import Answer
from stillroom.pipeline.record import Example, content_id
from stillroom.pipeline.shares import share_of
from stillroom.pipeline.teacher.protocol import RejectedExample


class Parts:
    """Answered prompts on disk: one Arrow file of examples for each run of prompts."""

    def __init__(self, work: Path, prompts: Split, size: int):
        self._work, self._prompts, self._size = work, prompts, size
        self.count = -(-len(prompts) // size)  # rounded up

    def path(self, number: int) -> Path:
        """Where a part is or will be."""
        return self._work / f"part-{number:06d}.arrow"

    def prompts(self, number: int) -> Split:
        """The prompts of a part."""
        return self._prompts[number * self._size : (number + 1) * self._size]

    def missing(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Parts of one worker's share that are not there."""
        share = share_of(self.count, rank, world_size)
        return [number for number in share if not self.path(number).exists()]

    def write(self, number: int, examples: Iterable[Example]) -> None:
        """Commit a part; another worker may have done so before."""
        made = self._work / f".part-{secrets.token_hex(8)}"
        with ExampleFile(made) as file:
            for example in examples:
                file.write(example)
        disk = Disk()
        disk.sync(made)
        disk.rename(made, self.path(number))


def answered(prompt: Example, answers: list[Answer]) -> list[Example]:
    """Examples of a prompt's answers, equal ones once with their number as weight.

    Raises:
        RejectedExample: a token was drawn from logits that are not numbers.
    """
    made: dict[str, Example] = {}
    for answer in answers:
        _check_finite(prompt, answer)
        example = _example(prompt, answer)
        before = made.get(example.example_id)
        made[example.example_id] = replace(before, weight=before.weight + 1) if before else example
    return list(made.values())


def _check_finite(prompt: Example, answer: Answer) -> None:
    bad = ~np.isfinite(answer.behaviour_logprob)
    if bad.any():
        raise RejectedExample(
            prompt,
            f"NaN or infinite logits at token {int(np.argmax(bad)) + 1} of its answer",
            remedy="Check the weights; try dtype = 'float32' or 'bfloat16' under [teacher].",
        )


def _example(prompt: Example, answer: Answer) -> Example:
    given, written = len(prompt.token_ids), len(answer.token_ids)
    token_ids = np.concatenate([prompt.token_ids, answer.token_ids]).astype(np.int32)
    mask = np.arange(given + written) >= given
    # The prompt was given: log 1.
    behaviour = np.concatenate([np.zeros(given, dtype=np.float32), answer.behaviour_logprob])
    return replace(
        prompt,
        example_id=content_id(token_ids, mask, prompt.images),
        token_ids=token_ids,
        loss_mask=mask,
        behaviour_logprob=behaviour.astype(np.float32),
    )
