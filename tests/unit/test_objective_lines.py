"""Lines of the `[[objective]]` table of which a key would be read by nothing, or wrongly."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from stillroom.cache_schemas.errors import ConfigError, StillroomError, StudentError
from stillroom.pipeline.config import Capture
from stillroom.pipeline.config.training import Objective
from stillroom.pipeline.data.batch import collate
from stillroom.pipeline.objectives.alignment import affinity
from stillroom.pipeline.objectives.combine import Distiller, balancing_term, terms_of
from stillroom.pipeline.objectives.embedding import info_nce
from stillroom.pipeline.objectives.registry import CacheFacts
from stillroom.pipeline.objectives.teacher_rows import logit_spread
from stillroom.pipeline.record import Example, TeacherRecord
from stillroom.pipeline.teacher.protocol import empty_record, hidden_positions
from tests.student_architectures import config_of
from tests.unit.test_objectives import World

SIGNALS = (*World().signals, "behaviour_logprob")
FACTS = {"": CacheFacts(SIGNALS, (1.0, 2.0), 64, {"hidden.final": 32}, k=31)}
LINES = ("mask", "all"), ("reduction", "sample"), ("curriculum", "low_entropy_first")
IMAGES = {"target": "dino", "layers": [1]}


@pytest.mark.parametrize(("key", "value"), LINES)
@pytest.mark.parametrize(
    ("name", "read"),
    [("affinity", ()), ("hidden", ("mask", "reduction")), ("next_item", ()), ("minillm", LINES[2])],
)
def test_a_key_that_nothing_reads_is_refused(name, read, key, value):
    """Each of them was taken, and the run was the one without it."""
    line = Objective(name=name, **{key: value})
    if key in read:
        assert getattr(terms_of([line], FACTS)[0].table, key) == value
        return
    with pytest.raises(ConfigError, match=key):
        terms_of([line], FACTS)


def test_a_recommenders_line_reads_no_sources():
    line = Objective(name="next_item", source_weights={"films": 2.0})
    with pytest.raises(ConfigError, match=r"source_weights.*Leave source_weights out"):
        terms_of([line], FACTS)


def test_a_presets_curriculum_is_that_of_its_lines_on_rows():
    lines = terms_of([Objective(name="llavadi_joint", curriculum="low_entropy_first")], FACTS)
    told = {term.table.name: term.table.curriculum for term in lines}
    assert told == {"hidden": "none", "forward_kl": "low_entropy_first"}


@pytest.mark.parametrize(
    ("more", "message"),
    [({"temperature": 2.0}, "at temperature 1"), ({"ce_weight": 0.5}, "name = 'cross_entropy'")],
)
def test_z_scores_go_with_nothing_that_has_another_scale(more, message):
    """A student that is the teacher had a loss at T = 2; cross-entropy was of z-scores."""
    options = {"normalise_logits": True}
    world = World()
    assert world.rows("forward_kl", **options).isfinite().all()
    with pytest.raises((ValidationError, StillroomError), match=message):
        world.rows("forward_kl", **options | more)


@pytest.mark.parametrize(("name", "part"), [("phi", "bias"), ("gemma2", "soft cap")])
def test_z_scores_are_of_heads_that_are_one_matrix(name, part):
    model = AutoModelForCausalLM.from_config(config_of(name, 64))
    line = Objective(name="forward_kl", options={"normalise_logits": True})
    with pytest.raises(StudentError, match=rf"head has a {part}.*Leave normalise_logits out"):
        Distiller(model, terms_of([line], FACTS))
    Distiller(model, terms_of([Objective(name="forward_kl")], FACTS))


@pytest.mark.parametrize("mask", [[0, 0, 0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1]])
def test_states_that_are_kept_of_answers_are_those_of_the_mask(mask):
    """The state before an answer's first token predicts it; it was left out, and was all there is
    where the answer is one token."""
    example = Example("e", "d", "s", np.arange(3, 11).astype(np.int32), np.array(mask, bool))
    kept = hidden_positions(example, Capture(k=2, hidden_layers=("final",), hidden_rows="answer"))
    signals = {"hidden.final": np.zeros((len(kept), 4), np.float32)}
    batch = collate([[{"": TeacherRecord(example, 2, signals, kept)}]], 8)
    positions = batch.teachers[""].positions
    assert positions.answer.all()
    assert positions.flat.tolist() == batch.rows.flat[batch.rows.answer].tolist()


def test_a_rejected_example_alone_balances_no_experts():
    class Shape:
        hidden_size = 32

    example = Example("e", "d", "s", np.arange(3, 12).astype(np.int32), np.ones(9, bool))
    capture = Capture(k=4, tail_draws=0)
    batch = collate([[{"": empty_record(example, capture, Shape())}]], 16)
    facts = {"": CacheFacts(tuple(batch.teachers[""].signals), (1.0,), 64, {}, k=4)}
    model = AutoModelForCausalLM.from_config(config_of("qwen3_moe", 64)).float().train()
    terms = terms_of([Objective(name="forward_kl")], facts)
    distiller = Distiller(model, [*terms, balancing_term(terms, 0.01, facts)])
    weights, totals = distiller.weigh(batch, 0.0)
    assert totals.tolist() == [0.0, 0.0]
    assert distiller(batch, weights).tolist() == [0.0, 0.0]


def test_a_row_outside_the_mask_may_be_as_unlikely_as_it_will():
    world = World()
    world.signals["token_logprob"] = world.signals["token_logprob"].clone()
    weights = torch.ones(9, dtype=torch.float64)
    weights[4] = 0.0
    spec, context = world.context("policy_gradient", weights=weights)
    plain = spec.compute(context)
    world.signals["token_logprob"][4] = -900.0
    spec, context = world.context("policy_gradient", weights=weights)
    torch.testing.assert_close(spec.compute(context), plain)


def test_what_is_widened_stays_so_under_autocast():
    torch.manual_seed(0)
    states, head = torch.randn(6, 16), torch.randn(40, 16)
    everyone, scale = torch.ones(6, dtype=torch.bool), torch.tensor(1.0)
    same, own = torch.zeros(6, 6, dtype=torch.bool), torch.arange(6)
    for compute in (
        lambda: affinity(states, everyone, everyone),
        lambda: logit_spread(states, head),
        lambda: info_nce(states, states.roll(1, 1), own, same, scale),
    ):
        plain = compute()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compute(), plain)
