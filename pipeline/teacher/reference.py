"""The truth: one example at a time through transformers, every signal by its plain definition.

One idea: nothing clever, so that a disagreement with `vllm` has one suspect. The same weights, one
example per forward, so a record does not depend on what was scored beside it (bit for bit).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from cache_schemas.errors import TeacherError
from cache_schemas.signals import hidden_name
from pipeline.config import Capture, Teacher
from pipeline.record import Example, TeacherRecord
from pipeline.teacher import engine
from pipeline.teacher.facts import model_directory, model_shape
from pipeline.teacher.rows import RowSpec, draw_key
from pipeline.teacher.sweep import sweep

ROW_BLOCK_BYTES = 64 << 20


class ReferenceEngine:
    """A teacher under transformers on the default device."""

    def __init__(self, teacher: Teacher, capture: Capture):
        self.shape = model_shape(teacher)
        self._capture = capture
        self._spec = RowSpec.of(capture)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model: Any = _load(teacher)
        self._model.to(self._device).eval()
        self._context = self.shape.context or 1 << 30

    def close(self) -> None:
        self._model = None

    def score(
        self, examples: Iterable[Example], reject: engine.Reject = engine.stop
    ) -> Iterator[TeacherRecord]:
        for example in examples:
            try:
                engine.check_example(example, self.shape, self._context)
                record = self._score(example)
            except engine.RejectedExample as error:
                reject(error)
                record = engine.empty_record(example, self._capture, self.shape)
            yield record

    @torch.inference_mode()
    def _score(self, example: Example) -> TeacherRecord:
        logits, states = self._forward(example)
        signals = self._row_signals(example, logits)
        engine.check_finite(example, example.first_row, signals)
        positions = engine.hidden_positions(example, self._capture)
        for layer in self._capture.hidden_layers:
            kept = states[layer][torch.as_tensor(positions, device=self._device, dtype=torch.long)]
            signals[hidden_name(layer)] = kept.float().cpu().numpy()
        return TeacherRecord(example, example.first_row, signals, positions)

    def _forward(self, example: Example) -> tuple[torch.Tensor, dict]:
        """Logits of the scored rows [R, V], and states [L, H] of the layers asked for."""
        ids = torch.tensor(example.token_ids, dtype=torch.long, device=self._device)[None]
        rows = torch.arange(example.first_row, ids.shape[1] - 1, device=self._device)
        layers = self._capture.hidden_layers
        blocks = [layer for layer in layers if layer != "final"]
        with _BlockOutputs(self._model, blocks) as states:
            out = self._model(
                input_ids=ids, logits_to_keep=rows, output_hidden_states="final" in layers
            )
        if "final" in layers:
            states["final"] = out.hidden_states[-1][0]
        return out.logits[0], states

    def _row_signals(self, example: Example, logits: torch.Tensor) -> dict[str, np.ndarray]:
        key = draw_key(self._spec.seed, example.example_id)
        first = example.first_row
        targets = torch.tensor(example.token_ids[first + 1 :], dtype=torch.long)
        targets = targets.to(self._device)
        positions = torch.arange(first, first + len(targets), device=self._device)
        step = max(1, ROW_BLOCK_BYTES // (4 * logits.shape[1]))
        blocks = [
            sweep(
                logits[i : i + step],
                targets[i : i + step],
                positions[i : i + step],
                key,
                self._spec,
            )
            for i in range(0, len(targets), step)
        ]
        ints = torch.cat([block[0] for block in blocks]).cpu().numpy()
        floats = torch.cat([block[1] for block in blocks]).cpu().numpy()
        return self._spec.unpack(ints, floats)


class _BlockOutputs:
    """While open, collects the outputs of chosen decoder blocks (1-based) as layer -> [L, H]."""

    def __init__(self, model, layers: Sequence[int]):
        self._layers = layers
        self._blocks = model.get_decoder().layers if layers else []
        self._handles: list = []

    def __enter__(self) -> dict:
        states: dict = {}
        for layer in self._layers:
            hook = self._keep(states, layer)
            self._handles.append(self._blocks[layer - 1].register_forward_hook(hook))
        return states

    @staticmethod
    def _keep(states: dict, layer: int):
        def hook(_module, _args, output):
            states[layer] = (output[0] if isinstance(output, tuple) else output)[0]

        return hook

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()


def _load(teacher: Teacher):
    from transformers import AutoModelForCausalLM

    directory = model_directory(teacher)
    dtype = teacher.dtype if teacher.dtype == "auto" else getattr(torch, teacher.dtype)
    try:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise TeacherError(
            f"cannot be loaded ({str(error).splitlines()[0]})",
            where=str(directory),
            remedy="Check that weights and config.json belong together.",
        ) from None
