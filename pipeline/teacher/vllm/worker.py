"""What runs inside vLLM's workers: scoring of prompt rows from the hidden states, in place.

One idea: vLLM calls one method for prompt logprobs, with the step's hidden states and the LM head
at hand. For requests that carry our mark this module answers in its place: it takes only the rows
asked for, in blocks that bound memory, and returns the two matrices of `rows` and the kept
hidden states where vLLM expects its three tensors. Unmarked requests get vLLM's own answer, so the
public API of the same engine is there to be tested against.

These are private names of one vLLM release: `vllm.engine` checks the version before it loads this.
Loaded through `worker_extension_cls`; the settings come in `additional_config`, which is part of
the key of vLLM's compile cache (a compiled graph either returns hidden states or does not).
"""

from typing import Any

import torch
from vllm import envs
from vllm.distributed.parallel_state import get_pp_group
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from stillroom.pipeline.teacher.vllm import loading  # noqa: F401  (measures what was loaded)
from stillroom.pipeline.teacher.vllm.scoring import (
    Progress,
    Settings,
    advance,
    ask_for_blocks,
    mark_of,
)


class WorkerExtension:
    """vLLM mixes this into its worker class; importing the module has done the work."""


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
    # Out of vLLM's sight while it answers the others; the unfinished ones go back afterwards.
    held = {req_id: wanted.pop(req_id) for req_id in marks if marks[req_id]}
    answers = _their_prompt_logprobs(self, hidden_states, num_scheduled_tokens)
    asked = [_asked(self, req_id, mark, num_scheduled_tokens) for req_id, mark in ours.items()]
    settings, states = self.stillroom_settings, self.stillroom_states
    advance(settings, asked, hidden_states, states, self.model.compute_logits)
    for req_id, (progress, start, count, _) in zip(ours, asked):
        if start + count >= len(progress.tokens):
            del held[req_id]
            self.requests[req_id].in_progress_prompt_logprobs_cpu = None
            answers[req_id] = progress.finish()
    wanted.update(held)
    return answers


def _asked(self, req_id: str, mark: dict, num_scheduled_tokens) -> tuple[Progress, int, int, int]:
    """What `advance` is told of a request in a step of the V1 runner."""
    request = self.requests[req_id]
    start, count = request.num_computed_tokens, num_scheduled_tokens[req_id]
    progress = request.in_progress_prompt_logprobs_cpu
    if progress is None or start == 0:  # start 0 again: it was preempted
        progress = Progress.of(mark, torch.tensor(request.prompt_token_ids, dtype=torch.int64))
        request.in_progress_prompt_logprobs_cpu = progress
    offset = self.query_start_loc.np[self.input_batch.req_id_to_index[req_id]].item()
    return progress, start, count, offset


def _setup(self) -> None:
    """V1 runner, after the model is loaded and before it is compiled: ask it for block outputs."""
    self.stillroom_settings = settings = Settings.checked(self.vllm_config, self.device)
    self.stillroom_states = self.stillroom_blocks = None
    if settings is None or not settings.layers:
        _their_setup(self)
        return
    self.stillroom_blocks = ask_for_blocks(self.get_model(), settings.layers, self.vllm_config)
    returned = self.stillroom_blocks is None
    self.use_aux_hidden_state_outputs = returned and get_pp_group().is_last_rank


def _sample_tokens(self, grammar_output):
    """V1 runner: keep this step's block outputs at hand for `_prompt_logprobs`."""
    if self.execute_model_state is not None:
        blocks = self.stillroom_blocks
        theirs = self.execute_model_state.aux_hidden_states
        self.stillroom_states = theirs if blocks is None else blocks.states()
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
    from stillroom.pipeline.teacher.vllm import worker_v2

    worker_v2.install()
runner: Any = GPUModelRunner
runner._get_prompt_logprobs_dict = _prompt_logprobs
runner._setup_eagle3_aux_hidden_state_outputs = _setup
runner.sample_tokens = _sample_tokens
runner.sync_and_gather_intermediate_tensors = _stage_input
