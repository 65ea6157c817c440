"""Records, dense chunks and facts from a stranger: refused as corrupt, or decoded to arrays of
the right shape; never a crash, never an allocation that the sizes do not justify."""

import struct
import tracemalloc

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.cache_schemas import row_scaling, streams
from stillroom.cache_schemas.errors import CacheError, FormatTooNew, ShardCorrupt
from stillroom.cache_schemas.record_codec import RowCodec
from tests.codec_samples import record

SIZES = {"k": 17, "vocab_size": 300, "draws": 4, "temperatures": 2}
SAMPLE = record(0, rows=60, k=17, vocab=300, draws=4, nucleus=True)
DRAWS_ALONE = record(0, rows=60, k=0, vocab=300, draws=4)
SAMPLES = {"exact": SAMPLE, "small": SAMPLE, "strict": SAMPLE, "draws": DRAWS_ALONE}
CODECS = {p: RowCodec.fit(p, [SAMPLE], **SIZES) for p in ("exact", "small", "strict")}
CODECS["draws"] = RowCodec.fit("small", [DRAWS_ALONE], **SIZES | {"k": 0})
BLOBS = {name: codec.encode(SAMPLES[name]) for name, codec in CODECS.items()}
ROWS = np.random.default_rng(0).standard_normal((30, 24)).astype(np.float32)
CHUNKS = {form: row_scaling.encode(ROWS, form, 0.05) for form in row_scaling.FORMS}

edits = st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 255)), min_size=1, max_size=4)
WITHIN_DIRECTORY = 200
"""Half of the edits go to the first bytes, where sizes and kinds are."""


def edited(blob: bytes, changes: list, cut: int, near: bool) -> bytes:
    """A blob with bytes changed and its end cut off, under a checksum that fits."""
    body = bytearray(blob[: -streams.CHECKSUM_BYTES])
    for place, value in changes:
        body[place % (min(len(body), WITHIN_DIRECTORY) if near else len(body))] = value
    body = bytes(body[: len(body) - cut])
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


@settings(max_examples=400, deadline=None)
@given(
    profile=st.sampled_from(sorted(CODECS)),
    changes=edits,
    cut=st.integers(0, 30),
    near=st.booleans(),
)
def test_forged_records_are_refused_or_have_the_right_shapes(profile, changes, cut, near):
    try:
        found = CODECS[profile].decode(edited(BLOBS[profile], changes, cut, near))
    except (ShardCorrupt, FormatTooNew):
        return
    rows = {len(array) for name, array in found.items() if name != "token_ids"}
    assert len(rows) <= 1
    for name, array in found.items():
        assert array.shape[1:] == SAMPLES[profile][name].shape[1:]
        assert array.dtype == SAMPLES[profile][name].dtype
    if profile != "exact" and "topk_ids" in found:
        assert found["topk_ids"].min(initial=0) >= -1
        assert found["topk_ids"].max(initial=0) < 300


@settings(max_examples=200, deadline=None)
@given(
    form=st.sampled_from(sorted(CHUNKS)),
    changes=edits,
    cut=st.integers(0, 30),
    near=st.booleans(),
)
def test_forged_dense_chunks_are_refused_or_have_the_right_shape(form, changes, cut, near):
    try:
        found = row_scaling.decode(edited(CHUNKS[form], changes, cut, near), 30, 24, form, 0.05)
    except (ShardCorrupt, FormatTooNew):
        return
    assert found.shape == (30, 24)


@pytest.mark.parametrize("profile", sorted(CODECS))
def test_every_flipped_bit_is_found(profile):
    blob = BLOBS[profile]
    for bit in range(0, 8 * len(blob), 97):
        flipped = bytearray(blob)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises((ShardCorrupt, FormatTooNew)):
            CODECS[profile].decode(bytes(flipped))


@pytest.mark.parametrize("size", [0, 1, 2, 13, 21, 22, 100])
def test_cut_records_are_refused(size):
    with pytest.raises(ShardCorrupt):
        CODECS["small"].decode(BLOBS["small"][:size])


@pytest.mark.parametrize("profile", sorted(CODECS))
@pytest.mark.parametrize("rows", [61, 1 << 20, (1 << 32) - 1])
def test_a_header_of_many_rows_allocates_nothing(profile, rows):
    blob = bytearray(BLOBS[profile])
    struct.pack_into("<I", blob, 4, rows)
    forged = edited(bytes(blob), [(0, ord("S"))], 0, True)
    tracemalloc.start()
    with pytest.raises(ShardCorrupt):
        CODECS[profile].decode(forged)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def test_a_newer_record_asks_for_an_update():
    blob = bytearray(BLOBS["small"])
    blob[2] = streams.VERSION + 1
    with pytest.raises(FormatTooNew, match="Update stillroom"):
        CODECS["small"].decode(edited(bytes(blob), [(0, ord("S"))], 0, True))


def test_a_record_of_another_profile_is_refused():
    with pytest.raises(ShardCorrupt, match="profile"):
        CODECS["strict"].decode(BLOBS["small"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("profile", "tiny"),
        ("profile", None),
        ("k", -1),
        ("k", 1 << 40),
        ("k", "17"),
        ("vocab_size", 1 << 60),
        ("draws", None),
        ("codebook", None),
        ("codebook", {}),
        ("codebook", {"gamma": 0, "first_step": 0, "max_step": 1, "floor": 30}),
        ("codebook", {"gamma": 0, "first_step": 1e-9, "max_step": 1e-9, "floor": 1e5}),
        ("codebook", {"gamma": float("nan"), "first_step": 1, "max_step": 1, "floor": 30}),
        ("mean_kl", "much"),
        ("tables", []),
        ("tables", {"lists": "00", "common": "00"}),
    ],
)
def test_facts_that_describe_no_codec_are_refused(key, value):
    codec = CODECS["small"]
    with pytest.raises(CacheError):
        RowCodec.from_facts(codec.facts() | {key: value}, codec.tables)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("lists", np.zeros((0, 300), np.uint16)),
        ("lists", np.zeros((300,), np.uint16)),
        ("lists", np.full((2, 300), 300, np.uint16)),
        ("lists", np.full((2, 300), -1, np.int32)),
        ("common", np.zeros(300, np.uint16)),
        ("common", np.arange(299, dtype=np.uint16)),
        ("common", np.arange(600, dtype=np.uint16).reshape(2, 300)),
        ("common", np.linspace(0, 299, 300)),
    ],
)
def test_tables_that_are_no_orders_of_the_vocabulary_are_refused(name, table):
    codec = CODECS["small"]
    tables = codec.tables | {name: table}
    with pytest.raises(CacheError):
        RowCodec("small", **SIZES, codebook=codec.codebook, tables=tables)


def test_a_table_of_another_cache_is_refused():
    codec = CODECS["small"]
    other = RowCodec.fit("small", [record(1, rows=60, k=17, vocab=300)], **SIZES)
    with pytest.raises(ShardCorrupt, match="table 'common'"):
        RowCodec.from_facts(codec.facts(), other.tables)
    with pytest.raises(ShardCorrupt, match="missing"):
        RowCodec.from_facts(codec.facts(), {})
