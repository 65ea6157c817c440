"""OLA-VLM's losses against an independent statement of their formulas, and their masks."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.multiprocessing

from stillroom.cache_schemas.errors import ConfigError, StudentError
from stillroom.pipeline.config.training import Objective
from stillroom.pipeline.data.batch import collate
from stillroom.pipeline.data.images import ImageTargets
from stillroom.pipeline.objectives.combine import Distiller, terms_of
from stillroom.pipeline.objectives.embedding import gather, info_nce, smooth_l1
from stillroom.pipeline.objectives.registry import CacheFacts, find
from stillroom.pipeline.record import Example, ImageSpan, TeacherRecord
from stillroom.pipeline.student.model import load
from tests import tiny_image_models
from tests.ranks import leave

FACTS = {
    "": CacheFacts(("topk_ids",), (1.0,), 768),
    "vision": CacheFacts(
        ("image.depth", "image.gen"),
        (),
        0,
        {"image.depth": 6, "image.gen": 10},
        {"image.depth": 9, "image.gen": 1},
    ),
}
DEPTH = {"target": "depth", "task": "depth", "layers": [1, 2], "seek": 4}
GEN = {"target": "gen", "task": "gen", "layers": [2], "seek": 3}
WEIGHTS = (1.0, 4.0, 1.0, 2.0)
"""Of the examples: float32 divides them by their sum without rounding, with the second or not."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_image_models.save("llava", tmp_path_factory.mktemp("llava"))


def objective(options, weight=0.5):
    return Objective(name="embedding", cache="vision", weight=weight, options=options)


def distiller(directory, *objectives, seed=0):
    model = load(directory).double().eval()
    torch.manual_seed(seed)
    return Distiller(model, terms_of(objectives, FACTS)).double()


def make_batch(names=("a", "b", "c", "a"), present=(True, True, True, True)):
    """Four examples with an image each, two to a row; the first and the last share theirs."""
    random = np.random.default_rng(0)
    records = []
    for number, name in enumerate(names):
        tokens = random.integers(5, 700, 22 + number).astype(np.int32)
        image_token = 3
        tokens[2:18] = image_token
        mask = np.arange(len(tokens)) >= 19
        span = (ImageSpan(name, 2, 16),)
        weight = WEIGHTS[number]
        example = Example(f"e{number}", f"d{number}", "s", tokens, mask, span, weight)
        rows = np.zeros((len(tokens) - 1, 1), np.int32)
        records.append({"": TeacherRecord(example, 0, {"topk_ids": rows})})
    batch = collate([records[:2], records[2:]], 64)
    distinct = {name: random.normal(size=(3, 28, 28)) for name in names}
    pixels = torch.tensor(np.stack([distinct[name] for name in names]))
    said = {
        name: {"image.depth": random.normal(size=(9, 6)), "image.gen": random.normal(size=(1, 10))}
        for name in names
    }
    signals = {
        signal: torch.tensor(np.stack([said[name][signal] for name in names]))
        for signal in ("image.depth", "image.gen")
    }
    targets = {"vision": ImageTargets(signals, torch.tensor(present))}
    return replace(batch, images=replace(batch.images, pixels=pixels, targets=targets))


def run(module, batch):
    """The step's loss, as the trainer weighs it."""
    weights, totals = module.weigh(batch, 0.0)
    scaled = [
        w * term.weight(0.0) / total if total else w * 0.0
        for w, total, term in zip(weights, totals, module.terms, strict=True)
    ]
    return module(batch, scaled)


def by_hand(module, number, batch, layer_states, documents, own):
    """Value per image: sum over layers of smooth-L1 + 0.3 InfoNCE, one image at a time."""
    options, predictor = module.terms[number].options, module.projectors[str(number)]
    answers = batch.images.targets["vision"]
    there = [i for i in range(len(batch.images.names)) if answers.present[i]]
    target = answers.signals[options.signal]
    total = dict.fromkeys(there, 0.0)
    for layer in options.supervised:
        net = predictor.layers[str(layer)]
        predictions = {}
        for i in there:
            states = layer_states[layer][documents[i]]
            if options.query_kind == "grid":
                queries = predictor.queries
            else:
                queries = layer_states[layer][own[i]].mean(0, keepdim=True)
            predictions[i] = resample(net, states, queries)
        for i in there:
            d = predictions[i] - target[i]
            small = d.abs() < 1
            total[i] = total[i] + torch.where(small, d**2 / 2, d.abs() - 0.5).mean()
            scores = {
                j: predictor.scale.exp().clamp(max=100.0)
                * (predictions[i].flatten() @ target[j].flatten())
                / predictions[i].norm()
                / target[j].norm()
                for j in there
                if j == i or batch.images.names[j] != batch.images.names[i]
            }
            logits = torch.stack(list(scores.values()))
            nce = torch.logsumexp(logits, 0) - scores[i]
            total[i] = total[i] + options.contrastive * nce
    return total


