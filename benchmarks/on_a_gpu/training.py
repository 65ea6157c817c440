"""The trainer's own steps on the device: alone, under DDP and under FSDP2, beside the CPU's.

One idea: the first losses of a run depend on weights, rows and weights of rows alone, so every way
to take a step must begin with the same ones; each rank is a process, and every rank sees its own
microbatch. Nothing is read and nothing is kept: student and records are made up from a seed.
"""

import json
import os
import tempfile
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.on_a_gpu.plain_student import PlainStudent
from benchmarks.on_a_gpu.scale import Scale
from stillroom.pipeline.config.training import Objective, Train
from stillroom.pipeline.data.batch import DistillBatch, collate
from stillroom.pipeline.objectives.combine import Distiller, terms_of
from stillroom.pipeline.objectives.registry import CacheFacts
from stillroom.pipeline.record import Example, TeacherRecord, content_id
from stillroom.pipeline.student.states import form_of
from stillroom.pipeline.training.optimization import optimizer_of
from stillroom.pipeline.training.parallel import ALONE, Parallel, replicated
from stillroom.pipeline.training.stepping import Stepper

STEPS, K = 3, 8
BOUNDS = {"float32": 2e-5, "bfloat16": 1e-2}
"""Relative: a loss is a mean of thousands of rows, over products that round to 24 or 8 bits. Later
steps have felt gradients of the same rounding."""


def training(scale: Scale, kind: str) -> dict[str, Any]:
    """First losses by precision and number of ranks, against one CPU process's."""
    counts = {1, scale.pick(max(1, torch.cuda.device_count()), 2)} if kind != "plain" else {1}
    figures: dict[str, Any] = {}
    wrong = []
    for ranks in sorted(counts):
        told = _launched(scale, kind, ranks)
        for precision, bound in BOUNDS.items():
            truth = _on_a_cpu(scale, precision, ranks)
            found = told[precision]
            name = f"{ranks} ranks {precision}"
            figures[name] = {"losses": found["losses"], "cpu": truth, "ms": found["ms"]}
            gap = max(abs(a - b) / abs(b) for a, b in zip(found["losses"], truth))
            if not gap <= bound:
                wrong.append(f"{name}: losses differ by {gap:.3g} of themselves")
    return figures | {"wrong": wrong}


def _launched(scale: Scale, kind: str, ranks: int) -> dict[str, Any]:
    """What the first rank says. The ranks meet in a file, since a port that was free may not be any
    longer; one that dies ends the others, and what it raised is raised here."""
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(_rank, (ranks, kind, scale, directory), nprocs=ranks)
        return json.loads(Path(directory, "losses.json").read_text())


def _rank(rank: int, ranks: int, kind: str, scale: Scale, directory: str) -> None:
    """One rank: take the steps, the first writes their losses."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in names.items()}
    dist.init_process_group(
        "gloo" if scale.tiny else "cpu:gloo,cuda:nccl",
        init_method=f"file://{directory}/ranks",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=scale.limit / 2),  # a wait for nothing ends while it can be told
    )
    parallel = Parallel.start()
    if scale.tiny:
        parallel = replace(parallel, device=torch.device("cpu"))
    told = {precision: _taken(scale, kind, precision, parallel) for precision in BOUNDS}
    if parallel.is_main:
        Path(directory, "losses.json").write_text(json.dumps(told))
    parallel.barrier()
    dist.destroy_process_group()


def _taken(scale: Scale, kind: str, precision: str, parallel: Parallel) -> dict[str, Any]:
    """First losses of these ranks, and what a step takes."""
    stepper, batches = _prepared(scale, kind, precision, parallel, parallel.world_size)
    mine = [batches[parallel.rank]]
    losses = [_loss(stepper, number, mine) for number in range(STEPS)]
    return {"losses": losses, "ms": scale.milliseconds(lambda: stepper.step(STEPS, mine, False), 5)}


def _on_a_cpu(scale: Scale, precision: str, count: int) -> list[float]:
    """First losses of one process that takes every rank's microbatch."""
    stepper, batches = _prepared(scale, "plain", precision, ALONE, count)
    return [_loss(stepper, number, batches) for number in range(STEPS)]


def _loss(stepper: Stepper, number: int, batches: list[DistillBatch]) -> float:
    done = stepper.step(number, batches, False)
    assert done is not None
    return done.loss


def _prepared(
    scale: Scale, kind: str, precision: str, parallel: Parallel, count: int
) -> tuple[Stepper, list[DistillBatch]]:
    """(a stepper over a fresh student, so many microbatches)."""
    device = parallel.device
    words, width = scale.pick((8192, 256), (96, 32))
    torch.manual_seed(0)
    model = PlainStudent(words, width, 2)  # made on the CPU: the same weights everywhere
    form_of(model)  # measured while it is whole
    objective = Objective(name="forward_kl", options={"ce_weight": 0.1})
    facts = CacheFacts(("topk_ids", "topk_logprobs", "tail_logprob", "lse"), (1.0,), words, k=K)
    kernel = "chunked" if device.type == "cpu" else "triton"
    told: dict[str, Any] = {"precision": precision, "parallel": "fsdp" if kind == "fsdp" else "ddp"}
    settings = Train(steps=100, warmup=0.0, **told)
    distiller = Distiller(model.to(device), terms_of([objective], {"": facts}), kernel)
    module = replicated(distiller) if kind == "ddp" else distiller
    if kind == "fsdp":
        module = parallel.wrap(distiller, settings)
    optimizer = optimizer_of([p for p in distiller.parameters() if p.requires_grad], settings)
    batches = [_batch(scale, words, number) for number in range(count)]
    return Stepper(settings, parallel, distiller, module, optimizer, []), batches


def _batch(scale: Scale, words: int, seed: int) -> DistillBatch:
    """Rows of one document each, of different lengths."""
    rng, length = np.random.default_rng(seed), scale.pick(256, 12)
    rows = [[{"": _record(rng, words, length - 3 * row)}] for row in range(scale.pick(4, 2))]
    return collate(rows, length)


def _record(rng: np.random.Generator, words: int, length: int) -> TeacherRecord:
    tokens = rng.integers(0, words, length, dtype=np.int32)
    mask = np.arange(length) >= length // 4
    example = Example(content_id(tokens, mask), "made-up", "made-up", tokens, mask)
    first = rng.integers(0, words // K, (example.num_rows, 1))
    logprobs = np.sort(rng.normal(-4.0, 1.0, (example.num_rows, K)).astype(np.float32))[:, ::-1]
    mass = np.exp(logprobs).sum(1)
    logprobs = logprobs - np.log(2 * mass)[:, None]  # half of the probability
    signals = {
        "topk_ids": (first + words // K * np.arange(K)).astype(np.int32),
        "topk_logprobs": np.ascontiguousarray(logprobs),
        "tail_logprob": np.full(example.num_rows, np.log(0.5), dtype=np.float32),
        "lse": np.full((example.num_rows, 1), 10.0, dtype=np.float32),
    }
    return TeacherRecord(example, example.first_row, signals)
