"""Every weight and loss of recommenders against a plain statement: values and gradients, fp64."""

import math

import numpy as np
import pytest
import torch

from stillroom.cache_schemas.errors import ConfigError, StudentError
from stillroom.pipeline.config.recommending import Distilled, Recommender
from stillroom.pipeline.config.training import Objective
from stillroom.pipeline.data.histories import HistoryBatch, Lists
from stillroom.pipeline.objectives import ranking
from stillroom.pipeline.objectives.combine import terms_of as language_terms
from stillroom.pipeline.objectives.recommending import RankingDistiller, negatives, terms_of
from stillroom.pipeline.objectives.registry import CacheFacts
from stillroom.pipeline.student.recommenders.model import initial

ITEMS, ROWS, K, LENGTH = 23, 6, 5, 4
TOLERANCE = {"rtol": 1e-11, "atol": 1e-13}
LISTS = ("candidate_ids", "candidate_distances")
FACTS = {
    "": CacheFacts(("interactions",), (), 0),
    "candidates": CacheFacts(LISTS, (), 0),
    "items": CacheFacts(("item.final",), (), 0, {"item.final": 9}),
}


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


@pytest.fixture
def batch():
    random = np.random.default_rng(3)
    history = random.integers(0, ITEMS, (ROWS, LENGTH))
    history[0, :3] = ITEMS
    ids = np.stack([random.permutation(ITEMS)[:K] for _ in range(ROWS)])
    distances = np.sort(random.uniform(0.1, 4, (ROWS, K)), axis=1).astype(np.float32)
    ids[2, 3:], distances[2, 3:] = -1, np.inf
    ids[4], distances[4] = -1, np.inf
    lists = {"candidates": Lists(torch.from_numpy(ids), torch.from_numpy(distances))}
    target = torch.from_numpy(random.integers(0, ITEMS, ROWS))
    names = tuple(f"row-{i}" for i in range(ROWS))
    return HistoryBatch(torch.from_numpy(history), target, names, lists)


