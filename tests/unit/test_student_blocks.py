"""Which blocks a teacher misses least: what is measured, and how `student --leave-out` says it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.config.training import Student
from stillroom.pipeline.evaluation.scores import mean_and_error
from stillroom.pipeline.student import leaving_out
from stillroom.pipeline.student.choosing_blocks import FILE, _Passes
from stillroom.pipeline.student.leaving_out import least_missed
from stillroom.pipeline.student.loading import load
from stillroom.pipeline.student.partial_passes import PartialPasses, batches
from stillroom.pipeline.student.pruning import prune_layers
from stillroom.pipeline.student.sameness import logits_of, skipped
from stillroom.pipeline.student.states import blocks_of
from stillroom.stages.__main__ import run as command
from stillroom.stages.progress_line import Pace
from tests import memory_cache
from tests.tiny_models import save_llama

EXAMPLES = memory_cache.examples(4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(save_llama(tmp_path_factory.mktemp("deep") / "m", num_layers=4, seed=5)).eval()


@torch.no_grad()
def kl_of_pruned(model, texts, keep) -> float:
    """By cutting the blocks out, in float64."""
    import copy

    cut = copy.deepcopy(model)
    prune_layers(cut, blocks_of(cut), keep)
    total, rows = 0.0, 0
    for text in texts:
        ids = torch.as_tensor(text.token_ids, dtype=torch.long)[None]
        p, q = (m(input_ids=ids).logits[0].double().log_softmax(-1) for m in (model, cut))
        total += float((p.exp() * (p - q)).sum())
        rows += len(p)
    return total / rows


def test_the_block_that_goes_first_is_missed_least(model):
    texts = memory_cache.examples(3)
    gone = least_missed(model, texts, 2)
    alone = {n: kl_of_pruned(model, texts, [k for k in range(4) if k != n]) for n in range(4)}
    assert gone[0].block == min(alone, key=alone.__getitem__)
    assert gone[0].kl == pytest.approx(alone[gone[0].block], rel=1e-3)
    left = [n for n in range(4) if n not in (gone[0].block, gone[1].block)]
    assert gone[1].kl == pytest.approx(kl_of_pruned(model, texts, left), rel=1e-3)


def test_texts_of_all_lengths_are_measured_as_each_by_itself(model):
    """Side by side they are padded, on the right, where a causal model does not look."""
    texts = [replace(one, token_ids=one.token_ids[:n]) for one, n in zip(EXAMPLES, (22, 6, 20, 6))]
    assert [len(group) for group in batches(texts)] == [2, 2]
    (gone,) = least_missed(model, texts, 1)
    keep = [n for n in range(4) if n != gone.block]
    assert gone.kl == pytest.approx(kl_of_pruned(model, texts, keep), rel=1e-3)


@torch.no_grad()
def test_a_partial_pass_says_what_a_whole_one_does(model):
    passes = PartialPasses(model, EXAMPLES[:2])
    counted = []
    hooks = [
        block.get_submodule("mlp").register_forward_hook(lambda *_, n=n: counted.append(n))
        for n, block in enumerate(blocks_of(model))
    ]
    passes.without((1,))
    counted.clear()
    found = passes.without((1,), 2).final
    assert counted == [3]  # what lies below the block that goes is not computed again
    for hook in hooks:
        hook.remove()
    with skipped([blocks_of(model)[n] for n in (1, 2)]):
        expected = logits_of(model, passes._ids)
    logits = model.lm_head(found).view(expected.shape)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_blocks_that_tell_each_other_more_than_a_state_are_passed_through_whole(tmp_path):
    talking = load(save_llama(tmp_path / "m", num_layers=4, seed=5)).eval()
    speaks, hears = list(blocks_of(talking))[2:]
    own = speaks.forward, hears.forward

    def speak(hidden, **named):
        hears.heard = hidden.mean()
        return own[0](hidden, **named)

    speaks.forward = speak
    hears.forward = lambda hidden, **named: own[1](hidden + hears.heard, **named)
    gone = least_missed(talking, EXAMPLES[:2], 2)
    with torch.inference_mode():
        passes = PartialPasses(talking, EXAMPLES[:2])
        assert not passes._partial
        with skipped([blocks_of(talking)[left.block] for left in gone]):
            expected = logits_of(talking, passes._ids)
        found = talking.lm_head(passes.without([left.block for left in gone]).final)
    torch.testing.assert_close(found.view(expected.shape), expected)
    assert speaks.forward is speak  # as it was


def test_time_left_does_not_rise_while_blocks_are_measured(tmp_path):
    """By a clock that goes forward by the blocks that are computed."""
    deep = load(save_llama(tmp_path / "m", num_layers=10, seed=5)).eval()
    clock, told, pace = [0.0], [], Pace(0.0)

    def tick(*_):
        clock[0] += 1.0

    def note(done, total):
        tick()  # the head is about one block here
        pace.note(clock[0], done, total)
        told.append((total, clock[0], pace.left(clock[0])))

    for block in blocks_of(deep):
        block.get_submodule("mlp").register_forward_hook(tick)
    least_missed(deep, EXAMPLES[:1], 7, note)
    assert len({total for total, _, _ in told}) == 1  # known from the beginning
    ahead = [(clock[0] - at, left) for _, at, left in told if left is not None]
    assert len(ahead) > 20
    assert all(left < 1.3 * really + 5 for really, left in ahead)


def test_an_interruption_keeps_what_was_measured(model):
    kept: dict = {}

    def stop_after_five(gone, kl):
        if len(kept) == 5:
            raise KeyboardInterrupt
        kept[gone] = kl

    with pytest.raises(KeyboardInterrupt):
        least_missed(model, EXAMPLES[:2], 3, on_measured=stop_after_five)
    again = []
    gone = least_missed(model, EXAMPLES[:2], 3, None, kept, lambda key, _: again.append(key))
    whole: dict = {}
    assert gone == least_missed(model, EXAMPLES[:2], 3, on_measured=whole.__setitem__)
    assert set(again) == set(whole) - set(kept)
    assert len(kept) == 5


def test_passes_that_were_kept_are_nobodys_speed(tmp_path):
    """Six passes a choice, of which all but the last three are known."""
    deep = load(save_llama(tmp_path / "m", num_layers=6, seed=5)).eval()
    whole: dict = {}
    told: list[tuple[float, int]] = []
    least_missed(deep, EXAMPLES[:1], 3, None, None, whole.__setitem__)
    kept = dict(list(whole.items())[:-3])
    new: list = []

    def note(done, _total):
        told.append((done, len(new)))

    least_missed(deep, EXAMPLES[:1], 3, note, kept, lambda key, _: new.append(key))
    assert [measured for _, measured in told] == [0, 1, 2, 3]
    first, last = told[0][0], told[-1][0]
    assert 0.5 * last < first < last  # what is kept is shown as done from the first word on


def test_all_passes_kept_is_said_once(model):
    whole: dict = {}
    least_missed(model, EXAMPLES[:2], 3, None, None, whole.__setitem__)
    told: list = []
    least_missed(model, EXAMPLES[:2], 3, lambda *numbers: told.append(numbers), whole)
    ((done, total),) = told
    assert done == total


def test_a_short_list_goes_by_what_a_block_adds(monkeypatch, tmp_path):
    """Not by its KL beside those that were gone then: a block that was not tried for long would
    stand before every fresh one."""
    tried: list[tuple[int, ...]] = []
    adds = [0.9, 0.5, 0.1, 0.2, 0.3, 0.8, 0.9, 0.9]

    def kl(_judge, without, number):
        tried.append((*without, number))
        return sum(adds[n] for n in (*without, number))

    monkeypatch.setattr(leaving_out, "SHORT_LIST", 2)
    monkeypatch.setattr(leaving_out._Judge, "kl", kl)
    deep = load(save_llama(tmp_path / "m", num_layers=8, seed=5)).eval()
    gone = least_missed(deep, EXAMPLES[:1], 4)
    assert [left.block for left in gone] == [2, 3, 4, 1]
    assert gone[-1].kl == pytest.approx(1.1)
    assert {one[-1] for one in tried if len(one) == 3} == {1, 4}


def test_passes_of_another_text_are_not_taken(tiny_llama, tmp_path):
    teacher = {"architecture": "A"}
    first = _Passes(tmp_path / FILE, teacher, EXAMPLES[:2])
    first.add((1,), 0.5)
    assert _Passes(tmp_path / FILE, teacher, EXAMPLES[:2]).known == {(1,): 0.5}
    assert _Passes(tmp_path / FILE, teacher, EXAMPLES[1:3]).known == {}
    assert _Passes(tmp_path / FILE, {"architecture": "B"}, EXAMPLES[:2]).known == {}
    (tmp_path / FILE).write_text('{"of": ')
    assert _Passes(tmp_path / FILE, teacher, EXAMPLES[:2]).known == {}


def test_no_block_would_be_left(model):
    with pytest.raises(StudentError, match="4 blocks to leave out; expected 1 to 3"):
        least_missed(model, memory_cache.examples(1), 4)


def test_errors_of_means_are_over_examples():
    mean, error = mean_and_error([2.0, 4.0, 9.0], [2, 2, 3])
    assert mean == pytest.approx(15 / 7)
    gaps = [2 - 2 * 15 / 7, 4 - 2 * 15 / 7, 9 - 3 * 15 / 7]
    assert error == pytest.approx(sum(gap**2 for gap in gaps) ** 0.5 / 7)


RUN = """
name = "elsewhere"
directory = "{root}/run"
[teacher]
model = "{teacher}"
[prepare]
window = 32
heldout = 0.0
[[prepare.source]]
name = "help"
kind = "pydoc_topics"
limit = 2
[evaluate]
split = "train"
examples = 4
students = {{ other = "{other}" }}
"""


def test_students_are_measured_and_asked_without_a_training_of_their_own(
    tmp_path, tiny_llama, capsys
):
    other = save_llama(tmp_path / "other", num_layers=1, seed=3)
    file = tmp_path / "run.toml"
    file.write_text(RUN.format(root=tmp_path, teacher=tiny_llama, other=other))
    assert command(["prepare", str(file)]) == 0
    capsys.readouterr()
    assert command(["evaluate", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"teacher", "other"}
    assert found["other"]["kl_standard_error"] > 0
    assert len(found["other"]["by_example"]["kl"]) == 4
    assert command(["ask", str(file), "", "--plain"]) == 2
    assert "an empty prompt" in capsys.readouterr().err
    assert command(["ask", str(file), "one", "two", "--plain", "--tokens", "3", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "run" / "answers.json").read_text())
    assert [len(answers) for answers in said["answers"].values()] == [2, 2]
    measured = ["student", str(file), "--leave-out", "1", "--tokens", "512", "--json"]
    assert command(measured) == 0
    kept = json.loads(capsys.readouterr().out)
    depth = len(kept["keep_layers"]) + 1
    assert sorted([*kept["keep_layers"], kept["left_out"][0]["block"]]) == list(range(depth))
    file.write_text(file.read_text() + "[student]\nleave_out = 1\n")
    assert command(["student", str(file)]) == 0
    receipt = tmp_path / "run" / "student-initial" / "student.json"
    made = json.loads(receipt.read_text())["student"]
    assert (made["leave_out"], made["keep_layers"]) == (1, kept["keep_layers"])
    goes_on_without_a_corpus(tmp_path, file, capsys)


def goes_on_without_a_corpus(tmp_path, file, capsys):
    (tmp_path / "run" / "corpus").rename(tmp_path / "away")
    assert command(["student", str(file)]) == 0
    file.write_text(file.read_text().replace("leave_out = 1", "leave_out = 2"))
    capsys.readouterr()
    assert command(["student", str(file)]) == 2
    assert "made with [student] leave_out = 1; expected 2" in " ".join(
        capsys.readouterr().err.split()
    )
    shutil.rmtree(tmp_path / "run" / "student-initial")
    assert command(["student", str(file)]) == 2
    assert "stillroom prepare" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"leave_out": 1, "keep_layers": [0]}, "take one"),
        ({"leave_out": 1, "init": "config"}, "init is 'config'"),
    ],
)
def test_blocks_are_chosen_in_one_way(table, message):
    with pytest.raises(ValueError, match=message):
        Student(**table)
