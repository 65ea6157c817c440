"""What of a model's directory changes its answers: weights, config, adapter, code of its own.

One idea: a config is in the identity whole, as the file has it, and a key is left out only where it
provably says nothing about answers; so a key that nobody here has heard of counts. Files are read
as JSON and hashed: nothing is loaded and nothing of the directory is executed.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import StillroomError, TeacherError

WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
"""Files that are read by unpickling them, which can run code; no weights are taken from one."""
FURTHER_FILES = ("*quant*.json", "params.json")
"""Beside config.json, what vLLM reads of a directory: how weights are quantised, and Mistral's own
form of a config."""
SILENT_KEYS = {
    "_name_or_path": "where it was saved from; loading replaces it with where it was loaded from",
    "transformers_version": "which release saved it; no model's code reads it",
}
"""Keys of a config that say nothing about answers, and why. All others are in the identity: also
those that only seem idle, because a model's code may read any of them."""
SILENT_ADAPTER_KEYS = {
    "base_model_name_or_path": "where the base lay in training; ours is [teacher] model",
    "peft_version": "which release saved it",
}
"""The same of an adapter's config."""
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
MAX_HEADER = 1 << 28
CODE_ELSEWHERE = "--"
"""In `auto_map`, between another repository and its module."""


def directory_facts(directory: Path, trusts_code: bool) -> dict[str, Any]:
    """Identity of a model directory as JSON: weights, config, further files, and code if it is run.

    Raises:
        TeacherError: no weights, a file that is not JSON, or code that lies in another repository.
    """
    facts: dict[str, Any] = {
        "weights_sha256": weights_sha256(directory),
        "config": canonical_config(directory / "config.json", SILENT_KEYS),
        "trust_remote_code": trusts_code,
    }
    paths = sorted({path for pattern in FURTHER_FILES for path in directory.glob(pattern)})
    if paths:
        facts["files"] = {path.name: canonical_config(path, {}) for path in paths}
    if trusts_code:
        facts["code_sha256"] = _code_sha256(directory, facts["config"])
    return facts


def canonical_config(path: Path, silent: dict[str, str]) -> Any:
    """A JSON file in one spelling: `silent` keys left out wherever they are, whole numbers as
    integers, infinities as words.

    Raises:
        TeacherError: it cannot be read.
    """
    try:
        return _canonical(json.loads(path.read_text(encoding="utf-8")), silent)
    except (OSError, ValueError, RecursionError) as error:
        raise TeacherError(
            f"cannot be read ({error})",
            expected="JSON",
            where=str(path),
            remedy="Get the file again.",
        ) from None


def _canonical(value: Any, silent: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(v, silent) for key, v in value.items() if key not in silent}
    if isinstance(value, list):
        return [_canonical(inner, silent) for inner in value]
    if isinstance(value, float):
        return _one_spelling(value)
    return value


def _one_spelling(value: float) -> float | int | str:
    if not math.isfinite(value):
        return str(value)
    return int(value) if value.is_integer() else value


def _code_sha256(directory: Path, config: dict[str, Any]) -> str:
    """sha256 over the Python files of a directory."""
    named = json.dumps(config.get("auto_map", {}))
    if CODE_ELSEWHERE in named:
        raise TeacherError(
            f"takes its code from another repository ({named[:120]}), which no hash here covers",
            where=str(directory),
            remedy="Put the Python files beside config.json, and name them alone in its auto_map.",
        )
    return _combined(sorted(directory.rglob("*.py")))


def weight_files(directory: Path) -> list[Path]:
    """Files of weights, in name order."""
    return sorted(p for pattern in WEIGHT_PATTERNS for p in directory.glob(pattern))


def refuse_pickles(directory: Path, error: type[StillroomError] = TeacherError) -> None:
    """Raise `error` for a directory whose weights are there as pickles alone."""
    if any(directory.glob("*.safetensors")):
        return
    if found := sorted(path.name for pattern in PICKLES for path in directory.glob(pattern)):
        raise error(
            f"holds its weights as a pickle ({found[0]}), and nothing is unpickled",
            expected="*.safetensors",
            where=str(directory),
            remedy="Load it with a library that you trust it to, and save it again with "
            "save_pretrained, which writes safetensors.",
        )


def weights_sha256(directory: Path) -> str:
    """sha256 over the name and sha256 of every weight file, in name order.

    Raises:
        TeacherError: there are none, or pickles alone.
    """
    refuse_pickles(directory)
    files = weight_files(directory)
    if not files:
        raise TeacherError(
            f"no weights ({', '.join(WEIGHT_PATTERNS)})",
            where=str(directory),
            remedy="Download or convert the model's weights.",
        )
    return _combined(files)


def stored_dtype(directory: Path) -> str:
    """The floating-point dtype that most bytes of a directory's safetensors are in; float32 where
    there are none."""
    sizes: Counter[str] = Counter(float32=0)
    for path in directory.glob("*.safetensors"):
        for entry in _header(path).values():
            if (name := DTYPES.get(entry.get("dtype", ""))) is not None:
                first, last = entry["data_offsets"]
                sizes[name] += last - first
    return sizes.most_common(1)[0][0]


def stored_dtypes(directory: Path) -> Iterator[tuple[str, str]]:
    """Name and dtype (as safetensors calls it) of every tensor in a directory's safetensors."""
    for path in sorted(directory.glob("*.safetensors")):
        for name, entry in _header(path).items():
            if "dtype" in entry:
                yield name, entry["dtype"]


def _header(path: Path) -> dict[str, Any]:
    """Names, dtypes and places of the tensors in a safetensors file."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            found = json.loads(file.read(min(length, MAX_HEADER)))
        return {name: entry for name, entry in found.items() if isinstance(entry, dict)}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise TeacherError(
            f"is not safetensors ({error})",
            where=str(path),
            remedy="Get the file again; where git wrote it, `git lfs pull` brings its content.",
        ) from None


def _combined(files: list[Path]) -> str:
    return _combined_sha256(tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files))


@cache
def _combined_sha256(states: tuple[tuple[str, int, int], ...]) -> str:
    paths = [Path(state[0]) for state in states]
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_file_sha256, paths))
    combined = hashlib.sha256()
    for path, digest in zip(paths, digests):
        combined.update(f"{path.name} {digest}\n".encode())
    return combined.hexdigest()


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
