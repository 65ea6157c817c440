"""Held-out measures: with the held-out cache's own facts, every example once, or refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stillroom.cache_schemas.errors import ConfigError, PlanMismatch, StillroomError, StudentError
from stillroom.cache_schemas.manifest import Plan
from stillroom.pipeline.student.model import load
from stillroom.pipeline.training.metrics import read_metrics
from stillroom.pipeline.training.trainer import train
from tests import memory_cache, tiny_models
from tests.integration.test_parallel_training import launch
from tests.integration.test_training import make_run

FACTS = {"temperatures": (1.0, 2.0), "k": 8, "tail_draws": 8}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_models.save_llama(tmp_path_factory.mktemp("teacher") / "model", num_layers=3)


@pytest.fixture(scope="module")
def cache(teacher):
    return memory_cache.captured(teacher, memory_cache.examples(12), **FACTS)


@pytest.fixture(scope="module")
def texts():
    return memory_cache.examples(7, seed=9)


@pytest.fixture(scope="module")
def heldout(teacher, texts, tmp_path_factory):
    captured = memory_cache.captured(teacher, texts, **FACTS)
    return str(captured.write(tmp_path_factory.mktemp("heldout") / "cache"))


def trained(directory, teacher, cache, more=None, **changes):
    """Two steps with one measurement at the end; returns what was logged last."""
    run = make_run(directory, teacher, **{"steps": 2, "evaluate_every": 5} | changes)
    train(run, caches={"": cache} | (more or {}))
    return read_metrics(run.path())[-1]


def refused(error, match, directory, *arguments, **changes):
    with pytest.raises(error, match=match) as caught:
        trained(directory, *arguments, **changes)
    assert caught.value.exit_code == 2
    assert not (directory / "checkpoints").exists()
    return caught.value


def mean_cross_entropy(student, texts) -> float:
    """Of the tokens under the loss mask, by plain transformers, one text at a time."""
    model, total, count = load(student).eval(), 0.0, 0
    for text in texts:
        ids = torch.from_numpy(text.token_ids.astype(np.int64))[None]
        with torch.no_grad():
            surprise = torch.nn.functional.cross_entropy(
                model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="none"
            )
        wanted = torch.from_numpy(text.loss_mask[1:])
        total, count = total + float(surprise[wanted].sum()), count + int(wanted.sum())
    return total / count


CROSS_ENTROPY = [{"name": "cross_entropy"}]


@pytest.mark.parametrize("batch_tokens", [24, 96, 100_000])
def test_every_example_counts_once_however_a_step_is_filled(
    tmp_path, teacher, cache, heldout, texts, batch_tokens
):
    changes = {"batch_tokens": batch_tokens, "accumulate": 3, "objective": CROSS_ENTROPY}
    logged = trained(tmp_path, teacher, cache, heldout_cache=heldout, **changes)
    wanted = mean_cross_entropy(tmp_path / "student", texts)
    assert logged["heldout/1.cross_entropy"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_every_example_counts_once_over_ranks(
    tmp_path, teacher, cache, heldout, texts, kind, tmp_path_factory
):
    stored = str(cache.write(tmp_path / "cache"))
    changes = {"cache": stored, "heldout_cache": heldout, "evaluate_every": 2, "parallel": kind}
    launch(2, tmp_path / "run", teacher, steps=2, objective=CROSS_ENTROPY, **changes)
    wanted = mean_cross_entropy(tmp_path / "run" / "student", texts)
    logged = read_metrics(tmp_path / "run")[-1]["heldout/1.cross_entropy"]
    assert logged == pytest.approx(wanted, rel=1e-5)


def test_the_average_is_measured_where_it_is_exported(tmp_path, teacher, cache, heldout, texts):
    changes = {"ema": 0.9, "objective": CROSS_ENTROPY, "heldout_cache": heldout}
    logged = trained(tmp_path, teacher, cache, **changes)
    wanted = mean_cross_entropy(tmp_path / "student", texts)
    assert logged["heldout/1.cross_entropy"] == pytest.approx(wanted, rel=1e-5)


def test_its_own_temperatures_are_read(tmp_path, teacher, cache, heldout, texts):
    """The same text with further temperatures: the column of `lse` is another one."""
    more = memory_cache.captured(teacher, texts, **FACTS | {"temperatures": (0.5, 1.0, 1.5, 2.0)})
    objective = [{"name": "forward_kl", "options": {"temperature": 2.0, "tail": "bucket"}}]
    named = {"same": {"cache": heldout}, "more": {"cache": str(more.write(tmp_path / "more"))}}
    logged = trained(tmp_path / "run", teacher, cache, objective=objective, heldout=named)
    same, other = (logged[f"heldout/{name}/1.forward_kl"] for name in named)
    assert other == pytest.approx(same, rel=1e-3)
    assert same > 0


def test_longer_examples_are_measured_too(tmp_path, teacher, cache):
    long = memory_cache.examples(5, seed=3, longest=60)
    held = str(memory_cache.captured(teacher, long, **FACTS).write(tmp_path / "held"))
    changes = {"objective": CROSS_ENTROPY, "heldout_cache": held, "batch_tokens": 48}
    logged = trained(tmp_path / "run", teacher, cache, sequence_length=24, **changes)
    wanted = mean_cross_entropy(tmp_path / "run" / "student", long)
    assert logged["heldout/1.cross_entropy"] == pytest.approx(wanted, rel=1e-5)


def test_what_is_not_there_is_found_at_start(tmp_path, teacher, cache):
    refused(
        StillroomError, "there is no cache here", tmp_path, teacher, cache, heldout_cache="nowhere"
    )
    refused(ConfigError, "evaluate_every without heldout_cache", tmp_path, teacher, cache)


def test_another_teacher_is_refused(tmp_path, teacher, cache, texts, heldout):
    other = tiny_models.save_llama(tmp_path / "other", num_layers=2, seed=5)
    held = str(memory_cache.captured(other, texts, **FACTS).write(tmp_path / "held"))
    arguments = (tmp_path / "run", teacher, cache)
    refused(PlanMismatch, r"is another teacher: .*weights_sha256", *arguments, heldout_cache=held)
    trained(*arguments, heldout_cache=heldout)


def test_another_tokenizer_is_refused(tmp_path, teacher, cache, texts):
    held = memory_cache.captured(teacher, texts, **FACTS)
    facts = dict(held.plan.facts)
    facts["tokenizer"] = facts["tokenizer"] | {"sha256": "0" * 64}
    held = replace(held, plan=Plan.from_facts(facts, "test")).write(tmp_path / "held")
    message = r"tokenizer sha256 is .* as in \[train\] heldout_cache"
    with pytest.raises(StudentError, match=message):
        trained(tmp_path / "run", teacher, cache, heldout_cache=str(held))


def test_a_temperature_that_it_lacks_is_refused(tmp_path, teacher, cache, texts):
    held = memory_cache.captured(teacher, texts, **FACTS | {"temperatures": (1.0,)})
    place = str(held.write(tmp_path / "held"))
    objective = [{"name": "reverse_kl", "options": {"temperature": 2.0}}]
    message = r"heldout_cache \[\[objective\]\] 1 'reverse_kl': temperature 2 is not in the cache"
    arguments = (tmp_path / "run", teacher, cache)
    refused(StudentError, message, *arguments, heldout_cache=place, objective=objective)


def test_another_tail_is_refused_and_can_be_told(tmp_path, teacher, cache, texts):
    held = memory_cache.captured(teacher, texts, **FACTS | {"tail_draws": 0})
    place = str(held.write(tmp_path / "held"))
    arguments = (tmp_path / "run", teacher, cache)
    error = refused(PlanMismatch, "measured with tail = 'bucket'", *arguments, heldout_cache=place)
    assert "options.tail" in error.remedy
    told = [{"name": "forward_kl", "options": {"tail": "bucket"}}]
    assert trained(*arguments, heldout_cache=place, objective=told)["heldout/1.forward_kl"] > 0


def test_two_teachers_need_two_heldout_caches(tmp_path, teacher, cache, texts, heldout):
    other = tiny_models.save_llama(tmp_path / "other", num_layers=2, seed=5)
    second = memory_cache.captured(other, [record.example for record in cache.records], **FACTS)
    objective = [{"name": "forward_kl"}, {"name": "forward_kl", "cache": "second"}]
    changes = {"objective": objective, "caches": {"second": "unused"}}
    arguments = (tmp_path / "run", teacher, cache, {"second": second})
    message = r"names no cache 'second', which objective 2.forward_kl@second is about"
    error = refused(ConfigError, message, *arguments, heldout_cache=heldout, **changes)
    assert 'caches = { second = "..." }' in error.remedy

    theirs = str(memory_cache.captured(other, texts, **FACTS).write(tmp_path / "theirs"))
    named = {"page": {"cache": heldout, "caches": {"second": theirs}}}
    logged = trained(*arguments, heldout=named, **changes)
    assert logged["heldout/page/1.forward_kl"] != logged["heldout/page/2.forward_kl@second"]

    wrong = {"page": {"cache": heldout, "caches": {"secnd": theirs}}}
    message = "names cache 'secnd'.*expected some of second.*Did you mean 'second'"
    refused(ConfigError, message, tmp_path / "b", *arguments[1:], heldout=wrong, **changes)


def test_the_text_that_is_trained_on_is_no_held_out_set(tmp_path, teacher, cache, heldout):
    """As a capture without `--split heldout` leaves it: another cache, the same texts."""
    same = memory_cache.captured(teacher, memory_cache.examples(12), **FACTS)
    again = str(same.write(tmp_path / "again"))
    arguments = (tmp_path / "run", teacher, cache)
    error = refused(StudentError, "each of its 12 examples is trained on", *arguments,
                    heldout_cache=again)  # fmt: skip
    assert "--split heldout" in error.remedy
    named = {"code": {"cache": again}}
    refused(StudentError, r"\[train.heldout.code\]: each", *arguments, heldout=named)
    trained(*arguments, heldout_cache=heldout)


def notes_of(directory, teacher, cache, **changes) -> list[str]:
    found: list[str] = []
    run = make_run(directory, teacher, steps=1, evaluate_every=1, **changes)
    train(run, caches={"": cache}, on_note=found.append)
    return found


def test_held_out_texts_of_which_some_are_trained_on_are_told(tmp_path, teacher, cache, heldout):
    mixed = [*memory_cache.examples(12)[:2], *memory_cache.examples(7, seed=9)]
    held = str(memory_cache.captured(teacher, mixed, **FACTS).write(tmp_path / "held"))
    told = notes_of(tmp_path / "mixed", teacher, cache, heldout_cache=held)
    assert told == ["[train] heldout_cache: 2 of 9 examples are trained on too"]
    assert notes_of(tmp_path / "apart", teacher, cache, heldout_cache=heldout) == []


def test_lists_of_another_length_are_told_or_refused(tmp_path, teacher, cache, texts):
    short = memory_cache.captured(teacher, texts, **FACTS | {"k": 4})
    held = str(short.write(tmp_path / "held"))
    line = {"name": "jsd", "options": {"tail": "bucket"}}
    (told,) = notes_of(tmp_path / "a", teacher, cache, heldout_cache=held, objective=[line])
    assert "1.jsd is measured with 4 ids per row, and trained with 8 ids" in told
    ends = memory_cache.captured(teacher, texts, **FACTS | {"nucleus": 0.5, "tail_draws": 0})
    early = str(ends.write(tmp_path / "early"))
    (told,) = notes_of(tmp_path / "e", teacher, cache, heldout_cache=early, objective=[line])
    assert "measured with 8 ids per row, up to a mass of 0.5, and trained with 8 ids per" in told
    line["options"] |= {"k": 8}
    message = r"heldout_cache .*options.k = 8 of a cache that holds 4 ids per row; expected at most"
    changes = {"heldout_cache": held, "objective": [line]}
    refused(StudentError, message, tmp_path / "b", teacher, cache, **changes)
    line["options"] |= {"k": 4}
    assert notes_of(tmp_path / "c", teacher, cache, **changes) == []
    assert notes_of(tmp_path / "d", teacher, cache, heldout_cache=held) == []  # draws, no list


def test_more_ids_than_the_cache_holds_are_refused(tmp_path, teacher, cache, heldout):
    changes = {"heldout_cache": heldout, "objective": [{"name": "jsd", "options": {"k": 9}}]}
    message = r"1 'jsd'.*options.k = 9 of a cache that holds 8 ids per row.*Set k = 8"
    refused(StudentError, message, tmp_path, teacher, cache, **changes)
    trained(tmp_path, teacher, cache, **changes | {"objective": [CROSS_ENTROPY[0], {
        "name": "jsd", "options": {"k": 8}}]})  # fmt: skip
