"""What a teacher is, read from its directory without starting an engine.

One idea: identity is everything that changes an answer (`identity.py` says what of a directory
does, `arguments.py` which arguments do); sizes are there so that a person can read a plan.
No weights are loaded here, and no code of a directory is run unless [teacher] says so.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import TeacherError, first_line
from stillroom.cache_schemas.scrubbing import scrubbed
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.teacher.adapter import CONFIG as ADAPTER_CONFIG
from stillroom.pipeline.teacher.adapter import adapter_facts
from stillroom.pipeline.teacher.arguments import meaningful
from stillroom.pipeline.teacher.identity import WEIGHT_PATTERNS, directory_facts, stored_dtype
from stillroom.pipeline.teacher.overrides import overridden

DTYPES = frozenset({"float64", "float32", "bfloat16", "float16"})


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


def teacher_facts(teacher: Teacher, engine: str = "") -> dict[str, Any]:
    """Identity of a teacher as nested JSON, for a plan.

    Args:
        teacher: which.
        engine: what runs it; transformers' attention belongs to the identity where it matters.

    Raises:
        TeacherError: no such directory or hub id, no weights or config in it, no such adapter.
    """
    shape = model_shape(teacher)
    facts = {
        "architecture": shape.architecture,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_layers": shape.num_layers,
        "dtype": dtype_of(teacher),
        "revision": teacher.revision,
        "quantization": teacher.quantization,
        "engine_args": scrubbed(meaningful(teacher.engine_args)),
        **directory_facts(model_directory(teacher), teacher.trust_remote_code),
    }
    if engine == "reference" and teacher.attention != "auto":
        facts["attention"] = teacher.attention
    return facts | ({"adapter": adapter_facts(teacher)} if teacher.adapter else {})


def facts_here(teacher: Teacher) -> dict[str, Any] | None:
    """The same as far as it can be known without a network; None where a file of it is not here."""
    adapter = teacher.adapter
    directory = _directory_here(teacher)
    if directory is None or (adapter and not Path(adapter).is_dir()):
        return None
    try:
        return teacher_facts(teacher.model_copy(update={"model": str(directory)}))
    except TeacherError:  # of a directory in which something is left
        return None


def _directory_here(teacher: Teacher) -> Path | None:
    """Where a teacher lies on this machine, whole."""
    if (path := Path(teacher.model)).is_dir():
        return path
    if path.is_absolute() or teacher.model.count("/") != 1:
        return None
    from huggingface_hub import snapshot_download

    try:
        wanted = teacher.revision or None
        found = Path(snapshot_download(teacher.model, revision=wanted, local_files_only=True))
    except (OSError, ValueError):  # the hub client's, where nothing of it was fetched
        return None
    return found if _is_whole(found) else None


def _is_whole(directory: Path) -> bool:
    """Whether every file of weights that an index names is there; a download may be cut off."""
    indexes = directory.glob("*.safetensors.index.json")
    named = {
        name for path in indexes for name in json.loads(path.read_text())["weight_map"].values()
    }
    return all((directory / name).is_file() for name in named)


def model_shape(teacher: Teacher) -> ModelShape:
    """Sizes from the model's config (of its text part, for a multimodal one)."""
    config = model_config(teacher)
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
            remedy=f"Name a causal or image-text language model with {teacher.name_given_as}.",
        ) from None


def model_directory(teacher: Teacher) -> Path:
    """The directory of a teacher: as given, or where the hub client keeps it."""
    return _resolve(teacher.model, teacher.revision, teacher.name_given_as)


def settings_directory(teacher: Teacher) -> Path:
    """The same directory where nobody needs its weights, which are not fetched for it: config,
    tokenizer and processor are there."""
    return _resolve(teacher.model, teacher.revision, teacher.name_given_as, WEIGHT_PATTERNS)


@cache
def _resolve(model: str, revision: str, named_by: str, without: tuple[str, ...] = ()) -> Path:
    if (path := Path(model)).is_dir():
        return _with_config(path, named_by)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise TeacherError(
            "no such directory",
            expected="a directory with config.json and weights, or a hub id like 'org/name'",
            where=model,
            remedy=f"Check {named_by}.",
        )
    return _from_hub(model, revision, named_by, without)


def _from_hub(model: str, revision: str, named_by: str, without: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    left_out = list(without) or None
    try:
        found = snapshot_download(model, revision=revision or None, ignore_patterns=left_out)
        return _with_config(Path(found), named_by)
    except TeacherError:
        raise
    except Exception as error:
        raise TeacherError(
            f"is neither a directory nor to be had from the hub ({type(error).__name__}: {error})",
            where=model,
            remedy=f"Check {named_by}, the network and HF_HUB_OFFLINE, or give a local directory.",
        ) from None


def _with_config(path: Path, named_by: str) -> Path:
    if (path / ADAPTER_CONFIG).is_file():  # transformers would apply it unasked, and vLLM would not
        raise TeacherError(
            "holds a PEFT adapter",
            expected="a model alone",
            where=str(path),
            remedy=f"Name its base with {named_by}, and its directory as [teacher] adapter.",
        )
    if not (path / "config.json").is_file():
        raise TeacherError(
            "config.json is missing",
            where=str(path),
            remedy=f"Point {named_by} at a Hugging Face model directory.",
        )
    return path


def model_config(teacher: Teacher) -> Any:
    """The transformers config of a model, with the `hf_overrides` of [teacher].

    Raises:
        ConfigError: an override says nothing to transformers.
        TeacherError: it cannot be understood, or only by code that is not to be run.
    """
    from transformers import AutoConfig

    directory = settings_directory(teacher)
    trusted = teacher.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trusted)
    except Exception as error:  # whatever a broken or foreign config makes the library raise
        if "trust_remote_code" in str(error) and not trusted:
            raise _not_trusted(directory) from None
        reason = first_line(error)
        raise TeacherError(
            f"config.json cannot be understood ({reason})",
            where=str(directory),
            remedy="Check the directory, or install a transformers that knows this model.",
        ) from None
    return overridden(config, directory, teacher)


def _not_trusted(directory: Path) -> TeacherError:
    return TeacherError(
        "is a model that only Python code of its own directory describes, and nothing there is run",
        where=str(directory),
        remedy="Read that code; if you trust it, set [teacher] trust_remote_code = true.",
    )


def dtype_of(teacher: Teacher) -> str:
    """The dtype that a teacher runs in, whichever engine runs it: as [teacher] says; for "auto" as
    the config says, else as most of the weights are.

    Raises:
        TeacherError: the config says one that no model runs in.
    """
    if teacher.dtype != "auto":
        return teacher.dtype
    config = model_config(teacher)
    stated = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    found = str(stated or stored_dtype(model_directory(teacher))).removeprefix("torch.")
    if found not in DTYPES:
        raise TeacherError(
            f"says dtype = {found[:80]}",
            expected=", ".join(sorted(DTYPES)),
            where=f"{settings_directory(teacher)}/config.json",
            remedy='Name the dtype to run it in as [teacher] dtype, such as "bfloat16".',
        )
    return found
