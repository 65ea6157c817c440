"""What capture costs beside what vLLM does anyway: one engine, same prompts, interleaved rounds.

    python -m benchmarks.capture --json

Every way of asking goes through the same engine object, so nothing differs but the request (and,
for the hidden layers, whether the model returns them). A round asks each way once, in turn; figures
are medians over rounds. `head_floor` is the work nobody can avoid for logit signals, measured in
the same process on the same rows: the LM head's product, log-softmax in fp32 and top-k. What a
capture does once at its start is timed apart: `start_seconds` (vLLM and the self-test) and `check`
(vLLM against the model's definition, as the manifest has it).
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import needs
from benchmarks.cache_trial import asking, publish
from stillroom.pipeline.config import Capture, Teacher
from stillroom.pipeline.record import Example, content_id
from stillroom.pipeline.teacher.definition_check import Question, check_definition
from stillroom.pipeline.teacher.rows import RowSpec
from stillroom.pipeline.teacher.sweep.blocks import rows_within, score_rows, usual_scratch_bytes
from stillroom.pipeline.teacher.vllm.engine import VllmEngine
from stillroom.pipeline.teacher.vllm.requests import one_pass

K = 64
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
EVERYTHING = Capture(
    k=K, tail_draws=56, temperatures=TEMPERATURES, moments=True, hidden_layers=(10, 20)
)
SCALARS = EVERYTHING.model_copy(
    update={"tail_draws": 0, "temperatures": (1.0,), "moments": False, "hidden_layers": ()}
)
WAYS = ("prefill", "dict_api", "flat_api", "capture", "everything", "hidden")
BIG_VOCABULARY, LONG_PROMPT = 151_936, 4_096


def main() -> None:
    """Measure, write `benchmarks/results/`, print."""
    parser = asking(__doc__)
    parser.add_argument("--model", default=needs.MODEL)
    parser.add_argument("--prompts", type=int, default=6, help="prompts of one round")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of one prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(_extra_peak_bytes())
        return
    model = needs.model(arguments.model)
    figures = run(model, arguments.prompts, arguments.tokens, arguments.rounds)
    publish("capture", figures, arguments.json)


def run(model: str, num_prompts: int, num_tokens: int, rounds: int) -> dict[str, Any]:
    """All figures of one run."""
    memory = subprocess.run(
        [sys.executable, "-m", "benchmarks.capture", "--memory"],
        check=True,
        capture_output=True,
        text=True,
    )
    teacher = Teacher(
        model=model,
        dtype="bfloat16",
        engine_args={"max_logprobs": K, "max_num_batched_tokens": 4096},
    )
    start = time.perf_counter()
    engine = VllmEngine(teacher, EVERYTHING, max_tokens=num_tokens)
    start_seconds = time.perf_counter() - start
    prompts = real_prompts(model, num_prompts, num_tokens)
    tokens = num_prompts * num_tokens
    check = check_definition(engine, Question(teacher, EVERYTHING, prompts, None, tokens))
    bench = _Bench(engine, prompts)
    seconds = {way: [] for way in (*WAYS, "head_floor")}
    for way in WAYS:
        bench.ask(way, prompts[:1])
    for number in range(rounds):
        order = WAYS if number % 2 == 0 else WAYS[::-1]
        for way in order:
            seconds[way].append(bench.ask(way, prompts))
        seconds["head_floor"].append(bench.head_floor())
    engine.close()
    return figures_of(seconds, tokens) | {
        "start_seconds": start_seconds,
        "check": check.model_dump(mode="json"),
        "extra_peak_bytes": int(memory.stdout.split()[-1]),
        "scratch_bound_bytes": usual_scratch_bytes(0),
        "prompts": num_prompts,
        "prompt_tokens": num_tokens,
        "rounds": rounds,
        "model": Path(model).name,
        "dtype": "bfloat16",
        "threads": torch.get_num_threads(),
    }


def figures_of(seconds: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """Medians; ratios are medians of the rounds' own ratios, so a slow round cancels."""
    rate = {way: tokens / statistics.median(times) for way, times in seconds.items()}

    def ratio(numerator: Callable[[int], float], denominator: Callable[[int], float]) -> float:
        rounds = range(len(seconds["prefill"]))
        return statistics.median(numerator(i) / denominator(i) for i in rounds)

    def of(way: str) -> Callable[[int], float]:
        return lambda i: seconds[way][i]

    def extra(way: str) -> Callable[[int], float]:
        return lambda i: seconds[way][i] - seconds["prefill"][i]

    return {
        "prefill_tok_s": rate["prefill"],
        "capture_tok_s": rate["capture"],
        "everything_tok_s": rate["everything"],
        "dict_api_tok_s": rate["dict_api"],
        "flat_api_tok_s": rate["flat_api"],
        "ratio_to_prefill": ratio(of("prefill"), of("capture")),
        "ratio_to_dict_api": ratio(of("dict_api"), of("capture")),
        "ratio_to_flat_api": ratio(of("flat_api"), of("capture")),
        "head_floor_seconds": statistics.median(seconds["head_floor"]),
        "extra_seconds": statistics.median(
            map(extra("everything"), range(len(seconds["prefill"])))
        ),
        "ratio_to_head_floor": ratio(extra("everything"), of("head_floor")),
        "hidden_overhead": ratio(of("hidden"), of("everything")) - 1.0,
        "seconds": {way: [round(t, 4) for t in times] for way, times in seconds.items()},
    }


