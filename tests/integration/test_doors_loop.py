"""A cache in plain PyTorch: the page runs, and its loss is that of `stillroom train`."""

import copy
import pickle
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from stillroom import CachedDataset, PackedStream, distillation_loss, loss_totals
from stillroom.cache_schemas.errors import ConfigError, PlanMismatch, StudentError
from stillroom.pipeline.data.loader import DistillLoader, Geometry
from stillroom.pipeline.data.packing import Position
from stillroom.pipeline.objectives.combine import Distiller, signals_needed
from stillroom.pipeline.objectives.weighting import UnitWeights, scales
from stillroom.pipeline.student.loading import load
from tests import memory_cache, tiny_models
from tests.in_float64 import ROUNDING

PAGE = Path(__file__).resolve().parents[2] / "runbooks" / "80-a-loop-of-your-own.md"
LINES = [
    {"name": "forward_kl", "weight": 2.0, "options": {"ce_weight": 0.1, "temperature": 2.0}},
    {"name": "jsd", "mask": "all", "reduction": "sample", "final_weight": 0.0},
    {"name": "cross_entropy", "curriculum": "low_entropy_first"},
]


@pytest.fixture(scope="module")
def cache(deep_llama, tmp_path_factory):
    made = memory_cache.captured(
        deep_llama, memory_cache.examples(30), temperatures=(1.0, 2.0), hidden_layers=("final",)
    )
    return str(made.write(tmp_path_factory.mktemp("cache") / "cache"))


@pytest.fixture(scope="module")
def model(tiny_llama):
    return load(tiny_llama, dtype=torch.float64)


def test_the_page_runs(cache, tiny_llama):
    torch.manual_seed(0)
    names = {"cache": cache, "student": str(tiny_llama)}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 3
    assert len(blocks[0].splitlines()) <= 20
    assert np.mean(names["losses"][-3:]) < 0.8 * np.mean(names["losses"][:3])
    stream = PackedStream(names["data"], steps=6, batch_tokens=96, seed=0)
    assert names["seen"] + names["rest"] == [batch.batch.example_ids for batch in stream]


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_the_loss_is_that_of_the_distiller(cache, model, progress):
    data = CachedDataset(cache, LINES, packed=True)
    step = [data.collate([data[i] for i in part]) for part in (range(5), range(5, 12))]
    totals = loss_totals(step, progress)
    own = sum(
        distillation_loss(model.model(**b.inputs).last_hidden_state, model, b, totals, progress)
        for b in step
    )
    distiller = Distiller(model, data.terms)
    weighed = [distiller.weigh(batch.host, progress) for batch in step]
    factors = scales(data.terms, sum(total for _, total in weighed), progress, 1)
    # A line of weight 0 is shown and teaches nothing.
    taught = torch.tensor([float(bool(term.weight(progress))) for term in data.terms]).double()
    expected = sum(
        distiller(batch.batch, UnitWeights(weights).times(factors), progress) @ taught
        for batch, (weights, _) in zip(step, weighed)
    )
    torch.testing.assert_close(own, expected, rtol=ROUNDING, atol=0)


def test_a_matrix_serves_where_nothing_else_happens_to_the_logits(cache, model):
    data = CachedDataset(cache)
    batch = data.collate([data[0], data[1]])
    hidden = model.model(**batch.inputs).last_hidden_state
    found = [
        distillation_loss(hidden, head, batch)
        for head in (model, model.lm_head, model.lm_head.weight)
    ]
    assert found[0] == found[1] == found[2]


def test_a_stream_is_the_order_of_training(cache):
    data = CachedDataset(cache, packed=True)
    stream = PackedStream(data, steps=5, batch_tokens=96, seed=3)
    geometry = Geometry(24, 4)
    signals = signals_needed(data.terms, data.sources)
    loader = DistillLoader(data.sources, signals, geometry, seed=3)
    expected = [batches[0].example_ids for batches, _ in loader.steps(Position(), 5)]
    assert [batch.batch.example_ids for batch in stream] == expected
    assert [batch.batch.example_ids for batch in stream] == expected  # from its beginning


def test_ranks_share_a_step(cache):
    data = CachedDataset(cache, packed=True)
    alone = [b.batch.example_ids for b in PackedStream(data, 6, batch_tokens=48)]
    ranks = [
        [b.batch.example_ids for b in PackedStream(data, 3, 48, rank=r, world_size=2)]
        for r in range(2)
    ]
    assert [one for step in zip(*ranks) for one in step] == alone


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 4])
def test_a_stopped_stream_goes_on(cache, workers, stop):
    def loader():
        stream = PackedStream(CachedDataset(cache, packed=True), steps=7, batch_tokens=96)
        return StatefulDataLoader(stream, batch_size=None, num_workers=workers)

    whole = [batch.batch.example_ids for batch in loader()]
    first = loader()
    begun = [batch.batch.example_ids for batch in islice(first, stop)]
    again = loader()
    again.load_state_dict(first.state_dict())
    assert begun + [batch.batch.example_ids for batch in again] == whole
    assert len(whole) == 7


def test_the_state_of_another_stream_is_refused(cache):
    data = CachedDataset(cache, packed=True)
    state = PackedStream(data, 4, batch_tokens=96).state_dict()
    with pytest.raises(PlanMismatch, match="a stream with seed = 0; expected 1"):
        PackedStream(data, 4, batch_tokens=96, seed=1).load_state_dict(state)


