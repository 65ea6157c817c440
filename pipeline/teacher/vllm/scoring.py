"""Marked requests inside vLLM's worker: their settings, their progress, their rows.

One idea: what both of vLLM's model runners share. Requests that carry our mark are scored from the
step's hidden states, only the rows asked for, all of a step together (`teacher.step`); the hooks
that bring the states here are in `worker` (first runner) and `worker_v2`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.distributed.parallel_state import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tp_group,
)
from vllm.model_executor.models.interfaces import EagleModelMixin
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import reserve_aux_intermediate_tensor_slots

from stillroom.cache_schemas.errors import StillroomError, TeacherError, first_line
from stillroom.pipeline.teacher.rows import MARK, RowSpec
from stillroom.pipeline.teacher.step import Share, by_share, score_step
from stillroom.pipeline.teacher.sweep.blocks import (
    SWEEP_VARIABLE,
    check_sweep,
    rows_within,
    sweep_name,
    usual_scratch_bytes,
)
from stillroom.pipeline.teacher.vllm.block_states import BlockStates


@dataclass(frozen=True, slots=True)
class Settings:
    """What every request of an engine shares.

    Attributes:
        spec: signals of a row.
        layers: blocks (1-based) whose output is kept, then whether the final state is kept too.
        final: keep the state that the LM head reads.
        block_rows: rows to score at a time, the same on every rank.
        across: a block may hold rows of several requests.
    """

    spec: RowSpec
    layers: tuple[int, ...]
    final: bool
    block_rows: int
    across: bool = False

    @classmethod
    def checked(cls, vllm_config, device: torch.device) -> "Settings | None":
        """Those of an engine, or None where it is not one of ours; every rank calls this once.

        Raises:
            TeacherError: an accelerator does not sweep right.
        """
        data = (vllm_config.additional_config or {}).get(MARK)
        if data is None:
            return None
        spec, model = RowSpec.from_json(data["spec"]), vllm_config.model_config
        vocab_size = model.get_vocab_size()
        if device.type != "cpu":
            _check_device(vocab_size, device, spec)
        scratch = data["scratch_bytes"] or usual_scratch_bytes(_memory_of(device))
        rows = rows_within(scratch, vocab_size, device.type, spec, model.head_dtype)
        across = device.type != "cpu"
        return cls(spec, tuple(data["layers"]), data["final"], _least_of_ranks(rows), across)


def _check_device(vocab_size: int, device: torch.device, spec: RowSpec) -> None:
    """Refuse a device whose sweep errs, or does not so much as run: too old, say, for Triton."""
    try:
        check_sweep(vocab_size, device.type, spec)
    except StillroomError:
        raise
    except Exception as error:  # of a compiler or a driver
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise TeacherError(
            f"the {sweep_name(device.type)} sweep does not run here ({first_line(error)})",
            where=name,
            remedy=f"Set {SWEEP_VARIABLE}=torch, which needs no Triton and is slower; Triton "
            "compiles for compute capability 8.0 and later.",
        ) from error


def _memory_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def _least_of_ranks(rows: int) -> int:
    """Of unlike cards: the head is a collective, so all ranks must cut alike."""
    group = get_tp_group()
    if group.world_size == 1:
        return rows
    least = torch.tensor(rows)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return int(least)


@dataclass(slots=True)
class Progress:
    """A marked request while its prompt is being read.

    Attributes:
        key: see `rows.draw_key`.
        tokens: int64 [L], on the host or on the device.
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

    def share(self, start: int, count: int, offset: int) -> Share | None:
        """What of a step is to be scored; None where nothing is.

        Args:
            start: position of its first token in the step.
            count: of its tokens in the step.
            offset: the first one's row among the step's states.
        """
        stop = min(start + count, len(self.tokens) - 1)  # nothing follows the last token
        first = max(start, self.first_row)
        if first >= stop:
            return None
        targets = self.tokens[first + 1 : stop + 1]  # the shift: row t meets token t + 1
        low, high = np.searchsorted(self.positions, (start, stop))
        return Share(self.key, offset - start, first, stop, targets, self.positions[low:high])

    def finish(self) -> LogprobsTensors | None:
        """Everything, in the three tensors that vLLM carries to the driver; forgets the parts."""
        parts, self.parts = self.parts, []
        if not parts:
            return None
        ints, floats, states = (torch.cat(tensors) for tensors in zip(*parts))
        return LogprobsTensors(ints, floats, states)


def advance(
    settings: Settings,
    asked: Sequence[tuple[Progress, int, int, int]],
    hidden: torch.Tensor,
    states: Sequence[torch.Tensor] | None,
    logits_fn: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Take the rows of one step, of all marked requests in it.

    Args:
        asked: each request with what `Progress.share` is told.
        hidden: [n, H], the states that the LM head reads.
        states: [n, H] of each of `settings.layers`.
        logits_fn: hidden [r, H] -> logits [r, V].
    """
    due = [(progress, progress.share(*place)) for progress, *place in asked]
    due = [(progress, share) for progress, share in due if share is not None]
    if not due:
        return
    shares = [share for _, share in due]
    kept = [*(states or ()), *([hidden] if settings.final else [])]
    blocks = settings.block_rows, settings.across
    said = score_step(settings.spec, shares, hidden, kept, logits_fn, *blocks)
    if get_tensor_model_parallel_rank() == 0:  # the rank whose answer goes to the driver
        for (progress, _), part in zip(due, by_share(shares, said)):
            progress.parts.append(part)


def mark_of(sampling_params) -> dict | None:
    """Our mark in a request, if it has one."""
    extra = sampling_params.extra_args if sampling_params else None
    return extra.get(MARK) if extra else None


def ask_for_blocks(model: Any, layers: tuple[int, ...], vllm_config: Any) -> BlockStates | None:
    """Make a model give the outputs of these blocks: beside its last states, or by hooks.

    Idefics3 and others do not offer it themselves, but hand on whatever their decoder returns.

    Returns:
        What collects the states; None where the model returns them.

    Raises:
        RuntimeError: vLLM's model does not give them, or its pipeline stages lose them.
    """
    if vllm_config.parallel_config.prefill_context_parallel_size > 1:
        raise RuntimeError(
            f"hidden layers of {type(model).__name__} come in another order under"
            " prefill_context_parallel_size: leave it out, or use tensor_parallel_size"
        )
    decoders = [part for part in model.modules() if isinstance(part, EagleModelMixin)]
    if not decoders:
        return BlockStates(model, layers, vllm_config)
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
    return None
