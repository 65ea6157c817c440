"""How exact a distribution rebuilt from cached final states is, by the codec that stored them.

One idea: a teacher in float32 scores a few windows once; each codec then writes its answers through
the real path (capture, writer, reader). Logits rebuilt with the head from what is read back are
compared with the live ones. A live bfloat16 teacher stands beside: what a codec adds means little
where it is below what half precision does anyway. Nothing is trained here.

    python -m benchmarks.full_vocabulary --json
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import stillroom.pipeline  # noqa: F401  (see pipeline.cpu_wheels)
from benchmarks.cache_trial import asking, publish
from stillroom.cache_schemas.signals import hidden_name
from stillroom.pipeline import config
from stillroom.pipeline.record import Example, TeacherRecord
from stillroom.pipeline.student.model import load

MODEL = ".cache/models/SmolLM2-135M-Instruct"
WINDOW, DOCUMENTS, TEMPERATURES = 512, 6, (1.0, 2.0)
CODECS: tuple[tuple[str, float], ...] = (
    ("bf16", 0.0),
    ("fp16", 0.0),
    ("int8", 0.0),
    ("fp8", 0.0),
    ("step", 0.016),
    ("step", 0.03),
    ("step", 0.05),
    ("step", 0.1),
)


def main() -> None:
    """Measure, write `benchmarks/results/`, print."""
    parser = asking(__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--windows", type=int, default=6)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rows = list(measure(arguments.model, Path(directory), arguments.windows))
    publish("full_vocabulary", {"windows": arguments.windows, "rows": rows}, arguments.json)


@torch.inference_mode()
def measure(model: str, directory: Path, windows: int) -> Iterator[dict[str, Any]]:
    """One row per codec, and one for live bfloat16."""
    from stillroom.pipeline.capture.job import capture
    from stillroom.pipeline.corpus.preparing import Corpus, prepare

    run = _run(model, directory, "bf16", 0.0)
    assert run.prepare
    prepare(run.prepare, model, directory / "corpus")
    replay = Replay(run)
    teacher = load(model, dtype=torch.float32).eval()
    head = teacher.get_output_embeddings().weight
    examples = list(Corpus.open(directory / "corpus").split("train"))[:windows]
    live = [_live(teacher, example) for example in examples]
    half = load(model, dtype=torch.bfloat16).eval()
    rounded = [_live(half, example).float() for example in examples]
    yield {"codec": "live bfloat16", **_errors(live, rounded, head)}
    for codec, step in CODECS:
        own = directory / f"{codec}-{step}"
        own.mkdir()
        (own / "corpus").symlink_to(directory / "corpus")
        capture(_run(model, own, codec, step), engine="reference", open_engine=lambda _: replay)
        states = _cached(own / "cache", len(examples))
        name = f"{codec} {step:g}".removesuffix(" 0")
        bits = _bits_per_element(own / "cache")
        yield {"codec": name, "bits_per_element": bits, **_errors(live, states, head)}


def _run(model: str, directory: Path, codec: str, step: float) -> config.Run:
    source = {"name": "help", "kind": "pydoc_topics", "limit": DOCUMENTS}
    document = {
        "name": "benchmark",
        "directory": str(directory),
        "teacher": {"model": str(Path(model).resolve()), "dtype": "float32"},
        "prepare": {"window": WINDOW, "min_tokens": WINDOW, "heldout": 0.0, "source": [source]},
        "capture": {
            "k": 8,
            "hidden_layers": ["final"],
            "hidden_codec": codec,
            **({"hidden_step": step} if step else {}),
        },
    }
    return config.parse(document, "benchmarks.full_vocabulary")


class Replay:
    """An engine that asks the teacher once about an example, and then says the same again."""

    def __init__(self, run: config.Run):
        from stillroom.pipeline.teacher.opening import open_engine

        assert run.teacher
        assert run.capture
        self._engine = open_engine("reference", run.teacher, run.capture)
        self._known: dict[str, TeacherRecord] = {}

    def score(self, examples: Iterable[Example], reject: Any = None) -> Iterator[TeacherRecord]:
        """As the teacher answered; what `reject` would be told of does not occur here."""
        for example in examples:
            if example.example_id not in self._known:
                self._known[example.example_id] = next(self._engine.score([example]))
            yield self._known[example.example_id]

    def close(self) -> None:
        """Nothing: the answers are kept for the next codec."""


def _live(teacher: Any, example: Example) -> torch.Tensor:
    """Final states [T, D] of a live teacher."""
    ids = torch.as_tensor(np.asarray(example.token_ids, dtype=np.int64))[None]
    return teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]


def _cached(cache: Path, count: int) -> list[torch.Tensor]:
    from stillroom.pipeline.cache.reader import TeacherCache

    opened, name = TeacherCache.open(str(cache)), hidden_name("final")
    return [
        torch.from_numpy(opened.read(i, [name]).signals[name].astype(np.float32))
        for i in range(count)
    ]


def _bits_per_element(cache: Path) -> float:
    """Of all that the dense files hold, metadata included; the top-k lists are not counted."""
    from stillroom.pipeline.cache.reader import TeacherCache

    manifest = TeacherCache.open(str(cache)).manifest
    facts = manifest.plan
    rows = manifest.num_tokens - facts["shards"]["num_examples"]
    size = sum(path.stat().st_size for path in (cache / "dense").rglob("*") if path.is_file())
    return 8 * size / (rows * facts["teacher"]["hidden_size"])


def _errors(
    live: list[torch.Tensor], states: list[torch.Tensor], head: torch.Tensor
) -> dict[str, Any]:
    """KL(live || rebuilt) over the full vocabulary, mean and largest, by temperature."""
    found: dict[str, Any] = {}
    for temperature in TEMPERATURES:
        rows = torch.cat(
            [_kl(a[: len(b)], b, head, temperature) for a, b in zip(live, states, strict=True)]
        )
        found[f"kl_mean_t{temperature:g}"] = float(rows.mean())
        found[f"kl_max_t{temperature:g}"] = float(rows.max())
    return found


def _kl(live: torch.Tensor, own: torch.Tensor, head: torch.Tensor, t: float) -> torch.Tensor:
    p, q = ((state @ head.T / t).log_softmax(-1).double() for state in (live, own))
    return (p.exp() * (p - q)).sum(-1)


if __name__ == "__main__":
    main()
