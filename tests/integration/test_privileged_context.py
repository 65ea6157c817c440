"""A teacher that reads another prompt than the student before the same answer."""

import json

import numpy as np
import pytest

from stillroom.cache_schemas.errors import StillroomError
from stillroom.pipeline import config
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.capture.job import capture
from stillroom.pipeline.corpus.preparing import Corpus, prepare
from stillroom.pipeline.corpus.privileged import asked
from stillroom.pipeline.evaluation.held_out import measure
from stillroom.pipeline.generation.written_corpus import generate
from stillroom.pipeline.training.trainer import train
from tests import tiny_models

SECRET = "The answer is known: look at the third page, it is there in full."


def chats(count: int):
    words = tiny_models.english(20_000).split()
    for number in range(count):
        said = " ".join(words[10 * number : 10 * number + 6])
        asks = {"role": "user", "content": f"What is {number}?"}
        answers = {"role": "assistant", "content": said}
        told = [{"role": "system", "content": SECRET}, asks, answers] if number % 4 else []
        yield {"messages": [asks, answers], "teacher_messages": told}


def run_in(directory, teacher, rows, **more):
    directory.mkdir(exist_ok=True)
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {
        "name": "chats",
        "kind": "jsonl",
        "path": str(directory / "rows.jsonl"),
        "messages_column": "messages",
        "teacher_messages_column": "teacher_messages",
    }
    document = {
        "name": "told",
        "directory": str(directory / "run"),
        "teacher": {"model": str(teacher), "dtype": "float32"},
        "prepare": {"window": 96, "heldout": 0.25, "source": [source]},
        "capture": {
            "k": 4,
            "profile": "exact",
            "examples_per_shard": 3,
            "hidden_layers": ["final"],
            "hidden_codec": "bf16",
        },
        "student": {"keep_every": 2},
        "objective": [{"name": "forward_kl"}, {"name": "hidden"}],
        "train": {"steps": 1, "batch_tokens": 96, "workers": 0},
    }
    return config.parse(document | more, "test")


@pytest.fixture(scope="module")
def captured(tmp_path_factory, tiny_llama):
    run = run_in(tmp_path_factory.mktemp("told"), tiny_llama, chats(12))
    prepare(run.prepare, str(tiny_llama), run.path("corpus"))
    capture(run, engine="reference")
    return run


