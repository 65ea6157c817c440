"""Pruned students are the teacher's kept parts, as transformers loads them; or they are refused."""

import json
import shutil

import pytest
import torch

from stillroom.cache_schemas.errors import PlanMismatch, StudentError
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.config.training import Student
from stillroom.pipeline.student import pruning
from stillroom.pipeline.student.model import initial_student, load
from stillroom.pipeline.student.saving import RECEIPT
from stillroom.pipeline.student.states import blocks_of
from tests import student_architectures, tiny_encoders, tiny_models

VOCAB = 300
NAMES_LAYERS = (
    "smollm3",
    "qwen3_moe",
    "qwen2_moe",
    "deepseek_v3",
    "glm4_moe",
    "ernie4_5_moe",
    "dots1",
    "recurrent_gemma",
    "gpt_neo",
    "gemma3_text",
    "lfm2",
)
"""Architectures whose configs say of each block what it is, each in its own way."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("architectures")
    tiny_models.save_tokenizer(root / "tokenizer", VOCAB)

    def save(architecture, **more):
        at = root / f"{architecture}-{len(list(root.iterdir()))}"
        return student_architectures.save_model(architecture, at, root / "tokenizer", VOCAB, **more)

    return save


def made(source, directory, **student):
    return load(initial_student(Student(**student), Teacher(model=str(source)), directory))


@torch.no_grad()
def logits(model, ids):
    return model.eval()(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def with_blocks_only(source, keep, ids):
    """The teacher's own answer where all blocks but `keep` are left out of its list, by hand."""
    model = load(source).eval()
    for number, block in enumerate(blocks_of(model)):
        if number not in keep:
            block.forward = hand_on(block.forward)
    return logits(model, ids)


def hand_on(forward):
    def same(hidden_states, *args, **kwargs):
        found = forward(hidden_states, *args, **kwargs)
        return (hidden_states, *found[1:]) if isinstance(found, tuple) else hidden_states

    return same


@pytest.mark.parametrize("keep", [(0, 2, 3), (1, 3)])
@pytest.mark.parametrize("architecture", NAMES_LAYERS)
def test_the_saved_student_is_the_kept_blocks(saved, tmp_path, architecture, keep):
    source = saved(architecture)
    ids = torch.arange(4, 44).view(2, 20)
    student = made(source, tmp_path / "made", keep_layers=keep)
    assert student.config.get_text_config().num_hidden_layers == len(keep)
    expected = with_blocks_only(source, keep, ids)
    torch.testing.assert_close(logits(student, ids), expected, rtol=1e-4, atol=1e-4)


def test_a_config_that_says_something_else_of_the_blocks_is_refused(saved, tmp_path, monkeypatch):
    def forgetful(config, keep):
        config.num_hidden_layers, config.layer_types = len(keep), config.layer_types[: len(keep)]

    monkeypatch.setattr(pruning, "keep_layers", forgetful)
    source, at = saved("smollm3"), tmp_path / "made"
    with pytest.raises(StudentError, match=r"prune_layers.*differ by"):
        made(source, at, keep_layers=(0, 2, 3))
    assert list(tmp_path.iterdir()) == []


def test_a_window_that_a_short_text_does_not_show_is_compared_too(saved, tmp_path, monkeypatch):
    def forgets_windows(config, keep):
        config.num_hidden_layers = len(keep)
        config.layer_types = config.layer_types[: len(keep)]

    monkeypatch.setattr(pruning, "keep_layers", forgets_windows)
    source = saved("qwen2", sliding_window=2048, use_sliding_window=True, max_window_layers=2)
    with pytest.raises(StudentError, match=r"layer_type = 'full_attention' in block 1"):
        made(source, tmp_path / "made", keep_layers=(1, 3))


