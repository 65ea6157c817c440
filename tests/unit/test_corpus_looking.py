"""Looking at a corpus: what is shown is what will be paid for."""

import json

import numpy as np
import pytest

from stillroom.cache_schemas.errors import PlanMismatch
from stillroom.pipeline.config import Prepare, Source
from stillroom.pipeline.corpus.looking import overview, remarks, shown_examples
from stillroom.pipeline.corpus.overlap import SPAN, overlap
from stillroom.pipeline.corpus.preparing import prepare
from stillroom.pipeline.corpus.tokenizer import CorpusTokenizer
from stillroom.stages import __main__ as shell
from stillroom.stages.corpus import _singular
from tests import tiny_models

RUN = """
name = "job"
directory = "{directory}"
[teacher]
model = "{teacher}"
[prepare]
window = 128
on_error = "skip"
[[prepare.source]]
name = "talks"
path = "{rows}"
"""


def chat(asked, said):
    return {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    }


@pytest.fixture(scope="module")
def job(tiny_llama, tmp_path_factory):
    root = tmp_path_factory.mktemp("job")
    english = tiny_models.english()
    rows = [chat(f"Question {n}?", english[n * 300 :][:200]) for n in range(20)]
    rows += [rows[3], {"messages": [rows[0]["messages"][0]]}, {"messages": 3}]
    (root / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    file = root / "run.toml"
    where = {"directory": root / "out", "teacher": tiny_llama, "rows": root / "rows.jsonl"}
    file.write_text(RUN.format(**where))
    return file


def test_prepare_shows_examples_and_says_what_it_saw(job, capsys):
    assert shell.run(["prepare", str(job), "--show", "1"]) == 0
    written = capsys.readouterr()
    assert 'prepare: messages in column "messages" (talks)' in written.err
    assert "left out: 1 rejected rows" in written.err
    assert "rejects.jsonl" in written.err
    assert "exact duplicates: 1 documents" in written.err
    assert "1 conversations have no assistant's turn" in written.err
    assert written.out.count("⟦") == written.out.count("⟧") == 1
    assert "<|im_start|>assistant\n⟦" in written.out
    assert "of the tokens" in written.out


def test_corpus_show_as_json_adds_up(job, capsys):
    assert shell.run(["prepare", str(job)]) == 0
    capsys.readouterr()
    assert shell.run(["corpus", "show", str(job), "--examples", "2", "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    examples = sum(split["examples"] for split in seen["counts"].values())
    assert sum(seen["lengths"]["examples"]) == examples == 20
    assert seen["sources"]["talks"]["examples"] == examples
    assert seen["dropped"] == {
        "duplicate_windows": 1,
        "rejected_rows": 1,
        "windows_without_targets": 1,
    }
    assert seen["share_without_targets"] == pytest.approx(1 / 21)
    assert 0 < seen["share_of_targets"] < 1
    assert len(seen["examples"]) == 2
    for example in seen["examples"]:
        kinds = [(part["target"], part["special"]) for part in example["segments"]]
        assert kinds[0] == (False, True)
        assert (True, True) in kinds
        said = "".join(part["text"] for part in example["segments"] if part["target"])
        assert said.endswith("<|im_end|>")


def test_corpus_show_of_a_run_without_a_corpus(job, tmp_path, capsys):
    other = tmp_path / "run.toml"
    other.write_text(job.read_text().replace("/out", "/elsewhere"))
    assert shell.run(["corpus", "show", str(other)]) == 2
    assert "no prepared corpus" in capsys.readouterr().err


def test_another_tokenizer_shows_nothing(job, tiny_llama, tmp_path):
    tiny_models.save_tokenizer(tmp_path, vocab_size=600)
    config = Prepare(source=(Source(name="t", kind="pydoc_topics", limit=3),), heldout=0.0)
    corpus = prepare(config, str(tiny_llama), tmp_path / "corpus")
    with pytest.raises(PlanMismatch, match="cannot show a corpus of another"):
        shown_examples(corpus, CorpusTokenizer.open(str(tmp_path), ""), 1)
    assert overview(corpus)["share_of_targets"] > 0.99
    assert remarks(corpus.facts) == []


def test_held_out_answers_that_training_holds_are_found(tiny_llama, tmp_path):
    """By the tokens: every span of a held-out answer, looked for in every other answer."""
    english = tiny_models.english()
    rows = [chat(f"Question {n}?", english[n % 7 * 400 :][:300]) for n in range(14)]
    rows += [chat(f"Question {n}?", english[n * 400 :][:300]) for n in range(20, 34)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = Prepare(source=(Source(name="s", path=str(tmp_path / "rows.jsonl")),), heldout=0.4)
    corpus = prepare(config, str(tiny_llama), tmp_path / "corpus")

    def spans(example):
        ids, mask = example.token_ids, example.loss_mask
        starts = range(len(ids) - SPAN + 1)
        return [tuple(ids[at : at + SPAN]) for at in starts if mask[at : at + SPAN].all()]

    train = {span for example in corpus.split("train") for span in spans(example)}
    heldout = [spans(example) for example in corpus.split("heldout")]
    known = {span for found in heldout for span in found}
    shares = [np.mean([span in train for span in found]) for found in heldout if found]
    assert 0 < len(known & train) < len(known)
    assert overlap(corpus) == {
        "span": SPAN,
        "spans": len(known),
        "shared": len(known & train),
        "examples": len(shares),
        "examples_shared": sum(share >= 0.5 for share in shares),
    }


@pytest.mark.parametrize(
    ("reason", "number", "said"),
    [
        ("users_with_fewer_than_three_interactions", 1, "user_with_fewer_than_three_interactions"),
        ("histories_cut_to_the_window", 1, "history_cut_to_the_window"),
        ("histories_cut_to_the_window", 2, "histories_cut_to_the_window"),
        ("rejected_rows", 1, "rejected_rows"),
    ],
)
def test_one_left_out_is_told_as_one(reason, number, said):
    assert _singular(reason, number) == said
