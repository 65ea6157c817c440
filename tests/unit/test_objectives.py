"""Every objective from a cache against the same loss from a live teacher, in fp64."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stillroom.pipeline  # noqa: F401  (see pipeline.cpu_wheels)
from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.config.training import Objective
from stillroom.pipeline.data.batch import DistillBatch, Teacher, Units
from stillroom.pipeline.objectives import registry
from stillroom.pipeline.objectives.alignment import distance
from stillroom.pipeline.objectives.combine import terms_of
from stillroom.pipeline.objectives.divergence import DIVERGENCES
from stillroom.pipeline.objectives.policy import effective_sample_share, returns, surrogate
from stillroom.pipeline.objectives.registry import CacheFacts, Context
from stillroom.pipeline.objectives.teacher_rows import logit_spread, sampled_tail
from stillroom.pipeline.objectives.weighting import admitted, unit_weights
from stillroom.pipeline.student.states import Head, StudentStates

ROWS, WIDTH, VOCABULARY, TEACHER_WIDTH = 9, 12, 31, 7
TEMPERATURES = (0.7, 1.0, 2.0)


class World:
    """A student's states and head, a teacher's logits, and the cache that they make."""

    def __init__(self, k=VOCABULARY, draws=0, seed=0):
        torch.manual_seed(seed)
        double = {"dtype": torch.float64}
        self.hidden = torch.randn(ROWS, WIDTH, **double, requires_grad=True)
        self.head = torch.randn(VOCABULARY, WIDTH, **double, requires_grad=True)
        self.teacher_states = torch.randn(ROWS, TEACHER_WIDTH, **double)
        bias = torch.randn(VOCABULARY, **double)
        matrix = torch.randn(VOCABULARY, TEACHER_WIDTH, **double)
        self.teacher_head = Head(matrix, bias, softcap=7.0, scale=1.5)
        self.teacher_logits = self.teacher_head.logits(self.teacher_states)
        self.form = {"bias": None, "softcap": None}  # of the student's head
        self.labels = torch.randint(0, VOCABULARY, (ROWS,))
        self.example = torch.arange(ROWS) // 4
        self.signals = self._signals(k, draws)

    def _signals(self, k, draws):
        logits = self.teacher_logits
        logprobs = logits.log_softmax(-1)
        top = logprobs.topk(k)
        mean, std = logits.mean(-1, keepdim=True), logits.std(-1, keepdim=True, unbiased=False)
        signals = {
            "topk_ids": top.indices,
            "topk_logprobs": top.values,
            "tail_logprob": (1 - top.values.exp().sum(-1)).clamp_min(1e-300).log(),
            "lse": torch.stack([(logits / t).logsumexp(-1) for t in TEMPERATURES], dim=1),
            "logit_mean": mean[:, 0],
            "logit_std": std[:, 0],
            "zscore_lse": ((logits - mean) / (1e-7 + std)).logsumexp(-1),
            "token_logprob": logprobs.gather(1, self.labels[:, None])[:, 0],
            "entropy": -(logprobs.exp() * logprobs).sum(-1),
            "hidden.final": self.teacher_states,
        }
        if draws:
            outside = logprobs.exp().scatter(1, top.indices, 0.0)
            ids = outside.topk(draws).indices
            signals |= {"draw_ids": ids, "draw_counts": torch.ones_like(ids)}
        return signals

    @property
    def logits(self):
        return Head(self.head, **self.form).logits(self.hidden)

    def context(self, name, weights=None, projector=None, **options):
        flat, image = torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.bool)
        units = Units(flat, self.example, ~image, image)
        batch = DistillBatch(
            flat[None],
            flat[None],
            units,
            ~image,
            self.labels,
            {"": Teacher(self.signals, units)},
            ("a", "b", "c"),
            ("s", "s", "s"),
            torch.ones(3),
            ROWS,
        )
        spec, checked = registry.find(name, options, "test")
        facts = CacheFacts(tuple(self.signals), TEMPERATURES, VOCABULARY)
        checked = spec.settle(checked, facts)
        made = torch.ones(ROWS, dtype=torch.float64) if weights is None else weights
        states = StudentStates(self.hidden, Head(self.head, **self.form))
        return spec, Context(
            states,
            batch,
            self.signals,
            units,
            made,
            checked,
            facts,
            projector,
            "chunked",
            self.teacher_head,
        )

    def rows(self, name, **options):
        spec, context = self.context(name, **options)
        return spec.compute(context)

    def gradients(self, rows):
        return torch.autograd.grad(rows.sum(), (self.hidden, self.head))


def live(name, p, log_q):
    """Each divergence by its definition, on the whole vocabulary."""
    q, log_p = log_q.exp(), p.log()
    if name == "forward_kl":
        return (p * (log_p - log_q)).sum(-1)
    if name == "reverse_kl":
        return (q * (log_q - log_p)).sum(-1)
    if name == "jsd":
        m = (p + q) / 2
        return (0.5 * p * (log_p - m.log()) + 0.5 * q * (log_q - m.log())).sum(-1)
    if name == "skew_forward_kl":
        return (p * (log_p - (0.1 * p + 0.9 * q).log())).sum(-1)
    if name == "skew_reverse_kl":
        return (q * (log_q - (0.9 * p + 0.1 * q).log())).sum(-1)
    return (p - q).abs().sum(-1) / 2


def assert_same(world, found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    ours, theirs = world.gradients(found), world.gradients(expected)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", [n for n in DIVERGENCES if n != "adaptive_kl"])
def test_a_full_cache_gives_the_live_teachers_loss(name, temperature):
    world = World()
    found = world.rows(name, temperature=temperature)
    p = (world.teacher_logits / temperature).softmax(-1)
    log_q = (world.logits / temperature).log_softmax(-1)
    assert_same(world, found, temperature**2 * live(name, p, log_q))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_the_rebuilt_vocabulary_gives_the_live_teachers_loss_at_any_temperature(name, temperature):
    world = World(k=3)
    found = world.rows("full_vocabulary", divergence=name, temperature=temperature)
    p = (world.teacher_logits / temperature).softmax(-1)
    log_q = (world.logits / temperature).log_softmax(-1)
    assert_same(world, found, temperature**2 * live(name, p, log_q))


def test_z_scored_logits_give_llavadis_normalised_loss():
    world = World()

    def scored(logits):
        mean, std = logits.mean(-1, keepdim=True), logits.std(-1, keepdim=True, unbiased=False)
        return (logits - mean) / (1e-7 + std)

    p, log_q = scored(world.teacher_logits).softmax(-1), scored(world.logits).log_softmax(-1)
    found = world.rows("forward_kl", normalise_logits=True)
    assert_same(world, found, live("forward_kl", p, log_q))


def test_the_spread_of_logits_needs_no_logits():
    world = World()
    expected = world.logits.std(-1, unbiased=False)
    found = logit_spread(world.hidden, world.head)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_cross_entropies_are_those_of_torch():
    world = World()
    expected = torch.nn.functional.cross_entropy(world.logits, world.labels, reduction="none")
    assert_same(world, world.rows("cross_entropy"), expected)
    best = world.teacher_logits.argmax(-1)
    expected = torch.nn.functional.cross_entropy(world.logits, best, reduction="none")
    assert_same(world, world.rows("teacher_argmax"), expected)


def test_the_mix_is_the_sum_of_its_parts():
    world = World(k=5)
    mixed = world.rows("forward_kl", ce_weight=0.3)
    expected = world.rows("forward_kl") + 0.3 * world.rows("cross_entropy")
    assert_same(world, mixed, expected)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_the_gap_to_the_live_teacher_shrinks_as_k_grows(name):
    world = World()
    log_q = world.logits.log_softmax(-1)
    truth = live(name, world.teacher_logits.softmax(-1), log_q)
    gaps = [(truth - world.rows(name, k=k)).min() for k in range(1, VOCABULARY + 1)]
    means = [(truth - world.rows(name, k=k)).mean() for k in range(1, VOCABULARY + 1)]
    # Reverse divergences see a tail of at least 2^-24, see the kernel's notes on numerics.
    assert all(gap >= -1e-5 for gap in gaps)
    assert all(later <= earlier + 1e-5 for earlier, later in itertools.pairwise(means))
    assert abs(means[-1]) < 1e-9


def test_a_sampled_tail_that_is_the_tail_gives_the_live_loss():
    world = World(k=4, draws=VOCABULARY - 4)
    tail = world.teacher_logits.softmax(-1).gather(1, world.signals["draw_ids"])
    world.signals["draw_counts"] = (tail * 1e12).round()
    ids, weights = sampled_tail(world.signals)
    torch.testing.assert_close(weights.double(), tail, rtol=1e-5, atol=1e-9)
    found = world.rows("forward_kl", tail="sampled")
    expected = live("forward_kl", world.teacher_logits.softmax(-1), world.logits.log_softmax(-1))
    assert_same(world, found, expected)
    assert ids.shape == weights.shape


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"normalise_logits": True}])
def test_what_rounding_lifts_above_certainty_is_scaled_back(options):
    world = World()
    exact = world.rows("forward_kl", **options)
    world.signals["lse"][:, 0] -= 1 / 128
    world.signals["lse"][:, 1] += 1 / 128
    world.signals["zscore_lse"] -= 1 / 128
    rounded = world.rows("forward_kl", **options)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=1e-6)


def test_draws_of_the_whole_distribution_need_no_exact_ids():
    world = World(k=0, draws=VOCABULARY)
    p = world.teacher_logits.softmax(-1)
    world.signals["draw_counts"] = (p.gather(1, world.signals["draw_ids"]) * 1e12).round()
    rows = world.rows("forward_kl", tail="sampled")
    found = world.gradients(rows)
    expected = world.gradients(live("forward_kl", p, world.logits.log_softmax(-1)))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_ids_that_a_smaller_student_lacks_join_the_tail():
    world = World()
    world.signals["topk_ids"] = torch.where(
        world.signals["topk_ids"] < 20, world.signals["topk_ids"], world.signals["topk_ids"] + 100
    )
    rows = world.rows("forward_kl")
    assert torch.isfinite(rows).all()
    assert all(torch.isfinite(g).all() for g in world.gradients(rows))


def without(world, *words):
    """The teacher's rows of these words are beyond the student's head; bool [rows, words]."""
    for name in ("topk_ids", "draw_ids"):
        if name in world.signals:
            ids = world.signals[name]
            away = torch.isin(ids, torch.tensor(words))
            world.signals[name] = torch.where(away, ids + VOCABULARY, ids)
    there = torch.ones(ROWS, VOCABULARY, dtype=torch.bool)
    there[:, list(words)] = False
    return there


@pytest.mark.parametrize("baseline", ["entropy", "none"])
@pytest.mark.parametrize("k", [0, 4])
def test_draws_that_a_smaller_student_lacks_are_none(k, baseline):
    """With every word of the tail drawn as often as it is likely, what is left is the divergence
    over the words that both have; the baseline is that of the draws' own words."""
    world = World(k=k, draws=VOCABULARY - k)
    p, log_q = world.teacher_logits.softmax(-1), world.logits.log_softmax(-1)
    drawn = p.gather(1, world.signals["draw_ids"])
    world.signals["draw_counts"] = (drawn * 1e12).round()
    in_list = torch.zeros(ROWS, VOCABULARY).scatter(1, world.signals["topk_ids"], 1.0) > 0
    both = without(world, 2, 17, 23)
    found = world.rows("forward_kl", tail="sampled", baseline=baseline)
    crossed = -(p * log_q).where(both, 0).sum(-1)
    known = both | (~in_list if baseline == "entropy" else both)
    own = (p * p.log()).where(known, 0).sum(-1) if baseline == "entropy" else 0.0
    torch.testing.assert_close(found, crossed + own, rtol=1e-7, atol=1e-9)
    ours, theirs = world.gradients(found), world.gradients(crossed)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_the_first_choice_is_one_that_the_student_has():
    world = World(k=4)
    best = world.signals["topk_ids"]
    second, gone = best[1, 1].item(), best[2].tolist()
    without(world, best[1, 0].item(), *gone)
    rows, log_q = world.rows("teacher_argmax"), world.logits.log_softmax(-1)
    assert rows[2] == 0
    if second not in gone:
        torch.testing.assert_close(rows[1], -log_q[1, second])
    assert torch.isfinite(rows).all()


