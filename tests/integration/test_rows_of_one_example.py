"""Architectures that cannot keep packed documents apart, other attentions, and experts."""

import json
import shutil

import pytest
import torch

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.config import parse
from stillroom.pipeline.objectives.balancing import unevenness
from stillroom.pipeline.student.model import load
from stillroom.pipeline.student.states import Routing
from stillroom.pipeline.training.metrics import read_metrics
from stillroom.pipeline.training.trainer import train
from tests import memory_cache, tiny_models
from tests.integration.test_heldout import mean_cross_entropy
from tests.integration.test_training import make_run, weights_digest

VOCABULARY = 768
OTHERS = memory_cache.examples(6, seed=2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_models.save_llama(tmp_path_factory.mktemp("teacher") / "model", num_layers=1)


@pytest.fixture(scope="module")
def cache(teacher):
    return memory_cache.captured(teacher, memory_cache.examples(8))


@pytest.fixture(scope="module")
def heldout(teacher, tmp_path_factory):
    others = memory_cache.captured(teacher, OTHERS)
    return str(others.write(tmp_path_factory.mktemp("heldout") / "cache"))


def config_of(architecture: str):
    """A config of a few thousand weights."""
    import transformers as hf

    words = {"vocab_size": VOCABULARY}
    small = words | {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    small |= {"num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0}
    experts = small | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    made = {
        "opt": lambda: hf.OPTConfig(
            **words,
            hidden_size=32,
            num_hidden_layers=2,
            ffn_dim=48,
            num_attention_heads=2,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        ),
        "bloom": lambda: hf.BloomConfig(**words, hidden_size=32, n_layer=2, n_head=2),
        "falcon": lambda: hf.FalconConfig(
            **words, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, alibi=True
        ),
        "mamba": lambda: hf.MambaConfig(**words, hidden_size=32, num_hidden_layers=2, state_size=4),
        "gptj": lambda: hf.GPTJConfig(
            **words, n_embd=32, n_layer=2, n_head=2, rotary_dim=8, n_positions=64
        ),
        "llama": lambda: hf.LlamaConfig(**small),
        "llama4": lambda: hf.Llama4TextConfig(
            **small,
            num_key_value_heads=2,
            head_dim=16,
            num_local_experts=4,
            intermediate_size_mlp=32,
            attention_chunk_size=24,
            no_rope_layers=[1, 0],
        ),
        "qwen3_moe": lambda: hf.Qwen3MoeConfig(
            **experts, num_key_value_heads=2, head_dim=16, router_aux_loss_coef=0.1
        ),
        "mixtral": lambda: hf.MixtralConfig(
            **small, num_key_value_heads=2, num_local_experts=4, router_aux_loss_coef=0.1
        ),
    }
    return made[architecture]()


def run_of(directory, teacher, architecture, **changes):
    source = directory / "config"
    source.mkdir(parents=True, exist_ok=True)
    config_of(architecture).save_pretrained(source)
    for path in [*teacher.glob("*token*"), teacher / "chat_template.jinja"]:
        shutil.copyfile(path, source / path.name)
    changes = {"steps": 2, "checkpoint_every": 2, "evaluate_every": 2} | changes
    run = make_run(directory / "run", teacher, objective=[{"name": "cross_entropy"}], **changes)
    student = {"init": "config", "model": str(source)}
    return parse(run.model_dump(mode="json") | {"student": student}, "test")


def trained(directory, teacher, cache, heldout, architecture, **changes):
    """Train; what was measured on held-out text is what plain transformers says of the export."""
    run = run_of(directory, teacher, architecture, heldout_cache=heldout, **changes)
    notes = []
    train(run, caches={"": cache}, on_note=notes.append)
    logged = read_metrics(run.path())[-1]
    wanted = mean_cross_entropy(run.path("student"), OTHERS)
    assert logged["heldout/1.cross_entropy"] == pytest.approx(wanted, rel=1e-5)
    return run, notes, logged


@pytest.mark.parametrize("architecture", ["opt", "bloom", "falcon", "mamba"])
def test_one_example_per_row_where_documents_are_not_kept_apart(
    tmp_path, teacher, cache, heldout, architecture
):
    run, notes, _ = trained(tmp_path, teacher, cache, heldout, architecture)
    assert any("one example per row" in note for note in notes)
    before = weights_digest(run)
    assert train(run, caches={"": cache}).seconds == 0
    assert weights_digest(run) == before


def test_packing_can_be_left_out(tmp_path, teacher, cache, heldout):
    _, notes, _ = trained(tmp_path / "a", teacher, cache, heldout, "llama", packing="never")
    assert notes == []


def test_one_example_per_row_says_what_packed_rows_do(tmp_path, teacher, cache, heldout):
    """The same student (its rate moves nothing), the same text, rows laid out in two ways."""
    still = {"steps": 1, "evaluate_every": 1, "learning_rate": 1e-30}
    found = [
        trained(tmp_path / packing, teacher, cache, heldout, "llama", packing=packing, **still)[2]
        for packing in ("auto", "never")
    ]
    packed, alone = (logged["heldout/1.cross_entropy"] for logged in found)
    assert alone == pytest.approx(packed, rel=1e-6)


@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_attention_survives_export_and_reruns(tmp_path, teacher, cache, heldout, attention):
    """GPT-J has no sdpa."""
    run, _, _ = trained(tmp_path, teacher, cache, heldout, "gptj", attention=attention)
    assert train(run, caches={"": cache}).seconds == 0


def test_an_attention_that_cannot_be_had_says_what_can(tmp_path, teacher, cache, heldout):
    run = run_of(tmp_path / "a", teacher, "gptj", heldout_cache=heldout, attention="sdpa")
    with pytest.raises(StudentError, match="cannot be loaded") as caught:
        train(run, caches={"": cache})
    assert "attention = 'auto'" in caught.value.remedy
    trained(tmp_path / "b", teacher, cache, heldout, "gptj", attention="auto")


def test_an_attention_without_gradients_here_is_refused(tmp_path, teacher, cache, heldout):
    run = run_of(
        tmp_path / "a", teacher, "llama", heldout_cache=heldout, attention="flex_attention"
    )
    with pytest.raises(StudentError, match="no backward pass on cpu") as caught:
        train(run, caches={"": cache})
    assert "attention = 'auto'" in caught.value.remedy
    run = run_of(tmp_path / "a", teacher, "llama", heldout_cache=heldout, attention="auto")
    train(run, caches={"": cache})


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_experts_are_balanced_by_the_configs_coefficient(
    tmp_path, teacher, cache, heldout, architecture
):
    _, _, logged = trained(tmp_path / "on", teacher, cache, heldout, architecture)
    assert logged["objective/2.load_balancing"] >= 1
    balanced = logged["objective/1.cross_entropy"] + 0.1 * logged["objective/2.load_balancing"]
    assert logged["loss"] == pytest.approx(balanced, rel=1e-6)
    off = {"load_balancing": False}
    _, _, logged = trained(tmp_path / "off", teacher, cache, heldout, architecture, **off)
    assert "objective/2.load_balancing" not in logged


def test_unevenness_is_that_of_transformers():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    torch.manual_seed(0)
    logits = tuple(torch.randn(12, 5) for _ in range(3))
    real = torch.arange(12) < 9
    wanted = load_balancing_loss_func(logits, 5, 2, real[None].long())
    torch.testing.assert_close(unevenness(Routing(logits, 5, 2), real), wanted)


def test_a_student_without_experts_has_no_routing_to_balance(tmp_path, teacher, cache):
    run = make_run(tmp_path, teacher, objective=[{"name": "load_balancing"}], steps=1)
    with pytest.raises(StudentError, match="needs a student with experts"):
        train(run, caches={"": cache})
    assert load(run.path("student-initial")) is not None


def changed_run(directory, teacher, heldout, architecture, more, **changes):
    """A run whose student's config says more."""
    run = run_of(directory, teacher, architecture, heldout_cache=heldout, **changes)
    path = directory / "config" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return run


DYNAMIC = {
    "max_position_embeddings": 16,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
}


@pytest.mark.parametrize("packing", ["auto", "never"])
def test_positions_turned_by_the_longest_text_share_no_row_and_are_told_of(
    tmp_path, teacher, cache, heldout, packing
):
    """Examples have up to 24 tokens: beyond the 16 that this student's RoPE was made for."""
    run = changed_run(tmp_path, teacher, heldout, "llama", DYNAMIC, packing=packing)
    notes = []
    train(run, caches={"": cache}, on_note=notes.append)
    assert any("beside one of" in n and "one example per row" in n for n in notes) is (
        packing == "auto"
    )
    assert any("turns all positions" in note for note in notes)


@pytest.mark.parametrize(("length", "packed"), [(24, True), (48, False)])
def test_attention_cut_by_places_decides_by_the_length_of_a_row(
    tmp_path, teacher, cache, heldout, length, packed
):
    """A Llama 4 of 24 places."""
    run = run_of(tmp_path, teacher, "llama4", heldout_cache=heldout, sequence_length=length)
    notes = []
    train(run, caches={"": cache}, on_note=notes.append)
    assert any(f"in a row of {length} tokens: one example" in n for n in notes) is not packed
