"""The reference engine computes what a config says; heads are measured; any blocks are found."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks._architecture_zoo import save
from stillroom.cache_schemas.errors import ConfigError, StudentError, TeacherError
from stillroom.pipeline.config import Capture, Teacher
from stillroom.pipeline.evaluation.held_out import measure
from stillroom.pipeline.kernels.linear_divergence import linear_divergence
from stillroom.pipeline.record import Example, content_id
from stillroom.pipeline.student.model import load
from stillroom.pipeline.student.states import forward_states
from stillroom.pipeline.student.teacher_head import (
    check_head,
    keep_teacher_head,
    read_teacher_head,
)
from stillroom.pipeline.teacher.facts import model_shape, teacher_facts
from stillroom.pipeline.teacher.opening import open_engine
from stillroom.pipeline.teacher.reference.engine import load_model
from stillroom.pipeline.teacher.reference.head import Head, form_of

HEADS = {
    "llama": (1.0, 1.0, None),
    "gemma2": (1.0, 1.0, 10.0),
    "granite": (1.0, 0.25, None),
    "hyperclovax": (1.0, 0.25, None),
    "cohere": (1.0, 0.25, None),
    "falcon-h1": (1.0, 0.25, None),
    "minicpm3": (0.125, 1.0, None),
    "phi": (1.0, 1.0, None),
}
"""Factor on the state, factor on the product, soft cap: as the zoo's configs say."""
TABLE = Capture(k=16, hidden_layers=(1, 2, 3, "final"))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Label -> a teacher of the zoo, saved once."""
    saved = {}

    def teacher(label: str, **more) -> Teacher:
        if label not in saved:
            saved[label] = save(label, tmp_path_factory.mktemp("zoo") / "model")
        return Teacher(model=str(saved[label]), dtype="float32", **more)

    return teacher


def text(length=40, seed=1) -> Example:
    ids = np.random.default_rng(seed).integers(4, 500, length).astype(np.int32)
    mask = np.ones(length, dtype=bool)
    return Example(content_id(ids, mask), "text", "random", ids, mask)


def said(teacher: Teacher, table=TABLE, asked=None):
    engine = open_engine("reference", teacher, table)
    (record,) = engine.score([asked or text()])
    engine.close()
    return record


@torch.no_grad()
def live(teacher: Teacher, attention="eager", **more):
    """Plain transformers on the same text: its output."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        teacher.model, attn_implementation=attention, dtype=torch.float32
    )
    return model.eval()(input_ids=torch.tensor(text().token_ids)[None].long(), **more)


@pytest.mark.parametrize("label", HEADS)
def test_heads_are_measured_and_make_the_models_own_logits(zoo, label, tmp_path):
    """Captured states and the kept head, and a student's states and head, are the live logits."""
    teacher = zoo(label)
    form = form_of(load_model(teacher))
    assert (form.state, form.scale, form.softcap) == pytest.approx(HEADS[label])
    states = torch.tensor(said(teacher).signals["hidden.final"])
    kept = keep_teacher_head(teacher, teacher_facts(teacher), tmp_path / "head")
    head = read_teacher_head(kept)
    logits = live(teacher).logits[0, :-1]
    torch.testing.assert_close(head.logits(states), logits, rtol=1e-5, atol=1e-5)
    student = load(teacher.model, "eager").eval()
    with torch.no_grad():
        ids = torch.tensor(text().token_ids)[None].long()
        own = forward_states(student, ids, torch.arange(40)[None])
    torch.testing.assert_close(own.final[:-1], states)
    divergence = linear_divergence(
        own.at(torch.arange(39)),
        own.head.weight,
        states * head.scale,
        head.weight,
        bias=own.head.bias,
        softcap=own.head.softcap,
        teacher_bias=head.bias,
        teacher_softcap=head.softcap,
    )
    assert divergence.abs().max() <= 1e-5


def _altered(model, change):
    """A model whose logits are changed after its head."""

    class Altered(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, **inputs):
            out = self.inner(**inputs)
            return type(out)(logits=change(out.logits))

        def get_output_embeddings(self):
            return self.inner.get_output_embeddings()

        def get_decoder(self):
            return self.inner.get_decoder()

    return Altered()


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z - z.mean(-1, keepdim=True),
        lambda z: z.clamp(-5, 5),
        lambda z: torch.cat([z[..., :9], torch.full_like(z[..., 9:], -1e9)], -1),
    ],
)
def test_a_head_of_another_kind_is_refused(zoo, change):
    with pytest.raises(TeacherError, match=r"Altered .*expected logits = softcap"):
        form_of(_altered(load_model(zoo("llama")), change))


