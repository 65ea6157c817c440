"""Rate and distortion of a cache before it is made: what each setting would cost and keep.

One idea: the teacher scores a few examples once with long lists; every setting is then coded for
real, with tables fitted on half of them and measured on the other half. Planning may cost a tenth
of the capture that it plans, so how much is scored follows from the corpus, and how much of that is
coded from the time that is left. Loading the teacher is `sample`, measuring is `frontier`, deciding
is `choose`; no drawing here.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from stillroom.cache_schemas.errors import ConfigError
from stillroom.cache_schemas.record_codec import MEAN_KL, TOKENS, RowCodec
from stillroom.pipeline.config import Capture, Run, require
from stillroom.pipeline.planning import distortion
from stillroom.pipeline.record import Example, TeacherRecord
from stillroom.pipeline.shares import evenly

AVERAGED_ROWS = 256
"""Over how many rows noise is taken to average: a choice, smaller than any usual batch."""
LONGEST_LIST = 256
KS = (0, 4, 8, 12, 16, 32, 64, 128, 256)
DRAWS = (0, 16, 56, 256)
USUAL_KS, BUDGETS = (16, 64), (1e-5, 1e-3)
"""Lists that are also coded in profiles `strict` and `exact`, and to other budgets of `small`."""
CODED_ROWS, LEAST_CODED = 49_152, 512
"""Rows that are coded per setting, at most and at least: more change the figures little, fewer say
nothing."""
COST, SCORED = 0.1, 0.02
"""Shares of a capture: what planning may cost, the engine's start apart, and what it scores."""
LEAST_EXAMPLES, MOST_EXAMPLES = 8, 200
NEAR = 1.1
"""Errors up to this many times the least one are as good, without a budget."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a [capture] table would say."""

    k: int
    draws: int
    profile: Literal["small", "strict", "exact"]
    mean_kl: float = MEAN_KL

    @property
    def tail(self) -> str:
        """How the tail is kept, in words; with k = 0 the tail is everything."""
        return f"{self.draws} draws" if self.draws else "bucket"

    def table(self) -> dict[str, object]:
        """Keys of [capture]."""
        keys: dict[str, object] = {"k": self.k, "tail_draws": self.draws, "profile": self.profile}
        return keys | ({"mean_kl": self.mean_kl} if self.profile == "small" else {})


@dataclass(frozen=True, slots=True)
class Point:
    """What a setting costs and keeps.

    Attributes:
        setting: the setting.
        bytes_per_token: of one scored row, its token included.
        retained_mass: mean probability of the listed ids.
        kl_added: mean KL(given || stored) over list and tail, nats: what coding loses.
        kl_max: the largest of any row measured.
        gradient_bias, gradient_noise: see `distortion`.
        gradient_error: root of bias^2 + noise^2 / AVERAGED_ROWS: noise averages over the rows that
            share parameters, bias does not.
        corpus_bytes: of the whole corpus.
        hours: of the whole capture on one such machine; the same for every setting.
        efficient: no other setting has less error for as few bytes.
    """

    setting: Setting
    bytes_per_token: float
    retained_mass: float
    kl_added: float
    kl_max: float
    gradient_bias: float
    gradient_noise: float
    gradient_error: float
    corpus_bytes: float
    hours: float
    efficient: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """Teacher rows with long lists.

    Attributes:
        rows: signals and tokens of examples.
        vocab_size: of the teacher.
        rows_per_second: of the engine, its start not counted.
        corpus_rows: rows of the whole corpus.
        seconds: that scoring took.
    """

    rows: list[dict[str, np.ndarray]]
    vocab_size: int
    rows_per_second: float
    corpus_rows: int
    seconds: float = 0.0

    @property
    def capture_seconds(self) -> float:
        """What the whole capture will take on this machine, without the engine's start."""
        return self.corpus_rows / self.rows_per_second

    @property
    def left(self) -> float:
        """Seconds that measuring may take, so that planning costs a tenth of the capture."""
        return max(0.0, COST * self.capture_seconds - self.seconds)


@dataclass(frozen=True, slots=True)
class Size:
    """How much is scored: examples and tokens, of how many in all."""

    examples: int
    every_example: int
    tokens: int
    every_token: int


