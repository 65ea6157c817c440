"""A small image-text teacher that is trained here, in minutes on two cores: its recipe.

One idea: LLaVA's shape at toy size, made the way LLaVA is made. First the vision tower learns to
see (here: to name shape and colour of easy-VQA's pictures), then a projector and a language model
learn to answer questions, the tower frozen; a picture is in the sequence once, before all its
questions. The result is an HF directory that transformers and vLLM serve.
"""

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from stillroom.pipeline.student.llava_parts import assemble, name_for_vllm, save_processor
from stillroom.stages.demos.questions import lay_out, states_of

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
QUESTION_WORDS = "? a color contain does image in is no not of present shape the there what yes"
WORDS = (*QUESTION_WORDS.split(), *SHAPES, *COLOURS)
SPECIAL = ("<pad>", "<image>", "<user>", "<answer>", "<end>", "<unknown>")
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<user>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{% else %}{{ '<answer>' }}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<end>' }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<answer>' }}{% endif %}"
)
PIXELS, PATCH = 64, 8
IMAGE_TOKENS = (PIXELS // PATCH) ** 2
LAYER = -1
"""Tower layer that the projector reads: every block is trained, so the last one is used too."""
MOST = 6
"""Pixels by which training pictures are shifted, at most."""
PREPROCESSOR = "preprocessor_config.json"
"""Written last, so a tower that has it is complete."""
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Sizes and lengths of the teacher's training.

    Attributes:
        tower_width, tower_blocks: of the vision tower.
        width, blocks: of the language model.
        tower_epochs, language_epochs: passes over the pictures.
        pictures: training pictures to use; 0 takes all.
        tower_batch, language_batch: pictures of a step.
    """

    tower_width: int = 64
    tower_blocks: int = 4
    width: int = 96
    blocks: int = 4
    tower_epochs: int = 30
    language_epochs: int = 5
    pictures: int = 0
    tower_batch: int = 64
    language_batch: int = 16
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of easy-VQA: its file, uint8 [3, S, S], and its questions with their answers."""

    path: Path
    pixels: np.ndarray
    questions: tuple[tuple[str, str], ...]


def read_pictures(directory: Path, split: str, limit: int = 0) -> list[Picture]:
    """Pictures of a split with all their questions, in order; `limit` takes the first."""
    asked: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for line in (directory / f"{split}.jsonl").read_text().splitlines():
        row = json.loads(line)
        user, assistant = (message["content"] for message in row["messages"])
        asked[row["image"]].append((user, assistant))
    kept = list(asked.items())[: limit or None]
    return [Picture(directory / n, _pixels(directory / n), tuple(asked)) for n, asked in kept]


def train_teacher(
    data: Path, directory: Path, recipe: Recipe, report: Report = lambda _: None
) -> Path:
    """Make the teacher; one that is there is kept.

    Returns:
        Its HF directory. `tower` and `language` beside it hold the parts.
    """
    if (directory / "config.json").exists():
        return directory
    torch.manual_seed(recipe.seed)
    pictures = read_pictures(data, "train", recipe.pictures)
    tower, language = directory.parent / "tower", directory.parent / "language"
    if not (tower / PREPROCESSOR).exists():
        save_tower(tower, pictures, recipe, report)
    save_language_model(language, recipe.width, recipe.blocks, recipe.seed)
    model = assemble(tower, language, layer=LAYER, seed=recipe.seed)
    _train_language(model, _tokenizer(), pictures, recipe, report)
    model.save_pretrained(directory)
    name_for_vllm(directory)
    save_processor(language, tower, model, directory)
    return directory


def save_tower(directory: Path, pictures: list[Picture], recipe: Recipe, report: Report) -> None:
    """Train the vision tower to name shape and colour from the mean of its patches."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=recipe.tower_width,
        intermediate_size=2 * recipe.tower_width,
        num_hidden_layers=recipe.tower_blocks,
        num_attention_heads=recipe.tower_width // 32,
        image_size=PIXELS,
        patch_size=PATCH,
    )
    tower = CLIPVisionModel(config)
    heads = nn.Linear(recipe.tower_width, len(SHAPES) + len(COLOURS))
    pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures]))
    labels = torch.tensor([_labels(picture) for picture in pictures])  # [pictures, 2]
    steps = recipe.tower_epochs * -(-len(pictures) // recipe.tower_batch)
    optimizer, schedule = _optimizer([*tower.parameters(), *heads.parameters()], 3e-3, steps)
    order = _epochs(len(pictures), recipe.tower_epochs, recipe.tower_batch, recipe.seed)
    for number, chosen in enumerate(order):
        states = tower(normalise(moved(pixels[chosen])), output_hidden_states=True)
        found = heads(states.hidden_states[LAYER][:, 1:].mean(dim=1))  # without the class token
        shape, colour = found.split([len(SHAPES), len(COLOURS)], dim=1)
        loss = F.cross_entropy(shape, labels[chosen, 0], ignore_index=-1)
        loss = loss + F.cross_entropy(colour, labels[chosen, 1], ignore_index=-1)
        _step(loss, optimizer, schedule)
        if number % 100 == 0:
            report(f"tower step {number} of {steps}: loss {loss.item():.3f}")
    tower.save_pretrained(directory)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    (directory / PREPROCESSOR).write_text(json.dumps(processor) + "\n")


def save_language_model(directory: Path, width: int, blocks: int, seed: int) -> Path:
    """A fresh Llama-shaped language model with easy-VQA's words, as an HF directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<end>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def prompts(tokenizer: Any, questions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [N, L] of prompts about one picture each, left-aligned, and where each answer is
    predicted, [N]."""
    head = [tokenizer.convert_tokens_to_ids("<user>")]
    head += IMAGE_TOKENS * [tokenizer.convert_tokens_to_ids("<image>")]
    ids = [head + tokenizer(question + "<answer>")["input_ids"] for question in questions]
    longest = max(map(len, ids))
    padded = torch.tensor([row + [0] * (longest + 2 - len(row)) for row in ids])
    return padded, torch.tensor([len(row) - 1 for row in ids])


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, S, S] -> float32 from -1 to 1."""
    return pixels.float() / 127.5 - 1


def _train_language(
    model: Any, tokenizer: Any, pictures: list[Picture], recipe: Recipe, report: Report
) -> None:
    model.model.vision_tower.requires_grad_(False)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = recipe.language_epochs * -(-len(pictures) // recipe.language_batch)
    optimizer, schedule = _optimizer(wanted, 3e-3, steps)
    user, end = tokenizer.convert_tokens_to_ids(["<user>", "<end>"])
    order = _epochs(len(pictures), recipe.language_epochs, recipe.language_batch, recipe.seed)
    for number, chosen in enumerate(order):
        batch = [pictures[index] for index in chosen.tolist()]
        pixels = torch.from_numpy(np.stack([picture.pixels for picture in batch]))
        # The turn's marker and the picture stand in front.
        asked = lay_out(tokenizer, [picture.questions for picture in batch], 1 + IMAGE_TOKENS, True)
        states = states_of(model, features_of(model, moved(pixels)), asked, user)
        said = [answer for picture in batch for _, answer in picture.questions]
        answers = torch.tensor(tokenizer.convert_tokens_to_ids(said))
        places = torch.stack([states[asked.row, asked.column], states[asked.row, asked.column + 1]])
        targets = torch.cat([answers, torch.full_like(answers, end)])  # the word, then the end
        loss = F.cross_entropy(model.lm_head(places).flatten(0, 1), targets)
        _step(loss, optimizer, schedule)
        if number % 100 == 0:
            report(f"language step {number} of {steps}: loss {loss.item():.3f}")


def features_of(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Projected features [B, patches, D] of uint8 pictures."""
    return torch.stack(
        list(model.model.get_image_features(pixel_values=normalise(pixels)).pooler_output)
    )


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<user>", "<answer>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _labels(picture: Picture) -> tuple[int, int]:
    """Shape and colour as its "what" questions tell; -1 where none does."""
    said = {answer for question, answer in picture.questions if question.startswith("what")}
    shape = next((SHAPES.index(word) for word in said if word in SHAPES), -1)
    return shape, next((COLOURS.index(word) for word in said if word in COLOURS), -1)


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def moved(pixels: torch.Tensor, most: int = MOST) -> torch.Tensor:
    """Mirror a batch at random and shift every picture by up to `most` pixels, repeating its edge;
    no question of easy-VQA is about place or direction."""
    for dimension in (2, 3):
        if random.random() < 0.5:
            pixels = pixels.flip(dimension)
    count, _, height, width = pixels.shape
    down, right = torch.randint(-most, most + 1, (2, count, 1))  # pixels
    rows = (torch.arange(height) + down).clamp(0, height - 1)
    columns = (torch.arange(width) + right).clamp(0, width - 1)
    number, channel = torch.arange(count)[:, None, None, None], torch.arange(3)[:, None, None]
    return pixels[number, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _epochs(count: int, epochs: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    random.seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).split(batch)


def _optimizer(parameters: list, rate: float, steps: int) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    return optimizer, schedule


def _step(loss: torch.Tensor, optimizer: Any, schedule: Any) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    schedule.step()
