"""What students are known by elsewhere: the harness's tasks, Rouge-L, answers, the model card."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from stillroom.cache_schemas.errors import StillroomError
from stillroom.pipeline import config
from stillroom.pipeline.config import Evaluate, Generate
from stillroom.pipeline.corpus.preparing import Corpus, prepare
from stillroom.pipeline.evaluation import answers, tasks
from stillroom.pipeline.evaluation.held_out import evaluate
from stillroom.pipeline.evaluation.on_the_card import card_results
from stillroom.pipeline.record import Example, content_id
from stillroom.pipeline.training import card as cards
from stillroom.pipeline.training.card import BEGIN, END, add_results, write_card
from stillroom.pipeline.training.trainer import train
from stillroom.stages.__main__ import app
from stillroom.stages.__main__ import run as command
from tests import memory_cache, tiny_models

TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    """Of a student that has taken two steps, beside its untrained twin, with chats to hold out."""
    root = tmp_path_factory.mktemp("measures")
    teacher = tiny_models.save_llama(root / "teacher")
    (root / "chats.jsonl").write_text("\n".join(map(json.dumps, chats(12))))
    text = TOML.format(root=root, teacher=teacher)
    (root / "run.toml").write_text(text)
    run = config.load(root / "run.toml")
    prepare(run.prepare, str(teacher), run.path("corpus"))
    cache = memory_cache.captured(teacher, list(Corpus.open(run.path("corpus")).split("train")))
    train(run, caches={"": cache})
    return root / "run.toml"


TOML = """
name = "known"
directory = "{root}/run"
[teacher]
model = "{teacher}"
dtype = "float32"
[prepare]
window = 64
heldout = 0.3
[[prepare.source]]
name = "chats"
kind = "jsonl"
path = "{root}/chats.jsonl"
messages_column = "messages"
[student]
keep_every = 2
[[objective]]
name = "forward_kl"
[train]
steps = 2
batch_tokens = 64
workers = 0
cache = "hf://datasets/owner/answers"
[evaluate]
examples = 2
[evaluate.students]
control = "{root}/run/student-initial"
[generate]
max_tokens = 4
temperature = 0.0
"""


def chats(count: int):
    words = tiny_models.english(20_000).split()
    for number in range(count):
        said = " ".join(words[10 * number : 10 * number + 8])
        turns = [("user", f"What is {number}?"), ("assistant", said)]
        yield {"messages": [{"role": role, "content": text} for role, text in turns]}


def test_tasks_of_the_harness(run_file, tmp_path, monkeypatch, capfd):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)  # which is no repository
    rows = tmp_path / "rows.jsonl"
    told = [
        {"question": f"{n} is", "choices": ["a lemon", "the moon"], "answer": n % 2}
        for n in range(6)
    ]
    rows.write_text("\n".join(map(json.dumps, told)))
    (tmp_path / "colours.yaml").write_text(TASK.format(rows=rows))
    done = CliRunner().invoke(
        app, ["evaluate", str(run_file), "--tasks", str(tmp_path / "colours.yaml"), "--shots", "0"]
    )
    assert done.exit_code == 0, done.output
    assert "fatal" not in capfd.readouterr().err
    run = config.load(run_file)
    kept = json.loads(run.path(tasks.RESULT).read_text())
    assert list(kept["models"]) == ["teacher", "student", "control"]
    for figures in kept["models"].values():
        (one,) = figures
        assert (one["task"], one["measure"], one["dataset"]) == ("colours", "acc", "")
        assert one["value"] * 6 == pytest.approx(round(one["value"] * 6))
        share = one["value"]
        assert one["standard_error"] == pytest.approx(np.sqrt(share * (1 - share) / 5))
    card = ModelCard.load(run.path("student", "README.md"))
    assert [r.dataset_name for r in card.data.eval_results if r.metric_type == "acc"] == ["colours"]


def test_tasks_that_are_not_there(run_file, tmp_path, monkeypatch):
    class Knows:
        all_tasks = ("arc_easy", "hellaswag")
        match_tasks = staticmethod(lambda names: [])

    monkeypatch.setattr(tasks, "_manager", lambda names: Knows())
    run = config.load(run_file)
    with pytest.raises(StillroomError, match=r"no task 'hellaswagg'.*hellaswag"):
        tasks.measure_tasks(run, tasks.Asked(("hellaswagg",)))
    with pytest.raises(StillroomError, match=r"no task '.*mine.yaml'"):
        tasks.measure_tasks(run, tasks.Asked((str(tmp_path / "mine.yaml"),)))


def test_results_on_data_sets_of_the_hub_are_entries_of_their_own(run_file, monkeypatch):
    monkeypatch.setattr(tasks, "version", lambda name: "0.4.13")
    run = config.load(run_file)
    figures = [
        tasks.Figure("arc_easy", "acc", 0.25, 0.1, "allenai/ai2_arc", 0),
        tasks.Figure("colours", "acc", 0.5, None, "", 0),
    ]
    tasks._tell_card(run, figures, tasks.Asked(("arc_easy",), limit=4))
    (entry,) = yaml.safe_load(run.path("student", tasks.ENTRIES).read_text())
    assert entry["dataset"] == {"id": "allenai/ai2_arc", "task_id": "arc_easy"}
    assert entry["value"] == 0.25
    assert "first 4 questions" in entry["notes"]
    told = ModelCard.load(run.path("student", "README.md")).data.eval_results
    names = [one.metric_name for one in told if one.metric_type == "acc"]
    assert all("0-shot, first 4 questions" in name for name in names)  # no part for the whole


def test_rouge_l_of_five_draws(run_file):
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    run = config.load(run_file)
    found = answers.measure_rouge(run, max_tokens=6)
    assert list(found) == ["teacher", "student", "control"]
    assert all(len(one.draws) == 5 and 0 <= one.mean <= 100 for one in found.values())
    again = answers.measure_rouge(run, max_tokens=6)
    assert again == found  # every draw has its seed
    judge = scorer.RougeScorer(["rougeL"], use_stemmer=True)
    assert answers._rouge_l(judge, "the cats sat", "the cat sat") == 100
    told = answers._summed(np.array([[1.0, 2, 3, 4, 5], [3, 4, 5, 6, 7]]))
    assert (told.mean, told.draws) == (4.0, (2.0, 3.0, 4.0, 5.0, 6.0))
    assert told.standard_error == pytest.approx(np.sqrt(2.5 / 5))


def test_instructions_are_texts_up_to_their_last_answer(run_file):
    run = config.load(run_file)
    found, tokenizer = answers.instructions_of(run)
    for one in found:
        prompt = tokenizer.hf.decode(one.prompt.token_ids)
        assert prompt.startswith("<|im_start|>user\nWhat is ")
        assert prompt.endswith("<|im_start|>assistant\n")
        assert tokenizer.hf.decode(one.answer).endswith("<|im_end|>")


def test_answers_side_by_side(run_file):
    done = CliRunner().invoke(app, ["generate", str(run_file), "--side-by-side", "2"])
    assert done.exit_code == 0, done.output
    for word in ("1 of 2: user", "the data", "teacher", "student", "control"):
        assert word in done.output
    assert max(map(len, done.output.splitlines())) <= 100
    assert not Path(config.load(run_file).path("generate.config.json")).exists()


def test_the_card_of_a_student(run_file, monkeypatch):
    monkeypatch.setattr(tasks, "version", lambda name: "0.4.13")
    run = config.load(run_file)
    path = run.path("student", "README.md")
    told = [tasks.Figure(name, "acc", 0.5, None, "owner/same", 0) for name in ("one", "two")]
    tasks._tell_card(run, told, tasks.Asked(("one", "two")))
    scores = {"student": answers._summed(np.ones((2, 5)))}
    answers._keep(run, scores, 2, 4)
    add_results(run, card_results(evaluate(run)))
    path.write_text(path.read_text().replace("A student that", "Mine: a student that"))
    add_results(run, card_results(evaluate(run)))
    card = ModelCard.load(path)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.datasets == ["owner/answers"]
    identity = json.loads(run.path("train.json").read_text())["identity"]
    assert card.data.teacher_caches == [identity["cache train.cache"]]
    assert card.data.base_model is None  # the teacher is a directory of this machine
    assert str(run.path()) not in path.read_text()
    assert "Mine: a student" in card.text
    assert card.text.count(BEGIN) == card.text.count("KL(teacher") == 1
    kinds = [one.metric_type for one in card.data.eval_results]
    assert [kinds.count(kind) for kind in ("kl_divergence", "rouge")] == [1, 1]
    same = [one.dataset_name for one in card.data.eval_results if one.dataset_type == "owner/same"]
    assert same == ["one", "two"]


@pytest.fixture
def own_card(run_file):
    """The card of the student, put back afterwards, and what measures it."""
    run = config.load(run_file)
    path = run.path("student", "README.md")
    write_card(run)
    before = path.read_text()
    scores = {"student": answers._summed(np.ones((2, 5)))}
    yield path, lambda: answers._keep(run, scores, 2, 4)
    path.write_text(before)


def test_a_card_of_ones_own_keeps_every_word(own_card):
    path, measure = own_card
    path.write_text("# Mine\n\nWhat I think of it.\n")
    measure()
    assert "What I think of it." in path.read_text()
    path.write_text(path.read_text().replace(END, "And what I thought later."))
    measure()
    measure()
    card = ModelCard.load(path)
    assert "What I think of it." in card.text
    assert "And what I thought later." in card.text
    assert card.text.count(BEGIN) == card.text.count(END) == 1
    assert [one.metric_type for one in card.data.eval_results] == ["rouge"]


def test_a_card_that_cannot_be_read(own_card, run_file, capsys):
    path, measure = own_card
    for broken in (b"---\nfoo: [1\n---\nmine", b"\xff\xfe caf\xe9", b"---\n- a list\n---\nmine"):
        path.write_bytes(broken)
        with pytest.raises(StillroomError, match=r"README.md: the card cannot be read"):
            measure()
        assert path.read_bytes() == broken
    assert command(["evaluate", str(run_file), "--rouge-l"]) == 2
    assert "asking teacher" not in capsys.readouterr().err  # before anything is measured


def test_entries_of_other_tasks_stay(run_file, monkeypatch):
    monkeypatch.setattr(tasks, "version", lambda name: "0.4.13")
    run = config.load(run_file)
    for task, value in (("one", 0.25), ("two", 0.5), ("one", 0.75)):
        told = [tasks.Figure(task, "acc", value, None, "owner/data", 0)]
        tasks._tell_card(run, told, tasks.Asked((task,)))
    kept = yaml.safe_load(run.path("student", tasks.ENTRIES).read_text())
    own = [one for one in kept if one["dataset"]["id"] == "owner/data"]
    found = {one["dataset"]["task_id"]: one["value"] for one in own}
    assert found == {"two": 0.5, "one": 0.75}


def test_the_revision_of_a_cache_is_no_part_of_its_id():
    assert cards._published("hf://datasets/owner/answers@refs%2Fpr%2F1/cache") == "owner/answers"
    assert cards._published("hf://datasets/owner/answers/cache@2") == "owner/answers"
    assert cards._published("s3://bucket/cache") == ""


OPTIONS = [
    (["--tasks", ","], "no task is named"),
    (["--limit", "3"], "--limit: without --tasks"),
    (["--rouge-l", "--chat"], "--chat: without --tasks"),
    (["--rouge-l", "--tasks", "a.yaml", "--json"], "two documents on stdout"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options_that_nothing_would_follow(options, message, run_file, capsys):
    assert command(["evaluate", str(run_file), *options]) == 2
    assert message in capsys.readouterr().err


def test_prompts_that_leave_no_room(run_file, capsys):
    assert command(["ask", str(run_file), "--plain", ""]) == 2
    assert "an empty prompt is nothing to continue" in capsys.readouterr().err
    assert command(["ask", str(run_file), "--plain", "word " * 700]) == 2
    assert "tokens; expected 1 to 511. Ask with another prompt" in capsys.readouterr().err
    run = config.load(run_file)
    teacher = run.teacher
    assert teacher is not None
    (found,) = answers.written(teacher, [prompt_of(508)], Generate(max_tokens=99), (767,))
    assert len(found[0]) == 4  # an answer ends where the model's context does


def prompt_of(length: int) -> Example:
    tokens = np.arange(length, dtype=np.int32) + 4
    mask = np.zeros(length, dtype=bool)
    return Example(content_id(tokens, mask), "", "", tokens, mask)


def test_a_task_that_cannot_be_read_is_told_before_a_model_is_loaded(run_file, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    (tmp_path / "bad.yaml").write_text("task: [1")
    assert command(["evaluate", str(run_file), "--tasks", str(tmp_path / "bad.yaml")]) == 2
    said = capsys.readouterr().err
    assert "asking teacher" not in said
    assert "the harness stopped (ParserError: while parsing a flow sequence). Mend" in said


@pytest.mark.parametrize("label", ["teacher", "student", "before", "after"])
def test_no_figures_stand_under_another_models_label(label, run_file):
    run = config.load(run_file)
    settings = Evaluate(students={label: str(run.path("student-initial"))})
    named = run.model_copy(update={"evaluate": settings})
    for measure in (evaluate, lambda one: answers.side_by_side(one, 1)):
        with pytest.raises(StillroomError, match=rf"evaluate.students\]: .* called '{label}'"):
            measure(named)


def test_answers_in_a_script_that_rouge_does_not_read():
    answers.check_script(["Ça été très bien, merci.", "42"], "corpus")
    answers.check_script([""], "corpus")
    with pytest.raises(StillroomError, match=r"reads 14% of the answers' letters"):
        answers.check_script(["今天天气很好我们去公园吧 ok"], "corpus")
