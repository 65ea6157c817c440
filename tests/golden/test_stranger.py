"""The readers that were written from FORMAT.md alone read every cache, and every number is ours."""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest

from stillroom.cache_schemas import row_scaling
from stillroom.cache_schemas.record_codec import RowCodec
from stillroom.pipeline.cache.reader import TeacherCache
from tests.codec_samples import SHAPES, assert_decoded, record
from tests.golden import mini_dense_reader, mini_reader, mini_record_reader
from tests.golden.make_cache_fixtures import flat
from tests.golden.make_codec_fixtures import DIRECTORY, STEP
from tests.golden.test_cache_fixtures import CACHES
from tests.golden.test_codec_fixtures import codec_of
from tests.synthetic_records import make_candidates_plan, make_plan, write_cache

READERS = (mini_reader, mini_record_reader, mini_dense_reader)
TAILS = {
    "list": {"k": 8},
    "long list": {"k": 70},
    "list and draws": {"k": 4, "tail_draws": 8},
    "draws alone": {"k": 0, "tail_draws": 8},
}
DENSE = {"exact": "bf16", "small": "step", "strict": "int8", "portable": "fp16"}


def assert_read_alike(root) -> None:
    """Every field of every example, as `flat` names them."""
    found = {}
    for number, example in enumerate(mini_reader.Cache(root)):
        images = example.pop("images")
        text = [example.pop(name) for name in ("example_id", "document_id", "source")]
        found[f"{number}/text"] = np.array([*text, *(image["sha256"] for image in images)])
        spans = [(image["start"], image["length"]) for image in images]
        found[f"{number}/spans"] = np.array(spans)
        found[f"{number}/numbers"] = np.array([example.pop("weight"), example.pop("first_row")])
        found |= {f"{number}/{name}": array for name, array in example.items()}
    expected = flat(TeacherCache.open(root))
    assert_decoded(found, expected)
    for name, array in expected.items():
        assert (found[name].dtype.kind, found[name].shape) == (array.dtype.kind, array.shape), name


def test_they_import_nothing_of_ours():
    ours = {"stillroom", "cache_schemas", "pipeline", "stages"}
    for module in READERS:
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                top = name.partition(".")[0]
                assert top not in ours, name
                assert top != "tests" or name.startswith("tests.golden")
                assert top == "tests" or top in sys.stdlib_module_names or "." not in name


@pytest.mark.parametrize("path", CACHES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_golden_caches(path):
    assert_read_alike(path)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("profile", DENSE)
def test_caches_of_today(tmp_path, profile, tail):
    settings = {"profile": profile, "moments": True, "hidden_layers": [2, "final"]}
    codec = {"hidden_codec": DENSE[profile]}
    plan = make_plan(7, 3, 12, images=True, **settings, **codec, **TAILS[tail])
    assert_read_alike(write_cache(tmp_path / "cache", plan))


def test_candidates_of_today(tmp_path):
    assert_read_alike(write_cache(tmp_path / "cache", make_candidates_plan()))


RECORDS = {
    "prompt of its own": {},
    "nucleus": {"nucleus": True},
    "long lists": {"k": 100},
    "no draws": {"draws": 0},
    "draws alone": {"k": 0},
    "no rows": {"rows": 0},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("profile", ["small", "strict", "exact"])
def test_records_of_today(profile, kind, shape):
    sizes = {"rows": 12, "k": 12, "vocab": 400, "draws": 4} | RECORDS[kind]
    sample = record(3, shape=shape, prompt=4, **sizes)
    widths = {"k": sizes["k"], "vocab_size": 400, "draws": sizes["draws"], "temperatures": 2}
    codec = RowCodec.fit(profile, [sample], **widths)
    assert_same_record(codec, codec.encode(sample))


@pytest.mark.parametrize("left", ["tail_logprob", "token_ids", "topk_ids", "token_rank", "lse"])
@pytest.mark.parametrize("profile", ["small", "strict"])
def test_records_that_lack_a_signal(profile, left):
    sample = record(3, rows=12, k=12, vocab=400, draws=4, prompt=4)
    codec = RowCodec.fit(profile, [sample], k=12, vocab_size=400, draws=4, temperatures=2)
    del sample[left]
    assert_same_record(codec, codec.encode(sample))


def assert_same_record(codec: RowCodec, blob: bytes) -> None:
    found = mini_record_reader.read(blob, codec.facts(), codec.tables)
    expected = codec.decode(blob)
    assert_decoded(found, expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("profile", ["exact", "small", "strict"])
def test_golden_records(profile, seed):
    blob = (DIRECTORY / f"{profile}-{seed}.record").read_bytes()
    assert_same_record(codec_of(profile), blob)


@pytest.mark.parametrize("form", row_scaling.FORMS)
def test_golden_chunks(form):
    blob = (DIRECTORY / f"{form}.chunk").read_bytes()
    found = mini_dense_reader.row_scaled(blob, form, STEP, 20, 16)
    np.testing.assert_array_equal(found, np.load(DIRECTORY / f"{form}.npy"))
