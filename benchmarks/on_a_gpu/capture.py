"""Capture without vLLM: the teacher's sweep, and the rows of one engine step.

One idea: a step's states and a head are made up, several requests share them, and what comes out
is compared with the definition in plain torch; then the same calls are timed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.on_a_gpu.scale import Scale
from stillroom.pipeline.teacher.rows import RowSpec
from stillroom.pipeline.teacher.step import Share, by_share, score_step
from stillroom.pipeline.teacher.sweep.blocks import check_sweep, rows_within, usual_scratch_bytes
from stillroom.pipeline.teacher.sweep.definition import sweep
from stillroom.pipeline.teacher.sweep.gpu import sweep_triton

SPECS = {
    "default": RowSpec(12, 56, (1.0,), True, False, 0),
    "k64": RowSpec(64, 0, (1.0,), True, False, 0),
    "everything": RowSpec(64, 16, (0.5, 1.0, 2.0, 4.0), True, True, 0),
}
NATS = 1e-3
"""What a signal may differ from its definition on the same float32 logits."""


class Step:
    """States of a step, a head, and requests that share them.

    Args:
        scale: its size.
        dtype: of states and head.
    """

    def __init__(self, scale: Scale, dtype: torch.dtype):
        device, random = scale.device, torch.Generator(scale.device).manual_seed(0)
        self.width, self.words = scale.pick((4096, 151_936), (16, 400))
        self.rows = scale.pick(8192, 24)
        shape = (self.words, self.width)
        head = torch.randn(shape, generator=random, device=device)
        self.head = (head * self.width**-0.5).to(dtype)
        states = torch.randn(self.rows, self.width, generator=random, device=device)
        self.hidden = (3 * states).to(dtype)
        self.tokens = torch.randint(0, self.words, (self.rows,), generator=random, device=device)
        self.tokens = self.tokens.cpu()  # as a request's prompt is

    def shares(self, requests: int) -> list[Share]:
        """The step cut into prompts of which the first quarter is not scored."""
        length, out = self.rows // requests, []
        for number in range(requests):
            targets = self.tokens[number * length : (number + 1) * length]
            first, stop = length // 4, length - 1
            kept = np.arange(first, stop, 3)
            out.append(
                Share(number, number * length, first, stop, targets[first + 1 : stop + 1], kept)
            )
        return out

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[r, V] in the states' dtype."""
        return hidden @ self.head.T


def one_step(scale: Scale) -> dict[str, Any]:
    """Requests scored together say what the definition says of each, without a wait on the way."""
    step, spec, wrong = Step(scale, torch.float32), SPECS["everything"], []
    step.hidden, step.rows = step.hidden[: scale.pick(512, 24)], scale.pick(512, 24)
    shares, states = step.shares(scale.pick(7, 3)), [step.hidden]
    score = lambda: score_step(  # noqa: E731
        spec, shares, step.hidden, states, step.logits, scale.pick(128, 5), True
    )
    score()
    scale.wait()
    try:
        with scale.no_waits():
            made = score()
    except RuntimeError as error:
        wrong.append(f"scoring a step waits for the device: {error}")
        made = score()
    for share, (_, floats, kept) in zip(shares, by_share(shares, made)):
        hidden = step.hidden[share.first + share.shift : share.stop + share.shift]
        positions = torch.arange(share.first, share.stop, device=hidden.device)
        asked = step.logits(hidden), share.targets.to(hidden.device), positions
        _, truth = sweep(*asked, share.key, spec)
        gap = float((floats - truth.cpu()).abs().max())
        if not gap <= NATS:
            wrong.append(f"request {share.key} is off by {gap:.3g}")
        places = torch.as_tensor(share.kept + share.shift)
        if not torch.equal(kept[:, 0], step.hidden.cpu()[places]):
            wrong.append(f"request {share.key} has other states")
    return {"wrong": wrong}


WIDTHS = {"even": (151_936, 49_152), "odd": (50_257, 49_155)}


def teacher_bits(scale: Scale, which: str) -> dict[str, Any]:
    """The sweep is its definition, and to the bit the same from call to call."""
    wrong = []
    for words in scale.pick(WIDTHS[which], (129,)):
        for name, spec in SPECS.items():
            logits = 3 * torch.randn(scale.pick(512, 2), words, device=scale.device)
            for given in (logits, logits.bfloat16()):
                asked = _asked(given)
                first, again = (sweep_triton(*asked, 1, spec) for _ in range(2))
                exact = sweep(*asked, 1, spec)
                if not all(map(torch.equal, first, again)):
                    wrong.append(f"{words} {name}: other bits from the same logits")
                ids, gap = (first[0] != exact[0])[:, : spec.k].sum(), (first[1] - exact[1]).abs()
                if ids or not float(gap.max()) <= NATS:
                    wrong.append(f"{words} {name}: off by {float(gap.max()):.3g}, {int(ids)} ids")
        check_sweep(words, scale.device, SPECS["everything"])
    return {"wrong": wrong}


def _asked(logits: torch.Tensor):
    rows = torch.arange(len(logits), device=logits.device)
    return logits, rows * 7 % logits.shape[1], rows


def teacher_sweep(scale: Scale) -> dict[str, Any]:
    """Milliseconds of the head and of the sweep, by rows of a block, and of 8,192 rows so."""
    step, figures = Step(scale, torch.bfloat16), {}
    for name, spec in SPECS.items():
        for rows in scale.pick((128, 384, 1024, 4096), (2,)):
            hidden = step.hidden[:rows]
            asked = _asked(step.logits(hidden))
            head = scale.milliseconds(lambda given=hidden: step.logits(given))
            own = scale.milliseconds(lambda given=asked, what=spec: sweep_triton(*given, 1, what))
            whole = (head + own) * 8192 / rows
            figures[f"{name} {rows} rows"] = {"head_ms": head, "sweep_ms": own, "of_8192_ms": whole}
        odd = _asked(step.logits(step.hidden[: scale.pick(64, 2)])[:, :-3])
        odd_ms = scale.milliseconds(lambda given=odd, what=spec: sweep_triton(*given, 1, what))
        figures[f"{name} odd width, {len(odd[0])} rows"] = {"sweep_ms": odd_ms}
    return figures


def step_speed(scale: Scale) -> dict[str, Any]:
    """Milliseconds of a step of 8,192 tokens, its answers on the host, by MiB of logits and by
    requests; beside it the head's product alone."""
    step, spec = Step(scale, torch.bfloat16), SPECS["default"]
    card = 0 if scale.tiny else torch.cuda.get_device_properties(0).total_memory
    figures: dict[str, Any] = {"usual_mib": usual_scratch_bytes(card) >> 20}
    part = step.hidden[: scale.pick(1024, 8)]
    head = scale.milliseconds(lambda: step.logits(part), 5)
    figures["head_of_8192_ms"] = head * step.rows / len(part)
    for mib in scale.pick((256, 1024, 4096), (1,)):
        rows = rows_within(mib << 20, step.words, scale.device, spec, torch.bfloat16)
        for requests in scale.pick((8, 64), (3,)):
            call = _answered(step, spec, step.shares(requests), rows)
            name = f"{mib} MiB ({rows} rows), {requests} requests"
            figures[name] = {"ms": scale.milliseconds(call, 5)}
    return figures


def _answered(step: Step, spec: RowSpec, shares: list[Share], rows: int) -> Callable[[], Any]:
    def call() -> Any:
        made = score_step(spec, shares, step.hidden, [], step.logits, rows, True)
        return by_share(shares, made)

    return call
