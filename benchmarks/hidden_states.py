"""Two ways for hidden states to leave vLLM, on the same prompts in interleaved rounds.

    python -m benchmarks.hidden_states --json

`auxiliary` is ours: the chosen blocks' outputs come back in the reply (ADR 0030); its cost is what
two layers add to a capture of all logit signals. `connector` is vLLM's own
`extract_hidden_states`: a drafting method copies the states into a cache group of their own and a
KV connector copies them out when a request ends; its cost is what the same two layers add to plain
prefill. The connector here is vLLM's example without its files and CUDA streams, so it does less
than a connector that stores anything.
"""

import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cache_trial import asking, publish
from benchmarks.capture import EVERYTHING, _Bench, real_prompts
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.teacher.vllm.engine import VllmEngine, start_vllm, vllm_arguments
from stillroom.pipeline.teacher.vllm.requests import one_pass

LAYERS = (10, 20)
MOST_STEPS = 1000


def main() -> None:
    """Measure, write `benchmarks/results/`, print."""
    parser = asking(__doc__)
    parser.add_argument("--model", default=".cache/models/SmolLM2-135M-Instruct")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    figures = run(arguments.model, arguments.prompts, arguments.tokens, arguments.rounds)
    publish("hidden_states", figures, arguments.json)


def run(model: str, num_prompts: int, num_tokens: int, rounds: int) -> dict[str, Any]:
    """All figures of one run."""
    sizes = {"max_num_batched_tokens": 4096}
    teacher = Teacher(model=model, dtype="bfloat16", engine_args=sizes)
    prompts = real_prompts(model, num_prompts, num_tokens)
    engine = VllmEngine(teacher, EVERYTHING, max_tokens=num_tokens)
    ours, theirs = _Bench(engine, prompts), _Connector(teacher, num_tokens)
    ways = {
        "prefill": lambda: ours.ask("prefill", prompts),
        "signals": lambda: ours.ask("everything", prompts),
        "signals_and_states": lambda: ours.ask("hidden", prompts),
        "prefill_and_connector": lambda: theirs.ask(prompts),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way in list(ways)[:: 1 if number % 2 else -1]:
            seconds[way].append(ways[way]())
    seconds = {way: times[1:] for way, times in seconds.items()}
    states = theirs.states
    theirs.close()
    engine.close()
    return _figures(seconds, states, num_prompts * num_tokens) | {
        "prompts": num_prompts,
        "prompt_tokens": num_tokens,
        "rounds": rounds,
        "layers": list(LAYERS),
        "model": Path(model).name,
        "dtype": "bfloat16",
        "threads": torch.get_num_threads(),
    }


def _figures(seconds: dict[str, list[float]], states: int, tokens: int) -> dict[str, Any]:
    def added(way: str, to: str) -> float:
        return statistics.median(a - b for a, b in zip(seconds[way], seconds[to]))

    prefill = statistics.median(seconds["prefill"])
    auxiliary = added("signals_and_states", "signals")
    connector = added("prefill_and_connector", "prefill")
    return {
        "auxiliary_seconds": auxiliary,
        "connector_seconds": connector,
        "auxiliary_of_prefill": auxiliary / prefill,
        "connector_of_prefill": connector / prefill,
        "auxiliary_bytes_per_token": states / tokens,
        "connector_bytes_per_token": 2 * states / tokens,
        "seconds": {way: [round(t, 4) for t in times] for way, times in seconds.items()},
    }


class _Connector:
    """A vLLM whose hidden states leave through its KV connector; one to a process."""

    def __init__(self, teacher: Teacher, num_tokens: int):
        self._here, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_serve, args=(teacher, num_tokens, there))
        self._process.start()
        self.states = 0

    def ask(self, prompts: list) -> float:
        """Seconds until every prompt's states are in hand, plain or through the connector."""
        self._here.send([prompt.token_ids.tolist() for prompt in prompts])
        seconds, self.states = self._here.recv()
        return seconds

    def close(self) -> None:
        """End the process."""
        self._here.send(None)
        self._process.join()


def _serve(teacher: Teacher, num_tokens: int, pipe: Any) -> None:
    """The process of a `_Connector`: answers lists of prompts with (seconds, bytes of states)."""
    engine = _ConnectorEngine(teacher, num_tokens)
    while (prompts := pipe.recv()) is not None:
        pipe.send(engine.ask(prompts))
    engine.close()


class _ConnectorEngine:
    def __init__(self, teacher: Teacher, num_tokens: int):
        arguments = vllm_arguments(teacher, 0, num_tokens + 1, 1.0)
        arguments["speculative_config"] = {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(LAYERS)}},
        }
        arguments["kv_transfer_config"] = {
            "kv_connector": "KeptStates",
            "kv_connector_module_path": "benchmarks.hidden_states_connector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"use_synchronization_lock": False},
        }
        self._llm: Any = start_vllm(teacher, arguments)
        self._asked = 0

    def ask(self, prompts: list) -> tuple[float, int]:
        from benchmarks.hidden_states_connector import KEPT

        KEPT.clear()
        start = time.perf_counter()
        for prompt in prompts:
            self._asked += 1
            ids = {"prompt_token_ids": prompt}
            self._llm.llm_engine.add_request(str(self._asked), ids, one_pass())
        for _ in range(MOST_STEPS):
            self._llm.llm_engine.step()
            if len(KEPT) == len(prompts):
                seconds = time.perf_counter() - start
                return seconds, sum(states.nbytes for states in KEPT.values())
        raise RuntimeError(f"{len(KEPT)} of {len(prompts)} prompts came out of the connector")

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
