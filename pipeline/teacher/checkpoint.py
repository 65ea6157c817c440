"""Loading by transformers that fills nothing in: a weight that the checkpoint lacks is an error.

One idea: weights come from safetensors alone, and transformers itself says what it loaded, so tied
heads and renamed weights are no false alarms. What the checkpoint has beyond the model is named
once. The same report is made without reading a weight (on torch's meta device), so that a model
which vLLM will load is looked at first.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import StillroomError, TeacherError, first_line
from stillroom.pipeline.teacher.identity import refuse_pickles
from stillroom.pipeline.teacher.quantised import cannot_run, check_stored, method_of


def load_whole(
    loader: Any,
    directory: str | Path,
    *,
    error: type[StillroomError] = TeacherError,
    trusts_code: bool = False,
    **options: Any,
) -> Any:
    """`loader.from_pretrained`, refusing a checkpoint that lacks weights of the model.

    Args:
        loader: a transformers model class or Auto class.
        directory: HF directory or hub id.
        error: what to raise.
        trusts_code: whether Python code of the directory may be run.
        options: further arguments of `from_pretrained`.

    Raises:
        StillroomError: of the kind `error`: it cannot be loaded, or weights are missing.
    """
    refuse_pickles(Path(directory), error)
    check_stored(Path(directory), error)
    options |= {"trust_remote_code": trusts_code, "use_safetensors": True}
    try:
        model, found = load_with_report(loader, directory, **options)
    except Exception as reason:  # whatever a broken directory makes the libraries raise
        raise unloadable(directory, reason, error) from None
    check_report(found, directory, type(model).__name__, error)
    return model


def load_with_report(loader: Any, directory: str | Path, **options: Any) -> tuple[Any, dict]:
    """A model, and transformers' own report of what it found; raises what transformers raises."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # the report is said here, in a line
    try:
        return loader.from_pretrained(directory, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(before)


def check_report(
    found: dict, directory: str | Path, model: str, error: type[StillroomError] = TeacherError
) -> None:
    """Raise `error` where a report has weights that the checkpoint lacks; name what it has beyond
    the model."""
    lacking = [*found["missing_keys"], *map(str, found["mismatched_keys"])]
    refuse_lacking(lacking, directory, model, error)
    _name_unexpected(found["unexpected_keys"], directory, model)


def refuse_lacking(
    names: Iterable[str], directory: str | Path, model: str, error: type[StillroomError]
) -> None:
    """Raise `error` if there are any names of weights that a checkpoint lacks."""
    if lacking := sorted(names):
        raise error(
            f"{len(lacking)} weights of {model} are not in the checkpoint, first {lacking[0]}",
            expected="every weight of the model",
            where=str(directory),
            remedy="Get the weight files again, and check that config.json belongs to them.",
        )


def unloadable(
    directory: str | Path, reason: Exception, error: type[StillroomError] = TeacherError
) -> StillroomError:
    """What to raise for a directory that a library does not load."""
    if method := method_of(directory):
        return cannot_run(directory, method, "transformers", first_line(reason), error)
    if "ignore_mismatched_sizes" in str(reason):
        found = "cannot be loaded (its weights have other shapes than its config says)"
        remedy = "Check that weights and config.json belong together."
    elif "trust_remote_code" in str(reason):
        found = "needs Python code of its own directory, and nothing there is run"
        remedy = "Read that code; if you trust it, set [teacher] trust_remote_code = true."
    else:
        found = f"cannot be loaded ({first_line(reason)})"
        remedy = "Check that weights and config.json belong together."
    return error(found, where=str(directory), remedy=remedy)


def _name_unexpected(names: Iterable[str], directory: str | Path, model: str) -> None:
    if unexpected := sorted(names):
        shown = ", ".join(unexpected[:3]) + ", ..." * (len(unexpected) > 3)
        warnings.warn(
            f"{directory}: {model} has no place for {len(unexpected)} tensors of the checkpoint: "
            f"{shown}",
            stacklevel=4,
        )
