"""What to store of a teacher's tail: held-out KL per byte, many treatments, seeds, budgets.

One idea: the experiment is a grid of (treatment, budget, seed); every cell is a file of its own in
the work directory, so the grid may be stopped at any time and goes on where it was. Nothing is
reported that was not run: the table says how many seeds each mean is over.

Treatments, each at the k (and draws) that bring the stored cache closest to the budget in bytes per
token, as really written:

    bucket       exact top-k, the rest of the mass as one outcome
    truncate     exact top-k as it is
    renormalise  exact top-k scaled to one
    sampled      exact top-k and as many draws from the tail
    full         the whole distribution, rebuilt from cached final states (no budget: the ceiling)

Pure random sampling (RS-KD, no exact ids) has no record kind and is not among them.

    python -m benchmarks.tail --work runs/tail            # hours on two cores; may be stopped
    python -m benchmarks.tail --work runs/tail --report   # table and plot of what is there
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pipeline  # noqa: F401  (see pipeline.cpu_wheels)
from benchmarks.cache_trial import publish
from pipeline import config
from pipeline.checkpoint import write_durably

MODEL = ".cache/models/SmolLM2-135M-Instruct"
TREATMENTS = ("bucket", "truncate", "renormalise", "sampled")
BUDGETS = (20, 40, 100, 180)
SEEDS = (1, 2, 3, 4, 5)
STEPS, BATCH_TOKENS = 150, 2048
CANDIDATES = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
"""Values of k that are tried for a budget; a sampled tail takes half of it as draws."""


@dataclass(frozen=True, slots=True)
class Storage:
    """What is captured per row."""

    k: int
    draws: int = 0
    full: bool = False

    @property
    def name(self) -> str:
        """Directory name of its cache."""
        return "full" if self.full else f"k{self.k}-d{self.draws}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One training run of the grid."""

    treatment: str
    budget: int
    seed: int

    @property
    def name(self) -> str:
        """Directory name of its run."""
        return f"{self.treatment}-{self.budget}-{self.seed}"