def test_a_kept_head_is_held_against_the_cache(zoo, tmp_path):
    teacher = zoo("granite")
    record = said(teacher)
    facts = {
        "teacher": {"vocab_size": 512},
        "capture": {"hidden_codec": "step", "hidden_step": 0.05},
    }
    plan = SimpleNamespace(facts=facts)
    kept = keep_teacher_head(teacher, teacher_facts(teacher), tmp_path / "head")
    head = read_teacher_head(kept)
    check_head(head, record, plan, "here")
    for wrong in (Head(head.weight), Head(head.weight, scale=-0.25)):
        with pytest.raises(StudentError, match=r"here: .* nats from the cached ones"):
            check_head(wrong, record, plan, "here")


def test_a_head_that_was_kept_without_its_factor_is_made_again(zoo, tmp_path):
    from safetensors.torch import save_file

    teacher = zoo("granite")
    facts = teacher_facts(teacher)
    old = {"head": torch.zeros(512, 64)}
    save_file(old, tmp_path / "head", {"weights_sha256": facts["weights_sha256"]})
    with pytest.raises(StudentError, match=r"an earlier release kept it.*Name the cache's teacher"):
        keep_teacher_head(None, facts, tmp_path / "head")
    assert read_teacher_head(keep_teacher_head(teacher, facts, tmp_path / "head")).scale == 0.25


@pytest.mark.parametrize("label", ["gpt2", "gptj", "falcon", "bloom", "mpt", "mamba"])
def test_hidden_layers_of_any_decoder(zoo, label):
    record = said(zoo(label))
    truth = live(zoo(label), output_hidden_states=True).hidden_states
    for layer in (1, 2):
        true = truth[layer - 1 if label == "mamba" else layer]  # Mamba's list lacks the embeddings
        torch.testing.assert_close(torch.tensor(record.signals[f"hidden.{layer}"]), true[0, :-1])


def test_blocks_that_hand_on_several_states_are_refused(zoo):
    with pytest.raises(TeacherError, match=r"Gemma3n\w+ hands on \(4, 1, 40, 64\) after block 1"):
        said(zoo("gemma3n"))
    kept = said(zoo("gemma3n"), TABLE.model_copy(update={"hidden_layers": ("final",)}))
    assert kept.signals["hidden.final"].shape == (39, 64)


def test_attention_computes_what_the_config_says(zoo):
    """Transformers' sdpa leaves Gemma 2's soft cap out; the reference and evaluation do not."""
    ids = text().token_ids
    rows = range(39), ids[1:]
    exact, without = (
        live(zoo("gemma2"), attention).logits[0, :-1].log_softmax(-1)[rows].numpy()
        for attention in ("eager", "sdpa")
    )
    assert np.abs(exact - without).max() > 0.01
    found = said(zoo("gemma2")).signals["token_logprob"]
    np.testing.assert_allclose(found, exact, atol=1e-5)
    chosen = said(zoo("gemma2", attention="sdpa")).signals["token_logprob"]
    np.testing.assert_allclose(chosen, without, atol=1e-5)
    same = {"itself": zoo("gemma2").model}
    scores = measure(zoo("gemma2"), same, [text()])
    assert scores["teacher"].perplexity == pytest.approx(np.exp(-exact.mean()), rel=1e-4)
    assert scores["itself"].kl == pytest.approx(0, abs=1e-6)
    fast = measure(zoo("gemma2"), same, [text()], attention="sdpa")
    assert fast["teacher"].perplexity == pytest.approx(np.exp(-without.mean()), rel=1e-4)


def test_overrides_of_the_config_are_applied_or_refused(zoo, tmp_path):
    other = shutil.copytree(zoo("llama").model, tmp_path / "model")
    config = json.loads((other / "config.json").read_text())
    rope = config["rope_parameters"] | {"rope_theta": 500.0}
    (other / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    told = zoo("llama", engine_args={"hf_overrides": {"rope_parameters": {"rope_theta": 500.0}}})
    written = said(Teacher(model=str(other), dtype="float32")).signals["lse"]
    np.testing.assert_array_equal(said(told).signals["lse"], written)
    assert np.abs(said(zoo("llama")).signals["lse"] - written).max() > 1e-3
    longer = zoo("llama", engine_args={"hf_overrides": {"max_position_embeddings": 1024}})
    assert model_shape(longer).context == 1024
    unheard = zoo("llama", engine_args={"hf_overrides": {"rope_theta": 500.0}})
    with pytest.raises(ConfigError, match=r"rope_theta = 500\.0 changes nothing in LlamaConfig"):
        said(unheard)


@pytest.mark.parametrize(
    "more", [{"engine_args": {"kv_cache_dtype": "fp8"}}, {"quantization": "fp8"}]
)
def test_what_transformers_cannot_do_is_refused(zoo, more):
    name = "quantization" if "quantization" in more else "kv_cache_dtype"
    with pytest.raises(ConfigError, match=f"the reference engine cannot apply {name}"):
        said(zoo("llama", **more))
    said(zoo("llama", engine_args={"max_num_seqs": 4, "enforce_eager": True}))
    said(zoo("llama", engine_args={"max_model_len": 64, "attention_backend": "TRITON_ATTN"}))
