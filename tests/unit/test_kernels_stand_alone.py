"""The kernels and their benchmark run where nothing else of stillroom can: no codec, no vLLM."""

import os
import subprocess
import sys

import torch

from tests.contract.divergence_cases import ROUNDING

ABSENT = (
    *("zarr", "numcodecs", "pcodec", "pydantic", "pyarrow", "fsspec", "numba", "xxhash"),
    *("vllm", "ray", "transformers", "tokenizers", "typer", "rich"),
    *("liger_kernel", "cut_cross_entropy"),
)
PROGRAM = f"""
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from benchmarks import topk_divergence as benchmark
from benchmarks._divergence_contenders import Problem, ours
import torch

problem = Problem.make(6, 8, 40, 3, dtype=torch.float32, device="cpu")
for entrant in (ours("chunked"), ours("triton"), ours("triton", "jsd", "dense")):
    print(benchmark.gradient_error(entrant, problem))
"""


def test_they_need_torch_triton_and_numpy_alone():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    errors = [float(line) for line in run.stdout.split()]
    assert len(errors) == 3
    assert max(errors) < ROUNDING[torch.float32]
