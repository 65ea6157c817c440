"""vLLM's second model runner: its prompt-logprob object, hooked, answers as the first runner does.

Here its batch is a stand-in, and the numbers must be the first runner's; `test_second_runner` runs
it whole.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stillroom.cache_schemas.errors import TeacherError
from stillroom.pipeline.teacher.rows import RowSpec

pytestmark = pytest.mark.vllm
SPEC = RowSpec(8, 4, (0.5, 1.0), True, True, 0)
WIDTH, VOCAB = 16, 300


@pytest.fixture(scope="module")
def hooks():
    """The hooked class of vLLM and our scoring module, with one tensor-parallel rank."""
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    from stillroom.pipeline.teacher.vllm import scoring, worker_v2

    worker_v2.install_on_prompt_worker()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "get_tensor_model_parallel_rank", lambda: 0)
        yield PromptLogprobsWorker, scoring


class Prompt:
    """A prompt with made-up hidden states, and what is asked about it."""

    def __init__(self, name: str, length: int, first_row: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.name, self.length, self.first_row = name, length, first_row
        self.tokens = torch.randint(0, VOCAB, (length,), generator=generator)
        self.hidden = torch.randn(length, WIDTH, generator=generator)
        self.block = torch.randn(length, WIDTH, generator=generator)
        self.positions = np.arange(first_row, length - 1, 2, dtype=np.int32)

    def mark(self) -> dict:
        positions = self.positions.tobytes()
        return {"key": 7, "first_row": self.first_row, "positions": positions}


HEAD = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0))


def head(hidden: torch.Tensor) -> torch.Tensor:
    """In float64: the two runners give it other numbers of rows at a time, which float32 sums feel,
    and a draw may then fall to the next id."""
    return (hidden.double() @ HEAD.double().T).float()


def steps_of(prompts: list[Prompt], budget: int):
    """Chunked prefill: (prompt, start, stop) of each step, a few prompts sharing a step."""
    waiting = [[p, 0] for p in prompts]
    while waiting:
        step, left = [], budget
        for item in waiting:
            stop = min(item[1] + left, item[0].length)
            if stop > item[1]:
                step.append((item[0], item[1], stop))
                left -= stop - item[1]
                item[1] = stop
        waiting = [item for item in waiting if item[1] < item[0].length]
        yield step


@pytest.mark.parametrize("budget", [9, 64, 1000])
@pytest.mark.parametrize("across", [False, True])
def test_the_second_runner_says_what_the_first_says(hooks, budget, across):
    worker_class, first = hooks
    settings = first.Settings(SPEC, (1,), True, 5, across)
    prompts = [Prompt("a", 30, 0, 1), Prompt("b", 41, 22, 2), Prompt("c", 2, 0, 3)]
    found = _through_second(worker_class, first, settings, prompts, budget)
    assert set(found) == {"a", "b", "c"}
    for prompt in prompts:
        progress = first.Progress.of(prompt.mark(), prompt.tokens)
        asked = [(progress, 0, prompt.length, 0)]
        first.advance(settings, asked, prompt.hidden, [prompt.block], head)
        expected = progress.finish()
        assert len(expected[0]) == prompt.length - 1 - prompt.first_row
        for ours, theirs in zip(found[prompt.name][:3], expected[:3]):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def _through_second(worker_class, first, settings, prompts, budget) -> dict:
    worker = worker_class(8, torch.device("cpu"))
    worker.stillroom_settings = settings
    rows = {prompt.name: 5 - i for i, prompt in enumerate(prompts)}
    all_tokens, lengths = torch.zeros(8, 64, dtype=torch.int32), np.zeros(8, dtype=np.int64)
    for prompt in prompts:
        extra = {first.MARK: prompt.mark()}
        asked = SimpleNamespace(prompt_logprobs=1, prompt_logprob_token_ids=None, extra_args=extra)
        worker.add_request(prompt.name, rows[prompt.name], asked)
        all_tokens[rows[prompt.name], : prompt.length] = prompt.tokens
        lengths[rows[prompt.name]] = prompt.length
    found = {}
    for step in steps_of(prompts, budget):
        batch = _batch(step, rows, lengths)
        hidden = torch.cat([p.hidden[start:stop] for p, start, stop in step])
        worker.stillroom_states = [torch.cat([p.block[start:stop] for p, start, stop in step])]
        answers = worker.compute_prompt_logprobs(head, hidden, batch, all_tokens, None, lengths)
        assert not set(answers) & set(found)
        found |= answers
    for prompt in prompts:
        worker.remove_request(prompt.name)
    assert not worker.stillroom_marks
    assert not worker.stillroom_progress
    return found


def _batch(step, rows, lengths) -> SimpleNamespace:
    counts = [stop - start for _, start, stop in step]
    index = np.array([rows[prompt.name] for prompt, _, _ in step])
    return SimpleNamespace(
        req_ids=[prompt.name for prompt, _, _ in step],
        idx_mapping_np=index,
        num_computed_prefill_tokens_np=np.array([start for _, start, _ in step]),
        num_scheduled_tokens=np.array(counts),
        query_start_loc_np=np.concatenate([[0], np.cumsum(counts)]),
        prefill_len_np=lengths[index],
    )


def _config(vocab_size=300, **settings) -> SimpleNamespace:
    """What the worker reads of vLLM's configuration."""
    told = {"spec": SPEC.to_json(), "layers": [1], "final": True, "scratch_bytes": 0} | settings
    model = SimpleNamespace(get_vocab_size=lambda: vocab_size, head_dtype=torch.bfloat16)
    return SimpleNamespace(additional_config={"stillroom": told}, model_config=model)


