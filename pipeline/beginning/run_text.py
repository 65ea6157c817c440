"""The text of a first run file: TOML with a word on every choice.

One idea: a person changes this file next, so it says what each number came from and leaves out what
is at its default. It decides nothing.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from stillroom.pipeline.beginning.choices import EVALUATED, Choices
from stillroom.pipeline.beginning.sampling import Sample

TEXT = """\
# A first run. Every table and key: runbooks/reference.md, or `stillroom schema`.
name = {name}
directory = {directory}

[teacher]
model = {teacher}

[prepare]
window = {window}{padding}# tokens; {cut} of the examples looked at are longer and are cut

[[prepare.source]]
name = {name}
path = {data}

[capture]                       # default: 12 ids and draws from the tail, about 40 bytes a token

[student]
{student}

[[objective]]
name = "forward_kl"
options = {{ ce_weight = 0.1 }}   # plus a tenth of cross-entropy on the text's own tokens

[train]
steps = {steps}{steps_padding}# {passes} the data looked at, in steps of {batch_tokens} tokens
batch_tokens = {batch_tokens}
learning_rate = {rate}
checkpoint_every = {every}

[evaluate]
examples = {evaluated}                   # of the held-out tenth; 0 takes all
"""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the student is to be.

    Attributes:
        table: lines of [student].
        kept: share of the teacher's blocks that it has, or about that much of its weights.
        rate: learning rate to begin with.
        leave_out: blocks that go, chosen by measurement.
    """

    table: str
    kept: float
    rate: str
    leave_out: int = 0


def wish(student: str, blocks: int) -> Wish:
    """What was asked for, of a teacher of so many blocks.

    Args:
        student: `third`, `half`, a model's directory or hub id, or a JSON config of a fresh model.
    """
    if student in ("third", "half"):
        share = {"third": 3, "half": 2}[student]
        return _some_blocks(blocks - math.ceil(blocks / share), blocks)
    fresh = Path(student).suffix == ".json"
    kind, rate = ("config", "6e-4") if fresh else ("model", "1e-4")
    return Wish(f'init = "{kind}"\nmodel = {json.dumps(student)}', 1.0, rate)


def _some_blocks(gone: int, blocks: int) -> Wish:
    what = f"# of {blocks} blocks: those that the teacher misses least, measured when"
    lines = [
        'init = "prune_layers"',
        f"leave_out = {gone}{' ' * max(1, 20 - len(str(gone)))}{what}",
        f"{' ' * 32}# the student is made; keep_layers = [...] names blocks instead",
    ]
    return Wish("\n".join(lines), (blocks - gone) / blocks, "6e-4", gone)


def run_text(
    name: str, data: str, teacher: str, wished: Wish, sample: Sample, made: Choices
) -> str:
    """The file."""
    return TEXT.format(
        name=json.dumps(name, ensure_ascii=False),
        directory=json.dumps(f"runs/{name}", ensure_ascii=False),
        teacher=json.dumps(teacher, ensure_ascii=False),
        data=json.dumps(data, ensure_ascii=False),
        window=made.window,
        padding=" " * max(1, 23 - len(str(made.window))),
        cut=f"{made.cut:.1%}",
        student=wished.table,
        steps=made.steps,
        steps_padding=" " * max(1, 24 - len(str(made.steps))),
        passes=f"{made.epochs:.1f} epochs of",
        batch_tokens=made.batch_tokens,
        rate=wished.rate,
        evaluated=EVALUATED,
        every=max(20, made.steps // 10),
    )