def size_of(run: Run, examples: int = 0) -> Size:
    """How much planning would score; `examples` of 0 takes what SCORED asks for."""
    from stillroom.pipeline.corpus.preparing import Corpus

    corpus = Corpus.open(run.path("corpus"))
    count, tokens = len(corpus.split("train")), corpus.facts["counts"]["train"]["tokens"]
    wanted = examples or min(max(round(count * SCORED), LEAST_EXAMPLES), MOST_EXAMPLES)
    wanted = min(wanted, count)
    return Size(wanted, count, round(tokens * wanted / max(count, 1)), tokens)


def sample(
    run: Run,
    engine: Literal["vllm", "reference"] = "vllm",
    examples: int = MOST_EXAMPLES,
    on_progress: Progress | None = None,
) -> Sample:
    """Let the run's teacher score examples spread evenly over its prepared corpus.

    Raises:
        ConfigError: the run lacks [teacher] or [capture].
        CorpusError, TeacherError: corpus or teacher cannot be used.
    """
    from stillroom.pipeline.corpus.preparing import Corpus
    from stillroom.pipeline.teacher.opening import open_engine

    teacher = require(run.teacher, "teacher", run.directory)
    capture = require(run.capture, "capture", run.directory)
    corpus = Corpus.open(run.path("corpus"))
    every = corpus.split("train")
    chosen = [every[number] for number in evenly(len(every), examples)]
    vocab_size = int(corpus.facts["tokenizer"]["vocab_size"])
    question = _question(capture, vocab_size)
    opened = open_engine(engine, teacher, question, max_tokens=max(map(_length, chosen)))
    try:
        vocab_size = opened.shape.vocab_size
        rows, seconds = _scored(opened.score(chosen), len(chosen), on_progress)
    finally:
        opened.close()
    scored = sum(len(signals["topk_ids"]) for signals in rows)
    per_example = scored / max(len(rows), 1)  # rows
    rate, every_row = scored / max(seconds, 1e-9), round(per_example * len(every))
    return Sample(rows, vocab_size, rate, every_row, seconds)


def settings(longest: int, vocab_size: int) -> list[Setting]:
    """The settings to compare: lists up to `longest` ids, every profile at the usual ones."""
    lists = [
        Setting(k, n, "small") for k in KS for n in DRAWS if k <= longest and 0 < k + n < vocab_size
    ]
    usual = [setting for setting in lists if setting.k in USUAL_KS and not setting.draws]
    budgets = [replace(setting, mean_kl=kl) for setting in usual for kl in BUDGETS]
    return lists + budgets + [replace(s, profile=p) for s in usual for p in ("strict", "exact")]


def frontier(
    sample: Sample,
    candidates: Sequence[Setting] | None = None,
    on_progress: Progress | None = None,
    seconds: float | None = None,
) -> list[Point]:
    """Measure settings, by rising bytes; the efficient ones are marked. With `seconds`, on as many
    rows as can be coded in that time, and LEAST_CODED at least."""
    longest = max((signals["topk_ids"].shape[1] for signals in sample.rows), default=0)
    todo = list(candidates or settings(longest, sample.vocab_size))
    if len(sample.rows) < 2:
        raise ConfigError(f"{len(sample.rows)} examples", expected="at least 2 to plan with")
    wanted = CODED_ROWS if seconds is None else _codable(sample, todo, seconds)
    sample = replace(sample, rows=_enough(sample.rows, min(wanted, CODED_ROWS)))
    usual = distortion.mean_distribution(sample.rows, sample.vocab_size)
    points = []
    for done, setting in enumerate(todo):
        points.append(_measure(sample, setting, usual))
        if on_progress:
            on_progress(done + 1, len(todo))
    return _marked(sorted(points, key=lambda point: point.bytes_per_token))


def choose(
    points: Sequence[Point], budget: float | None = None, max_kl: float | None = None
) -> Point:
    """The setting to take: least gradient error within `budget` bytes a token; without a budget,
    the cheapest whose error is at most a tenth above the least. `max_kl` excludes first. Draws
    alone (k = 0) are not chosen: they serve one divergence, and name no teacher's first choice.

    Raises:
        ConfigError: no setting is within the limits.
    """
    points = [p for p in points if p.setting.k] or points
    able = [p for p in points if max_kl is None or p.kl_added <= max_kl]
    able = [p for p in able if budget is None or p.bytes_per_token <= budget]
    if not able:
        least = min(points, key=lambda point: point.bytes_per_token)
        raise ConfigError(
            "no setting is within the limits",
            expected=f"{least.bytes_per_token:.1f} bytes a token or more, KL {least.kl_added:.2g}",
            where="cache plan",
        )
    best = min(point.gradient_error for point in able)
    near = [p for p in able if p.gradient_error <= best * (NEAR if budget is None else 1.0)]
    return min(near, key=lambda point: point.bytes_per_token)


