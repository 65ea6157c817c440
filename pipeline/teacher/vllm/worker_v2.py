"""The same scoring hooks on vLLM's second model runner (`v1/worker/gpu`), the default on GPUs.

One idea: that runner keeps prompt logprobs in a worker object of their own, which is handed the
hidden states and the head; marked requests are hidden from it and scored by the same `Progress`
as on the first runner. Tested on a CPU with a stand-in for the batch and not yet on a GPU, so
`vllm.engine` chooses the first runner unless VLLM_USE_V2_MODEL_RUNNER says otherwise.
"""

from typing import Any

import torch
from vllm.distributed.parallel_state import get_pp_group

from stillroom.pipeline.teacher.vllm.scoring import Progress, Settings, ask_for_blocks, mark_of


def install() -> None:
    """Hook the runner's classes; may be called more than once."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    runner: Any = GPUModelRunner
    if hasattr(runner, "stillroom_hooked"):
        return
    runner.stillroom_hooked = True
    runner.load_model = _loading(runner.load_model)
    runner.sample_tokens = _sampling(runner.sample_tokens)
    install_on_prompt_worker()


def install_on_prompt_worker() -> None:
    """Hook the object that answers prompt logprobs."""
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    worker: Any = PromptLogprobsWorker
    if hasattr(worker, "stillroom_hooked"):
        return
    worker.stillroom_hooked = True
    worker.add_request = _adding(worker.add_request)
    worker.remove_request = _removing(worker.remove_request)
    worker.compute_prompt_logprobs = _computing(worker.compute_prompt_logprobs)


def _loading(theirs):
    def load_model(self, *args, **kwargs):
        theirs(self, *args, **kwargs)
        settings = Settings.checked(self.vllm_config, self.device)
        if settings is not None and settings.layers:
            ask_for_blocks(self.model, settings.layers)
            self.use_aux_hidden_state_outputs = get_pp_group().is_last_rank

    return load_model


def _sampling(theirs):
    def sample_tokens(self, *args, **kwargs):
        if self.prompt_logprobs_worker is not None and self.execute_model_state is not None:
            worker = self.prompt_logprobs_worker
            worker.stillroom_settings = Settings.of(self.vllm_config)
            worker.stillroom_states = self.execute_model_state.aux_hidden_states
        return theirs(self, *args, **kwargs)

    return sample_tokens


def _adding(theirs):
    def add_request(self, req_id, req_idx, sampling_params):
        theirs(self, req_id, req_idx, sampling_params)
        if mark := mark_of(sampling_params):
            self.uses_prompt_logprobs[req_idx] = False  # vLLM's own path passes it by
            _marks(self)[req_id] = mark

    return add_request


def _removing(theirs):
    def remove_request(self, req_id):
        theirs(self, req_id)
        _marks(self).pop(req_id, None)
        _progress(self).pop(req_id, None)

    return remove_request


def _computing(theirs):
    def compute_prompt_logprobs(
        self, logits_fn, hidden_states, batch, all_token_ids, num_computed_tokens, prompt_lens
    ):
        answers = theirs(
            self, logits_fn, hidden_states, batch, all_token_ids, num_computed_tokens, prompt_lens
        )
        for i, req_id in enumerate(batch.req_ids):
            row = batch.idx_mapping_np[i]
            if req_id not in _marks(self) or _is_answered(batch, i, prompt_lens[row]):
                continue
            tokens = all_token_ids[row, : prompt_lens[row]]
            answer = _score(self, req_id, tokens, i, batch, hidden_states, logits_fn)
            if answer is not None:
                answers[req_id] = answer
        return answers

    return compute_prompt_logprobs


def _is_answered(batch, i: int, prompt_len: int) -> bool:
    """Decoding, or resumed after its prompt was answered."""
    return (
        batch.num_computed_prefill_tokens_np[i] >= prompt_len
        or prompt_len < batch.prefill_len_np[i]
    )


def _score(self, req_id: str, tokens: torch.Tensor, i: int, batch, hidden_states, logits_fn):
    """The answer if this step completes the prompt, else None."""
    start = int(batch.num_computed_prefill_tokens_np[i])
    progress = _progress(self).get(req_id)
    if progress is None or start == 0:  # start 0 again: it was preempted
        progress = Progress.of(_marks(self)[req_id], tokens)
        _progress(self)[req_id] = progress
    rows = slice(int(batch.query_start_loc_np[i]), int(batch.query_start_loc_np[i + 1]))
    states = [state[rows] for state in self.stillroom_states or ()]
    progress.score(self.stillroom_settings, start, hidden_states[rows], states, logits_fn)
    done = start + rows.stop - rows.start >= len(tokens)
    return _progress(self).pop(req_id).finish() if done else None


def _marks(worker) -> dict[str, dict]:
    return worker.__dict__.setdefault("stillroom_marks", {})


def _progress(worker) -> dict[str, Progress]:
    return worker.__dict__.setdefault("stillroom_progress", {})
