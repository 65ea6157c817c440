"""A student is a plain HF directory: transformers loads it, and vLLM serves the same model."""

import json
import subprocess
import sys

import pytest
import torch

from stillroom.pipeline.config import Student, Teacher
from stillroom.pipeline.student.model import export, initial_student, load

SCORED_BY_BOTH = """
import json, sys
import numpy as np
from stillroom.pipeline.config import Capture, Teacher
from stillroom.pipeline.record import Example, content_id
from stillroom.pipeline.teacher.opening import open_engine

ids, mask = np.arange(3, 43, dtype=np.int32), np.ones(40, dtype=bool)
example = Example(content_id(ids, mask), "document", "counted", ids, mask)
teacher = Teacher(model=sys.argv[1], dtype="float32")
said = {}
for name in ("reference", "vllm"):
    engine = open_engine(name, teacher, Capture(k=512), max_tokens=64)
    (record,) = engine.score([example])
    said[name] = np.full((39, 768), np.nan)
    np.put_along_axis(
        said[name], record.signals["topk_ids"], record.signals["topk_logprobs"], axis=1
    )
print(json.dumps(float(np.nanmax(np.abs(said["reference"] - said["vllm"])))))
"""


@pytest.mark.vllm
def test_a_trained_student_is_served_by_vllm(tiny_llama, tmp_path):
    teacher = Teacher(model=str(tiny_llama))
    initial = initial_student(Student(keep_layers=(0, 2)), teacher, tmp_path / "initial")
    model = load(initial)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    export(model, tmp_path / "student", initial, {})
    command = [sys.executable, "-c", SCORED_BY_BOTH, str(tmp_path / "student")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) <= 1e-4
