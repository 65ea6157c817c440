"""The reference engine that also writes: one prompt at a time, its most probable next token each.

One idea: plain steps with the keys and values of what has been read; equal logits go to the lower
id, as in vLLM.
"""

from collections.abc import Sequence

import numpy as np
import torch

from stillroom.pipeline.teacher.reference.engine import ReferenceEngine


class GreedyReference(ReferenceEngine):
    """See `stillroom.pipeline.teacher.opening.WritingEngine`."""

    def write(
        self, prompts: Sequence[np.ndarray], max_tokens: int, stop_ids: Sequence[int]
    ) -> list[np.ndarray]:
        """See `WritingEngine.write`."""
        return [self._write(prompt, max_tokens, frozenset(stop_ids)) for prompt in prompts]

    @torch.inference_mode()
    def _write(self, prompt: np.ndarray, max_tokens: int, stop_ids: frozenset[int]) -> np.ndarray:
        ids = torch.tensor(prompt, dtype=torch.long, device=self._device)[None]
        written: list[int] = []
        past = None
        while len(written) < max_tokens:
            out = self._model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = out.past_key_values
            ids = out.logits[:, -1, : self.shape.vocab_size].argmax(dim=1, keepdim=True)
            written.append(int(ids))
            if written[-1] in stop_ids:
                break
        return np.array(written, dtype=np.int32)