def test_rows_are_those_of_the_teachers_prompt_at_the_students_places(captured, tiny_llama):
    """Held to one forward pass of transformers over what the teacher reads."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    corpus, cache = Corpus.open(captured.path("corpus")), TeacherCache.open(captured.path("cache"))
    told = [one.teacher_prompt is not None for one in corpus.split("train")]
    assert 0 < sum(told) < len(told)
    for example, record in zip(corpus.split("train"), cache, strict=True):
        question = asked(example)
        np.testing.assert_array_equal(record.example.token_ids, example.token_ids)
        answer = int(np.argmax(example.loss_mask))
        assert record.first_row == answer - 1
        with torch.no_grad():
            out = model(torch.as_tensor(question.token_ids).long()[None], output_hidden_states=True)
        rows = slice(question.first_row, len(question.token_ids) - 1)
        known = out.logits[0, rows].log_softmax(-1)
        best = known.topk(4).values
        np.testing.assert_allclose(record.signals["topk_logprobs"], best, atol=2e-4)
        own = known.gather(1, torch.as_tensor(example.token_ids[answer:]).long()[:, None])[:, 0]
        np.testing.assert_allclose(record.signals["token_logprob"], own, atol=2e-4)
        moved = len(question.token_ids) - len(example.token_ids)
        states = out.hidden_states[-1][0][record.hidden_positions + moved]
        kept = record.hidden_positions >= (record.first_row if moved else 0)
        assert kept.all()
        np.testing.assert_allclose(record.signals["hidden.final"], states, rtol=2**-7, atol=1e-3)


def test_a_student_trains_on_it_and_is_held_to_what_the_teacher_reads(captured, tiny_llama):
    train(captured)
    held = list(Corpus.open(captured.path("corpus")).split("heldout"))
    told = [one for one in held if one.teacher_prompt is not None]
    found = measure(str(tiny_llama), {"twin": str(tiny_llama)}, told)
    assert found["twin"].kl > 1e-4  # the same weights, and they read less
    questions = [asked(one) for one in told]
    plain = measure(str(tiny_llama), {"twin": str(tiny_llama)}, questions)
    assert plain["twin"].kl == pytest.approx(0, abs=1e-6)
    assert found["teacher"].perplexity == pytest.approx(plain["teacher"].perplexity, rel=1e-5)


def test_the_digest_covers_what_the_teacher_reads(captured, tiny_llama, tmp_path):
    rows = [row | {"teacher_messages": []} for row in chats(12)]
    run = run_in(tmp_path / "other", tiny_llama, rows)
    plain = prepare(run.prepare, str(tiny_llama), run.path("corpus"))
    assert plain.digest != Corpus.open(captured.path("corpus")).digest


def test_another_answer_is_refused(tiny_llama, tmp_path):
    rows = list(chats(4))
    *before, _ = rows[1]["teacher_messages"]
    rows[1]["teacher_messages"] = [*before, {"role": "assistant", "content": "No"}]
    run = run_in(tmp_path / "wrong", tiny_llama, rows)
    with pytest.raises(StillroomError, match=r"jsonl:2: .*its answers are other tokens"):
        prepare(run.prepare, str(tiny_llama), run.path("corpus"))
    told = run_in(tmp_path / "writes", tiny_llama, chats(4), generate={"max_tokens": 4})
    with pytest.raises(StillroomError, match="teacher_messages_column, and a teacher that writes"):
        generate(told, engine="reference")


def told_to(run):
    examples = Corpus.open(run.path("corpus")).split("train")
    return {
        e.example_id: None if e.teacher_prompt is None else tuple(e.teacher_prompt)
        for e in examples
    }


def test_a_row_without_the_column_is_read_alike(captured, tiny_llama, tmp_path):
    """As one where it is empty; where no row has it, its name is wrong."""
    rows = [{k: v for k, v in row.items() if v} for row in chats(12)]
    run = run_in(tmp_path / "lacks", tiny_llama, rows)
    prepare(run.prepare, str(tiny_llama), run.path("corpus"))
    assert told_to(run) == told_to(captured)
    named = [{"messages": row["messages"], "teacher_massages": []} for row in chats(4)]
    run = run_in(tmp_path / "misspelt", tiny_llama, named)
    match = r"no row has the column 'teacher_messages'.*Did you mean 'teacher_massages'"
    with pytest.raises(StillroomError, match=match):
        prepare(run.prepare, str(tiny_llama), run.path("corpus"))


@pytest.mark.parametrize("long", ["cut", "keep_end"])
def test_a_teachers_prompt_that_is_longer_than_the_window(long, tiny_llama, tmp_path):
    rows = list(chats(4))
    rows[1]["teacher_messages"][0]["content"] = SECRET * 8
    run = run_in(tmp_path / "long", tiny_llama, rows)
    narrow = run.prepare.model_copy(update={"long": long})
    with pytest.raises(StillroomError, match=r"jsonl:2: .*raise \[prepare\] window"):
        prepare(narrow, str(tiny_llama), run.path("corpus"))
    wide = narrow.model_copy(update={"window": 400})  # as it says
    corpus = prepare(wide, str(tiny_llama), run.path("corpus"))
    assert len([*corpus.split("train"), *corpus.split("heldout")]) == 4


def test_a_window_without_room_for_an_answer(tiny_llama, tmp_path):
    rows = [{"messages": row["messages"]} for row in chats(6)]
    run = run_in(tmp_path / "narrow", tiny_llama, rows)
    (source,) = run.prepare.source
    source = source.model_copy(update={"teacher_messages_column": ""})
    for changes, message in (
        ({"window": 8}, r"no example came out.*Raise \[prepare\] window = 8"),
        ({"min_tokens": 90}, r"no example came out.*Lower \[prepare\] min_tokens = 90"),
    ):
        wanted = run.prepare.model_copy(update={"source": (source,), **changes})
        with pytest.raises(StillroomError, match=message):
            prepare(wanted, str(tiny_llama), run.path("corpus"))
