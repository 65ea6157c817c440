"""One marked request inside vLLM's worker: its settings, its progress, its rows.

One idea: what both of vLLM's model runners share. A request that carries our mark is scored from
the step's hidden states, only the rows asked for, in blocks that bound memory; the hooks that bring
the states here are in `worker` (first runner) and `worker_v2`.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank
from vllm.model_executor.models.interfaces import EagleModelMixin
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import reserve_aux_intermediate_tensor_slots

from stillroom.pipeline.teacher.rows import MARK, RowSpec
from stillroom.pipeline.teacher.sweep.blocks import check_sweep, rows_within, score_block


@dataclass(frozen=True, slots=True)
class Settings:
    """What every request of an engine shares.

    Attributes:
        spec: signals of a row.
        layers: blocks (1-based) whose output is kept, then whether the final state is kept too.
        final: keep the state after the final norm.
        block_rows: rows to score at a time.
    """

    spec: RowSpec
    layers: tuple[int, ...]
    final: bool
    block_rows: int

    @classmethod
    def of(cls, vllm_config) -> "Settings | None":
        """Those of an engine, or None where it is not one of ours."""
        data = (vllm_config.additional_config or {}).get(MARK)
        if data is None:
            return None
        spec = RowSpec.from_json(data["spec"])
        vocab_size = vllm_config.model_config.get_vocab_size()
        device = vllm_config.device_config.device_type
        block_rows = rows_within(data["scratch_bytes"], vocab_size, device, spec)
        return cls(spec, tuple(data["layers"]), data["final"], block_rows)

    @classmethod
    def checked(cls, vllm_config, device: torch.device) -> "Settings | None":
        """The same, when an accelerator has shown that it sweeps right.

        Raises:
            TeacherError: it does not.
        """
        settings = cls.of(vllm_config)
        if settings is not None and device.type != "cpu":
            vocab_size = vllm_config.model_config.get_vocab_size()
            check_sweep(vocab_size, device.type, settings.spec)
        return settings


@dataclass(slots=True)
class Progress:
    """A marked request while its prompt is being read.

    Attributes:
        key: see `rows.draw_key`.
        tokens: int64 [L] on the device.
        first_row: first row to score.
        positions: sorted positions whose hidden states are kept.
        parts: what the steps so far have given.
    """

    key: int
    tokens: torch.Tensor
    first_row: int
    positions: np.ndarray
    parts: list = field(default_factory=list)

    @classmethod
    def of(cls, mark: dict, tokens: torch.Tensor) -> "Progress":
        """From the mark in a request's `extra_args` and its prompt."""
        positions = np.frombuffer(mark["positions"], dtype=np.int32)
        return cls(mark["key"], tokens.to(torch.int64), mark["first_row"], positions)

    def score(self, settings: Settings, start: int, hidden, states, logits_fn) -> None:
        """Take the rows of one step.

        Args:
            start: position of the step's first token.
            hidden: [n, H], the states that the LM head reads.
            states: [n, H] of each of `settings.layers`.
            logits_fn: hidden [r, H] -> logits [r, V].
        """
        stop = min(start + len(hidden), len(self.tokens) - 1)  # nothing follows the last token
        first = max(start, self.first_row)
        if first >= stop:
            return
        rows = score_block(
            settings.spec,
            self.key,
            hidden[first - start : stop - start],
            self.tokens[first + 1 : stop + 1],  # the shift: row t meets token t + 1
            first,
            logits_fn,
            settings.block_rows,
        )
        kept = self._kept_states(settings, start, stop, hidden, states)
        if get_tensor_model_parallel_rank() == 0:  # the rank whose answer goes to the driver
            self.parts.append(tuple(part.cpu() for part in (*rows, kept)))

    def _kept_states(self, settings, start: int, stop: int, hidden, states) -> torch.Tensor:
        """[P, layers, H]: states at the kept positions of this step."""
        low, high = np.searchsorted(self.positions, (start, stop))
        at = torch.as_tensor(self.positions[low:high] - start, dtype=torch.long)  # within this step
        kept = [state[at.to(state.device)] for state in states]
        kept += [hidden[at.to(hidden.device)]] if settings.final else []
        return torch.stack(kept, 1) if kept else hidden.new_empty((len(at), 0, 0))

    def finish(self) -> LogprobsTensors | None:
        """Everything, in the three tensors that vLLM carries to the driver; forgets the parts."""
        parts, self.parts = self.parts, []
        if not parts:
            return None
        ints, floats, states = (torch.cat(tensors) for tensors in zip(*parts))
        return LogprobsTensors(ints, floats, states)


def mark_of(sampling_params) -> dict | None:
    """Our mark in a request, if it has one."""
    extra = sampling_params.extra_args if sampling_params else None
    return extra.get(MARK) if extra else None


def ask_for_blocks(model: Any, layers: tuple[int, ...]) -> None:
    """Make a model return the outputs of these blocks beside its last states.

    Idefics3 and others do not offer it themselves, but hand on whatever their decoder returns.

    Raises:
        RuntimeError: vLLM's model does not give them, or its pipeline stages lose them.
    """
    decoders = [part for part in model.modules() if isinstance(part, EagleModelMixin)]
    if not decoders:
        raise RuntimeError(f"{type(model).__name__} does not give its hidden layers in vLLM")
    stages = get_pp_group().world_size
    if stages > 2 or (stages == 2 and not decoders[0].supports_aux_hidden_states_over_pp):
        raise RuntimeError(
            f"hidden layers of {type(model).__name__} do not come through {stages} pipeline stages:"
            " use fewer stages, or tensor_parallel_size"
        )
    if hasattr(model, "set_aux_hidden_state_layers"):
        model.set_aux_hidden_state_layers(layers)
    else:
        decoders[0]._set_aux_hidden_state_layers(layers)
    reserve_aux_intermediate_tensor_slots(model)
