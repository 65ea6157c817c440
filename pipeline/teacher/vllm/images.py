"""Prompts with images for vLLM: rendered by vLLM's own processor, compared before they are asked.

One idea: vLLM expands one placeholder per image itself, so it is given the tokens as they were
before the corpus's processor ran, and what it renders must be the prepared example again. Images
are named by their content hash, so vLLM processes each only once.
"""

from typing import Any

from stillroom.cache_schemas.errors import TeacherError
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.record import Example
from stillroom.pipeline.teacher.facts import model_config
from stillroom.pipeline.teacher.images import (
    Pictures,
    check_expansion,
    collapsed,
    image_token,
    reads_prefixes,
)
from stillroom.pipeline.teacher.protocol import RejectedExample


def check_served(teacher: Teacher) -> None:
    """Refuse a model that vLLM runs otherwise than it was trained.

    Raises:
        TeacherError: it reads its prefix in both directions, and vLLM 0.32 scores left to right.
    """
    if reads_prefixes(model_config(teacher)):
        raise TeacherError(
            "reads its prompt in both directions, which vLLM does not when it scores",
            where=teacher.model,
            remedy="Use `--engine reference`.",
        )


def with_pictures(example: Example, pictures: Pictures | None, llm: Any) -> Any:
    """What vLLM's engine takes for an example with images.

    Raises:
        RejectedExample: an image is missing or damaged, or vLLM makes other placeholders of it.
    """
    if pictures is None or not llm.model_config.is_multimodal_model:
        raise RejectedExample(
            example, "has images", remedy="Use an image-text teacher, or leave the images out."
        )
    prompt = {
        "prompt_token_ids": collapsed(example, image_token(llm.model_config.hf_config)),
        "multi_modal_data": {"image": pictures.of(example)},
        "multi_modal_uuids": {"image": [span.sha256 for span in example.images]},
        "mm_processor_kwargs": pictures.arguments,
    }
    (rendered,) = llm.llm_engine.renderer.render_cmpl([prompt])
    found = rendered["mm_placeholders"].get("image", [])
    spans = [(place.offset, place.length) for place in found]
    check_expansion(example, rendered["prompt_token_ids"], spans)
    return rendered
