"""What the record codec refuses to write, and how it says so; and that it stays light to import."""

import subprocess
import sys

import numba
import numpy as np
import pytest

from stillroom.cache_schemas import kernels
from stillroom.cache_schemas.errors import CacheError
from stillroom.cache_schemas.record_codec import RowCodec
from tests.codec_samples import record, sorted_rows

SIZES = {"k": 4, "vocab_size": 50, "draws": 2, "temperatures": 2}
SAMPLE = record(0, rows=20, k=4, vocab=50, draws=2)


@pytest.fixture(scope="module")
def codec() -> RowCodec:
    return RowCodec.fit("small", [SAMPLE], **SIZES)


def changed(name: str, row: int, values) -> dict:
    signals = {n: array.copy() for n, array in SAMPLE.items()}
    signals[name][row] = values
    return signals


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("topk_ids", [0, 1, 2, 50], "signal topk_ids, row 7: id 50; expected an id"),
        ("topk_ids", [0, -1, 2, 3], "signal topk_ids, row 7: an entry after the padding"),
        ("topk_logprobs", 0.5, r"signal topk_logprobs, row 7: .* 0.5; expected at most 0"),
        ("topk_logprobs", np.nan, "signal topk_logprobs, row 7: .* nan"),
        ("tail_logprob", 0.25, r"signal tail_logprob, row 7: .* 0.25; expected at most 0"),
        ("tail_logprob", np.nan, "signal tail_logprob, row 7"),
        ("draw_ids", [50, -1], "signal draw_ids, row 7: 50; expected below 50"),
        ("draw_counts", [0, 0], "signal draw_counts, row 7: 0; expected at least 1"),
    ],
)
def test_values_that_are_no_teacher_output_are_named(codec, name, values, message):
    with pytest.raises(CacheError, match=message):
        codec.encode(changed(name, 7, values))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("token_logprob", -np.inf),
        ("entropy", np.nan),
        ("lse", [1e12, -1e12]),
        ("logit_std", np.inf),
        ("logit_mean", -3e38),
    ],
)
def test_scalars_beyond_the_steps_are_kept_exactly(codec, name, values):
    signals = changed(name, 7, values)
    np.testing.assert_array_equal(codec.decode(codec.encode(signals))[name], signals[name])


@pytest.mark.parametrize("token", [-5, 50, 1 << 30])
def test_tokens_outside_the_vocabulary_are_kept_exactly(codec, token):
    signals = changed("token_ids", 7, token)
    found = codec.decode(codec.encode(signals))
    np.testing.assert_array_equal(found["token_ids"], signals["token_ids"])
    np.testing.assert_array_equal(found["token_rank"], signals["token_rank"])


def test_rows_out_of_order_come_back_sorted(codec):
    shuffled = {n: array.copy() for n, array in SAMPLE.items()}
    for name in ("topk_ids", "topk_logprobs"):
        shuffled[name] = shuffled[name][:, ::-1]
    found = codec.decode(codec.encode(shuffled))
    np.testing.assert_array_equal(sorted_rows(found)[0], sorted_rows(SAMPLE)[0])
    assert (np.diff(found["topk_logprobs"], axis=1) <= 0).all()


def test_arrays_that_do_not_fit_each_other_are_a_programming_error(codec):
    with pytest.raises(ValueError, match="shape"):
        codec.encode({"topk_ids": np.zeros((3, 5), np.int32)})
    with pytest.raises(ValueError, match="number of rows"):
        codec.encode({"entropy": np.zeros(3), "token_rank": np.ones(4, np.int32)})
    with pytest.raises(ValueError, match="no such signals"):
        codec.encode({"topk": np.zeros(3)})


def test_importing_the_codec_does_not_import_numba():
    code = "import sys, stillroom.cache_schemas.record_codec; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_kernels_compile_where_no_cache_directory_can_be_written(monkeypatch):
    njit = numba.njit

    def refuses_a_cache(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", refuses_a_cache)

    def double(x):
        return 2 * x

    assert kernels.compiled(double)(21) == 42