def resample(net, states, queries):
    """The resampler of one image, written out head by head."""

    def norm(x, layer):
        centred = x - x.mean(-1, keepdim=True)
        spread = (centred**2).mean(-1, keepdim=True)
        return centred / (spread + layer.eps).sqrt() * layer.weight + layer.bias

    x = states @ net.proj_in.weight.T + net.proj_in.bias
    y = queries @ net.proj_in.weight.T + net.proj_in.bias
    q = norm(y, net.norm_latents) @ net.to_q.weight.T
    both = torch.cat([norm(x, net.norm_media), norm(y, net.norm_latents)])
    k, v = both @ net.to_kv.weight[:128].T, both @ net.to_kv.weight[128:].T
    heads = []
    for h in range(4):
        part = slice(32 * h, 32 * h + 32)
        weights = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(32), dim=-1)
        heads.append(weights @ v[:, part])
    y = y + torch.cat(heads, dim=-1) @ net.to_out.weight.T
    first, second = net.feed_forward[1].weight, net.feed_forward[3].weight
    inner = norm(y, net.feed_forward[0]) @ first.T
    y = y + (inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))) @ second.T
    out = norm(y @ net.proj_out.weight.T + net.proj_out.bias, net.norm_out)
    return out @ net.head.weight.T + net.head.bias if hasattr(net.head, "weight") else out


def sequences(module, batch):
    """Every image's document by hand: (layer -> all states, places of each document and its own
    task tokens for a task)."""
    captured = {}
    blocks = module.model.model.language_model.layers
    hooks = [
        block.register_forward_hook(
            lambda _m, _i, out, n=n: captured.setdefault(
                n, (out[0] if isinstance(out, tuple) else out)
            )
        )
        for n, block in enumerate(blocks, start=1)
    ]
    run(module, batch)
    for hook in hooks:
        hook.remove()
    return {n: states.flatten(0, 1) for n, states in captured.items()}


def places(lengths, counts, task, width=64):
    """Documents two to a row: each is head (18 tokens), all task tokens, tail."""
    before = sum(counts[:task])
    found_documents, found_own = [], []
    wider = width + 2 * sum(counts)
    for row in range(2):
        start = row * wider
        for length in lengths[2 * row : 2 * row + 2]:
            tail = start + 18 + sum(counts)
            own = list(range(start + 18 + before, start + 18 + before + counts[task]))
            document = [*range(start, start + 18), *own, *range(tail, tail + length - 18)]
            found_documents.append(document)
            found_own.append(own)
            start = tail + length - 18
    return found_documents, found_own


@pytest.mark.parametrize("present", [(True,) * 4, (True, False, True, True)])
def test_values_and_gradients_are_the_papers_formulas(directory, present):
    module = distiller(directory, objective(DEPTH), objective(GEN, weight=0.25))
    batch = make_batch(present=present)
    found = run(module, batch)
    states = sequences(module, batch)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64) * torch.tensor(present)
    wanted = []
    for number, weight in enumerate((0.5, 0.25)):
        documents, own = places([22, 23, 24, 25], [4, 3], number)
        values = by_hand(module, number, batch, states, documents, own)
        mean = sum(weights[i] * value for i, value in values.items()) / weights.sum()
        wanted.append(weight * mean)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-12, atol=1e-12)
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(found.sum(), named.values(), allow_unused=True, retain_graph=True)
    theirs = torch.autograd.grad(torch.stack(wanted).sum(), named.values(), allow_unused=True)
    reached = 0
    for name, a, b in zip(named, ours, theirs, strict=True):
        assert (a is None) == (b is None) or a is None or not a.any(), name
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)
            reached += bool(b.any())
    assert reached > 30


def test_temperature_is_learned_and_capped():
    scale = torch.tensor(2.0, requires_grad=True)
    predicted, targets = torch.randn(3, 4), torch.randn(3, 4)
    same = torch.zeros(3, 3, dtype=torch.bool)
    info_nce(predicted, targets, torch.arange(3), same, scale).sum().backward()
    assert scale.grad.abs() > 0
    hot = info_nce(predicted, targets, torch.arange(3), same, torch.tensor(9.0))
    capped = info_nce(predicted, targets, torch.arange(3), same, torch.tensor(math.log(100.0)))
    torch.testing.assert_close(hot, capped)


def test_smooth_l1_is_quadratic_inside_one_and_linear_outside():
    predicted = torch.tensor([[[0.5, 3.0]]])
    assert smooth_l1(predicted, torch.zeros(1, 1, 2)).tolist() == [(0.125 + 2.5) / 2]


