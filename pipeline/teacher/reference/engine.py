"""The truth: one example at a time through transformers, every signal by its plain definition.

One idea: nothing clever, so that a disagreement with `teacher.vllm` has one suspect. The same
weights, one example per forward, so a record does not depend on what was scored beside it (bit for
bit).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from stillroom.cache_schemas.errors import TeacherError
from stillroom.cache_schemas.signals import hidden_name
from stillroom.pipeline.config import Capture, Teacher
from stillroom.pipeline.record import Example, TeacherRecord
from stillroom.pipeline.teacher import protocol
from stillroom.pipeline.teacher.facts import model_directory, model_shape
from stillroom.pipeline.teacher.images import Pictures
from stillroom.pipeline.teacher.reference.images import ImageInputs, is_image_text
from stillroom.pipeline.teacher.rows import RowSpec, draw_key
from stillroom.pipeline.teacher.sweep.definition import sweep

ROW_BLOCK_BYTES = 64 << 20


class ReferenceEngine:
    """A teacher under transformers on the default device."""

    def __init__(self, teacher: Teacher, capture: Capture, pictures: Pictures | None = None):
        self.shape = model_shape(teacher)
        self._capture = capture
        self._spec = RowSpec.of(capture)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model: Any = load_model(teacher)
        self._model.to(self._device).eval()
        self._context = self.shape.context or 1 << 30
        self._images = None
        if pictures is not None and is_image_text(self._model.config):
            self._images = ImageInputs(model_directory(teacher), self._model.config, pictures)

    def close(self) -> None:
        self._model = None

    def score(
        self, examples: Iterable[Example], reject: protocol.Reject = protocol.stop
    ) -> Iterator[TeacherRecord]:
        for example in examples:
            try:
                protocol.check_example(example, self.shape, self._context)
                record = self._score(example)
            except protocol.RejectedExample as error:
                reject(error)
                record = protocol.empty_record(example, self._capture, self.shape)
            yield record

    @torch.inference_mode()
    def _score(self, example: Example) -> TeacherRecord:
        first = protocol.first_row(example, self._capture)
        logits, states = self._forward(example, first)
        signals = self._row_signals(example, first, logits)
        positions = protocol.hidden_positions(example, self._capture)
        for layer in self._capture.hidden_layers:
            kept = states[layer][torch.as_tensor(positions, device=self._device, dtype=torch.long)]
            signals[hidden_name(layer)] = kept.float().cpu().numpy()
        return protocol.record_of(example, self._capture, first, signals)

    def _forward(self, example: Example, first: int) -> tuple[torch.Tensor, dict]:
        """Logits of the scored rows [R, V], and states [L, H] of the layers asked for."""
        ids = torch.tensor(example.token_ids, dtype=torch.long, device=self._device)[None]
        # The last token predicts nothing that is there to be compared.
        rows = torch.arange(first, ids.shape[1] - 1, device=self._device)
        layers = self._capture.hidden_layers
        blocks = [layer for layer in layers if layer != "final"]
        with _BlockOutputs(self._model, blocks) as states:
            out = self._model(
                input_ids=ids,
                logits_to_keep=rows,  # the head reads these positions alone
                output_hidden_states="final" in layers,
                **self._image_inputs(example),
            )
        if "final" in layers:
            states["final"] = out.hidden_states[-1][0]  # after the final norm
        return out.logits[0], states

    def _image_inputs(self, example: Example) -> dict[str, torch.Tensor]:
        if not example.images:
            return {}
        if self._images is None:
            raise protocol.RejectedExample(
                example, "has images", remedy="Use an image-text teacher, or leave the images out."
            )
        return self._images.for_model(example, self._model)

    def _row_signals(
        self, example: Example, first: int, logits: torch.Tensor
    ) -> dict[str, np.ndarray]:
        key = draw_key(self._spec.seed, example.example_id)
        targets = torch.tensor(example.token_ids[first + 1 :], dtype=torch.long)
        targets = targets.to(self._device)
        positions = torch.arange(first, first + len(targets), device=self._device)
        step = max(1, ROW_BLOCK_BYTES // (4 * logits.shape[1]))  # rows of float32 logits
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
    """While open, collects the states after chosen decoder blocks (1-based) as layer -> [L, H].

    The state after a block is what the next one reads: Qwen3-VL adds features of the picture
    between its first blocks.
    """

    def __init__(self, model, layers: Sequence[int]):
        self._layers = layers
        self._blocks = model.get_decoder().layers if layers else []
        self._handles: list = []

    def __enter__(self) -> dict:
        states: dict = {}
        for layer in self._layers:
            self._handles.append(self._hook(states, layer))
        return states

    def _hook(self, states: dict, layer: int):
        def before_next(_module, args, kwargs):
            states[layer] = (args[0] if args else kwargs["hidden_states"])[0]

        def after_last(_module, _args, output):
            states[layer] = (output[0] if isinstance(output, tuple) else output)[0]

        if layer == len(self._blocks):
            return self._blocks[-1].register_forward_hook(after_last)
        return self._blocks[layer].register_forward_pre_hook(before_next, with_kwargs=True)

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()


def load_model(teacher: Teacher) -> Any:
    """The model of a directory, with a head that writes text.

    Raises:
        TeacherError: it cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    directory = model_directory(teacher)
    reads_images = is_image_text(AutoConfig.from_pretrained(directory))
    loader = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
    dtype = teacher.dtype if teacher.dtype == "auto" else getattr(torch, teacher.dtype)
    try:
        return loader.from_pretrained(directory, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise TeacherError(
            f"cannot be loaded ({str(error).splitlines()[0]})",
            where=str(directory),
            remedy="Check that weights and config.json belong together.",
        ) from None
