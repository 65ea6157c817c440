"""What a teacher is, read from its directory without starting an engine.

One idea: identity is the hash of the weight files; everything else is there so that a person can
read a plan. No weights are loaded here.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from stillroom.cache_schemas.errors import TeacherError
from stillroom.pipeline.config import Teacher

WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that capture needs.

    Attributes:
        architecture: class name in the model's config.
        vocab_size: real columns of the LM head.
        hidden_size: width of the residual stream.
        num_layers: blocks.
        context: positions the model was made for; 0 where its config does not say.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    context: int


def teacher_facts(teacher: Teacher) -> dict:
    """Identity of a teacher as nested JSON, for a plan.

    Raises:
        TeacherError: no such directory or hub id, or no weights or config in it.
    """
    directory = model_directory(teacher)
    shape = model_shape(teacher)
    return {
        "weights_sha256": weights_sha256(directory),
        "architecture": shape.architecture,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_layers": shape.num_layers,
        "dtype": teacher.dtype if teacher.dtype != "auto" else _stored_dtype(directory),
        "revision": teacher.revision,
        "quantization": teacher.quantization,
    }


def model_shape(teacher: Teacher) -> ModelShape:
    """Sizes from the model's config (of its text part, for a multimodal one)."""
    config = _config(model_directory(teacher))
    text = config.get_text_config()
    names = getattr(config, "architectures", None) or [type(config).__name__]
    try:
        return ModelShape(
            architecture=names[0],
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            num_layers=text.num_hidden_layers,
            context=getattr(text, "max_position_embeddings", 0) or 0,
        )
    except AttributeError as error:
        raise TeacherError(
            f"is not a decoder language model ({error})",
            where=teacher.model,
            remedy="Name a causal or image-text language model under [teacher].",
        ) from None


def model_directory(teacher: Teacher) -> Path:
    """The directory of a teacher: as given, or where the hub client keeps it."""
    return _resolve(teacher.model, teacher.revision)


@cache
def _resolve(model: str, revision: str) -> Path:
    if (path := Path(model)).is_dir():
        return _with_config(path)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise TeacherError(
            "no such directory",
            expected="a directory with config.json and weights, or a hub id like 'org/name'",
            where=model,
            remedy="Check [teacher] model.",
        )
    return _from_hub(model, revision)


def _from_hub(model: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return _with_config(Path(snapshot_download(model, revision=revision or None)))
    except TeacherError:
        raise
    except Exception as error:
        raise TeacherError(
            f"is neither a directory nor to be had from the hub ({type(error).__name__}: {error})",
            where=model,
            remedy="Check the name, the network and HF_HUB_OFFLINE, or give a local directory.",
        ) from None


def _with_config(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise TeacherError(
            "config.json is missing",
            where=str(path),
            remedy="Point [teacher] model at a Hugging Face model directory.",
        )
    return path


def _config(directory: Path):
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory)
    except (ValueError, OSError, KeyError, json.JSONDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise TeacherError(
            f"config.json cannot be understood ({reason})",
            where=str(directory),
            remedy="Check the directory, or install a transformers that knows this model.",
        ) from None


def _stored_dtype(directory: Path) -> str:
    config = _config(directory)
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return str(dtype or "float32").removeprefix("torch.")


def weights_sha256(directory: Path) -> str:
    """sha256 over the name and sha256 of every weight file, in name order."""
    files = sorted(p for pattern in WEIGHT_PATTERNS for p in directory.glob(pattern))
    if not files:
        raise TeacherError(
            f"no weights ({', '.join(WEIGHT_PATTERNS)})",
            where=str(directory),
            remedy="Download or convert the model's weights.",
        )
    # The key under which the hash is remembered: a file that has changed is read again.
    states = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    return _combined_sha256(states)


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
