"""A head wider than the teacher's: its further columns lose their probability, and are counted."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from stillroom.pipeline.config import parse
from stillroom.pipeline.evaluation.held_out import measure
from stillroom.pipeline.student.loading import load
from stillroom.pipeline.training.trainer import train
from tests import memory_cache, student_architectures, tiny_models

VOCAB, HEAD = 300, 512


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    at = tmp_path_factory.mktemp("teacher") / "model"
    return tiny_models.save_llama(at, num_layers=2, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def padded(tmp_path_factory, teacher):
    """Shape of a student whose head has columns for 212 ids that no token has."""
    root = tmp_path_factory.mktemp("padded")
    (root / "nothing").mkdir()
    return student_architectures.save_model("llama", root / "model", root / "nothing", HEAD)


@pytest.fixture(scope="module")
def texts():
    return memory_cache.examples(40, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def cache(teacher, texts):
    return memory_cache.captured(teacher, texts, hidden_layers=("final",), tail_draws=8)


def make_run(directory, teacher, padded, objective, steps=30):
    document = {
        "name": "test",
        "directory": str(directory),
        "teacher": {"model": str(teacher), "dtype": "float32"},
        "student": {"init": "config", "model": str(padded)},
        "objective": [objective],
        "train": {"steps": steps, "batch_tokens": 192, "learning_rate": 1e-2, "workers": 0},
    }
    return parse(document, "test")


@torch.no_grad()
def mass_on_nothing(directory, texts) -> float:
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = [torch.as_tensor(text.token_ids, dtype=torch.long) for text in texts[:8]]
    rows = torch.cat([model(row[None]).logits[0] for row in ids])
    return float(rows.softmax(-1)[:, VOCAB:].sum(-1).mean())


@pytest.mark.parametrize(
    ("k", "objective"),
    [
        (4, {"name": "forward_kl"}),
        (0, {"name": "forward_kl"}),
        (4, {"name": "forward_kl", "options": {"tail": "bucket"}}),
        (4, {"name": "teacher_argmax"}),
    ],
    ids=str,
)
def test_a_head_narrower_than_the_teachers_trains(tmp_path, k, objective):
    """A large teacher often has more rows of padding than a small one of its family."""
    wide = tiny_models.save_llama(tmp_path / "teacher", num_layers=2, vocab_size=HEAD)
    tiny_models.save_tokenizer(wide, VOCAB)
    texts = memory_cache.examples(12, vocab_size=VOCAB)
    cache = memory_cache.captured(wide, texts, k=k, tail_draws=8)
    ids = [record.signals["draw_ids"] for record in cache.records]
    assert max(int(one.max()) for one in ids) >= VOCAB  # random weights draw padding too
    (tmp_path / "nothing").mkdir()
    narrow = student_architectures.save_model("llama", tmp_path / "s", tmp_path / "nothing", VOCAB)
    result = train(make_run(tmp_path, wide, narrow, objective, steps=3), caches={"": cache})
    assert result.check["reloaded"] == pytest.approx(result.check["in_training"], abs=1e-5)


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "forward_kl"},
        {"name": "forward_kl", "options": {"tail": "bucket"}},
        {"name": "forward_kl", "options": {"tail": "truncate"}},
        {"name": "reverse_kl"},
        {"name": "jsd"},
        {"name": "tv"},
        {"name": "full_vocabulary"},
        {"name": "cross_entropy"},
    ],
    ids=lambda o: o["name"] + "-" + o.get("options", {}).get("tail", ""),
)
def test_a_fresh_student_says_nothing_that_no_token_has(
    tmp_path, teacher, padded, texts, cache, objective
):
    result = train(make_run(tmp_path, teacher, padded, objective), caches={"": cache})
    before, after = (mass_on_nothing(at, texts) for at in (result.initial, result.student))
    assert before > 0.3
    assert after < 0.3 * before
    assert AutoModelForCausalLM.from_pretrained(result.student).config.vocab_size == HEAD


def test_it_is_counted_and_costs_divergence(tmp_path, teacher, padded, texts, cache):
    made = train(make_run(tmp_path, teacher, padded, {"name": "tv"}, 1), caches={"": cache}).initial
    found = measure(str(teacher), {"fresh": made}, texts[:8])
    assert found["teacher"].no_token == 0
    models = load(teacher).eval(), load(made).eval()
    p, q, masses, labels = [], [], [], []
    for text in texts[:8]:
        ids = torch.as_tensor(text.token_ids, dtype=torch.long)
        rows = torch.as_tensor(text.loss_mask[1:])
        for model, found_rows in zip(models, (p, q)):
            logits = model(ids[None]).logits[0, :-1].detach()
            found_rows.append(logits[rows].double().log_softmax(-1))
        masses.append(q[-1][:, VOCAB:].exp().sum(-1))
        labels.append(-q[-1].gather(1, ids[1:][rows][:, None])[:, 0])
    p, q = torch.cat(p), torch.cat(q)
    expected = float((p.exp() * (p - q[:, :VOCAB])).sum(-1).mean())
    assert found["fresh"].kl == pytest.approx(expected, rel=1e-5)
    assert found["fresh"].no_token == pytest.approx(float(torch.cat(masses).mean()), rel=1e-5)
    shared = q[:, :VOCAB].log_softmax(-1)
    backwards = float((shared.exp() * (shared - p)).sum(-1).mean())
    assert found["fresh"].reverse_kl == pytest.approx(backwards, rel=1e-5)
    assert abs(found["teacher"].reverse_kl) < 1e-6
    assert found["fresh"].perplexity == pytest.approx(
        float(torch.cat(labels).mean().exp()), rel=1e-5
    )


def test_a_far_wider_head_can_be_compared(tmp_path, teacher, texts):
    (tmp_path / "nothing").mkdir()
    wide = student_architectures.save_model("llama", tmp_path / "wide", tmp_path / "nothing", 5000)
    found = measure(str(teacher), {"wide": str(wide)}, texts[:2])
    assert found["wide"].no_token > 0.8