def test_a_second_look_at_the_same_image_is_no_negative():
    predicted = torch.randn(2, 4)
    same = torch.tensor([[False, True], [True, False]])
    value = info_nce(predicted, predicted[[0, 0]], torch.arange(2), same, torch.tensor(2.0))
    assert value.tolist() == [0.0, 0.0]


def test_a_mask_of_zeros_is_the_run_without_embedding_losses(directory):
    plain = Objective(name="cross_entropy")
    without = distiller(directory, plain)
    batch = make_batch(present=(False,) * 4)
    for seek, kind in ((0, "grid"), (4, "grid")):
        options = {"target": "depth", "layers": [1, 2], "seek": seek, "queries": kind}
        masked = distiller(directory, plain, objective(options))
        assert not masked.weigh(batch, 0.0)[0][1].any()
        losses = run(masked, batch)
        assert losses[1].item() == 0.0
        losses.sum().backward()
        assert not any(
            p.grad.any() for p in masked.projectors["1"].layers.parameters() if p.grad is not None
        )
        if seek:
            continue
        wanted = run(without, batch)
        assert torch.equal(losses[0], wanted[0])
        wanted.sum().backward()
        for (name, a), (_, b) in zip(
            masked.model.named_parameters(), without.model.named_parameters(), strict=True
        ):
            assert (a.grad is None) == (b.grad is None), name
            assert a.grad is None or torch.equal(a.grad, b.grad), name


def test_the_mask_is_one_where_an_image_has_a_target(directory):
    module = distiller(directory, objective(DEPTH))
    (weights,), totals = module.weigh(make_batch(present=(True, False, True, True)), 0.0)
    assert weights.tolist() == [1.0, 0.0, 1.0, 2.0]
    assert totals.tolist() == [4.0]


def test_a_batch_without_images_costs_nothing(directory):
    module = distiller(directory, Objective(name="cross_entropy"), objective(DEPTH))
    batch = replace(make_batch(), images=None)
    batch = replace(batch, input_ids=batch.input_ids.clamp_max(700))
    losses = run(module, batch)
    assert losses[1].item() == 0.0
    assert losses[0].item() > 0.0


def test_defaults_are_the_papers():
    for task, layers in (("depth", (8, 20)), ("seg", (10, 18)), ("gen", (12, 20))):
        _, options = find("embedding", {"target": "x", "task": task}, "")
        assert options.supervised == layers
        assert (options.seek, options.contrastive) == (8, 0.3)
        assert options.query_kind == ("tokens" if task == "gen" else "grid")


def test_what_does_not_fit_is_refused_before_the_first_step(directory):
    with pytest.raises(ConfigError, match="needs layers, or a task"):
        terms_of([objective({"target": "depth"})], FACTS)
    with pytest.raises(ConfigError, match=r"queries = 'tokens' needs task tokens"):
        terms_of([objective({"target": "gen", "task": "gen", "seek": 0})], FACTS)
    with pytest.raises(StudentError, match=r"'image.seg'.*image.depth"):
        terms_of([objective({"target": "seg", "layers": [1]})], FACTS)
    with pytest.raises(StudentError, match="no block 20"):
        distiller(directory, objective({"target": "depth", "task": "depth", "layers": [20]}))
    facts = {"": replace(FACTS[""], signals=("image.depth",))}
    terms = terms_of([Objective(name="embedding", options=DEPTH)], facts)
    with pytest.raises(StudentError, match="not a target of images"):
        Distiller(load(directory), terms)


def _on_rank(rank, folder, predicted, targets):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    mine = slice(0, 3) if rank == 0 else slice(3, 4)
    everyone, first = gather(targets[mine])
    own = first + torch.arange(len(targets[mine]))
    same = torch.zeros(len(own), len(everyone), dtype=torch.bool)
    own_predictions = predicted[mine].clone().requires_grad_()
    values = info_nce(own_predictions, everyone, own, same, torch.tensor(2.0))
    values.sum().backward()
    torch.save((values.detach(), own_predictions.grad), f"{folder}/{rank}.pt")
    leave()


def test_negatives_come_from_all_ranks(tmp_path):
    generator = torch.Generator().manual_seed(0)
    predicted, targets = (torch.randn(4, 5, generator=generator) for _ in range(2))
    torch.multiprocessing.spawn(_on_rank, (str(tmp_path), predicted, targets), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    whole = predicted.clone().requires_grad_()
    same = torch.zeros(4, 4, dtype=torch.bool)
    wanted = info_nce(whole, targets, torch.arange(4), same, torch.tensor(2.0))
    wanted.sum().backward()
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), wanted.detach())
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), whole.grad)
