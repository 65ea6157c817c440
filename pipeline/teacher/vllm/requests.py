"""Two ways to ask vLLM about a prompt and read its answer; the engine around them is the same.

One idea: `MarkedRequests` has our worker hooks answer with matrices. `PublicRequests` asks for
every logit of the vocabulary through vLLM's public API and sweeps them here: the same signals, one
or two orders of magnitude slower, and no hidden states. It is for a vLLM release whose private
names nobody has checked.
"""

import numpy as np
import torch

from stillroom.cache_schemas.errors import TeacherError
from stillroom.cache_schemas.signals import hidden_name
from stillroom.pipeline.config import Capture
from stillroom.pipeline.record import Example
from stillroom.pipeline.teacher import protocol
from stillroom.pipeline.teacher.rows import MARK, RowSpec, draw_key
from stillroom.pipeline.teacher.sweep.definition import sweep


class MarkedRequests:
    """Answered by `vllm.worker`; needs exactly the release that module was written for."""

    in_flight_tokens = 1 << 17

    def __init__(self, capture: Capture, scratch_bytes: int = 0):
        self._capture, self._spec = capture, RowSpec.of(capture)
        self._scratch_bytes = scratch_bytes
        self._layers = sorted(layer for layer in capture.hidden_layers if layer != "final")
        self._final = "final" in capture.hidden_layers

    def engine_arguments(self) -> dict:
        """What vLLM must be started with."""
        from stillroom.pipeline.teacher.vllm import driver

        driver.install()
        settings = {
            "spec": self._spec.to_json(),
            "layers": self._layers,
            "final": self._final,
            "scratch_bytes": self._scratch_bytes,
        }
        return {
            "worker_extension_cls": "stillroom.pipeline.teacher.vllm.worker.WorkerExtension",
            "additional_config": {MARK: settings},
        }

    def sampling(self, example: Example):
        """`SamplingParams` of one example."""
        mark = {
            "key": draw_key(self._spec.seed, example.example_id),
            "first_row": protocol.first_row(example, self._capture),
            "positions": protocol.hidden_positions(example, self._capture).tobytes(),
        }
        return one_pass(prompt_logprobs=1, extra_args={MARK: mark})  # any number: the hooks answer

    def signals(self, example: Example, output) -> dict[str, np.ndarray]:
        """What the answer says.

        Raises:
            TeacherError: rows are missing.
        """
        tensors = getattr(output.prompt_logprobs, "tensors", None)
        ints, floats, states = tensors or (torch.empty(0),) * 3  # states [P, layers, H]
        check_rows(example, protocol.first_row(example, self._capture), len(ints))
        signals = self._spec.unpack(ints.numpy(), floats.numpy())
        names = [*self._layers, *(["final"] if self._final else [])]
        for i, layer in enumerate(names):
            signals[hidden_name(layer)] = states[:, i].float().numpy()
        return signals


class PublicRequests:
    """Every logit through vLLM's public API; the sweep runs here."""

    in_flight_tokens = 1

    def __init__(self, capture: Capture):
        if capture.hidden_layers:
            raise TeacherError(
                "hidden states cannot be had from this vLLM's public API",
                where="[capture] hidden_layers",
                remedy="Install the vLLM release named above, or drop hidden_layers.",
            )
        self._capture, self._spec = capture, RowSpec.of(capture)

    def engine_arguments(self) -> dict:
        """What vLLM must be started with."""
        return {"logprobs_mode": "raw_logits", "max_logprobs": -1}

    def sampling(self, example: Example):
        """`SamplingParams` of one example."""
        return one_pass(prompt_logprobs=-1, flat_logprobs=True)

    def signals(self, example: Example, output) -> dict[str, np.ndarray]:
        """What the answer says, swept in blocks.

        Raises:
            TeacherError: rows are missing.
        """
        flat = output.prompt_logprobs
        first = protocol.first_row(example, self._capture)
        key = draw_key(self._spec.seed, example.example_id)
        check_rows(example, first, len(flat) - 1 - first)  # an entry a token; the first is empty
        targets = torch.tensor(example.token_ids, dtype=torch.int64)
        parts = []
        for row in range(first, len(flat) - 1):
            logits = _all_logits(flat, row + 1)[None]
            position = torch.tensor([row])
            parts.append(sweep(logits, targets[row + 1 : row + 2], position, key, self._spec))
        ints, floats = (torch.cat(tensors).numpy() for tensors in zip(*parts))
        return self._spec.unpack(ints, floats)


def _all_logits(flat, index: int) -> torch.Tensor:
    """Float32 [V] of one token of a `FlatLogprobs` that holds the whole vocabulary."""
    span = slice(flat.start_indices[index], flat.end_indices[index])
    ids = np.array(flat.token_ids[span])
    logits = np.empty(ids.max() + 1, dtype=np.float32)
    logits[ids] = flat.logprobs[span]
    return torch.from_numpy(logits)


def check_rows(example: Example, first_row: int, found: int) -> None:
    """Refuse an answer that does not have every row (a prefix cache would do that)."""
    num_rows = len(example.token_ids) - 1 - first_row
    if found != num_rows:
        raise TeacherError(
            f"vLLM returned {found} of {num_rows} rows",
            where=f"example {example.example_id}",
            remedy="Report this with your vLLM version; `--engine reference` is not affected.",
        )


def one_pass(**more):
    """`SamplingParams` for one forward over the prompt and nothing else."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        **more,
    )
