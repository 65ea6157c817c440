"""Embedding distillation as in OLA-VLM: hidden layers should be able to say what encoders saw.

One idea: per supervised layer a predictor turns the student's states into an encoder's target, and
smooth-L1 plus InfoNCE compares them; the value of an image is the sum over layers. Source: OLA-VLM
(arXiv 2412.09585) section 3. The authors' released code multiplies these losses by a mask that it
has set to zero; here the mask is 1 wherever an image has a target.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field, model_validator

from stillroom.cache_schemas.errors import StudentError
from stillroom.cache_schemas.signals import IMAGE_PREFIX
from stillroom.pipeline.config.strict import Table
from stillroom.pipeline.kernels.precision import in_full, wide
from stillroom.pipeline.objectives.embedding_predictor import TaskPredictor, inverse_temperature
from stillroom.pipeline.objectives.registry import CacheFacts, Context, Needs, Spec, register

PAPER_LAYERS = {"depth": (8, 20), "seg": (10, 18), "gen": (12, 20)}
"""Layers 8 and 20, 10 and 18, 12 and 20 of 32: not ranges."""


class EmbeddingOptions(Table):
    """Options of `embedding`. The paper gives each task the weight 0.5."""

    target: str
    """Encoder of the vision cache; the signal is `image.<target>`."""
    task: Literal["", "depth", "seg", "gen"] = ""
    """Takes the paper's layers, queries and predictor for this task where they are not given."""
    layers: tuple[int, ...] = ()
    """Student blocks (1-based) that are supervised."""
    seek: int = Field(default=8, ge=0)
    """Task tokens behind every image."""
    queries: Literal["", "grid", "tokens"] = ""
    """`grid`: a learned query per target position; `tokens`: the mean state of the task tokens."""
    contrastive: float = Field(default=0.3, ge=0)
    """Weight of InfoNCE beside smooth-L1."""

    @model_validator(mode="after")
    def _complete(self) -> "EmbeddingOptions":
        if not self.layers and not self.task:
            raise ValueError("needs layers, or a task whose layers the paper gives")
        if self.query_kind == "tokens" and not self.seek:
            raise ValueError("queries = 'tokens' needs task tokens (seek > 0)")
        return self

    @property
    def query_kind(self) -> str:
        """`grid` unless told, or unless the task is image generation."""
        return self.queries or ("tokens" if self.task == "gen" else "grid")

    @property
    def supervised(self) -> tuple[int, ...]:
        """The layers, given or the paper's."""
        return self.layers or PAPER_LAYERS[self.task]

    @property
    def signal(self) -> str:
        """Name of the target."""
        return IMAGE_PREFIX + self.target


def smooth_l1(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean smooth-L1 (beta = 1) of each image, [I]."""
    return F.smooth_l1_loss(predicted, target, reduction="none").flatten(1).mean(dim=1)


def info_nce(
    predicted: torch.Tensor,
    targets: torch.Tensor,
    own: torch.Tensor,
    same: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """Cross-entropy of picking each image's own target among all ranks' targets.

    Args:
        predicted: [I, ...].
        targets: [G, ...], of all ranks.
        own: int64 [I], where each image's own target is among them.
        same: bool [I, G], the target is of the same image and not the own one: no negative.
        scale: logarithm of the inverse temperature.

    Returns:
        float32 [I].
    """
    a = F.normalize(predicted.flatten(1), dim=1)  # [I, positions * width]
    b = F.normalize(targets.flatten(1), dim=1)  # [G, positions * width]
    with in_full(predicted):
        logits = inverse_temperature(scale) * (a @ b.T)
    return F.cross_entropy(logits.masked_fill(same, -torch.inf), own, reduction="none")


def gather(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Rows of all ranks, in rank order, and where this rank's begin.

    Targets carry no gradient, so none has to travel: a rank's loss reaches its own predictions.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor, 0
    count = torch.tensor([len(tensor)], device=tensor.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = [int(one) for one in counts]
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])  # all_gather wants equal shapes
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    rank = dist.get_rank()
    rows = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    return torch.cat(rows), sum(sizes[:rank])


def _compute(context: Context) -> torch.Tensor:
    options: EmbeddingOptions = context.options
    predictor = context.projector
    assert isinstance(predictor, TaskPredictor)
    there, target, keys = _answers(context)
    # Every rank comes here with every microbatch, without an image too: the others wait for it.
    everyone, first = (target, 0) if context.alone else gather(target)
    every_key = keys if context.alone else gather(keys)[0]  # [G]
    own = first + torch.arange(len(there), device=target.device)  # [I]
    same = keys[:, None] == every_key  # [I, G]
    same[torch.arange(len(there), device=target.device), own] = False
    value, states = target.new_zeros(len(there)), context.states.wide
    seen = states and states.about(there, context.task_tokens)
    for layer in options.supervised:
        read = seen.at(layer) if seen else _nothing(context, layer)
        predicted = predictor.predict(layer, *read)
        value = value + smooth_l1(predicted, target)
        if options.contrastive:
            nce = info_nce(predicted, everyone, own, same, predictor.scale)
            value = value + options.contrastive * nce
    return value * context.weights[there]


def _answers(context: Context) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers int64 [I] of the images that have a target, the targets, and the images' keys."""
    images, final = context.batch.images, context.states.final
    signal = context.options.signal
    if images is None:
        none = torch.zeros(0, dtype=torch.int64, device=final.device)
        shape = context.cache.positions[signal], context.cache.widths[signal]
        return none, torch.zeros(0, *shape, dtype=wide(final.dtype), device=final.device), none
    answers = images.targets[context.cache_name]
    there = answers.present.nonzero()[:, 0]
    return there, answers.signals[signal][there].to(wide(final.dtype)), images.keys[there]


def _nothing(context: Context, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a predictor reads of a batch without an image: no rows, of which its gradient is zero.

    FSDP sums the gradients of the same weights on every rank, so none may go without.
    """
    states = context.states.blocks[layer][:0]  # [0, D]
    tokens = context.projector.tokens().to(states.dtype)  # [seek, D]
    present = torch.zeros(0, 0, dtype=torch.bool, device=states.device)
    return states[None][:0], present, tokens.expand(0, -1, -1)


def _needs(options: EmbeddingOptions) -> Needs:
    return Needs((options.signal,), blocks=options.supervised)


def _predictor(options: EmbeddingOptions, config: Any, facts: CacheFacts) -> TaskPredictor:
    if options.signal not in facts.positions:
        raise StudentError(
            f"'{options.signal}' is not a target of images",
            where="[[objective]] 'embedding' cache",
            remedy="Name a vision cache under [train.images] and give its name as cache.",
        )
    depth_task = options.task == "depth"
    return TaskPredictor(
        config.hidden_size,
        (facts.positions[options.signal], facts.widths[options.signal]),
        options.supervised,
        options.seek,
        options.query_kind,
        width=config.hidden_size if depth_task else 0,
        head=depth_task,
    )


register(Spec("embedding", "image", EmbeddingOptions, _compute, _needs, _predictor))