def main() -> None:
    """Run what is missing, or report what is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--work", type=Path, default=Path("runs/tail"))
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--engine", choices=("vllm", "reference"), default="vllm")
    parser.add_argument("--report", action="store_true", help="only report what has been run")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    experiment = Experiment(arguments.work, arguments.model, arguments.engine, arguments.steps)
    if not arguments.report:
        experiment.run(arguments.seeds, arguments.budgets)
    publish("tail", report(arguments.work), arguments.json)


@dataclass
class Experiment:
    """The grid's caches and runs in one directory."""

    work: Path
    model: str
    engine: Any
    steps: int

    def run(self, seeds, budgets) -> None:
        """Seed by seed, so that every treatment has as many seeds as any other."""
        self._prepare()
        chosen = {(t, b): self.storage(t, b) for t in TREATMENTS for b in budgets}
        for seed in seeds:
            self.cell(Cell("full", 0, seed), Storage(8, full=True))
            for (treatment, budget), storage in chosen.items():
                self.cell(Cell(treatment, budget, seed), storage)

    def storage(self, treatment: str, budget: int) -> Storage:
        """The candidate whose sample cache comes closest to a budget."""
        made = [Storage(k, k // 2 if treatment == "sampled" else 0) for k in CANDIDATES]
        return min(made, key=lambda storage: abs(self._sample_bytes(storage) - budget))

    def cell(self, cell: Cell, storage: Storage) -> None:
        """Train and measure one cell, unless its result is there."""
        from pipeline.corpus import Corpus
        from pipeline.evaluate import measure
        from pipeline.trainer import train

        path = self.work / "cells" / f"{cell.name}.json"
        if path.exists():
            return
        cache = self._capture(storage, self.work / "caches" / storage.name)
        run = self._training(cell, cache)
        result = train(run)
        heldout = list(Corpus.open(self.work / "corpus").split("heldout"))
        scores = measure(self.model, {"student": result.student}, heldout)["student"]
        facts = {
            "treatment": cell.treatment,
            "budget": cell.budget,
            "seed": cell.seed,
            "k": storage.k,
            "draws": storage.draws,
            "bytes_per_token": _bytes_per_token(cache),
            "kl": scores.kl,
            "perplexity": scores.perplexity,
            "tokens": result.tokens,
            "steps": result.steps,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(facts, indent=1) + "\n")

    def _prepare(self) -> None:
        from pipeline.corpus import prepare

        if not (self.work / "corpus").exists():
            table = self._run(Storage(8), self.work).prepare
            assert table is not None
            prepare(table, self.model, self.work / "corpus")

    def _sample_bytes(self, storage: Storage) -> float:
        """Bytes per token of sixteen examples, captured once and remembered."""
        path = self.work / "samples" / f"{storage.name}.json"
        if not path.exists():
            cache = self._capture(storage, self.work / "samples" / storage.name, sample=True)
            write_durably(path, json.dumps(_bytes_per_token(cache)))
        return json.loads(path.read_text())

    def _capture(self, storage: Storage, directory: Path, sample: bool = False) -> Path:
        from pipeline.capture import capture

        cache = directory / "cache"
        if (cache / "manifest.json").exists():
            return cache
        source = self._sample_corpus() if sample else self.work / "corpus"
        directory.mkdir(parents=True, exist_ok=True)
        corpus = directory / "corpus"
        if not corpus.exists():
            corpus.symlink_to(source.resolve(), target_is_directory=True)
        capture(self._run(storage, directory), engine=self.engine)
        return cache

    def _sample_corpus(self) -> Path:
        from pipeline.corpus import prepare

        directory = self.work / "sample-corpus"
        if not directory.exists():
            table = self._run(Storage(8), self.work, documents=8).prepare
            assert table is not None
            prepare(table, self.model, directory)
        return directory

    def _run(self, storage: Storage, directory: Path, documents: int = 0) -> config.Run:
        source = {"name": "help", "kind": "pydoc_topics", "limit": documents}
        document = {
            "name": "tail",
            "directory": str(directory),
            "teacher": {"model": self.model, "dtype": "bfloat16"},
            "prepare": {"window": 512, "heldout": 0.1, "source": [source]},
            "capture": {
                "k": storage.k,
                "tail_draws": storage.draws,
                "hidden_layers": ["final"] if storage.full else [],
                "hidden_codec": "bf16",
            },
        }
        return config.parse(document, "benchmarks.tail")

    def _training(self, cell: Cell, cache: Path) -> config.Run:
        objective: dict[str, Any] = {"name": "forward_kl", "options": {"tail": cell.treatment}}
        if cell.treatment == "full":
            objective = {"name": "full_vocabulary"}
        document = {
            "name": cell.name,
            "directory": str(self.work / "runs" / cell.name),
            "teacher": {"model": self.model, "dtype": "bfloat16"},
            "student": {"keep_every": 3},
            "objective": [objective],
            "train": {
                "cache": str(cache),
                "steps": self.steps,
                "batch_tokens": BATCH_TOKENS,
                "precision": "bfloat16",
                "seed": cell.seed,
                "checkpoint_every": 50,
                "keep_last": 1,
            },
        }
        return config.parse(document, "benchmarks.tail")


def _bytes_per_token(cache: Path) -> float:
    """Bytes of everything under a cache over the tokens it is about."""
    from pipeline.cache.reader import TeacherCache

    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return size / TeacherCache.open(str(cache)).manifest.num_tokens


def report(work: Path) -> dict[str, Any]:
    """Means and standard errors over the seeds that were run, and a plot beside them."""
    cells = [json.loads(path.read_text()) for path in sorted((work / "cells").glob("*.json"))]
    groups: dict[tuple, list[dict]] = {}
    for cell in cells:
        groups.setdefault((cell["treatment"], cell["budget"]), []).append(cell)
    rows = [_row(treatment, budget, own) for (treatment, budget), own in groups.items()]
    rows.sort(key=lambda row: (row["treatment"], row["bytes_per_token"]))
    if rows:
        _plot(rows, work / "tail.png")
    return {"rows": rows, "cells": len(cells)}


def _row(treatment: str, budget: int, cells: list[dict]) -> dict[str, Any]:
    kl = [cell["kl"] for cell in cells]
    error = statistics.stdev(kl) / len(kl) ** 0.5 if len(kl) > 1 else None
    return {
        "treatment": treatment,
        "budget": budget,
        "k": cells[0]["k"],
        "draws": cells[0]["draws"],
        "bytes_per_token": statistics.mean(cell["bytes_per_token"] for cell in cells),
        "kl": statistics.mean(kl),
        "kl_standard_error": error,
        "seeds": len(cells),
        "tokens_per_run": cells[0]["tokens"],
    }


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.subplots()
    for treatment in dict.fromkeys(row["treatment"] for row in rows):
        own = [row for row in rows if row["treatment"] == treatment]
        if treatment == "full":
            axis.axhline(own[0]["kl"], linestyle="--", color="grey", label="full vocabulary")
            continue
        axis.errorbar(
            [row["bytes_per_token"] for row in own],
            [row["kl"] for row in own],
            yerr=[row["kl_standard_error"] or 0.0 for row in own],
            marker="o",
            capsize=3,
            label=treatment,
        )
    axis.set(xscale="log", xlabel="bytes per token, as stored", ylabel="held-out KL (nats)")
    axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