def _measure(sample: Sample, setting: Setting, usual: np.ndarray) -> Point:
    sizes = setting.k, setting.draws, sample.vocab_size
    records = [distortion.cut(rows, *sizes, seed) for seed, rows in enumerate(sample.rows)]
    fitted_on, measured = records[::2], records[1::2]
    codec = RowCodec.fit(
        setting.profile,
        fitted_on,
        k=setting.k,
        vocab_size=sample.vocab_size,
        draws=setting.draws,
        temperatures=measured[0]["lse"].shape[1],
        mean_kl=setting.mean_kl,
    )
    coded = [codec.encode_measured(record) for record in measured]
    rows = sum(len(record["topk_ids"]) for record in measured)
    per_token = sum(len(blob) for blob, _ in coded) / max(rows, 1)  # bytes
    found = [codec.decode(blob, ["topk_ids", "topk_logprobs"]) for blob, _ in coded]
    bias, noise = distortion.gradient(sample.rows[1::2], setting.k, setting.draws, usual, found)
    mass = np.concatenate([np.exp(r["topk_logprobs"]).sum(axis=1) for r in measured])
    return Point(
        setting=setting,
        bytes_per_token=per_token,
        retained_mass=float(mass.mean()),
        kl_added=sum(error.kl_sum for _, error in coded) / max(rows, 1),
        kl_max=max(error.kl_max for _, error in coded),
        gradient_bias=bias,
        gradient_noise=noise,
        gradient_error=float(np.sqrt(bias**2 + noise**2 / AVERAGED_ROWS)),
        corpus_bytes=per_token * sample.corpus_rows,
        hours=sample.corpus_rows / sample.rows_per_second / 3600,
    )


def _marked(points: list[Point]) -> list[Point]:
    """Points by rising bytes, marked where the error is below that of all cheaper ones."""
    least, marked = np.inf, []
    for point in points:
        marked.append(replace(point, efficient=point.gradient_error < least))
        least = min(least, point.gradient_error)
    return marked


def _enough(rows: list[dict[str, np.ndarray]], wanted: int) -> list[dict[str, np.ndarray]]:
    """Examples, evenly spread, that hold about so many rows."""
    total = sum(len(signals["topk_ids"]) for signals in rows)
    count = max(2, len(rows) * wanted // max(total, 1))
    return [rows[number] for number in evenly(len(rows), count)]


def _codable(sample: Sample, todo: Sequence[Setting], seconds: float) -> int:
    """Rows of which all settings can be coded in so many seconds, by a trial of a middling one."""
    few = replace(sample, rows=_enough(sample.rows, LEAST_CODED))
    usual = distortion.mean_distribution(few.rows, sample.vocab_size)
    middling = todo[len(todo) // 2]
    _measure(few, middling, usual)  # compiles what is not compiled yet
    started = time.monotonic()
    _measure(few, middling, usual)
    each = (time.monotonic() - started) / sum(len(one["topk_ids"]) for one in few.rows)
    return max(LEAST_CODED, int(seconds / (each * len(todo))))


def _question(capture: Capture, vocab_size: int) -> Capture:
    changes = {"k": min(LONGEST_LIST, vocab_size - 1), "tail_draws": 0, "hidden_layers": ()}
    return capture.model_copy(update=changes)


def _length(example: Example) -> int:
    return len(example.token_ids)


def _scored(
    records: Iterable[TeacherRecord], total: int, on_progress: Progress | None
) -> tuple[list[dict[str, np.ndarray]], float]:
    """(signals with tokens, seconds)."""
    started, rows = time.monotonic(), []
    for record in records:
        rows.append(record.signals | {TOKENS: record.example.token_ids})
        if on_progress:
            on_progress(len(rows), total)
    return rows, time.monotonic() - started
