"""LLaVA-type models from parts, and written so that vLLM and transformers both read them.

One idea: a vision tower and a language model that exist are joined by a fresh two-layer projector;
everything the result needs (config, processor, placeholder token) follows from the two. Training is
elsewhere.
"""

import json
from pathlib import Path
from typing import Any

import torch

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.encoders.preparation import stated_preparation

IMAGE_TOKEN = "<image>"


def assemble(tower: Path, language: Path, layer: int = -2, seed: int = 0) -> Any:
    """A LLaVA-type model, fp32: the tower's and the language model's weights, a fresh projector.

    Args:
        tower: HF directory of a CLIP or SigLIP vision model, or of a model that has one.
        language: HF directory of a causal LM whose tokenizer has the token `<image>`.
        layer: tower layer that the projector reads, counted from the end as LLaVA does.
        seed: of the projector.

    Raises:
        StudentError: the tokenizer has no `<image>`, or a part cannot be loaded.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = _tower(tower)
    text = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(language)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        raise StudentError(
            f"the tokenizer has no token {IMAGE_TOKEN}",
            where=str(language),
            remedy="Use the teacher's tokenizer, or add the token and retrain the language model.",
        )
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=text.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=layer,
        # "default" drops the class token, which SigLIP's tower does not have.
        vision_feature_select_strategy="default" if _has_class_token(vision) else "full",
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    with torch.random.fork_rng():  # the caller's random numbers stay what they were
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).float()
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.tie_weights()
    return model


def name_for_vllm(directory: Path) -> None:
    """Rename the tower's weights in a saved LLaVA-type model as vLLM and older transformers know
    them (`vision_tower.vision_model.`); transformers reads both. Nothing happens to others."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    if json.loads((directory / "config.json").read_text()).get("model_type") != "llava":
        return
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            weights = {_named(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(weights, path, {"format": "pt"})
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        listed = json.loads(index.read_text())
        listed["weight_map"] = {_named(n): file for n, file in listed["weight_map"].items()}
        index.write_text(json.dumps(listed, indent=2) + "\n")


def save_processor(language: Path, tower: Path, model: Any, directory: Path) -> None:
    """The processor of an assembled model: the tower's pictures, the language model's tokens."""
    from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor

    vision = model.config.vision_config
    side = {"height": vision.image_size, "width": vision.image_size}
    stated = stated_preparation(tower)
    normal = {k: stated[k] for k in ("image_mean", "image_std", "resample") if k in stated}
    pictures = CLIPImageProcessor(
        size={"shortest_edge": vision.image_size}, crop_size=side, **normal
    )
    drops_class_token = model.config.vision_feature_select_strategy == "default"
    tokenizer = AutoTokenizer.from_pretrained(language)
    processor = LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        # The processor takes one placeholder off for "default": this gives it back.
        num_additional_image_tokens=int(drops_class_token),
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(directory)


def _tower(directory: Path) -> Any:
    from transformers import AutoConfig, CLIPVisionModel, SiglipVisionModel

    kinds = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}
    found = AutoConfig.from_pretrained(directory).model_type
    kind = kinds.get(found.removesuffix("_vision_model"))
    if kind is None:
        raise StudentError(
            f"'{found}' is not a vision tower that can be joined to a language model",
            expected="CLIP or SigLIP",
            where=str(directory),
        )
    return kind.from_pretrained(directory, dtype=torch.float32)


def _has_class_token(vision: Any) -> bool:
    return vision.config.model_type.startswith("clip")


def _named(name: str) -> str:
    if "vision_tower." not in name or "vision_tower.vision_model." in name:
        return name
    return name.replace("vision_tower.", "vision_tower.vision_model.")
