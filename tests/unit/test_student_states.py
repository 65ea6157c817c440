"""The student's forward pass: packed documents do not see each other, heads are as they are."""

import math

import pytest
import torch
from torch import nn

from stillroom.pipeline.config.training import Train
from stillroom.pipeline.evaluation.held_out import measure
from stillroom.pipeline.student.apart import keeps_documents_apart
from stillroom.pipeline.student.model import load
from stillroom.pipeline.student.states import (
    blocks_of,
    forward_states,
    head_of,
)
from stillroom.pipeline.training.optimization import rate
from tests import memory_cache, student_architectures
from tests.in_float64 import ROUNDING, norms_in_float64


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_qwen3"])
def model(request):
    with norms_in_float64():
        yield load(request.getfixturevalue(request.param), dtype=torch.float64).eval()


def packed(*documents):
    ids = torch.tensor([token for document in documents for token in document])
    places = torch.tensor([p for document in documents for p in range(len(document))])
    return ids[None], places[None]


@torch.no_grad()
def test_a_document_does_not_see_the_one_before_it(model):
    second = [40, 41, 42, 43, 44]
    states = [
        forward_states(model, *packed(first, second)).final[-5:]
        for first in ([5, 6, 7], [105, 206, 307])
    ]
    alone = forward_states(model, *packed(second)).final
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    torch.testing.assert_close(states[0], alone, rtol=ROUNDING, atol=ROUNDING)


def test_a_model_that_looks_across_documents_is_refused(model):
    class Leaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.inner = model.config, model

        def get_decoder(self):
            return self

        def get_output_embeddings(self):
            return model.get_output_embeddings()

        def forward(self, input_ids, position_ids=None, **_):
            places = torch.arange(input_ids.shape[1])[None]
            return model.model(input_ids=input_ids, position_ids=places, use_cache=False)

    assert keeps_documents_apart(model, 768)
    assert not keeps_documents_apart(Leaky(), 768)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "apart"), [("llama", True), ("qwen3_moe", True), ("lfm2", False)]
)
def test_what_small_first_weights_let_through_is_found(architecture, apart, dtype):
    """LFM2's short convolutions look back over two tokens, at first by a thousandth."""
    from transformers import AutoModelForCausalLM

    config = student_architectures.config_of(architecture, 300, initializer_range=0.02)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert keeps_documents_apart(model, 300) is apart
    assert model.training
    for name, weight in model.state_dict().items():
        assert weight.dtype == before[name].dtype
        assert torch.equal(weight, before[name])


def test_what_is_zero_before_training_lets_nothing_through_yet():
    from transformers import AutoModelForCausalLM

    config = student_architectures.config_of("lfm2", 300)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "conv" in name:
                weight.zero_()
    assert not keeps_documents_apart(model, 300)


@pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError])
def test_a_model_that_takes_no_packed_row_keeps_nothing_apart(model, monkeypatch, error):
    def fails(*_args, **_more):
        raise error("The size of tensor a (4) must match the size of tensor b (32)")

    monkeypatch.setattr(model.get_decoder(), "forward", fails)
    assert not keeps_documents_apart(model, 768)


def test_a_machine_without_room_says_nothing_of_documents(model, monkeypatch):
    def fails(*_args, **_more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.get_decoder(), "forward", fails)
    with pytest.raises(torch.OutOfMemoryError):
        keeps_documents_apart(model, 768)


@torch.no_grad()
def test_final_states_and_head_give_the_models_logits(model):
    ids, places = packed([4, 5, 6, 7, 8, 9])
    states, head = forward_states(model, ids, places, blocks=[1, 2]), head_of(model)
    found = states.at(torch.arange(6)) @ head.weight.T
    truth = model(input_ids=ids, output_hidden_states=True)
    torch.testing.assert_close(found, truth.logits[0], rtol=ROUNDING, atol=ROUNDING)
    block = truth.hidden_states[1][0]
    torch.testing.assert_close(states.blocks[1], block, rtol=ROUNDING, atol=ROUNDING)
    assert len(blocks_of(model)) == model.config.num_hidden_layers


def test_kl_is_that_of_the_whole_vocabulary(tiny_llama, tmp_path):
    from tests.tiny_models import save_llama

    other = save_llama(tmp_path / "other", num_layers=1, seed=3)
    texts = memory_cache.examples(3)
    scores = measure(str(tiny_llama), {"other": str(other)}, texts)
    teacher, student = load(tiny_llama), load(other)
    kl, nll, hits, rows = 0.0, 0.0, 0, 0
    for text in texts:
        ids = torch.tensor(text.token_ids, dtype=torch.long)
        kept = torch.tensor(text.loss_mask[1:])
        with torch.no_grad():
            p, q = (m(ids[None]).logits[0, :-1].log_softmax(-1)[kept] for m in (teacher, student))
        kl += float((p.exp() * (p - q)).sum())
        nll -= float(q.gather(1, ids[1:][kept][:, None]).sum())
        hits += int((p.argmax(-1) == q.argmax(-1)).sum())
        rows += int(kept.sum())
    assert scores["other"].kl == pytest.approx(kl / rows, rel=1e-4)
    assert scores["other"].perplexity == pytest.approx(math.exp(nll / rows), rel=1e-4)
    assert scores["other"].top1 == hits / rows
    assert scores["teacher"].kl == pytest.approx(0, abs=1e-6)


def test_schedules_rise_stay_and_fall():
    cosine = Train(steps=100, warmup=0.1, learning_rate=1.0, final_rate=0.1)
    rates = [rate(cosine, step) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 < rates[-1] < 0.11
    wsd = cosine.model_copy(update={"schedule": "wsd", "decay": 0.5})
    rates = [rate(wsd, step) for step in range(100)]
    assert set(rates[10:55]) == {1.0}
    assert rates[60:] == sorted(rates[60:], reverse=True)
    assert rates[-1] == pytest.approx(0.1 + 0.9 / 45, abs=0.01)
    constant = cosine.model_copy(update={"schedule": "constant"})
    assert {rate(constant, step) for step in range(10, 100)} == {1.0}
