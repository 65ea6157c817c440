"""What recommenders cost: `python -m benchmarks.recommenders --json`.

One idea: capture of items and lists is timed beside bare vLLM on the same prompts, in turns within
one run, so that the ratios hold whatever else the machine is doing; the parts that grow with the
catalogue and with the interactions are timed at sizes that two cores can do, and what is above them
is computed and named `computed`.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import needs
from benchmarks.cache_trial import asking, publish
from stillroom.pipeline.capture import candidates, items
from stillroom.pipeline.capture.candidate_engines import line_ends, prompt_of
from stillroom.pipeline.capture.nearest import Nearest
from stillroom.pipeline.config import Run
from stillroom.pipeline.config.recommending import Interactions, Recommender
from stillroom.pipeline.config.training import Objective
from stillroom.pipeline.corpus.histories import Catalogue
from stillroom.pipeline.corpus.interactions import Log, sequences
from stillroom.pipeline.corpus.preparing import prepare
from stillroom.pipeline.data.histories import HistoryBatch, Lists
from stillroom.pipeline.objectives.recommending import RankingDistiller, terms_of
from stillroom.pipeline.objectives.registry import CacheFacts
from stillroom.pipeline.student.recommenders.model import initial
from stillroom.pipeline.teacher.opening import open_writing_engine
from stillroom.stages.demos.recsys_synthetic import write_files

BATCH, LENGTH, K, WIDTH = 256, 10, 10, 576
CATALOGUES = (2_000, 20_000, 100_000)
INTERACTIONS = (100_000, 1_000_000)


def main() -> None:
    """Measure and print."""
    parser = asking(__doc__)
    parser.add_argument("--teacher", default=".cache/models/SmolLM2-135M-Instruct")
    parser.add_argument("--histories", type=int, default=64)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--without-teacher", action="store_true")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"steps": steps(), "search": search(), "prepare": preparing()}
    found["computed"] = computed(found)
    if not arguments.without_teacher:
        with tempfile.TemporaryDirectory() as scratch:
            found |= capture(arguments, Path(scratch))
    publish("recommenders", found, arguments.json)


def capture(arguments: Any, scratch: Path) -> dict[str, Any]:
    """Items and histories per second of capture and of bare vLLM, and bytes of each."""
    run = _run(arguments, scratch)
    prepare(run.prepare, arguments.teacher, run.path("corpus"))  # type: ignore[arg-type]
    task = items.open_task(run, "vllm")
    table: Any = run.items
    writer = open_writing_engine("vllm", run.teacher, items.state_capture(table), 256)  # type: ignore[arg-type]
    engine: Any = items.ItemEngine(writer, table)
    asked = [task.examples[number] for number in range(len(task.examples))]
    paired = _turns(
        arguments.turns,
        lambda: list(engine.score(asked)),
        lambda: _prefill(writer, [one.token_ids for one in asked]),
    )
    found = {"items_per_s": _rates(len(asked), paired)}
    engine.close()
    found["bytes_per_item"] = _bytes(items.capture_items(run), len(asked))
    task = candidates.open_task(run, "vllm", "heldout")
    engine = task.start(1.0)
    asked = [task.examples[number] for number in range(arguments.histories)]
    ends, tokens = line_ends(engine._shelf.tokenizer.hf), engine._shelf.table.written_tokens
    prompts = [prompt_of(one) for one in asked]
    paired = _turns(
        arguments.turns,
        lambda: list(engine.score(asked)),
        lambda: engine._engine.write(prompts, tokens, ends),
    )
    found["histories_per_s"] = _rates(len(asked), paired)
    engine.close()
    found["bytes_per_history"] = _bytes(candidates.capture_candidates(run, split="heldout"), 320)
    return found


def steps() -> list[dict[str, Any]]:
    """Milliseconds of a training step of 256 histories by catalogue size, one thread or all."""
    lists = CacheFacts(("candidate_ids", "candidate_distances"), (), 0)
    facts = {"": CacheFacts(("interactions",), (), 0), "candidates": lists}
    kinds = {
        "bce": [{"name": "next_item"}],
        "bce_dros": [{"name": "next_item"}, {"name": "dros"}],
        "distilled": [
            {"name": "next_item"},
            {"name": "dros"},
            {"name": "ranking_distillation", "cache": "candidates"},
        ],
    }
    found = []
    for size in CATALOGUES:
        for name, lines in kinds.items():
            model = initial(Recommender(), size, LENGTH)
            terms = terms_of([Objective.model_validate(line) for line in lines], facts)
            distiller = RankingDistiller(model, terms, torch.ones(size, dtype=torch.long), {})
            seconds = _step_seconds(distiller, size)
            found.append({"items": size, "objectives": name, "ms": round(1e3 * seconds, 2)})
    return found


def search() -> list[dict[str, Any]]:
    """Milliseconds of one nearest search for 10 of N items of width 576, exact and by graph."""
    random, found = np.random.default_rng(0), []
    for size in CATALOGUES:
        vectors = random.normal(size=(size, WIDTH)).astype(np.float32)
        queries = random.normal(size=(16, WIDTH)).astype(np.float32)
        row: dict[str, Any] = {"items": size}
        row["exact_ms"] = _search_ms(Nearest(vectors), queries)
        if size <= CATALOGUES[1]:
            started = time.perf_counter()
            graph = Nearest(vectors, exact=False)
            row["graph_build_s"] = round(time.perf_counter() - started, 2)
            row["graph_ms"] = _search_ms(graph, queries)
        found.append(row)
    return found


def preparing() -> list[dict[str, Any]]:
    """Seconds from interactions in memory to sequences (5-core), by how many there are."""
    random, found = np.random.default_rng(0), []
    for size in INTERACTIONS:
        users, things = size // 50, max(size // 100, 100)
        names = [str(i) for i in range(things)]
        log = Log(
            [str(i) for i in range(users)],
            names,
            random.integers(0, users, size),
            (things * random.random(size) ** 2).astype(np.int64),
            random.integers(0, 1 << 30, size).astype(np.float64),
        )
        started = time.perf_counter()
        sequences(log, Catalogue(names, names, names), Interactions())
        found.append({"interactions": size, "seconds": round(time.perf_counter() - started, 2)})
    return found


def computed(found: dict[str, Any]) -> dict[str, Any]:
    """To 10^6 items and 10^7 interactions, in proportion to the largest size that was measured."""
    largest = max(CATALOGUES)
    steps_of = {r["objectives"]: r["ms"] for r in found["steps"] if r["items"] == largest}
    per_epoch = 1e7 / BATCH
    times = 1e6 / largest
    return {
        "step_ms_at_1e6_items": {name: round(ms * times) for name, ms in steps_of.items()},
        "epoch_h_at_1e7_rows_and_2e3_items": {
            r["objectives"]: round(r["ms"] * per_epoch / 3.6e6, 1)
            for r in found["steps"]
            if r["items"] == CATALOGUES[0]
        },
        "exact_search_ms_at_1e6_items": round(found["search"][-1]["exact_ms"] * times),
        "item_vectors_gb_at_1e6_items_fp32": 4 * WIDTH * 1e6 / 1e9,
        "prepare_s_at_1e7": round(
            found["prepare"][-1]["seconds"] * 1e7 / found["prepare"][-1]["interactions"]
        ),
    }


def _step_seconds(distiller: RankingDistiller, size: int, count: int = 4) -> float:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(0, size, shape, generator=generator)

    far = torch.rand(BATCH, K, generator=generator).sort(dim=1).values
    lists = {"candidates": Lists(draw(BATCH, K), far)}
    batch = HistoryBatch(draw(BATCH, LENGTH), draw(BATCH), ("",) * BATCH, lists)
    optimizer = torch.optim.AdamW(distiller.parameters(), fused=True)
    times = []
    for _ in range(count + 1):
        started = time.perf_counter()
        weights, totals = distiller.weigh(batch, 1.0)
        distiller(batch, [w / float(t) for w, t in zip(weights, totals)]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


def _search_ms(nearest: Nearest, queries: np.ndarray) -> float:
    started = time.perf_counter()
    for query in queries:
        nearest.search(query, K)
    return round(1e3 * (time.perf_counter() - started) / len(queries), 2)


def _turns(turns: int, ours: Any, bare: Any) -> list[tuple[float, float]]:
    """(seconds of ours, seconds of bare), once to warm up and then in turns."""
    bare()
    found = []
    for _ in range(turns):
        began = time.perf_counter()
        ours()
        middle = time.perf_counter()
        bare()
        found.append((middle - began, time.perf_counter() - middle))
    return found


def _rates(count: int, paired: list[tuple[float, float]]) -> dict[str, float]:
    ours, bare = (float(np.median([pair[i] for pair in paired])) for i in (0, 1))
    ratio = float(np.median([b / o for o, b in paired]))
    return {"capture": count / ours, "bare_vllm": count / bare, "ratio": ratio}


def _prefill(engine: Any, prompts: list[np.ndarray]) -> None:
    """The same texts through vLLM, one token written and thrown away."""
    engine.write(prompts, 1, ())


def _bytes(manifest: Any, count: int) -> float:
    return manifest.num_bytes / count


def _run(arguments: Any, scratch: Path) -> Run:
    path = write_files(scratch / "source")
    settings = {"k_core": 1, "history": 8}
    source = {"name": "made-up", "kind": "interactions", "path": str(path)}
    return Run.model_validate(
        {
            "name": "costs",
            "directory": str(scratch / "run"),
            "prepare": {"source": [source | {"interactions": settings}], "window": 256},
            "teacher": {"model": arguments.teacher},
            "items": {},
            "candidates": {"batch": 64},
        }
    )


if __name__ == "__main__":
    needs.run(main)
