"""Tiny image-text teachers of several families, saved as vLLM 0.32 and transformers both read them.

One idea: the real architecture, processor and chat template of a family at toy sizes, so that what
differs between families (how an image becomes placeholders, which positions they get) is real.
"""

import json
from pathlib import Path

from tests import pictures, tiny_models

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm")
"""Families that vLLM serves as transformers does; `paligemma` is the other kind."""
_QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_IDEFICS = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)),
)
EXTRA = {
    "llava": ("<image>",),
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "idefics3": _IDEFICS,
    "smolvlm": (*_IDEFICS, "<video>"),
    "paligemma": ("<image>",),
}
MARKER = {
    "llava": "<image>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "idefics3": "<image>",
    "smolvlm": "<image>",
}
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'MARKER' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
"""Of the plain vision transformers: 16 patches of a picture."""


def save(family: str, directory: str | Path, seed: int = 0) -> Path:
    """An image-text model of a family with its processor, fp32, as an HF directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_models.save_tokenizer(directory, chat_template=None)
    tokenizer.add_special_tokens({"additional_special_tokens": list(EXTRA[family])})
    processor = PROCESSORS[family](tokenizer)
    if family in MARKER:
        processor.chat_template = TEMPLATE.replace("MARKER", MARKER[family])
    tiny_models.drawn(lambda: MODELS[family](tokenizer), seed).save_pretrained(directory)
    processor.save_pretrained(directory)
    _rename_for_vllm(family, directory)
    return directory


def image(seed: int = 0, width: int = 40, height: int = 30, form: str = "PNG") -> bytes:
    """The bytes of an image file with smooth content."""
    return pictures.file(pictures.picture(seed, (width, height), grain=4), form)


def _text(tokenizer, **more) -> dict:
    own = {"tie_word_embeddings": False, "max_position_embeddings": 1024}
    return tiny_models.shape(2, 64, len(tokenizer), **own | more)


def _llava(tokenizer):
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(**TOWER | {"num_hidden_layers": 3, "initializer_range": 0.3})
    config = LlavaConfig(
        text_config=LlamaConfig(**_text(tokenizer, head_dim=32)),
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )
    return LlavaForConditionalGeneration(config)


def _qwen(tokenizer):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = _text(tokenizer) | {
        "hidden_size": 128,
        "intermediate_size": 128,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]},
    }
    config = Qwen2_5_VLConfig(
        text_config=text | {"model_type": "qwen2_5_vl_text"},
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "out_hidden_size": 128,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.1,
        },
        **_qwen_ids(tokenizer),
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen_ids(tokenizer) -> dict[str, int]:
    ids = [tokenizer.convert_tokens_to_ids(name) for name in _QWEN]
    names = ("vision_start", "vision_end", "image", "video")
    return {f"{name}_token_id": number for name, number in zip(names, ids)}


def _qwen3(tokenizer):
    """Interleaved positions of three axes; two vision blocks add to the text blocks."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [8, 4, 4], "mrope_interleaved": True}
    text = _text(tokenizer, head_dim=32, num_hidden_layers=3)
    text |= {"rope_parameters": rope | {"rope_theta": 1e4}}
    config = Qwen3VLConfig(
        text_config=text,
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.1,
        },
        **_qwen_ids(tokenizer),
        tie_word_embeddings=False,
    )
    return Qwen3VLForConditionalGeneration(config)


def _idefics3(tokenizer):
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    return Idefics3ForConditionalGeneration(_tiled(Idefics3Config, tokenizer))


def _smolvlm(tokenizer):
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    return SmolVLMForConditionalGeneration(_tiled(SmolVLMConfig, tokenizer))


def _tiled(config_class, tokenizer):
    return config_class(
        text_config=_text(tokenizer, head_dim=32) | {"model_type": "llama"},
        vision_config=TOWER | {"initializer_range": 0.1},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=0,
    )


def _paligemma(tokenizer):
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = PaliGemmaConfig(
        text_config=_text(tokenizer, head_dim=32) | {"model_type": "gemma"},
        vision_config=TOWER | {"model_type": "siglip_vision_model"},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=64,
        hidden_size=64,
    )
    return PaliGemmaForConditionalGeneration(config)


def _llava_processor(tokenizer):
    from transformers import CLIPImageProcessor, LlavaProcessor

    size = {"height": 28, "width": 28}
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


QWEN_SIZE = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 8}
"""Pixels of a whole picture, at least and at most: one to eight placeholders."""


def _qwen_processor(tokenizer):
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    images, videos = Qwen2VLImageProcessor(size=QWEN_SIZE), Qwen2VLVideoProcessor(size=QWEN_SIZE)
    return Qwen2_5_VLProcessor(images, tokenizer, videos)


def _qwen3_processor(tokenizer):
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    videos = Qwen3VLVideoProcessor(size=QWEN_SIZE, patch_size=14)
    return Qwen3VLProcessor(Qwen2VLImageProcessor(size=QWEN_SIZE), tokenizer, videos)


TILES = {
    "size": {"longest_edge": 56},
    "max_image_size": {"longest_edge": 28},
    "do_image_splitting": True,
}


def _idefics3_processor(tokenizer):
    from transformers import Idefics3ImageProcessor, Idefics3Processor

    return Idefics3Processor(Idefics3ImageProcessor(**TILES), tokenizer, image_seq_len=4)


def _smolvlm_processor(tokenizer):
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    sampling = {"max_frames": 4, "fps": 1, "video_size": {"longest_edge": 28}}
    videos = SmolVLMVideoProcessor(
        size={"longest_edge": 28}, max_image_size={"longest_edge": 28}, video_sampling=sampling
    )
    return SmolVLMProcessor(SmolVLMImageProcessor(**TILES), tokenizer, videos, image_seq_len=4)


def _paligemma_processor(tokenizer):
    from transformers import PaliGemmaProcessor, SiglipImageProcessor

    images = SiglipImageProcessor(size={"height": 28, "width": 28})
    images.image_seq_length = 16
    return PaliGemmaProcessor(images, tokenizer)


def _rename_for_vllm(family: str, directory: Path) -> None:
    """vLLM 0.32 looks for CLIP's weights where transformers 5.18 and earlier saved them."""
    from safetensors.torch import load_file, save_file

    if family != "llava":
        return
    path = directory / "model.safetensors"
    old, new = "vision_tower.", "vision_tower.vision_model."
    weights = {name.replace(old, new): tensor for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    index = directory / "model.safetensors.index.json"
    assert not index.exists(), json.loads(index.read_text())


MODELS = {
    "llava": _llava,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen3,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "paligemma": _paligemma,
}
PROCESSORS = {
    "llava": _llava_processor,
    "qwen2_5_vl": _qwen_processor,
    "qwen3_vl": _qwen3_processor,
    "idefics3": _idefics3_processor,
    "smolvlm": _smolvlm_processor,
    "paligemma": _paligemma_processor,
}
