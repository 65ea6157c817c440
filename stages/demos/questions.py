"""All questions about a picture in one sequence: the picture once, and questions that do not see
each other.

One idea: under a causal mask a picture's states do not depend on what is asked about it. So each
question attends to the picture and to itself, at the positions that it would have alone, and the
states are those of one prompt per question for a fraction of the work. It knows no data set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

ANSWER = "<answer>"
_EVERYONE, _NOBODY = -1, -2


@dataclass(frozen=True, slots=True)
class Asked:
    """Questions about B pictures, laid out behind `prefix` tokens each.

    Attributes:
        ids: int64 [B, Q], the questions' tokens.
        position_ids: int64 [B, prefix + Q].
        mask: bool [B, 1, prefix + Q, prefix + Q], what attends to what.
        row, column: int64 [N], where each question's answer is predicted, question by question.
    """

    ids: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor


def lay_out(
    tokenizer: Any, pictures: Sequence[Sequence[tuple[str, str]]], prefix: int, answered: bool
) -> Asked:
    """Lay out questions.

    Args:
        tokenizer: of the model; `<answer>` is one of its tokens.
        pictures: per picture, (question, answer) pairs.
        prefix: tokens in front of the questions: the turn's marker, the picture, task tokens.
        answered: the answers are in the sequence, for training.
    """
    marker = tokenizer.convert_tokens_to_ids(ANSWER)
    said = [
        [f"{question}{ANSWER}{answer if answered else ''}" for question, answer in pairs]
        for pairs in pictures
    ]
    segments = [[tokenizer(text)["input_ids"] for text in texts] for texts in said]
    width = max(sum(map(len, of_picture)) for of_picture in segments)
    ids = torch.zeros(len(segments), width, dtype=torch.int64)  # [B, Q]
    owner = torch.full((len(segments), prefix + width), _NOBODY)  # [B, prefix + Q]
    owner[:, :prefix] = _EVERYONE
    positions = torch.arange(prefix + width).repeat(len(segments), 1)
    row, column = [], []
    for number, of_picture in enumerate(segments):
        start = 0
        for place, segment in enumerate(of_picture):
            end = start + len(segment)
            ids[number, start:end] = torch.tensor(segment)
            owner[number, prefix + start : prefix + end] = place
            positions[number, prefix + start : prefix + end] -= start  # as if it were the only one
            row.append(number)
            column.append(prefix + start + segment.index(marker))
            start = end
    return Asked(ids, positions, _mask(owner), torch.tensor(row), torch.tensor(column))


def states_of(model: Any, pictures: torch.Tensor, asked: Asked, user: int) -> torch.Tensor:
    """States after the final norm, [B, prefix + Q, D].

    Args:
        model: a LLaVA-type model.
        pictures: [B, prefix - 1, D], embeddings between the turn's marker and the questions.
        asked: from `lay_out`.
        user: id of the token that opens a user's turn.
    """
    table = model.get_input_embeddings()
    opening = table(torch.full((len(asked.ids), 1), user))
    embeddings = torch.cat([opening, pictures, table(asked.ids)], dim=1)  # [B, prefix + Q, D]
    return model.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=asked.mask,
        position_ids=asked.position_ids,
        use_cache=False,
    ).last_hidden_state


def _mask(owner: torch.Tensor) -> torch.Tensor:
    width = owner.shape[1]
    seen = (owner[:, None] == _EVERYONE) | (owner[:, None] == owner[:, :, None])  # [B, query, key]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    return (seen & causal)[:, None]