def distiller_of(*objectives, kind="sasrec", distilled=None, seed=1) -> RankingDistiller:
    """In fp64, without dropout, with weights large enough to matter."""
    vectors = torch.randn(ITEMS, 9, generator=torch.Generator().manual_seed(5))
    table = Recommender(kind=kind, width=8, dropout=0.0, seed=seed, distilled=distilled)
    model = initial(table, ITEMS, LENGTH, vectors)
    terms = terms_of([Objective.model_validate(line) for line in objectives], FACTS)
    counts = torch.arange(ITEMS)
    made = RankingDistiller(model, terms, counts, {"items": vectors.double()}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        model.items.weight[ITEMS] = 0
    return made


def run(distiller, batch, seed=0):
    """Value of the only objective, its gradients, and the draws' scores."""
    weights, totals = distiller.weigh(batch, 1.0)
    torch.manual_seed(seed)
    values = distiller(batch, [w.double() / t for w, t in zip(weights, totals)])
    values.sum().backward()
    found = {n: p.grad.clone() for n, p in distiller.named_parameters() if p.grad is not None}
    distiller.zero_grad()
    return values.detach(), found


def plain(distiller, batch, per_row, rows=range(ROWS), seed=0):
    """The mean over all rows of a plain statement, 0 outside `rows`, and its gradients."""
    model = distiller.model
    torch.manual_seed(seed)
    drawn = negatives(batch.history, batch.target, ITEMS)
    states = model.states(batch.history)
    scores = states @ model.head.weight.T + model.head.bias
    listed = (per_row(scores[r], int(batch.target[r]), int(drawn[r]), r) for r in rows)
    value = sum(listed) / ROWS
    value.backward()
    found = {n: p.grad.clone() for n, p in distiller.named_parameters() if p.grad is not None}
    distiller.zero_grad()
    return value.detach(), found


def assert_same(found, expected):
    torch.testing.assert_close(found[0].sum(), expected[0], **TOLERANCE)
    assert found[1].keys() == expected[1].keys()
    for name in expected[1]:
        torch.testing.assert_close(found[1][name], expected[1][name], msg=name, **TOLERANCE)


def bce(scores, positive, negative, legacy=False):
    own = -torch.log(sigmoid(scores[positive]))
    other = scores[negative]
    return own - torch.log(sigmoid(1 - other) if legacy else 1 - sigmoid(other))


def propensity(power=0.05):
    counts = torch.arange(ITEMS, dtype=torch.float64) + 1
    return (counts / counts.sum()) ** power


def robust(scores, item, beta=1.0):
    p = propensity()
    total = sum(torch.exp(p[j] * scores[j] ** 2 / beta) for j in range(ITEMS))
    own = torch.exp(p[item] * scores[item] ** 2 / beta)
    return torch.log(total - own + torch.exp(p[item] * (scores[item] - 1) ** 2 / beta))


@pytest.mark.parametrize("legacy", [False, True])
def test_next_item(batch, legacy):
    made = distiller_of({"name": "next_item", "options": {"legacy_negatives": legacy}})
    expected = plain(made, batch, lambda s, y, n, r: bce(s, y, n, legacy))
    assert_same(run(made, batch), expected)


@pytest.mark.parametrize("beta", [1.0, 0.7])
def test_dros(batch, beta):
    made = distiller_of({"name": "dros", "options": {"beta": beta}})
    assert_same(run(made, batch), plain(made, batch, lambda s, y, n, r: robust(s, y, beta)))


SHARES = [
    {"position": 0.3, "confidence": 0.5, "consistency": 0.1},
    {"position": 1.0, "confidence": 0.0, "consistency": 0.0},
    {"position": 0.0, "confidence": 1.0, "consistency": 0.0},
    {"position": 0.0, "confidence": 0.0, "consistency": 1.0},
]


@pytest.mark.parametrize("normalise", ["list", "none"])
@pytest.mark.parametrize("shares", SHARES, ids=["all", "position", "confidence", "consistency"])
def test_ranking_distillation(batch, shares, normalise):
    temperatures = {"position_temperature": 1.3, "confidence_temperature": 0.8}
    options = {**shares, **temperatures, "k": K, "normalise": normalise, "dros": 0.5}
    line = {"name": "ranking_distillation", "cache": "candidates", "options": options}
    made = distiller_of(line)
    lists = batch.lists["candidates"]

    def per_row(scores, _target, negative, row):
        used = [int(i) for i in lists.ids[row] if i >= 0]
        best = sorted(range(ITEMS), key=lambda j: -float(scores[j].detach()))[:K]
        position = [math.exp(-r / 1.3) for r in range(1, len(used) + 1)]
        position = [w / sum(position) for w in position]
        sure = [math.exp(-float(d) / 0.8) + 1e-8 for d in lists.distances[row][: len(used)]]
        sure = [w / sum(sure) for w in sure] if normalise == "list" else sure
        agreed = [(item in best) + 1e-8 for item in used]
        weight = [
            shares["position"] * p + shares["confidence"] * c + shares["consistency"] * o
            for p, c, o in zip(position, sure, agreed)
        ]
        scale = sum(weight) if normalise == "list" else 1.0
        return sum(
            w / scale * (bce(scores, item, negative) + 0.5 * robust(scores, item))
            for w, item in zip(weight, used)
        )

    rows = [0, 1, 2, 3, 5]  # the teacher has no answer to the fifth
    assert_same(run(made, batch), plain(made, batch, per_row, rows))


def test_uniform_ranking_distillation(batch):
    options = {"weights": "uniform", "k": 4, "dros": 0.0, "legacy_negatives": True}
    line = {"name": "ranking_distillation", "cache": "candidates", "options": options}
    made = distiller_of(line)

    def per_row(scores, _target, negative, row):
        used = [int(i) for i in batch.lists["candidates"].ids[row][:4] if i >= 0]
        return sum(bce(scores, item, negative, legacy=True) for item in used) / len(used)

    assert_same(run(made, batch), plain(made, batch, per_row, [0, 1, 2, 3, 5]))


def test_the_hint_pulls_the_embedding_of_the_item_that_came(batch):
    made = distiller_of({"name": "item_hint", "cache": "items"})
    linear, vectors = made.projectors["0"], made.vectors["items"]

    def per_row(_scores, target, _negative, _row):
        own = linear.weight @ made.model.items.weight[target] + linear.bias
        return sum((own[i] - vectors[target][i]) ** 2 for i in range(9)) / 9

    found, expected = run(made, batch), plain(made, batch, per_row)
    torch.testing.assert_close(found[0].sum(), expected[0], **TOLERANCE)
    for name in found[1]:
        torch.testing.assert_close(found[1][name], expected[1][name], msg=name, **TOLERANCE)


@pytest.mark.parametrize("kind", ["sasrec", "gru4rec", "caser"])
def test_collaborative_embeddings_are_a_sum_that_folds_into_one_table(batch, kind):
    part = Distilled(cache="items", weight=0.2)
    made = distiller_of({"name": "next_item"}, kind=kind, distilled=part)
    model = made.model
    vectors = made.vectors["items"]
    model.distilled.vectors = vectors
    linear = model.distilled.projection
    table = torch.stack(
        [
            model.items.weight[i] + 0.2 * (linear.weight @ vectors[i] + linear.bias)
            for i in range(ITEMS)
        ]
        + [torch.zeros(8, dtype=torch.float64)]
    )
    states = model.encoder(table[batch.history], batch.history < ITEMS)
    expected = torch.autograd.grad(states.square().sum(), list(linear.parameters()))
    found = torch.autograd.grad(model.states(batch.history).square().sum(), linear.parameters())
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs, **TOLERANCE)
    torch.testing.assert_close(model.folded_table(), table.detach(), **TOLERANCE)


