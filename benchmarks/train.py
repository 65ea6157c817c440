"""Training speed: a student from the cache, beside plain cross-entropy and online distillation.

One idea: children hold the same student, the same optimiser and the same packed text, and take one
step each in turn, so that whatever else the machine does hits all of them; each child's own peak
memory is its arm's.

    cache    this project's step: top-k and tail and a tenth of cross-entropy from the cache
    ce       the usual loop: model(input_ids, labels=...) with transformers' own loss
    ce_fused cross-entropy through this project's sweep (no [tokens, vocabulary] logits either)
    online   teacher in memory, full-vocabulary forward KL on its logits (TRL's GKD on given text)

The data-wait share is taken afterwards over uninterrupted steps of the cache arm.

    python -m benchmarks.train --json
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import stillroom.pipeline  # noqa: F401  (see pipeline.cpu_wheels)
from benchmarks import needs
from benchmarks.cache_trial import asking, publish
from stillroom.pipeline import config
from stillroom.pipeline.data.packing import Position
from stillroom.pipeline.student.model import load

ARMS = ("cache", "ce", "ce_fused", "online")
WINDOW = 512


def main() -> None:
    """Measure, write `benchmarks/results/`, print."""
    parser = asking(__doc__)
    parser.add_argument("--model", default=needs.MODEL)
    parser.add_argument("--rows", type=int, default=4, help=f"rows of {WINDOW} tokens in a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        serve(arguments.arm, arguments.run)
        return
    model = needs.model(arguments.model)
    with tempfile.TemporaryDirectory() as directory:
        run = make_run(model, Path(directory), arguments.rows, arguments.precision)
        found = measure(run, arguments.rounds) | {"precision": arguments.precision}
        publish("train", found, arguments.json)


def make_run(model: str, directory: Path, rows: int, precision: str) -> Path:
    """Prepare, capture and write the run's JSON; returns its path."""
    from stillroom.pipeline.capture.job import capture
    from stillroom.pipeline.corpus.preparing import prepare
    from stillroom.pipeline.student.model import initial_student

    document = {
        "name": "benchmark",
        "directory": str(directory),
        "teacher": {"model": str(Path(model).resolve()), "dtype": precision},
        "prepare": {
            "window": WINDOW,
            "min_tokens": WINDOW,
            "heldout": 0.0,
            "source": [{"name": "help", "kind": "pydoc_topics", "limit": 12}],
        },
        "capture": {"k": 64},
        "student": {"keep_every": 3},
        "objective": [{"name": "forward_kl", "options": {"ce_weight": 0.1}}],
        "train": {"batch_tokens": WINDOW * rows, "precision": precision, "steps": 1000},
    }
    run = config.parse(document, "benchmark")
    assert run.prepare
    assert run.teacher
    assert run.student
    prepare(run.prepare, run.teacher.model, run.path("corpus"))
    capture(run, engine="reference")
    initial_student(run.student, run.teacher, run.path("student-initial"))
    path = directory / "run.json"
    path.write_text(json.dumps(document))
    return path


def measure(run: Path, rounds: int) -> dict[str, Any]:
    """Interleave the arms and gather their figures."""
    children = {arm: _start(arm, run) for arm in ARMS}
    try:
        for child in children.values():
            _ask(child, "warm")
        steps = {arm: [] for arm in ARMS}
        for _ in range(rounds):
            for arm, child in children.items():
                steps[arm].append(_ask(child, "step"))
        waiting = _ask(children["cache"], "continuous")
        peaks = {arm: _ask(child, "peak")["bytes"] for arm, child in children.items()}
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    return _figures(steps, waiting, peaks)