def test_blocks_that_know_their_place_are_refused_with_a_way_out(saved, tmp_path):
    source = saved("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(StudentError, match=r"name the first blocks.*init = 'config'"):
        made(source, tmp_path / "made", keep_layers=(0, 3))
    assert made(source, tmp_path / "first", keep_layers=(0, 1)).config.n_layer == 2
    fresh = made(source, tmp_path / "fresh", init="config", model=str(source))
    assert fresh.config.n_layer == 4


def test_blocks_out_of_order_are_refused_with_the_order(saved, tmp_path):
    source = saved("llama")
    with pytest.raises(StudentError, match=r"Write keep_layers = \[1, 3\]"):
        made(source, tmp_path / "made", keep_layers=(3, 1))
    made(source, tmp_path / "made", keep_layers=(1, 3))


@pytest.mark.parametrize("architecture", ["olmo2", "olmo3", "cohere", "stablelm", "doge", "helium"])
def test_inner_units_can_go(saved, tmp_path, architecture):
    student = made(saved(architecture), tmp_path / "made", init="prune_width")
    assert student.config.intermediate_size == 32


@pytest.mark.parametrize("architecture", ["llama", "cohere", "qwen3", "arcee"])
def test_heads_can_go(saved, tmp_path, architecture):
    student = made(saved(architecture), tmp_path / "made", init="prune_width", keep_heads=0.5)
    config = student.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)


@pytest.mark.parametrize("architecture", ["olmo2", "stablelm", "doge", "helium"])
def test_heads_that_cannot_go_are_refused_with_a_way_out(saved, tmp_path, architecture):
    source = saved(architecture)
    with pytest.raises(StudentError, match=r"keep_heads = 1\.0"):
        made(source, tmp_path / "made", init="prune_width", keep_heads=0.5)
    made(source, tmp_path / "made", init="prune_width", keep_heads=1.0)


@pytest.mark.parametrize(
    ("share", "count", "remedy"),
    [
        ({"keep_heads": 0.9}, r"all 2 groups of heads", r"keep_heads = 0\.5 for 1, or"),
        ({"keep_intermediate": 0.999}, r"all 64 units", r"keep_intermediate = 0\.9843 for 63, or"),
    ],
)
def test_a_share_that_leaves_nothing_out_is_refused(saved, tmp_path, share, count, remedy):
    """It would be the whole model, and the run file says otherwise."""
    source, kept = saved("llama"), {"keep_heads": 1.0, "keep_intermediate": 1.0} | share
    with pytest.raises(StudentError, match=rf"(?s){count}.*{remedy}"):
        made(source, tmp_path / "made", init="prune_width", **kept)
    less = {"keep_heads": 0.5, "keep_intermediate": 0.9843}
    student = made(
        source, tmp_path / "less", init="prune_width", **kept | {k: less[k] for k in share}
    )
    assert (student.config.num_key_value_heads == 1) == ("keep_heads" in share)
    assert (student.config.intermediate_size == 63) == ("keep_intermediate" in share)


def test_a_norm_over_all_inner_units_is_refused_with_a_way_out(saved, tmp_path):
    source = saved("bitnet")
    with pytest.raises(StudentError, match=r"keep_intermediate = 1\.0"):
        made(source, tmp_path / "made", init="prune_width")
    made(source, tmp_path / "made", init="prune_width", keep_intermediate=1.0)


def test_heads_that_do_not_divide_the_width_are_refused_with_a_way_out(saved, tmp_path):
    source = saved("llama", num_key_value_heads=4)
    with pytest.raises(StudentError, match=r"not a multiple.*keep_heads = 1\.0"):
        made(source, tmp_path / "made", init="prune_width", keep_heads=0.75)
    made(source, tmp_path / "made", init="prune_width", keep_heads=1.0)


def test_heads_of_a_width_of_their_own_may_be_any_number(saved, tmp_path):
    source = saved("qwen3", num_key_value_heads=4, head_dim=12)
    student = made(source, tmp_path / "made", init="prune_width", keep_heads=0.75)
    assert (student.config.num_attention_heads, student.config.head_dim) == (3, 12)


