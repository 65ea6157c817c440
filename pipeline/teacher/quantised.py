"""Quantised model directories (GPTQ, AWQ, bitsandbytes, FP8, compressed-tensors and the like).

One idea: whether a machine can run one is found out by running it, and where it cannot, one message
says so under either engine. Nothing here knows which kernels exist for which device.
"""

import json
from pathlib import Path
from typing import Any

import torch

from stillroom.cache_schemas.errors import StillroomError, TeacherError, first_line
from stillroom.pipeline.teacher.identity import stored_dtypes

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Of safetensors: what plain weights are stored as."""
REMEDY = (
    "Use a machine and packages that run it, the other engine, or the same model in bfloat16 "
    "(another teacher: its answers differ)."
)


KEYS = ("quantization_config", "compression_config")
"""Where a config says how its weights are quantised; the second is what vLLM reads too."""


def method_of(directory: str | Path) -> str:
    """How the weights of a directory are quantised, as its config.json says; empty if not."""
    written = _written(directory)
    return str(written.get("quant_method") or "a method without a name") if written else ""


def _written(directory: str | Path) -> dict[str, Any]:
    """The quantisation that a directory's config.json states; empty where there is none."""
    try:
        config = json.loads(Path(directory, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict):
        return {}
    for part in (config, *config.values()):
        for key in KEYS if isinstance(part, dict) else ():
            if isinstance(found := part.get(key), dict) and found:
                return found
    return {}


def cannot_run(
    directory: str | Path, method: str, by: str, reason: str, error: type[StillroomError]
) -> StillroomError:
    """What to raise where `by` cannot run a quantised directory on this machine."""
    found = f"is quantised ({method}), and {by} cannot run that on this machine ({reason})"
    return error(found, where=str(directory), remedy=REMEDY)


def check_stored(directory: Path, error: type[StillroomError]) -> None:
    """Refuse matrices of whole or 8-bit numbers whose config says nothing of quantisation: they
    would be read as plain numbers, without their scales.

    Raises:
        StillroomError: of the kind `error`, as described.
    """
    if method_of(directory):
        return
    for name, dtype in stored_dtypes(directory):
        if dtype not in FLOATS and name.endswith("weight"):
            raise error(
                f"{name} is stored as {dtype}, and config.json says nothing of quantisation",
                expected=f"{', '.join(sorted(FLOATS))}, or a quantization_config",
                where=str(directory),
                remedy="Get config.json again from where the weights are from.",
            )


def check_as_written(model: Any, directory: Path) -> None:
    """Refuse a model that transformers made otherwise than its config says, for want of a device or
    of knowledge: it would answer as another model than on a machine that has them.

    Raises:
        TeacherError: as described.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

    written, method = _written(directory), method_of(directory)
    made = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    plain = made is None or getattr(made, "dequantize", False)
    if not written or not plain:
        return
    if made is None and method not in KNOWN:
        reason = "it does not know this method, and takes the weights for plain ones"
        raise cannot_run(directory, method, "transformers", reason, TeacherError)
    if not written.get("dequantize"):
        reason = (
            "it would turn the weights back into plain ones; if that is wanted, write "
            '"dequantize": true into quantization_config in config.json'
        )
        raise cannot_run(directory, method, "transformers", reason, TeacherError)


@torch.inference_mode()
def try_forward(model: Any, directory: Path) -> None:
    """Read two tokens with a quantised model: its kernels are first asked for there.

    Raises:
        TeacherError: this machine cannot run it.
    """
    if not (method := method_of(directory)):
        return
    try:
        model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=model.device))
    except Exception as error:  # whatever a kernel that is not there makes the libraries raise
        reason = first_line(error)
        raise cannot_run(directory, method, "transformers", reason, TeacherError) from None