@pytest.mark.parametrize(
    ("name", "options", "tail"),
    [
        ("forward_kl", {}, "sampled"),
        ("forward_kl", {"temperature": 2.0}, "bucket"),
        ("forward_kl", {"k": 2}, "bucket"),
        ("forward_kl", {"normalise_logits": True}, "bucket"),
        ("jsd", {}, "bucket"),
    ],
)
def test_draws_are_used_where_they_can_be(name, options, tail):
    world = World(k=4, draws=3)
    settled = world.context(name, **options)[1].options
    assert settled.tail == tail
    expected = world.rows(name, tail=tail, **options)
    torch.testing.assert_close(world.rows(name, **options), expected, rtol=0, atol=0)
    assert World(k=4, draws=0).context(name, **options)[1].options.tail == "bucket"


def test_draws_beyond_all_ids_do_not_go_with_fewer_ids():
    with pytest.raises(ConfigError, match="from beyond all cached ids"):
        World().rows("forward_kl", tail="sampled", k=2)


@pytest.mark.parametrize("kind", ["mse", "cosine", "smooth_l1"])
def test_hidden_states_are_compared_through_a_projector(kind):
    world = World()
    projector = torch.nn.Linear(WIDTH, TEACHER_WIDTH).double()
    holder = torch.nn.Module()
    holder.pairs = torch.nn.ModuleList([projector])
    spec, context = world.context("hidden", projector=holder, distance=kind)
    found = spec.compute(context)
    ours, theirs = projector(world.hidden), world.teacher_states
    if kind == "mse":
        expected = ((ours - theirs) ** 2).mean(-1)
    elif kind == "cosine":
        expected = 1 - (ours * theirs).sum(-1) / ours.norm(dim=-1) / theirs.norm(dim=-1)
    else:
        gap = (ours - theirs).abs()
        expected = torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean(-1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert distance(theirs, theirs, kind).abs().max() < 1e-12


def test_affinity_compares_cosines_within_each_example():
    world = World()
    weights = torch.tensor([1.0, 1.0, 0.0])
    spec, context = world.context("affinity", weights=weights, rows="all", columns="all")
    found = spec.compute(context)

    def cosines(states):
        unit = states / states.norm(dim=-1, keepdim=True)
        return unit @ unit.T

    for number in range(2):
        here = world.example == number
        gap = cosines(world.hidden[here]) - cosines(world.teacher_states[here])
        torch.testing.assert_close(found[number], gap.square().mean(), rtol=1e-12, atol=1e-12)
    assert found[2] == 0


def reference_returns(rewards, example, discount, include_own, normalise):
    found = []
    for t in range(len(rewards)):
        later = [u for u in range(len(rewards)) if example[u] == example[t] and u >= t]
        later = later if include_own else [u for u in later if u > t]
        start = later[0] if later else t
        total = sum(discount ** (u - start) * rewards[u] for u in later)
        found.append(total / max(len(later), 1) if normalise else total)
    return found


@given(
    st.lists(st.tuples(st.floats(-3, 3), st.integers(0, 3)), min_size=1, max_size=12),
    st.booleans(),
    st.booleans(),
)
def test_returns_are_discounted_sums_of_later_rewards(rows, include_own, normalise):
    rows = sorted(rows, key=lambda row: row[1])
    rewards, example = torch.tensor([r for r, _ in rows]), torch.tensor([e for _, e in rows])
    found = returns(rewards, example, 0.9, include_own, normalise)
    expected = reference_returns(rewards.tolist(), example.tolist(), 0.9, include_own, normalise)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_the_surrogates_slope_is_its_derivative():
    logratio = torch.linspace(-0.6, 0.6, 13, dtype=torch.float64).repeat(2).requires_grad_()
    advantage = torch.cat([torch.ones(13), -torch.ones(13)]).double()
    value, slope = surrogate(logratio, advantage, 0.2)
    (expected,) = torch.autograd.grad(value.sum(), logratio)
    torch.testing.assert_close(slope, expected)


def test_policy_gradient_equals_the_live_estimator():
    world = World()
    found = world.rows("policy_gradient", whiten=False, clip=0.5)
    log_q = world.logits.log_softmax(-1).gather(1, world.labels[:, None])[:, 0]
    log_p = world.signals["token_logprob"]
    reward = ((log_p - log_q) / 0.5).detach()
    advantage = torch.tensor(
        reference_returns(reward.tolist(), world.example.tolist(), 0.95, False, True),
        dtype=torch.float64,
    )
    ratio = (log_q - log_p).exp()
    expected = -torch.minimum(ratio * advantage, ratio.clamp(0.5, 1.5) * advantage)
    assert_same(world, found, expected)


def test_effective_sample_share_counts_who_carries_the_weight():
    even = {"weight": 8.0, "weight_squared": 8.0, "tokens": 8.0}
    lone = {"weight": 5.0, "weight_squared": 25.0, "tokens": 8.0}
    assert effective_sample_share(even) == {"effective_sample_share": 1.0}
    assert effective_sample_share(lone) == {"effective_sample_share": 1 / 8}
    spec = registry.OBJECTIVES["policy_gradient"]
    assert spec.warn({"effective_sample_share": 0.5}) == ""
    assert "collapsed: 1.0%" in spec.warn({"effective_sample_share": 0.01})


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.floats(0, 1))
def test_a_curriculum_admits_a_growing_share_from_one_end(scores, progress):
    score = torch.tensor(scores)
    low, high = admitted(score, progress, True), admitted(score, progress, False)
    count = max(1, math.ceil((0.25 + 0.75 * progress) * len(scores)))
    assert low.sum() == high.sum() == min(count, len(scores))
    assert score[low].max() <= min(score[~low].tolist(), default=math.inf)
    assert score[high].min() >= max(score[~high].tolist(), default=-math.inf)


