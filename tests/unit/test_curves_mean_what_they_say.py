"""What is logged: KL of a drawn teacher, parts of a mixture, objectives of weight 0."""

import pytest
import torch

from stillroom.pipeline.config.training import Objective
from stillroom.pipeline.objectives.combine import _term
from stillroom.pipeline.objectives.parts import parts
from stillroom.pipeline.objectives.registry import CacheFacts
from tests.unit.test_objectives import World, live


def expected_value(world, **options):
    """forward_kl's value and gradient over one draw from the tail, by the draw's probability."""
    probabilities = world.teacher_logits.softmax(-1)
    listed = world.signals["topk_ids"].shape[1]
    outside = probabilities.argsort(dim=1, descending=True)[:, listed:]
    chance = probabilities.gather(1, outside)
    chance = chance / chance.sum(1, keepdim=True)
    value, gradients = 0, [0, 0]
    for place in range(outside.shape[1]):
        world.signals["draw_ids"] = outside[:, [place]]
        world.signals["draw_counts"] = torch.ones(len(outside), 1)
        rows = world.rows("forward_kl", tail="sampled", **options) * chance[:, place]
        value = value + rows.detach()
        gradients = [a + b for a, b in zip(gradients, world.gradients(rows))]
    return value, gradients


def test_a_drawn_teachers_value_is_its_kl_in_expectation():
    world = World(k=4, draws=1)
    found, gradients = expected_value(world)
    truth = live("forward_kl", world.teacher_logits.softmax(-1), world.logits.log_softmax(-1))
    torch.testing.assert_close(found, truth.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tuple(gradients), world.gradients(truth), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [0, 4])
def test_a_perfect_student_shows_nothing(k):
    world = World(k=k, draws=1)
    world.hidden = world.teacher_states.requires_grad_(True)
    teacher = world.teacher_head
    world.head = teacher.weight.requires_grad_(True)
    world.form = {"bias": teacher.bias, "softcap": teacher.softcap, "scale": teacher.scale}
    world.teacher_logits = world.teacher_logits.detach()
    found, _ = expected_value(world)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-5)
    if k:
        for tail in ("bucket", "truncate"):
            rows = world.rows("forward_kl", tail=tail)
            torch.testing.assert_close(rows, torch.zeros_like(rows), rtol=0, atol=1e-5)


def test_without_the_teachers_entropy_the_value_is_named_for_what_it_is():
    world = World(k=4, draws=1)
    found, gradients = expected_value(world, baseline="none")
    probabilities, log_q = world.teacher_logits.softmax(-1), world.logits.log_softmax(-1)
    truth = -(probabilities * log_q).sum(-1)
    torch.testing.assert_close(found, truth.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tuple(gradients), world.gradients(truth), rtol=1e-5, atol=1e-6)
    drawn = ("topk_ids", "topk_logprobs", "draw_ids", "draw_counts", "tail_logprob")
    labels = {
        _term(0, Objective(name="forward_kl"), {"": CacheFacts(signals, (1.0,), 9, k=4)}, "").label
        for signals in (drawn, (*drawn, "entropy"))
    }
    assert labels == {"1.forward_kl+entropy", "1.forward_kl"}


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "full_vocabulary"])
def test_divergence_and_cross_entropy_are_told_apart(name):
    world = World(k=4)
    weights = torch.linspace(0.0, 1.0, len(world.labels), dtype=torch.float64)
    spec, context = world.context(name, weights=weights, ce_weight=0.3)
    spec.compute(context)
    told = parts({key: float(value) for key, value in context.sums.items()})
    for part, own in (("divergence", name), ("cross_entropy", "cross_entropy")):
        rows = world.rows(own, weights=weights)
        wanted = float(rows.detach().sum() / weights.sum())
        assert told[part] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "full_vocabulary"])
def test_the_parts_of_a_wider_head_are_of_all_its_columns(name):
    world = World(k=4)
    further = torch.randn(5, world.head.shape[1], dtype=torch.float64)
    world.head = torch.cat([world.head.detach(), further]).requires_grad_()
    weights = torch.linspace(0.0, 1.0, len(world.labels), dtype=torch.float64)
    spec, context = world.context(name, weights=weights, ce_weight=0.3)
    both = spec.compute(context).detach().sum()
    told = parts({key: float(value) for key, value in context.sums.items()})
    log_q = world.logits.detach().log_softmax(-1)
    surprise = -log_q.gather(1, world.labels[:, None])[:, 0]
    wanted = float((weights * surprise).sum() / weights.sum())
    assert told["cross_entropy"] == pytest.approx(wanted, rel=1e-6)
    alone = world.rows(name, weights=weights).detach().sum()
    assert told["divergence"] == pytest.approx(float(alone / weights.sum()), rel=1e-6)
    assert float(both) == pytest.approx(float(alone + 0.3 * wanted * weights.sum()), rel=1e-6)


def test_no_cross_entropy_leaves_no_parts():
    spec, context = World(k=4).context("forward_kl")
    spec.compute(context)
    assert context.sums == {}