def test_another_number_of_workers_is_refused_by_name(cache):
    def loader(workers):
        stream = PackedStream(CachedDataset(cache, packed=True), steps=7, batch_tokens=96)
        return StatefulDataLoader(stream, batch_size=None, num_workers=workers)

    first = loader(2)
    next(iter(first))
    again = loader(1)
    again.load_state_dict(first.state_dict())
    with pytest.raises(PlanMismatch, match="a stream with num_workers = 2; expected 1"):
        next(iter(again))


@pytest.mark.parametrize("packed", [False, True])
def test_rows_that_an_example_does_not_fit_into(packed, cache):
    data = CachedDataset(cache, packed=packed)
    longest = int(data.lengths.max())
    assert len(list(PackedStream(data, 2, batch_tokens=longest))) == 2
    short = [{"batch_tokens": longest - 1}] + [{"sequence_length": longest - 1}] * packed
    for settings in short:
        message = rf"tokens; expected at most {longest - 1}.*Set batch_tokens to {longest} or more"
        with pytest.raises(StudentError, match=message):
            list(PackedStream(data, 2, **settings))
    assert len(list(PackedStream(data, 2, longest, sequence_length=longest))) == 2  # as it says
    message = rf"more than batch_tokens = {longest}.*Set batch_tokens to {2 * longest} or more"
    with pytest.raises(ConfigError, match=message):
        PackedStream(data, 2, batch_tokens=longest, sequence_length=2 * longest)
    PackedStream(data, 2, batch_tokens=2 * longest, sequence_length=2 * longest)


def test_workers_that_are_spawned_read_the_same(cache):
    data = CachedDataset(cache, LINES)
    data.records.read(0)
    again = pickle.loads(pickle.dumps(data))
    assert again[3][""] is not None
    loader = DataLoader(
        data, 8, num_workers=1, collate_fn=data.collate, multiprocessing_context="spawn"
    )
    here = [data.collate(data.__getitems__(list(range(s, min(s + 8, 30))))) for s in (0, 8, 16, 24)]
    for found, expected in zip(loader, here, strict=True):
        assert found.batch.example_ids == expected.batch.example_ids
        for name, signal in expected.batch.teachers[""].signals.items():
            assert torch.equal(found.batch.teachers[""].signals[name], signal)


def test_what_does_not_fit_is_refused(cache, model):
    with pytest.raises(ConfigError, match=r"unknown objective 'forward_lk'.*forward_kl"):
        CachedDataset(cache, ["forward_lk"])
    with pytest.raises(ConfigError, match=r"unknown key 'wieght'. Did you mean 'weight'"):
        CachedDataset(cache, [{"name": "jsd", "wieght": 1.0}])
    with pytest.raises(StudentError, match="temperature 3 is not in the cache"):
        CachedDataset(cache, [{"name": "forward_kl", "options": {"temperature": 3.0}}])
    data = CachedDataset(cache, ["hidden"])
    batch = data.collate([data[0], data[1]])
    hidden = model.model(**batch.inputs).last_hidden_state
    with pytest.raises(StudentError, match=r"1\.hidden needs more of the student"):
        distillation_loss(hidden, model, batch)
    with pytest.raises(StudentError, match="neither shifted nor cut"):
        distillation_loss(hidden[:, :-1], model, batch)
    with pytest.raises(IndexError):
        data[30]


def test_logits_in_place_of_states_are_known_for_what_they_are(cache, model):
    data = CachedDataset(cache)
    batch = data.collate(data[2:4])
    logits = model(**batch.inputs).logits
    message = r"states of 768 numbers: these look like logits; expected 64.*last_hidden_state"
    for head in (model, model.lm_head, model.lm_head.weight):
        with pytest.raises(StudentError, match=message):
            distillation_loss(logits, head, batch)
        with pytest.raises(StudentError, match="states of 63 numbers; expected 64"):
            distillation_loss(logits[..., :63], head, batch)


def test_several_examples_at_once(cache):
    data = CachedDataset(cache)
    assert [one[""].example.example_id for one in data[2:9:3]] == [
        data[number][""].example.example_id for number in (2, 5, 8)
    ]
    assert data[30:] == []
    assert data[-1:][0][""].example == data[29][""].example


def test_a_head_without_rows_for_every_word(cache, model):
    """Labels and listed ids beyond it would be left out of the loss in silence."""
    data, rows = CachedDataset(cache), 400
    words = data.sources[""].plan.facts["tokenizer"]["vocab_size"]
    assert rows < words
    batch = data.collate([data[0]])
    hidden = model.model(**batch.inputs).last_hidden_state
    message = rf"the head has {rows} rows; expected at least the tokenizer's {words} ids"
    with pytest.raises(StudentError, match=message):
        distillation_loss(hidden, model.lm_head.weight[:rows], batch)
    small = copy.deepcopy(model)
    small.resize_token_embeddings(rows)
    with pytest.raises(StudentError, match=message):
        distillation_loss(hidden, small, batch)
    with pytest.raises(StudentError, match=message):
        Distiller(small, data.terms)


def test_a_head_that_is_narrower_than_the_softmax_is_measured(model, tmp_path):
    """A tied head of the tokenizer's own size: what the teacher has beyond it joins the tail."""
    teacher = tiny_models.save_qwen3(tmp_path / "teacher", vocab_size=768, padded_vocab_size=800)
    data = CachedDataset(memory_cache.captured(teacher, memory_cache.examples(2)))
    batch = data.collate([data[0]])
    assert batch.terms[0].facts.vocab_size == 800
    hidden = model.model(**batch.inputs).last_hidden_state
    assert torch.isfinite(distillation_loss(hidden, model, batch))
    with pytest.raises(StudentError, match=r"the head has 767 rows; expected at least .* 768 ids"):
        distillation_loss(hidden, model.lm_head.weight[:767], batch)
