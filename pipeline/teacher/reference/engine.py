"""The truth: one example at a time through transformers, every signal by its plain definition.

One idea: nothing clever, so that a disagreement with `teacher.vllm` has one suspect. The same
weights, one example per forward, so a record does not depend on what was scored beside it (bit for
bit). Attention is eager unless the run says otherwise: faster kinds leave out what they do not
know.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from stillroom.cache_schemas.errors import TeacherError
from stillroom.cache_schemas.signals import hidden_name
from stillroom.pipeline.config import Capture, Teacher
from stillroom.pipeline.record import Example, TeacherRecord
from stillroom.pipeline.teacher import protocol
from stillroom.pipeline.teacher.adapter import merged, with_adapter
from stillroom.pipeline.teacher.checkpoint import check_report, load_whole, load_with_report
from stillroom.pipeline.teacher.facts import dtype_of, model_config, model_directory, model_shape
from stillroom.pipeline.teacher.images import Pictures
from stillroom.pipeline.teacher.overrides import check_applicable
from stillroom.pipeline.teacher.quantised import (
    check_as_written,
    check_stored,
    method_of,
    try_forward,
)
from stillroom.pipeline.teacher.reference.head import WatchedHead
from stillroom.pipeline.teacher.reference.images import ImageInputs, is_image_text
from stillroom.pipeline.teacher.reference.parts import BlockOutputs
from stillroom.pipeline.teacher.rows import RowSpec, draw_key
from stillroom.pipeline.teacher.sweep.definition import sweep

ROW_BLOCK_BYTES = 64 << 20


class ReferenceEngine:
    """A teacher under transformers, on the default device or by transformers' own `placement`."""

    def __init__(
        self,
        teacher: Teacher,
        capture: Capture,
        pictures: Pictures | None = None,
        placement: Mapping[str, Any] | None = None,
    ):
        check_applicable(teacher)
        self.shape = model_shape(teacher)
        self._capture = capture
        self._spec = RowSpec.of(capture)
        self._model: Any = load_model(teacher, placement)
        if not placement:
            self._model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._model.eval()
        try_forward(self._model, model_directory(teacher))
        self._device = "cpu" if placement else self._model.device
        self._context = self.shape.context or 1 << 30
        self._images = None
        if pictures is not None and is_image_text(self._model.config):
            self._images = ImageInputs(teacher, self._model.config, pictures)

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
            places = positions - first if layer == "final" else positions
            kept = states[layer][torch.as_tensor(places, device=self._device, dtype=torch.long)]
            signals[hidden_name(layer)] = kept.float().cpu().numpy()
        return protocol.record_of(example, self._capture, first, signals)

    def _forward(self, example: Example, first: int) -> tuple[torch.Tensor, dict]:
        """Logits of the scored rows [R, V], and states [L, H] of the layers asked for."""
        ids = torch.tensor(example.token_ids, dtype=torch.long, device=self._device)[None]
        # The last token predicts nothing that is there to be compared.
        rows = torch.arange(first, ids.shape[1] - 1, device=self._device)
        layers = self._capture.hidden_layers
        blocks = [layer for layer in layers if layer != "final"]
        with BlockOutputs(self._model, blocks) as states, WatchedHead(self._model) as seen:
            out = self._model(
                input_ids=ids, use_cache=False, **self._keep(rows), **self._image_inputs(example)
            )
        if "final" in layers:
            states["final"] = _of_rows(seen.input, rows)
        return _of_rows(out.logits, rows), states

    def _keep(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        known = inspect.signature(self._model.forward).parameters
        return {"logits_to_keep": rows} if "logits_to_keep" in known else {}

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


def _of_rows(values: Any, rows: torch.Tensor) -> torch.Tensor:
    """[R, ...] of what a model made for these rows [1, R, ...], or for every token."""
    if values is None:
        raise TeacherError(
            "the model makes its logits without its output embedding",
            where="[capture] hidden_layers",
            remedy="Leave 'final' out.",
        )
    return values[0] if values.shape[1] == len(rows) else values[0][rows]


def load_model(teacher: Teacher, placement: Mapping[str, Any] | None = None) -> Any:
    """The model of a directory, with a head that writes text and its adapter, if it has one.

    Args:
        teacher: which, and how.
        placement: of its weights, as `from_pretrained` takes it (`device_map` and the like).

    Raises:
        TeacherError: it cannot be loaded, or its checkpoint lacks weights.
    """
    directory = model_directory(teacher)
    options: dict[str, Any] = {
        "config": model_config(teacher),
        "dtype": getattr(torch, dtype_of(teacher)),
        "attn_implementation": "eager" if teacher.attention == "auto" else teacher.attention,
        **(placement or {}),
    }
    trusts_code = teacher.trust_remote_code
    model = load_whole(_loader(teacher), directory, trusts_code=trusts_code, **options)
    check_as_written(model, directory)
    return with_adapter(model, teacher)


def load_merged(teacher: Teacher) -> Any:
    """The same with its adapter added to its weights, for what reads its matrices."""
    return merged(load_model(teacher.model_copy(update={"adapter": ""})), teacher)


def read_names(teacher: Teacher) -> Any:
    """The model without its weights, for a look at the names in its checkpoint before another
    engine loads it; None where transformers cannot build it (or builds it otherwise: quantised
    weights), where the engine's own measurement is all there is.

    Raises:
        TeacherError: the checkpoint lacks weights of the model, or the adapter does not fit.
    """
    loader, directory = _loader(teacher), model_directory(teacher)
    if method_of(directory):
        return None
    check_stored(directory, TeacherError)
    options = {
        "config": model_config(teacher),
        "device_map": "meta",
        "trust_remote_code": teacher.trust_remote_code,
    }
    try:
        model, found = load_with_report(loader, directory, **options)
    except Exception:  # a model that transformers does not know, or only on a device
        return None
    check_report(found, directory, type(model).__name__)
    return with_adapter(model, teacher)


def _loader(teacher: Teacher) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    reads_images = is_image_text(model_config(teacher))
    return AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
