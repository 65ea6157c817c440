"""What runs inside vLLM's workers: scoring of prompt rows from the hidden states, in place.

One idea: vLLM calls one method for prompt logprobs, with the step's hidden states and the LM head
at hand. For requests that carry our mark this module answers in its place: it takes only the rows
asked for, in blocks that bound memory, and returns the two matrices of `rows` and the kept
hidden states where vLLM expects its three tensors. Unmarked requests get vLLM's own answer, so the
public API of the same engine is there to be tested against.

These are private names of one vLLM release: `vllm.py` checks the version before it loads this.
Loaded through `worker_extension_cls`; the settings come in `additional_config`, which is part of
the key of vLLM's compile cache (a compiled graph either returns hidden states or does not).
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm import envs
from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank
from vllm.model_executor.models.interfaces import EagleModelMixin
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import reserve_aux_intermediate_tensor_slots
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from pipeline.teacher.blocks import check_sweep, rows_within, score_block
from pipeline.teacher.rows import RowSpec

MARK = "stillroom"


class WorkerExtension:
    """vLLM mixes this into its worker class; importing the module has done the work."""


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
        stop = min(start + len(hidden), len(self.tokens) - 1)
        first = max(start, self.first_row)
        if first >= stop:
            return
        rows = score_block(
            settings.spec,
            self.key,
            hidden[first - start : stop - start],
            self.tokens[first + 1 : stop + 1],
            first,
            logits_fn,
            settings.block_rows,
        )
        kept = self._kept_states(settings, start, stop, hidden, states)
        if get_tensor_model_parallel_rank() == 0:
            self.parts.append(tuple(part.cpu() for part in (*rows, kept)))

    def _kept_states(self, settings, start: int, stop: int, hidden, states) -> torch.Tensor:
        """[P, layers, H]: states at the kept positions of this step."""
        low, high = np.searchsorted(self.positions, (start, stop))
        at = torch.as_tensor(self.positions[low:high] - start, dtype=torch.long)
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


_their_prompt_logprobs = GPUModelRunner._get_prompt_logprobs_dict
_their_setup = GPUModelRunner._setup_eagle3_aux_hidden_state_outputs
_their_sample_tokens: Any = GPUModelRunner.sample_tokens
_their_stage_input = GPUModelRunner.sync_and_gather_intermediate_tensors


def _prompt_logprobs(self, hidden_states, num_scheduled_tokens):
    """V1 runner: `GPUModelRunner._get_prompt_logprobs_dict` for marked and unmarked requests."""
    wanted = self.num_prompt_logprobs
    marks = {req_id: mark_of(self.requests[req_id].sampling_params) for req_id in wanted}
    ours = {
        req_id: mark for req_id, mark in marks.items() if mark and req_id in num_scheduled_tokens
    }
    if not ours:
        return _their_prompt_logprobs(self, hidden_states, num_scheduled_tokens)
    held = {req_id: wanted.pop(req_id) for req_id in marks if marks[req_id]}
    answers = _their_prompt_logprobs(self, hidden_states, num_scheduled_tokens)
    for req_id, mark in ours.items():
        done, answer = _score_request(self, req_id, mark, hidden_states, num_scheduled_tokens)
        if done:
            del held[req_id]
            answers[req_id] = answer
    wanted.update(held)
    return answers


def _score_request(self, req_id: str, mark: dict, hidden_states, num_scheduled_tokens):
    """(whether the prompt is complete, its answer) after one step of the V1 runner."""
    request = self.requests[req_id]
    start, count = request.num_computed_tokens, num_scheduled_tokens[req_id]
    progress = request.in_progress_prompt_logprobs_cpu
    if progress is None or start == 0:  # start 0 again: it was preempted
        tokens = torch.tensor(request.prompt_token_ids, dtype=torch.int64, device=self.device)
        progress = Progress.of(mark, tokens)
        request.in_progress_prompt_logprobs_cpu = progress
    offset = self.query_start_loc.np[self.input_batch.req_id_to_index[req_id]].item()
    rows = slice(offset, offset + count)
    states = [state[rows] for state in self.stillroom_states or ()]
    settings = self.stillroom_settings
    progress.score(settings, start, hidden_states[rows], states, self.model.compute_logits)
    if start + count < len(progress.tokens):
        return False, None
    request.in_progress_prompt_logprobs_cpu = None
    return True, progress.finish()


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


def _setup(self) -> None:
    """V1 runner, after the model is loaded and before it is compiled: ask it for block outputs."""
    self.stillroom_settings = settings = Settings.checked(self.vllm_config, self.device)
    self.stillroom_states = None
    if settings is None or not settings.layers:
        _their_setup(self)
        return
    ask_for_blocks(self.get_model(), settings.layers)
    self.use_aux_hidden_state_outputs = get_pp_group().is_last_rank


def _sample_tokens(self, grammar_output):
    """V1 runner: keep this step's block outputs at hand for `_prompt_logprobs`."""
    if self.execute_model_state is not None:
        self.stillroom_states = self.execute_model_state.aux_hidden_states
    try:
        return _their_sample_tokens(self, grammar_output)
    finally:
        self.stillroom_states = None


def _stage_input(self, num_tokens, intermediate_tensors, sync_self):
    """V1 runner, later pipeline stages: buffers of the dummy run, which vLLM skips on a CPU."""
    if self.intermediate_tensors is None:
        self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
            batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
        )
    return _their_stage_input(self, num_tokens, intermediate_tensors, sync_self)


if envs.VLLM_USE_V2_MODEL_RUNNER:
    from pipeline.teacher import vllm_worker_v2

    vllm_worker_v2.install()
runner: Any = GPUModelRunner
runner._get_prompt_logprobs_dict = _prompt_logprobs
runner._setup_eagle3_aux_hidden_state_outputs = _setup
runner.sample_tokens = _sample_tokens
runner.sync_and_gather_intermediate_tensors = _stage_input