class _Bench:
    """The ways of asking, on one engine."""

    def __init__(self, engine: VllmEngine, prompts: list[Example]):
        self._engine, self._prompts = engine, prompts
        core = engine._llm.llm_engine.engine_core.engine_core
        self._runner = core.model_executor.driver_worker.worker.model_runner
        self._full = self._runner.stillroom_settings
        self._decoder = self._runner.get_model().model
        self._requests = engine._requests

    def ask(self, way: str, prompts: list[Example]) -> float:
        """Seconds until every prompt is answered and its arrays are in hand."""
        capture = {"everything": _without_hidden(EVERYTHING), "hidden": EVERYTHING}.get(
            way, SCALARS
        )
        self._use(capture)
        start = time.perf_counter()
        if way in ("capture", "everything", "hidden"):
            for _ in self._engine.score(prompts):
                pass
        else:
            self._ask_vllm(SAMPLING[way](), prompts)
        return time.perf_counter() - start

    def _use(self, capture: Capture) -> None:
        """Switch what the engine keeps; possible because everything runs here, uncompiled."""
        layers = tuple(capture.hidden_layers)
        settings = type(self._full)(RowSpec.of(capture), layers, False, self._full.block_rows)
        self._runner.stillroom_settings = settings
        self._runner.use_aux_hidden_state_outputs = bool(layers)
        self._decoder._set_aux_hidden_state_layers(layers)
        self._engine._capture = capture
        self._engine._requests = type(self._requests)(capture)

    def _ask_vllm(self, sampling, prompts: list[Example]) -> None:
        ids = [
            self._engine._add(p, {"prompt_token_ids": p.token_ids.tolist()}, sampling)
            for p in prompts
        ]
        waiting = set(ids)
        while waiting:
            for output in self._engine._llm.llm_engine.step():
                waiting -= {output.request_id} if output.finished else set()

    @torch.inference_mode()
    def head_floor(self) -> float:
        """Seconds for the head's product, log-softmax and top-k over as many rows."""
        model = self._runner.get_model()
        width = self._decoder.config.hidden_size
        seconds = 0.0
        for prompt in self._prompts:
            hidden = torch.randn(prompt.num_rows, width, dtype=torch.bfloat16)
            start = time.perf_counter()
            logits = model.compute_logits(hidden)
            torch.topk(torch.log_softmax(logits, -1, dtype=torch.float32), K)
            seconds += time.perf_counter() - start
        return seconds


SAMPLING: dict[str, Callable] = {
    "prefill": one_pass,
    "dict_api": lambda: one_pass(prompt_logprobs=K),
    "flat_api": lambda: one_pass(prompt_logprobs=K, flat_logprobs=True),
}


def real_prompts(model: str, num_prompts: int, num_tokens: int) -> list[Example]:
    """Windows of Python's own help texts, every row scored."""
    import pydoc_data.topics

    from transformers import AutoTokenizer

    texts = pydoc_data.topics.topics
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "\n\n".join(texts[name] for name in sorted(texts))[: 8 * num_prompts * num_tokens]
    ids = np.array(tokenizer(text)["input_ids"], dtype=np.int32)
    mask = np.ones(num_tokens, dtype=bool)
    windows = [ids[i * num_tokens : (i + 1) * num_tokens] for i in range(num_prompts)]
    return [Example(content_id(w, mask), "pydoc", "pydoc", w, mask) for w in windows]


def _without_hidden(capture: Capture) -> Capture:
    return capture.model_copy(update={"hidden_layers": ()})


def _extra_peak_bytes() -> int:
    """Growth of this process's peak memory while a long prompt meets a big vocabulary."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(BIG_VOCABULARY, 64, generator=generator).bfloat16()
    hidden = torch.randn(LONG_PROMPT - 1, 64, generator=generator).bfloat16()
    targets = torch.randint(0, BIG_VOCABULARY, (LONG_PROMPT - 1,), generator=generator)
    spec = RowSpec.of(EVERYTHING)
    block = rows_within(usual_scratch_bytes(0), BIG_VOCABULARY, "cpu", spec, torch.bfloat16)
    positions = torch.arange(LONG_PROMPT)

    def score(count: int) -> None:
        at = targets[:count], positions[:count], torch.ones(count, dtype=torch.int64)
        asked = *at, lambda h: h @ head.T, block, False
        score_rows(spec, [count], lambda a, b: hidden[a:b], *asked)

    score(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    score(LONG_PROMPT - 1)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


if __name__ == "__main__":
    needs.run(main)