def _figures(steps: dict[str, list[dict]], waiting: dict, peaks: dict) -> dict[str, Any]:
    """The keys that machines read; rates are medians over rounds, ratios medians of ratios."""
    rates = {arm: [step["tokens"] / step["seconds"] for step in own] for arm, own in steps.items()}

    def ratio(other: str) -> float:
        return statistics.median(a / b for a, b in zip(rates["cache"], rates[other], strict=True))

    cpu = {arm: sum(step["cpu_seconds"] for step in own) for arm, own in steps.items()}
    return {
        **{f"{arm}_tok_s": statistics.median(own) for arm, own in rates.items()},
        "ratio_to_ce": ratio("ce"),
        "ratio_to_ce_fused": ratio("ce_fused"),
        "ratio_to_online": ratio("online"),
        "cpu_ratio_to_ce": cpu["ce"] / cpu["cache"],
        "cpu_ratio_to_online": cpu["online"] / cpu["cache"],
        "data_wait_share": waiting["waited"] / waiting["seconds"],
        "peak_bytes": peaks,
        "rounds": len(steps["cache"]),
        "tokens_per_step": steps["cache"][0]["tokens"],
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def _start(arm: str, run: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.train", "--arm", arm, "--run", str(run)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(child: subprocess.Popen, order: str) -> dict[str, Any]:
    assert child.stdin
    assert child.stdout
    child.stdin.write(order + "\n")
    child.stdin.flush()
    while line := child.stdout.readline():
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError(f"the child ended ({child.poll()}); its message is above")


def serve(arm: str, run_file: str) -> None:
    """A child: holds one arm and does what its parent asks."""
    run = config.parse(json.loads(Path(run_file).read_text()), run_file)
    step = _arm(arm, run)
    for line in sys.stdin:
        print(json.dumps(_obey(line.strip(), step)), flush=True)


def _obey(order: str, step: Callable[[], tuple[int, float]]) -> dict[str, Any]:
    if order == "peak":
        return {"bytes": _peak_bytes()}
    began, cpu = time.perf_counter(), time.process_time()
    count = 8 if order == "continuous" else 1
    done = [step() for _ in range(count)]
    return {
        "tokens": sum(tokens for tokens, _ in done),
        "waited": sum(waited for _, waited in done),
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
    }


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _arm(arm: str, run: config.Run) -> Callable[[], tuple[int, float]]:
    """A function that takes one step and tells its tokens and the seconds it waited for data."""
    if arm == "ce_fused":
        run = run.model_copy(update={"objective": (config.Objective(name="cross_entropy"),)})
    if arm in ("cache", "ce_fused"):
        return _own_step(_training(run))
    return _plain_step(run, online=arm == "online")


def _training(run: config.Run) -> Any:
    from stillroom.pipeline.training.parallel import Parallel
    from stillroom.pipeline.training.run import open_caches
    from stillroom.pipeline.training.trainer import Training

    assert run.train
    return Training(run, run.train, Parallel.start(), open_caches(run, run.train))


def _own_step(training: Any) -> Callable[[], tuple[int, float]]:
    training.build()
    steps = training.loader.steps(Position(), training.settings.steps)
    numbers = iter(range(training.settings.steps))

    def step() -> tuple[int, float]:
        began = time.perf_counter()
        batches, _ = next(steps)
        waited = time.perf_counter() - began
        done = training.stepper.step(next(numbers), batches, False)
        return done.tokens, waited

    return step


def _plain_step(run: config.Run, online: bool) -> Callable[[], tuple[int, float]]:
    assert run.train
    assert run.teacher
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = load(run.path("student-initial")).to(device).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    dtype = getattr(torch, run.train.precision)
    teacher = load(run.teacher.model, dtype=dtype).to(device).eval() if online else None
    batches = _same_text(run)

    def step() -> tuple[int, float]:
        ids = next(batches).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = _online_loss(student, teacher, ids) if teacher else _plain_loss(student, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return ids.numel(), 0.0

    return step


def _same_text(run: config.Run) -> Iterator[torch.Tensor]:
    """The rows that the cache arm trains on, in its order; decoded before the clock starts."""
    training = _training(run)
    loader = training.make_loader(training.caches, 0)
    rows = [batches[0].input_ids for batches, _ in loader.steps(Position(), 16)]
    while True:
        yield from rows


def _plain_loss(student: Any, ids: torch.Tensor) -> torch.Tensor:
    return student(input_ids=ids, labels=ids, use_cache=False).loss


def _online_loss(student: Any, teacher: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean full-vocabulary forward KL, as TRL's GKD computes it with beta = 0 on given text."""
    with torch.no_grad():
        truth = teacher(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    own = student(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    rows = truth.shape[0] * truth.shape[1]
    kl = torch.nn.functional.kl_div(own, truth, reduction="none", log_target=True)
    return kl.sum() / rows


if __name__ == "__main__":
    needs.run(main)
