"""vLLM's second model runner, whole, on a CPU: it says what the definition says.

It wants Triton, and vLLM on a CPU a Triton backend for CPUs; Triton's interpreter stands in for
one here, so every kernel of the runner is run, word by word.
"""

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
PROGRAM = """
import json, sys
from types import SimpleNamespace
from triton.backends import backends
backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
import numpy as np
import stillroom.pipeline
from stillroom.pipeline.config import Capture, Teacher
from stillroom.pipeline.record import Example, content_id
from stillroom.pipeline.teacher.opening import open_engine

def example(length, masked):
    tokens = np.random.default_rng(length).integers(0, 700, length, dtype=np.int32)
    mask = np.arange(length) >= masked
    return Example(content_id(tokens, mask), "made-up", "made-up", tokens, mask)

examples = [example(2, 0), example(17, 8), example(90, 0), example(33, 30), example(64, 5)]
table = Capture(k=12, tail_draws=20, temperatures=(0.5, 1.0), moments=True, hidden_layers=LAYERS)
arguments = {"max_num_batched_tokens": 48, "max_num_seqs": 8}  # prompts share steps, and span them
teacher = Teacher(model=sys.argv[1], dtype="float32", engine_args=arguments)
engine = open_engine("vllm", teacher, table, max_tokens=128)
runner = engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner
found = list(engine.score(examples))
engine.close()
truth = open_engine("reference", Teacher(model=sys.argv[1], dtype="float32"), table).score(examples)
gaps = {}
for mine, theirs in zip(found, truth):
    assert mine.num_rows == theirs.num_rows
    for name, array in theirs.signals.items():
        assert mine.signals[name].shape == array.shape, name
        if array.dtype.kind == "f" and array.size:
            largest = np.abs(array).max() if name.startswith("hidden.") else 1.0
            gap = float(np.abs(mine.signals[name] - array).max() / largest)
            gaps[name] = max(gaps.get(name, 0.0), gap)
print(json.dumps({"runner": type(runner).__module__, "gaps": gaps}))
"""


@pytest.mark.parametrize("layers", [(), (1, "final")])
def test_the_second_runner_says_what_the_definition_says(tiny_llama, layers):
    chosen = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
    program = PROGRAM.replace("LAYERS", repr(layers))
    command = [sys.executable, "-c", program, str(tiny_llama)]
    run = subprocess.run(command, env=os.environ | chosen, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout.splitlines()[-1])
    assert told["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert {"topk_logprobs", "tail_logprob", "lse", "entropy"} <= set(told["gaps"])
    assert ("hidden.1" in told["gaps"]) == bool(layers)
    # 24 bits through three blocks and a head; a wrong row differs by whole nats.
    assert max(told["gaps"].values()) < 1e-4, told
