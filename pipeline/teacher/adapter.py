"""A PEFT adapter over a teacher: what identifies it, and how transformers applies it.

One idea: every tensor of the adapter's file must have a place in the model and every place a
tensor; a name that fits nothing would leave the base model to answer alone. How vLLM applies it is
in `vllm/adapter.py`. Students have nothing to do with this: their adapters are trained and merged.
"""

import warnings
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import TeacherError, first_line
from stillroom.cache_schemas.extras import extra_package
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.teacher.identity import (
    SILENT_ADAPTER_KEYS,
    canonical_config,
    refuse_pickles,
    weights_sha256,
)

CONFIG = "adapter_config.json"
WHERE = "[teacher] adapter"


def adapter_directory(teacher: Teacher) -> Path:
    """Where the adapter of a teacher lies.

    Raises:
        TeacherError: no PEFT adapter is there, or one that would have to be unpickled.
    """
    directory = Path(teacher.adapter)
    if not (directory / CONFIG).is_file():
        raise TeacherError(
            f"no {CONFIG} is there",
            expected="a directory that PEFT's save_pretrained wrote",
            where=f"{WHERE} {directory}",
            remedy="Check [teacher] adapter.",
        )
    refuse_pickles(directory)
    return directory


def adapter_facts(teacher: Teacher) -> dict[str, Any]:
    """Identity of a teacher's adapter as JSON."""
    directory = adapter_directory(teacher)
    return {
        "weights_sha256": weights_sha256(directory),
        "config": canonical_config(directory / CONFIG, SILENT_ADAPTER_KEYS),
    }


def tensor_names(directory: Path) -> set[str]:
    """Names of the tensors in an adapter's file.

    Raises:
        TeacherError: it cannot be read.
    """
    from peft.utils.save_and_load import load_peft_weights

    try:
        return set(load_peft_weights(str(directory), device="cpu"))
    except Exception as error:  # whatever PEFT raises at a foreign or damaged file
        reason = first_line(error)
        raise _unfit(directory, f"its tensors cannot be read ({reason})") from None


def with_adapter(model: Any, teacher: Teacher) -> Any:
    """The same model object with the adapter of its teacher in its modules; as it was, where there
    is none.

    Raises:
        TeacherError: the adapter does not fit the model, or is of a kind that changes prompts.
    """
    return _applied(model, teacher).get_base_model() if teacher.adapter else model


def merged(model: Any, teacher: Teacher) -> Any:
    """The same model with its teacher's adapter added to its weights, for what is cut from them.

    Raises:
        TeacherError: as for `with_adapter`.
    """
    if not teacher.adapter:
        return model
    plain = _embeddings(model)
    made = _applied(model, teacher)
    if plain[0].weight is plain[1].weight and _embeddings(made.get_base_model()) != plain:
        _untie(model, plain[1])
    return made.merge_and_unload()


def _embeddings(model: Any) -> tuple[Any, Any]:
    """The layers that read a token and write one."""
    return model.get_input_embeddings(), model.get_output_embeddings()


def _untie(model: Any, head: Any) -> None:
    """Give the head a matrix of its own: an adapter changes one of the two, or each apart, and
    adding it to a shared matrix would change the other too."""
    from torch import nn

    head.weight = nn.Parameter(head.weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _applied(model: Any, teacher: Teacher) -> Any:
    directory = adapter_directory(teacher)
    peft = extra_package("peft", "lora", WHERE)
    try:
        with warnings.catch_warnings(action="ignore"):  # names are checked below, all of them
            made = peft.PeftModel.from_pretrained(model, directory)
    except Exception as error:  # whatever PEFT raises at a foreign file
        reason = first_line(error)
        raise _unfit(directory, f"PEFT cannot apply it ({reason})") from None
    if made.active_peft_config.is_prompt_learning:
        kind = made.active_peft_config.peft_type
        raise _unfit(directory, f"{kind} puts tokens of its own into every prompt")
    _check_names(made, directory)
    return made


def _check_names(made: Any, directory: Path) -> None:
    """Compare the adapter's own file with what PEFT would save of the model."""
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings(action="ignore"):
        placed = set(get_peft_model_state_dict(made))
    saved = tensor_names(directory)
    for names, said in ((saved - placed, "have no place in"), (placed - saved, "are lacking for")):
        if names:
            first = ", ".join(sorted(names)[:3])
            raise _unfit(directory, f"{len(names)} tensors {said} this model, first {first}")


def _unfit(directory: Path, found: str) -> TeacherError:
    return TeacherError(
        found,
        expected="an adapter that was trained over this model",
        where=f"{WHERE} {directory}",
        remedy="Check [teacher] model and adapter, or merge the two and name the result as model.",
    )
