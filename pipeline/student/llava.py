"""A LLaVA-type student on packed batches: pictures into the sequence, task tokens after them.

One idea: everything happens on embeddings. Image features replace the embeddings of their
placeholders; task tokens are inserted behind each image and taken out of the states again, so that
rows, labels and masks keep meaning what they meant. `Layout` is the bookkeeping of that insertion.
It makes no loss.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.data.images import ImageBatch

PADDING = -1
TASK_TOKENS = "task_tokens.safetensors"
"""File of a student's directory that holds its frozen task tokens, float32 [count, D]."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where tokens are once `count` task tokens stand behind every image.

    Attributes:
        width: tokens of a row, S'.
        kept: int64 [B * S], new flat place of every old token.
        inserted: int64 [I, count], flat place of each image's task tokens.
        position_ids: int64 [B, S'], restarting with every document.
        document: int64 [B * S'], number of the document (in reading order); -1 at padding that the
            insertion made.
        owner: int64 [B * S'], the image that a task token belongs to; -1 for all others.
        column: int64 [B * S'], which of the image's task tokens it is; -1 for all others.
        of_image: int64 [I], the document of each image.
    """

    width: int
    kept: torch.Tensor
    inserted: torch.Tensor
    position_ids: torch.Tensor
    document: torch.Tensor
    owner: torch.Tensor
    column: torch.Tensor
    of_image: torch.Tensor


def insert_behind_images(position_ids: torch.Tensor, images: ImageBatch, count: int) -> Layout:
    """Make room for `count` task tokens behind the last placeholder of every image.

    Args:
        position_ids: int64 [B, S], restarting at 0 with every document and at every padding token.
        images: of the batch.
        count: task tokens of one image.
    """
    rows, width = position_ids.shape
    flat_positions = position_ids.flatten()
    document = (flat_positions == 0).cumsum(0) - 1  # [B * S]
    at = images.start + images.length  # [I], the place behind each image
    row = images.start // width  # [I]
    # [I]; a column may be S, because an image may end its row.
    column, order = at - row * width, torch.arange(len(at), device=at.device)
    before = (row[:, None] == row) & (  # [I, I], the second stands before the first
        (column[:, None] > column) | ((column[:, None] == column) & (order[:, None] > order))
    )
    # [B], tokens to insert
    per_row = torch.zeros(rows, dtype=torch.int64, device=at.device).index_add_(
        0, row, torch.full_like(row, count)
    )
    wider = width + int(per_row.max())  # S'
    steps = torch.arange(count, device=at.device)
    inserted = (row * wider + column + count * before.sum(1))[:, None] + steps
    kept = _shifted(rows, width, wider, row, column, count)

    of_image = document[images.document]  # [I]
    token = torch.arange(rows * width, device=at.device)
    earlier = (document[:, None] == of_image) & (token[:, None] >= at)  # [B * S, I]
    new_positions = torch.zeros(rows * wider, dtype=torch.int64, device=at.device)
    new_positions[kept] = flat_positions + count * earlier.sum(1)
    same_document = before & (of_image[:, None] == of_image)
    first = (at - images.document) + count * same_document.sum(1)  # [I], positions
    new_positions[inserted] = first[:, None] + steps

    new_document = torch.full_like(new_positions, PADDING)
    new_document[kept] = document
    new_document[inserted] = of_image[:, None].expand_as(inserted)
    owner = torch.full_like(new_positions, PADDING)
    owner[inserted] = order[:, None].expand_as(inserted)
    column_of = torch.full_like(new_positions, PADDING)
    column_of[inserted] = steps.expand_as(inserted)
    return Layout(
        wider,
        kept,
        inserted,
        new_positions.view(rows, wider),
        new_document,
        owner,
        column_of,
        of_image,
    )


@dataclass(frozen=True, slots=True)
class WideStates:
    """States of the sequence with task tokens in it.

    Attributes:
        layout: where everything is.
        blocks: block number (1-based) -> [B * S', D].
    """

    layout: Layout
    blocks: dict[int, torch.Tensor]

    def about(self, images: torch.Tensor, columns: range) -> "ImageStates":
        """What a task may read of some images: their documents, without the tokens of other tasks
        and of other images.

        Args:
            images: int64 [I], numbers of the images.
            columns: the task's own columns among the task tokens.
        """
        layout = self.layout
        document = layout.of_image[images]  # [I]
        within = layout.document == document[:, None]  # [I, B * S']
        first = within.int().argmax(dim=1)  # [I], where the document begins
        longest = int(within.sum(dim=1).max()) if len(images) else 0
        places = first[:, None] + torch.arange(longest, device=images.device)
        places = places.clamp_max(layout.document.numel() - 1)
        mine = (layout.owner[places] == images[:, None]) & (
            (layout.column[places] >= columns.start) & (layout.column[places] < columns.stop)
        )
        present = within.gather(1, places) & ((layout.owner[places] == PADDING) | mine)
        return ImageStates(self, places, present, layout.inserted[images][:, list(columns)])


@dataclass(frozen=True, slots=True)
class ImageStates:
    """States that the predictors of one task read.

    Attributes:
        wide: all states.
        places: int64 [I, K], flat places of each image's document.
        present: bool [I, K], which of them count.
        own: int64 [I, seek], places of the task's own tokens.
    """

    wide: WideStates
    places: torch.Tensor
    present: torch.Tensor
    own: torch.Tensor

    def at(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """States [I, K, D], `present`, and own states [I, seek, D] after one block."""
        states = self.wide.blocks[layer]
        return states[self.places], self.present, states[self.own]


def embed(
    model: Any, input_ids: torch.Tensor, images: ImageBatch | None, reaching: bool = False
) -> torch.Tensor:
    """Input embeddings [B, S, D] with the images' features at their placeholders.

    Args:
        model: the student.
        input_ids: [B, S].
        images: of the batch.
        reaching: without pixels, what sees has a gradient of zeros, by the way that an image's
            takes: FSDP gathers each block for it on every rank or none.

    Raises:
        StudentError: the student sees no images, or an image has another number of placeholders
            than the student's vision tower gives features.
    """
    embeddings = model.get_input_embeddings()(input_ids)
    if images is None or images.pixels is None:
        return embeddings + _untouched(model) if reaching else embeddings
    if not is_multimodal(model):
        raise StudentError(
            f"{type(model).__name__} takes no pictures",
            expected="a LLaVA-type student (vision tower, projector, language model)",
            remedy="Choose another student, or leave the images out.",
        )
    dtype = next(model.model.vision_tower.parameters()).dtype
    features = _features(model, images.pixels.to(dtype)).to(embeddings.dtype)  # [I, F, D]
    steps = torch.arange(features.shape[1], device=input_ids.device)
    if not bool((images.length == len(steps)).all()):
        raise StudentError(
            f"the student's vision tower gives {len(steps)} features for an image",
            expected=f"{int(images.length.max())}, the placeholders of the cache",
            remedy="Choose a tower with the teacher's number of patches.",
        )
    places = (images.start[:, None] + steps).flatten()  # [I * F]
    flat = embeddings.flatten(0, 1).index_copy(0, places, features.flatten(0, 1))
    return flat.view_as(embeddings)


def with_tokens(embeddings: torch.Tensor, layout: Layout, tokens: torch.Tensor) -> torch.Tensor:
    """Embeddings [B, S', D] in a layout: the old, and `tokens` [count, D] behind each image."""
    rows, _, width = embeddings.shape
    made = embeddings.new_zeros(rows * layout.width, width)
    made = made.index_copy(0, layout.kept, embeddings.flatten(0, 1))
    repeated = tokens.to(made.dtype).repeat(len(layout.inserted), 1)
    made = made.index_copy(0, layout.inserted.flatten(), repeated)
    return made.view(rows, layout.width, width)


def load_task_tokens(directory: Path) -> torch.Tensor | None:
    """The frozen task tokens that belong to a student, [count, D]; None where it has none."""
    from safetensors.torch import load_file

    path = directory / TASK_TOKENS
    return load_file(path)["task_tokens"] if path.is_file() else None


def _untouched(model: Any) -> torch.Tensor | float:
    """0, with a gradient of zeros for the weights that an image would reach: those that a black one
    does, for a tower may have layers that no image reaches."""
    if not is_multimodal(model):
        return 0.0
    tower = next(model.model.vision_tower.parameters())
    size = model.config.vision_config.image_size
    black = torch.zeros(1, 3, size, size, dtype=tower.dtype, device=tower.device)
    return _features(model, black)[:0].sum()


def _features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[I, F, D]."""
    return torch.stack(list(model.model.get_image_features(pixel_values=pixels).pooler_output))


def is_multimodal(model: Any) -> bool:
    """True for a model with a vision tower and a projector."""
    inner = getattr(model, "model", None)
    return hasattr(inner, "vision_tower") and hasattr(inner, "multi_modal_projector")


def only_sees(module: nn.Module) -> bool:
    """Whether all that is trained comes before the language model: no text reaches any of it."""
    trained = [name for name, weight in module.named_parameters() if weight.requires_grad]
    return all("vision_tower." in name or "multi_modal_projector." in name for name in trained)


def _shifted(rows: int, width: int, wider: int, row, column, count: int) -> torch.Tensor:
    """New flat place of every old token: its own row and column, moved by what is before it."""
    # A column more than there are tokens: an image may end its row.
    made = torch.zeros(rows, width + 1, dtype=torch.int64, device=row.device)
    made.index_put_((row, column), torch.full_like(row, count), accumulate=True)
    shift = made.cumsum(1)[:, :width]  # [B, S], task tokens before each
    old = torch.arange(width, device=row.device)
    start = wider * torch.arange(rows, device=row.device)[:, None]
    return (start + old + shift).flatten()