def _ranks(scoring, patch, world_size=1, least=None):
    group = SimpleNamespace(world_size=world_size, cpu_group=None)
    patch.setattr(scoring, "get_tp_group", lambda: group)
    told = lambda rows, *_, **__: rows.fill_(least)  # noqa: E731
    patch.setattr(torch.distributed, "all_reduce", told)


def test_a_cpu_cuts_at_requests_and_ranks_cut_alike(hooks, monkeypatch):
    _, scoring = hooks
    _ranks(scoring, monkeypatch)
    settings = scoring.Settings.checked(_config(), torch.device("cpu"))
    assert (settings.block_rows, settings.across) == (128, False)
    _ranks(scoring, monkeypatch, world_size=2, least=64)
    assert scoring.Settings.checked(_config(), torch.device("cpu")).block_rows == 64
    nothing = SimpleNamespace(additional_config={})
    assert scoring.Settings.checked(nothing, torch.device("cpu")) is None


def test_an_accelerator_without_a_sweep_is_told_what_works(hooks, monkeypatch):
    _, scoring = hooks
    _ranks(scoring, monkeypatch)

    def does_not_compile(*_):
        raise RuntimeError("PTX was compiled for a later device")

    monkeypatch.setattr(scoring, "check_sweep", does_not_compile)
    told = r"xpu: the torch sweep does not run here \(PTX was .*STILLROOM_SWEEP=torch.*8\.0"
    with pytest.raises(TeacherError, match=told):
        scoring.Settings.checked(_config(), torch.device("xpu"))
    monkeypatch.setattr(scoring, "check_sweep", lambda *_: None)
    assert scoring.Settings.checked(_config(), torch.device("xpu")).across


def test_shares_of_a_prompt_give_no_hidden_layers(hooks):
    """The second runner puts final states back into order before it samples, and only those."""
    _, scoring = hooks
    shared = SimpleNamespace(prefill_context_parallel_size=2)
    with pytest.raises(RuntimeError, match=r"Linear come in another order.*tensor_parallel_size"):
        scoring.ask_for_blocks(torch.nn.Linear(1, 1), (1,), SimpleNamespace(parallel_config=shared))