@pytest.mark.parametrize("curriculum", ["low_entropy_first", "high_entropy_first"])
@pytest.mark.parametrize("source", ["easy", "hard"])
def test_a_curriculum_ranks_the_rows_of_its_line_alone(curriculum, source):
    """A source of weight 0 and what the mask leaves out take no line's place in the order."""
    world = World()
    _, context = world.context("forward_kl")
    world.signals["entropy"] = torch.arange(ROWS, dtype=torch.float64)  # example 0 is the easiest
    batch = replace(context.batch, sources=("easy", "hard", "hard"))
    batch.rows.answer[[3, 8]] = False
    others = {"easy": 0.0, "hard": 0.0} | {source: 2.0}
    table = Objective(name="forward_kl", curriculum=curriculum, source_weights=others)
    (term,) = terms_of([table], {"": replace(context.cache, k=VOCABULARY)})
    own = [0, 1, 2] if source == "easy" else [4, 5, 6, 7]
    for progress in (0.0, 0.5, 1.0):
        weights = unit_weights(term, batch, progress)
        count = max(1, math.ceil((0.25 + 0.75 * progress) * len(own)))
        ranked = own if curriculum.startswith("low") else own[::-1]
        assert weights.nonzero()[:, 0].tolist() == sorted(ranked[:count])
        assert set(weights.tolist()) <= {0.0, 2.0}


def test_mixtures_of_teachers_have_the_gradient_of_their_mean():
    one, other = World(seed=1), World(seed=2)
    other.hidden, other.head = one.hidden, one.head
    summed = 0.3 * one.rows("forward_kl").sum() + 0.7 * other.rows("forward_kl").sum()
    p = 0.3 * one.teacher_logits.softmax(-1) + 0.7 * other.teacher_logits.softmax(-1)
    direct = live("forward_kl", p, one.logits.log_softmax(-1)).sum()
    inputs = (one.hidden, one.head)
    torch.testing.assert_close(
        torch.autograd.grad(summed, inputs), torch.autograd.grad(direct, inputs)
    )


def test_rows_of_weight_zero_give_nothing():
    world = World(k=5)
    weights = torch.ones(ROWS, dtype=torch.float64)
    weights[3:] = 0
    spec, context = world.context("forward_kl", weights=weights)
    rows = spec.compute(context)
    assert (rows[3:] == 0).all()
    hidden, _ = world.gradients(rows)
    assert (hidden[3:] == 0).all()
    assert (hidden[:3] != 0).any()
    none = replace(context, weights=torch.zeros(ROWS, dtype=torch.float64))
    assert (spec.compute(none) == 0).all()
