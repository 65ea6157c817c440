"""The same scoring hooks on vLLM's second model runner (`v1/worker/gpu`), the default on GPUs.

One idea: that runner keeps prompt logprobs in a worker object of their own, which is handed the
hidden states and the head; marked requests are hidden from it and scored by the same `Progress`
as on the first runner. Tested on a CPU, where that runner needs Triton's interpreter, not yet on a
GPU, so `starting` chooses the first runner unless VLLM_USE_V2_MODEL_RUNNER says otherwise.
"""

from typing import Any

import torch
from vllm.distributed.parallel_state import get_pp_group

from stillroom.pipeline.teacher.vllm.scoring import (
    Progress,
    Settings,
    advance,
    ask_for_blocks,
    mark_of,
)


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
        self.stillroom_settings = settings = Settings.checked(self.vllm_config, self.device)
        if settings is not None and settings.layers:
            blocks = ask_for_blocks(self.model, settings.layers, self.vllm_config)
            self.stillroom_blocks = blocks
            self.use_aux_hidden_state_outputs = blocks is None and get_pp_group().is_last_rank

    return load_model


def _sampling(theirs):
    def sample_tokens(self, *args, **kwargs):
        if self.prompt_logprobs_worker is not None and self.execute_model_state is not None:
            worker = self.prompt_logprobs_worker
            worker.stillroom_settings = self.stillroom_settings
            blocks = getattr(self, "stillroom_blocks", None)
            returned = self.execute_model_state.aux_hidden_states
            worker.stillroom_states = returned if blocks is None else blocks.states()
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
        asked = _asked(self, batch, all_token_ids, prompt_lens)
        if asked:
            settings, states = self.stillroom_settings, self.stillroom_states
            advance(settings, list(asked.values()), hidden_states, states, logits_fn)
        for req_id, (progress, start, count, _) in asked.items():
            if start + count >= len(progress.tokens):
                answer = _progress(self).pop(req_id).finish()
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


def _asked(self, batch, all_token_ids: torch.Tensor, prompt_lens) -> dict[str, tuple]:
    """What `advance` is told of each marked request in a step."""
    asked = {}
    for i, req_id in enumerate(batch.req_ids):
        row = batch.idx_mapping_np[i]
        if req_id not in _marks(self) or _is_answered(batch, i, prompt_lens[row]):
            continue
        start = int(batch.num_computed_prefill_tokens_np[i])
        if start == 0 or req_id not in _progress(self):  # start 0 again: it was preempted
            tokens = all_token_ids[row, : prompt_lens[row]]
            _progress(self)[req_id] = Progress.of(_marks(self)[req_id], tokens)
        offset, stop = (int(place) for place in batch.query_start_loc_np[i : i + 2])
        asked[req_id] = _progress(self)[req_id], start, stop - offset, offset
    return asked


def _marks(worker) -> dict[str, dict]:
    return worker.__dict__.setdefault("stillroom_marks", {})


def _progress(worker) -> dict[str, Progress]:
    return worker.__dict__.setdefault("stillroom_progress", {})
