"""OLA-VLM's embedding predictors: task tokens in the sequence, resamplers on the hidden states.

One idea: a task owns learned queries and one small cross-attention resampler per supervised layer.
Its task tokens stand behind every image and are what the language model can think with; the
resampler reads a layer's states of the whole document (without other tasks' tokens) and predicts
the encoder's target. Source: OLA-VLM (arXiv 2412.09585) and its released code. No loss is here.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from stillroom.cache_schemas.errors import StudentError

HEADS, HEAD_WIDTH = 4, 32
FIRST_SCALE = 2.0
"""Initial logarithm of InfoNCE's inverse temperature, as the authors have it."""


class TaskTokenResampler(nn.Module):
    """One perceiver block: latents attend to states and themselves, then a feed-forward layer.

    Args:
        width_in: D of states and latents.
        width: inside.
        width_out: of the prediction.
        head: add a linear layer at the end, as the depth task's decoder does.
    """

    def __init__(self, width_in: int, width: int, width_out: int, head: bool = False):
        super().__init__()
        inner = HEADS * HEAD_WIDTH
        self.proj_in = nn.Linear(width_in, width)
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width, bias=False),
            nn.GELU(),
            nn.Linear(width, width, bias=False),
        )
        self.proj_out = nn.Linear(width, width_out)
        self.norm_out = nn.LayerNorm(width_out)
        self.head = nn.Linear(width_out, width_out) if head else nn.Identity()

    def forward(
        self, states: torch.Tensor, latents: torch.Tensor, present: torch.Tensor
    ) -> torch.Tensor:
        """Predict.

        Args:
            states: [I, K, D], keys and values.
            latents: [I, P, D], queries.
            present: bool [I, K], which states count.

        Returns:
            [I, P, width_out].
        """
        x, y = self.proj_in(states), self.proj_in(latents)
        y = y + self._attend(x, y, present)
        y = y + self.feed_forward(y)
        return self.head(self.norm_out(self.proj_out(y)))

    def _attend(self, x: torch.Tensor, y: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        media, latents = self.norm_media(x), self.norm_latents(y)
        keys, values = self.to_kv(torch.cat([media, latents], dim=1)).chunk(2, dim=-1)
        own = torch.ones(y.shape[:2], dtype=torch.bool, device=y.device)
        mask = torch.cat([present, own], dim=1)[:, None, None]  # [I, 1, 1, K + P]
        out = F.scaled_dot_product_attention(
            _heads(self.to_q(latents)), _heads(keys), _heads(values), attn_mask=mask
        )
        return self.to_out(out.transpose(1, 2).flatten(2))  # [I, P, width]


class TaskPredictor(nn.Module):
    """What one task adds to a student: queries, task tokens, and a resampler per layer.

    Args:
        student_width: D of the language model.
        target: (positions, width) of the encoder's target.
        layers: supervised layers (1-based).
        seek: number of task tokens; 0 inserts none.
        queries: `grid` has one learned query per target position, whose group means are the task
            tokens; `tokens` has one learned vector per task token, and the mean of the states at
            those tokens is the only query.
        width: inside the resampler; 0 takes the target's.
        head: see `TaskTokenResampler`.
    """

    def __init__(
        self,
        student_width: int,
        target: tuple[int, int],
        layers: tuple[int, ...],
        seek: int = 8,
        queries: str = "grid",
        width: int = 0,
        head: bool = False,
    ):
        super().__init__()
        positions, target_width = target
        self.seek, self.grid = seek, queries == "grid"
        self.queries = nn.Parameter(torch.randn(positions if self.grid else seek, student_width))
        self.scale = nn.Parameter(torch.tensor(FIRST_SCALE))
        self.layers = nn.ModuleDict(
            {
                str(layer): TaskTokenResampler(
                    student_width, width or target_width, target_width, head
                )
                for layer in layers
            }
        )

    def tokens(self) -> torch.Tensor:
        """Input embeddings of the task tokens, [seek, D]."""
        if not self.grid or not self.seek:
            return self.queries[: self.seek]
        parts = self.queries.tensor_split(self.seek)  # groups of neighbouring positions
        return torch.stack([part.mean(dim=0) for part in parts])

    def predict(
        self, layer: int, states: torch.Tensor, present: torch.Tensor, own: torch.Tensor
    ) -> torch.Tensor:
        """Targets predicted from one layer.

        Args:
            layer: which.
            states: [I, K, D], the layer's states of each image's document.
            present: bool [I, K].
            own: [I, seek, D], the states at this task's tokens.

        Returns:
            float32 [I, positions, width].
        """
        if self.grid:
            latents = self.queries.expand(len(states), -1, -1).to(states.dtype)  # [I, positions, D]
        else:
            latents = own.mean(dim=1, keepdim=True)  # [I, 1, D]
        return self.layers[str(layer)](states, latents, present).float()


class TaskTokens:
    """All task tokens of a student, in the order of its objectives.

    Args:
        projectors: by number; the `TaskPredictor`s among them own task tokens.
        frozen: [count, D], a finished student's own; then no objective may bring others.

    Raises:
        StudentError: it has frozen ones, and an objective brings others.
    """

    def __init__(self, projectors: nn.ModuleDict, frozen: torch.Tensor | None = None):
        self._owners = {k: p for k, p in projectors.items() if isinstance(p, TaskPredictor)}
        self._frozen = frozen
        self.columns: dict[str, range] = {}
        start = 0
        for key, owner in self._owners.items():
            self.columns[key] = range(start, start + owner.seek)
            start += owner.seek
        if frozen is not None and self._owners:
            raise StudentError(
                "the student's task tokens are frozen, and an 'embedding' objective brings others",
                remedy="Leave 'embedding' out in this stage, or start from the stage before.",
            )

    def embeddings(self) -> torch.Tensor | None:
        """[count, D]; None where the student has no task tokens and needs none."""
        if self._owners:
            return torch.cat([owner.tokens() for owner in self._owners.values()])
        return self._frozen


def inverse_temperature(scale: torch.Tensor) -> torch.Tensor:
    """exp(scale), at most 100."""
    return scale.clamp(max=math.log(100.0)).exp()


def _heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (HEADS, HEAD_WIDTH)).transpose(1, 2)
