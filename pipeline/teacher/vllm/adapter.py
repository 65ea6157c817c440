"""A teacher's adapter under vLLM: one LoRA that every request of an engine goes through.

One idea: the engine itself adds the adapter to whatever it is asked, so no caller can forget it,
and it is loaded when the engine starts, so that what vLLM does not support is refused there.
"""

from functools import partial
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import TeacherError, first_line
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.teacher.adapter import (
    WHERE,
    adapter_directory,
    adapter_facts,
    tensor_names,
)
from stillroom.pipeline.teacher.reference.parts import decoder_of


def adapter_arguments(teacher: Teacher) -> dict[str, Any]:
    """vLLM's engine arguments for a teacher's adapter; none where it has none.

    Raises:
        TeacherError: it is no LoRA, or of a rank that vLLM has no room for.
    """
    if not teacher.adapter:
        return {}
    from vllm.config.lora import MaxLoRARanks

    config = adapter_facts(teacher)["config"]
    if config.get("peft_type") != "LORA":
        raise _refused(teacher, f"it is of the kind {config.get('peft_type')}")
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    rooms = [room for room in MaxLoRARanks.__args__ if room >= rank]
    if not rooms:
        raise _refused(teacher, f"its rank is {rank}")
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": min(rooms),
        # Else vLLM wraps the head too, and its wrapper expects one row of each request.
        "lora_target_modules": _last_names(adapter_directory(teacher)),
    }


def _last_names(directory: Path) -> list[str]:
    """Of the modules that an adapter changes."""
    modules = {name.split(".lora_")[0] for name in tensor_names(directory)}
    return sorted({module.rsplit(".", 1)[-1] for module in modules})


def check_adapted(model: Any, teacher: Teacher) -> None:
    """Refuse what vLLM would leave out without a word: it compares last names only, and a vision
    tower's are those of the decoder.

    Args:
        model: of transformers, with the adapter in it; its weights are not looked at. Or None.
        teacher: whose.

    Raises:
        TeacherError: the adapter changes something outside the decoder.
    """
    if model is None or not teacher.adapter:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside = {id(module) for module in decoder_of(model).modules()}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and id(module) not in inside:
            raise _refused(teacher, f"it changes {name}, outside the decoder")


def speak_through_adapter(llm: Any, teacher: Teacher) -> None:
    """Load a teacher's adapter and put it into every request of an engine.

    Raises:
        TeacherError: vLLM does not support what it does.
    """
    if not teacher.adapter:
        return
    from vllm.lora.request import LoRARequest

    request = LoRARequest("teacher", 1, str(adapter_directory(teacher).resolve()))
    engine = llm.llm_engine
    try:
        engine.add_lora(request)
    except Exception as error:  # whatever vLLM raises at what it does not support
        raise _refused(teacher, first_line(error)) from error
    engine.add_request = partial(engine.add_request, lora_request=request)


def _refused(teacher: Teacher, reason: str) -> TeacherError:
    return TeacherError(
        f"vLLM cannot apply this adapter ({reason})",
        where=f"{WHERE} {teacher.adapter}",
        remedy="Use `--engine reference`, or merge it into the model and name that as model.",
    )