@pytest.mark.parametrize("kind", ["sasrec", "gru4rec", "caser"])
def test_padding_means_nothing_and_order_does(kind):
    model = initial(Recommender(kind=kind, width=8, dropout=0.0), ITEMS, LENGTH).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)
        model.items.weight[ITEMS] = 0
    history = torch.tensor([[ITEMS, ITEMS, 3, 4], [ITEMS, ITEMS, 4, 3], [ITEMS] * 4])
    states = model.states(history)
    assert torch.isfinite(states).all()
    assert not torch.allclose(states[0], states[1])
    with torch.no_grad():
        model.items.weight[ITEMS] = 100.0  # whatever stands there is not read
    if kind != "caser":
        torch.testing.assert_close(model.states(history)[:2], states[:2])


def test_a_negative_is_any_item_that_is_not_in_the_row():
    history = torch.tensor([[5, 5, 0, 1]] * 4000)
    target = torch.tensor([3] * 4000)
    torch.manual_seed(0)
    drawn = negatives(history, target, 7)
    counts = torch.bincount(drawn, minlength=7)
    assert counts[[0, 1, 3, 5]].sum() == 0
    expected = 4000 / 3
    assert (counts[[2, 4, 6]] - expected).abs().max() < 5 * math.sqrt(expected)
    padded = negatives(torch.tensor([[7, 7, 7, 0]]), torch.tensor([1]), 7)
    assert int(padded) not in (0, 1, 7)
    assert int(negatives(torch.tensor([[0, 1]]), torch.tensor([2]), 3)) == 2  # nothing is left


def test_dros_stays_a_number_where_its_exponentials_do_not():
    scores = torch.tensor([[90.0, -3.0, 0.5]], requires_grad=True)
    found = ranking.Robust(scores, torch.ones(3)).of(torch.tensor([[0, 1]]))
    expected = [(90.0 - 1) ** 2, 90.0**2]
    torch.testing.assert_close(found[0], torch.tensor(expected), rtol=1e-5, atol=0)
    found.sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_what_cannot_be_is_refused(batch):
    off = {"position": 0, "confidence": 0, "consistency": 0}
    with pytest.raises(ConfigError, match="all three weights are 0"):
        distiller_of({"name": "ranking_distillation", "cache": "candidates", "options": off})
    with pytest.raises(StudentError, match="needs signal 'candidate_ids'"):
        distiller_of({"name": "ranking_distillation"})
    with pytest.raises(StudentError, match="needs signal"):
        distiller_of({"name": "forward_kl"})
    with pytest.raises(ConfigError, match="objective of language models"):
        distiller_of({"name": "cross_entropy"})
    texts = {"": CacheFacts(("topk_ids", "topk_logprobs"), (1.0,), 100, k=8)}
    with pytest.raises(StudentError, match="needs signal 'interactions'"):
        language_terms([Objective(name="next_item")], texts)