def test_experts_are_not_cut(saved, tmp_path):
    source = saved("mixtral")
    with pytest.raises(StudentError, match=r"cannot be pruned in width.*init = 'prune_layers'"):
        made(source, tmp_path / "made", init="prune_width")
    made(source, tmp_path / "made", init="prune_layers", keep_layers=(0, 2))


@pytest.mark.parametrize("student", [{"keep_layers": [0, 1]}, {"init": "model"}])
def test_a_student_of_weights_that_are_others_since_is_not_taken_up_again(saved, tmp_path, student):
    source = saved("llama")
    named = {"model": str(source)} if "init" in student else {}
    made(source, tmp_path / "student", **student, **named)
    made(source, tmp_path / "student", **student, **named)
    weights = load(source)
    with torch.no_grad():
        next(weights.parameters()).mul_(1.5)
    weights.save_pretrained(source)
    with pytest.raises(PlanMismatch, match=r"another teacher.*sha256") as refused:
        made(source, tmp_path / "student", **student, **named)
    assert f"Delete {tmp_path / 'student'}" in str(refused.value)
    source.rename(tmp_path / "gone")  # training goes on where the teacher is not
    made(source, tmp_path / "student", **student, **named)


def test_a_student_of_a_config_that_is_another_since_is_not_taken_up_again(saved, tmp_path):
    source, config = saved("llama"), saved("llama", num_hidden_layers=2)
    at, path = tmp_path / "student", config / "config.json"

    def make():
        teacher = Teacher(model=str(source))
        return initial_student(Student(init="config", model=str(config)), teacher, at)

    make()
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"transformers_version": "0", "_name_or_path": "elsewhere"}))
    make()  # which change nothing that is made
    path.write_text(json.dumps(said | {"num_hidden_layers": 3}))
    with pytest.raises(
        PlanMismatch, match=r"config\.num_hidden_layers: found 2, expected 3"
    ) as refused:
        make()
    assert f"Delete {at}" in str(refused.value)
    receipt = json.loads((at / RECEIPT).read_text())
    (at / RECEIPT).write_text(json.dumps(receipt | {"teacher": {"model": str(config)}}))
    make()  # of a release that did not say it
    (at / RECEIPT).write_text(json.dumps(receipt))
    path.rename(tmp_path / "config.json")  # training goes on where the config is not
    make()
    (tmp_path / "config.json").rename(path)
    path.write_text(json.dumps(said | {"num_hidden_layers": 3}))
    shutil.rmtree(at)  # the remedy
    assert len(blocks_of(load(make()))) == 3


@pytest.mark.parametrize("part", ["language model", "vision tower"])
def test_a_student_of_parts_that_are_others_since_is_not_taken_up_again(tmp_path, part):
    paths = {
        "language model": tiny_models.save_llama(tmp_path / "language"),
        "vision tower": tiny_encoders.save("clip", tmp_path / "tower"),
    }
    language, tower = map(str, paths.values())
    student = Student(init="parts", model=language, vision_model=tower)
    at = tmp_path / "student"

    def make():
        return initial_student(student, Teacher(model=language), at)

    make()
    make()
    receipt = json.loads((at / RECEIPT).read_text())
    if part == "language model":
        tiny_models.save_llama(paths[part], seed=5)
    else:
        tiny_encoders.save("clip", paths[part], seed=5)
    with pytest.raises(PlanMismatch, match=rf"another {part}.*weights_sha256") as refused:
        make()
    assert f"Delete {at}" in str(refused.value)
    (at / RECEIPT).write_text(json.dumps(receipt | {"teacher": {"model": language}}))
    make()  # of a release that did not say it
    (at / RECEIPT).write_text(json.dumps(receipt))
    paths[part].rename(tmp_path / "gone")
    make()
