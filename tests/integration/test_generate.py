"""Teacher-written corpora: what is drawn, with which probability, and what becomes of it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks._architecture_zoo import save
from stillroom.cache_schemas.errors import ConfigError, CorpusError, PlanMismatch, TeacherError
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.capture.job import capture
from stillroom.pipeline.config import Capture, Generate, Prepare, Run, Source, Teacher
from stillroom.pipeline.corpus.documents import Document
from stillroom.pipeline.corpus.preparing import Corpus
from stillroom.pipeline.corpus.prompts import questions
from stillroom.pipeline.generation.parts import answered
from stillroom.pipeline.generation.writers import Answer
from stillroom.pipeline.generation.written_corpus import generate
from stillroom.pipeline.teacher.protocol import RejectedExample
from stillroom.pipeline.teacher.reference.engine import load_model
from tests import tiny_image_models, tiny_models
from tests.memory_cache import examples

QUESTIONS = ["What is a list?", "Name two loops.", "Why?", "What is a dict?", "Say more."]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Other weights under the teacher's tokenizer."""
    return tiny_models.save_llama(tmp_path_factory.mktemp("models") / "student", 1, seed=7)


def chats(directory, questions=QUESTIONS, **more):
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "prompts.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "An answer that is not used."},
            ]
        }
        for question in questions
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return Source(name="chats", kind="jsonl", path=str(path), messages_column="messages", **more)


def run_in(directory, teacher, source=None, prepare=None, **settings) -> Run:
    source = source or chats(directory.parent / "prompts")
    table = {"window": 96, "heldout": 0.0} | (prepare or {})
    return Run(
        name="run",
        directory=str(directory),
        prepare=Prepare(source=(source,), **table),
        teacher=Teacher(model=str(teacher), dtype="float32"),
        generate=Generate(**{"max_tokens": 12, "prompts_per_part": 2} | settings),
        capture=Capture(k=16, profile="exact", examples_per_shard=4, check="never"),
    )


def written(run, **options) -> Corpus:
    corpus = generate(run, engine="reference", **options)
    assert corpus is not None
    return corpus


def next_logits(model, token_ids) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        loaded = AutoModelForCausalLM.from_pretrained(model)
        return loaded(torch.tensor(token_ids)[None].long()).logits[0, -1].double()


@pytest.mark.parametrize(
    ("share", "temperature", "top_p"),
    [(1.0, 1.0, 1.0), (0.0, 1.0, 1.0), (0.2, 1.0, 1.0), (0.5, 0.7, 0.6)],
)
def test_tokens_are_drawn_from_the_stated_mixture(
    tiny_llama, student, tmp_path, share, temperature, top_p
):
    count = 1024
    corpus = written(
        run_in(
            tmp_path / "run",
            tiny_llama,
            chats(tmp_path, QUESTIONS[:1]),
            n=count,
            max_tokens=1,
            temperature=temperature,
            top_p=top_p,
            teacher_share=share,
            student=str(student) if share < 1 else "",
        )
    )
    examples = list(corpus.split("train"))
    prompt = examples[0].token_ids[:-1]
    p, q = (
        (next_logits(model, prompt.copy()) / temperature).softmax(-1)
        for model in (tiny_llama, student)
    )
    b = share * p + (1 - share) * q
    falling, ids = b.sort(descending=True)
    kept = ids[: int((falling.cumsum(0) < top_p).sum()) + 1] if top_p < 1 else ids
    allowed = torch.zeros_like(b).scatter(0, kept, b[kept])
    allowed = (allowed / allowed.sum()).numpy()
    assert sum(example.weight for example in examples) == count
    for example in examples:
        token = example.token_ids[-1]
        assert example.behaviour_logprob[-1] == pytest.approx(np.log(allowed[token]), abs=1e-5)
    drawn = np.zeros_like(allowed)
    drawn[[example.token_ids[-1] for example in examples]] = [e.weight for e in examples]
    assert (drawn[allowed == 0] == 0).all()
    _assert_drawn(drawn, allowed)


def test_an_answer_is_the_target_and_everything_else_was_given(
    tiny_llama, tiny_tokenizer, tmp_path
):
    corpus = written(run_in(tmp_path / "run", tiny_llama, n=2))
    for example in corpus.split("train"):
        first = int(np.argmax(example.loss_mask))
        assert example.loss_mask[first:].all()
        assert tiny_tokenizer.decode(example.token_ids[:first]).endswith("<|im_start|>assistant\n")
        assert "not used" not in tiny_tokenizer.decode(example.token_ids)
        assert (example.behaviour_logprob[:first] == 0).all()
        assert (example.behaviour_logprob[first:] <= 0).all()
        assert len(example.token_ids) - first <= 12
    answers = corpus.facts["generated"]["answers"]
    assert sum(answers.values()) == 2 * len(QUESTIONS)


def test_greedy_answers_are_the_most_probable_tokens(tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    corpus = written(run_in(tmp_path / "run", tiny_llama, temperature=0, max_tokens=8))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for example in corpus.split("train"):
        first = int(np.argmax(example.loss_mask))
        with torch.inference_mode():
            logits = model(torch.tensor(example.token_ids.copy())[None].long()).logits[0]
        assert (logits.argmax(-1)[first - 1 : -1].numpy() == example.token_ids[first:]).all()
        assert (example.behaviour_logprob == 0).all()


@pytest.mark.parametrize("label", ["lfm2", "mamba", "qwen3-next"])
def test_models_that_remember_otherwise_write_too(label, tmp_path):
    """Short convolutions, a state space, linear attention: each text is read again."""
    model = save(label, tmp_path / "model")
    tiny_models.save_tokenizer(model, 512)
    source = chats(tmp_path / "prompts", QUESTIONS[:1])
    corpus = written(run_in(tmp_path / "run", model, source, temperature=0, max_tokens=3, n=2))
    (example,) = corpus.split("train")
    assert example.weight == 2
    first = int(np.argmax(example.loss_mask))
    for place in range(first, len(example.token_ids)):
        said = next_logits(model, example.token_ids[:place].copy())
        assert int(said.argmax()) == example.token_ids[place]


def test_interruption_workers_and_repetition_do_not_change_what_is_written(
    tiny_llama, student, tmp_path
):
    settings = {"n": 2, "teacher_share": 0.4, "student": str(student)}
    digest = written(run_in(tmp_path / "whole", tiny_llama, **settings)).digest
    stopped = run_in(tmp_path / "stopped", tiny_llama, **settings)

    def stop(progress):
        if progress.prompts == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(stopped, engine="reference", on_progress=stop)
    done = []
    assert written(stopped, on_progress=done.append).digest == digest
    assert done[-1].total_prompts < len(QUESTIONS)
    shared = run_in(tmp_path / "shared", tiny_llama, **settings)
    assert generate(shared, engine="reference", rank=1, world_size=2) is None
    assert generate(shared, engine="reference", rank=0, world_size=2).digest == digest
    assert written(shared, on_progress=pytest.fail).digest == digest
    assert [p.name for p in (tmp_path / "shared").iterdir()] == ["corpus"]
    again = settings | {"seed": 1}
    with pytest.raises(PlanMismatch, match=r"generated\.settings\.seed: found 0, expected 1"):
        written(run_in(tmp_path / "shared", tiny_llama, **again))
    assert written(run_in(tmp_path / "other", tiny_llama, **again)).digest != digest


def test_a_capture_gives_the_teachers_rows_and_keeps_the_behaviour(tiny_llama, student, tmp_path):
    alone = run_in(tmp_path / "alone", tiny_llama, n=2)
    mixed = run_in(tmp_path / "mixed", tiny_llama, n=2, teacher_share=0.3, student=str(student))
    gaps = []
    for run in (alone, mixed):
        corpus = written(run)
        capture(run, engine="reference")
        cache = TeacherCache.open(str(run.path("cache")))
        assert "behaviour_logprob" in cache.signals
        for i, example in enumerate(corpus.split("train")):
            record = cache[i]
            rows = example.loss_mask[1:][record.first_row :]
            kept = record.signals["behaviour_logprob"]
            expected = example.behaviour_logprob[record.first_row + 1 :]
            np.testing.assert_array_equal(kept, expected)
            gaps.append(np.abs(kept - record.signals["token_logprob"])[rows].max())
    alone_gaps, mixed_gaps = gaps[: len(gaps) // 2], gaps[len(gaps) // 2 :]
    assert max(alone_gaps) < 1e-4
    assert max(mixed_gaps) > 1e-2


def test_roll_outs_of_a_mixture_train_a_student_by_policy_gradient(tiny_llama, student, tmp_path):
    from stillroom.pipeline.config import parse
    from stillroom.pipeline.training.trainer import train

    run = run_in(tmp_path / "run", tiny_llama, n=2, teacher_share=0.2, student=str(student))
    written(run)
    capture(run, engine="reference")
    tables = run.model_dump(mode="json", exclude_none=True) | {
        "student": {"init": "model", "model": str(student)},
        "objective": [
            {"name": "policy_gradient", "options": {"behaviour": "cached"}},
            {"name": "reverse_kl"},
        ],
        "train": {"steps": 2, "batch_tokens": 256},
    }
    result = train(parse(tables, "test"))
    assert result.steps == 2


def test_each_turn_is_asked_for_after_what_the_source_said(tiny_llama, tiny_tokenizer, tmp_path):
    roles = ["system", "user", "assistant", "user", "assistant"]
    said = ["Be brief.", "One?", "First.", "Two?", "Second."]
    messages = [{"role": role, "content": text} for role, text in zip(roles, said)]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    source = Source(name="s", kind="jsonl", path=str(path), messages_column="messages")
    corpus = written(run_in(tmp_path / "run", tiny_llama, source, turns="each", max_tokens=3))
    examples = list(corpus.split("train"))
    assert len({example.document_id for example in examples}) == 1
    prompts = [tiny_tokenizer.decode(e.token_ids[~e.loss_mask]) for e in examples]
    assert ["First." in prompt for prompt in prompts] == [False, True]
    assert all("Second." not in prompt for prompt in prompts)
    assert [prompt.count("?") for prompt in prompts] == [1, 2]


def test_each_turn_shows_only_the_images_that_were_shown_until_then():
    text = ("user", "<image>a"), ("assistant", "b"), ("user", "<image>c")
    messages = tuple({"role": role, "content": content} for role, content in text)
    first, second = questions(Document("here", messages=messages, images=(b"1", b"2")))
    assert (first.images, second.images) == ((b"1",), (b"1", b"2"))
    assert (len(first.messages), len(second.messages)) == (1, 3)


def test_texts_are_continued_from_their_first_tokens(tiny_llama, tmp_path):
    source = Source(name="help", kind="pydoc_topics", limit=3)
    corpus = written(run_in(tmp_path / "run", tiny_llama, source, prompt_tokens=9))
    assert [int(np.argmax(e.loss_mask)) for e in corpus.split("train")] == [9, 9, 9]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_answers_about_images_are_as_probable_as_a_capture_says(tmp_path, family):
    model = tiny_image_models.save(family, tmp_path / "model")
    rows = []
    for number in range(2):
        picture = tiny_image_models.image(number, 50 + 30 * number, 40)
        (tmp_path / f"{number}.png").write_bytes(picture)
        message = {"role": "user", "content": "<image>What is it?"}
        rows.append({"messages": [message], "images": [f"{number}.png"]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"messages_column": "messages", "image_column": "images"}
    source = Source(name="s", kind="jsonl", path=str(tmp_path / "rows.jsonl"), **columns)
    run = run_in(tmp_path / "run", model, source, n=2, max_tokens=6)
    corpus = written(run)
    capture(run, engine="reference")
    cache = TeacherCache.open(str(run.path("cache")))
    for i, example in enumerate(corpus.split("train")):
        assert cache[i].example.images == example.images
        corpus.image_bytes(example.images[0].sha256)
        signals = cache[i].signals
        np.testing.assert_allclose(
            signals["behaviour_logprob"], signals["token_logprob"], atol=1e-4
        )


def test_a_mixture_needs_a_student(tiny_llama, tmp_path):
    with pytest.raises(ConfigError, match="none is named"):
        written(run_in(tmp_path / "run", tiny_llama, teacher_share=0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 0.9}, "top_p = 0.9 acts on the whole mixture"),
        ({"temperature": 0}, "temperature = 0 acts on the whole mixture"),
        ({}, "heads of teacher and student have 768 and 800 words"),
    ],
)
def test_vllm_refuses_a_mixture_that_coins_cannot_draw(tmp_path, tiny_llama, settings, message):
    wide = tiny_models.save_qwen3(tmp_path / "wide", chat_template=tiny_models.CHAT_TEMPLATE)
    run = run_in(tmp_path / "run", tiny_llama, teacher_share=0.5, student=str(wide), **settings)
    with pytest.raises(ConfigError, match=message):
        generate(run, engine="vllm")


def test_a_student_with_another_tokenizer_is_refused(tiny_llama, tmp_path):
    other = tiny_models.save_llama(tmp_path / "other", vocab_size=700)
    run = run_in(tmp_path / "run", tiny_llama, teacher_share=0.5, student=str(other))
    with pytest.raises(PlanMismatch, match="tokenizer is another"):
        written(run)


def test_prompts_without_room_are_an_error_or_left_out(tiny_llama, tmp_path):
    source = chats(tmp_path, [*QUESTIONS[:2], "so " * 200])
    with pytest.raises(CorpusError, match=r"prompts.jsonl:3: a prompt of \d+ tokens; expected at"):
        written(run_in(tmp_path / "run", tiny_llama, source))
    corpus = written(run_in(tmp_path / "run", tiny_llama, source, long_prompts="skip"))
    assert corpus.facts["dropped"] == {"long_prompts": 1}
    with pytest.raises(ConfigError, match="leaves no prompt"):
        written(run_in(tmp_path / "run", tiny_llama, source, max_tokens=96))


def test_a_conversation_that_asks_nothing_is_an_error(tiny_llama, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "assistant", "content": "I speak."}]}')
    source = Source(name="s", kind="jsonl", path=str(path), messages_column="messages")
    with pytest.raises(CorpusError, match="no message to answer"):
        written(run_in(tmp_path / "run", tiny_llama, source))


def test_equal_answers_are_one_example_and_broken_logits_are_refused():
    (prompt,) = examples(1)
    prompt = replace(prompt, loss_mask=np.zeros_like(prompt.loss_mask))
    good = Answer(np.array([5, 2], np.int32), np.array([-1.0, -0.5], np.float32), True)
    other = Answer(np.array([6, 2], np.int32), np.array([-2.0, -0.5], np.float32), True)
    made = answered(prompt, [good, other, good])
    assert [example.weight for example in made] == [2, 1]
    assert made[0].behaviour_logprob[-2:].tolist() == [-1.0, -0.5]
    broken = Answer(good.token_ids, np.array([-1.0, np.nan], np.float32), True)
    with pytest.raises(RejectedExample, match="token 2 of its answer"):
        answered(prompt, [good, broken])


def test_the_command_writes_a_corpus_and_says_what_is_in_it(tiny_llama, tmp_path, capsys):
    from stillroom.stages.__main__ import run as command

    source = chats(tmp_path)
    file = tmp_path / "run.toml"
    file.write_text(
        f"""
name = "r"
directory = "{tmp_path / "run"}"
[teacher]
model = "{tiny_llama}"
[prepare]
window = 96
heldout = 0.2
[[prepare.source]]
name = "chats"
kind = "jsonl"
path = "{source.path}"
messages_column = "messages"
[generate]
max_tokens = 4
"""
    )
    assert command(["generate", str(file), "--engine", "reference"]) == 0
    said = capsys.readouterr()
    assert "cut at the limit" in said.err
    assert str(tmp_path / "run" / "corpus") in said.out.replace("\n", "")
    assert len(Corpus.open(tmp_path / "run" / "corpus").split("heldout")) == 1
    assert command(["prepare", str(file)]) == 2
    assert "stillroom generate" in capsys.readouterr().err
    assert command(["capture", str(file), "--ray", "--rank", "1", "--world-size", "2"]) == 2
    assert "mean nothing with --ray" in capsys.readouterr().err


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_writes_what_it_says_it_writes(tiny_llama, tmp_path):
    settings = {"n": 3, "temperature": 0.8, "top_p": 0.7}
    corpora = []
    for name in ("one", "two"):
        run = run_in(tmp_path / name, tiny_llama, **settings)
        corpora.append(generate(run, engine="vllm"))
    assert corpora[0].digest == corpora[1].digest
    from transformers import AutoModelForCausalLM

    model, judged = AutoModelForCausalLM.from_pretrained(tiny_llama), 0
    for example in corpora[0].split("train"):
        first = int(np.argmax(example.loss_mask))
        with torch.inference_mode():
            logits = model(torch.tensor(example.token_ids.copy())[None].long()).logits[0].double()
        b = (logits[first - 1 : -1] / 0.8).softmax(-1)
        falling, ids = b.sort(dim=1, descending=True)
        before = falling.cumsum(1) - falling
        b = torch.zeros_like(b).scatter(1, ids, falling * (before < 0.7))
        b = b / b.sum(1, keepdim=True)
        drawn = b.gather(1, torch.tensor(example.token_ids[first:].copy()).long()[:, None])[:, 0]
        # Where the running sum meets 0.7 to within rounding, the last word may be in or out.
        clear = ((before - 0.7).abs() > 1e-4).all(1)
        written = example.behaviour_logprob[first:][clear.numpy()]
        np.testing.assert_allclose(written, drawn[clear].log(), atol=1e-4)
        judged += len(written)
    assert judged > 100


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_draws_from_a_mixture_and_knows_how_probable_each_token_was(
    tiny_llama, student, tmp_path
):
    from transformers import AutoModelForCausalLM

    share, temperature, count = 0.4, 0.8, 200
    settings = {"n": count, "max_tokens": 6, "temperature": temperature, "teacher_share": share}
    run = run_in(tmp_path / "run", tiny_llama, student=str(student), **settings)
    corpus = generate(run, engine="vllm")
    models = [AutoModelForCausalLM.from_pretrained(model) for model in (tiny_llama, student)]
    first_tokens, surprises = {}, []
    for number, example in enumerate(corpus.split("train")):
        start = int(np.argmax(example.loss_mask))
        if number % 4 and start in first_tokens:
            continue
        ids = torch.tensor(example.token_ids.copy()).long()
        with torch.inference_mode():
            p, q = (
                (model(ids[None]).logits[0].double() / temperature).softmax(-1) for model in models
            )
        b = (share * p + (1 - share) * q)[start - 1 : -1]
        drawn = b.gather(1, ids[start:, None])[:, 0].log().numpy()
        np.testing.assert_allclose(example.behaviour_logprob[start:], drawn, atol=1e-4)
        entropy = -(b * b.log()).sum(1).numpy()
        surprises.append((-drawn - entropy).mean())
        first_tokens.setdefault(start, (example.token_ids[:start].tobytes(), b[0].numpy()))
    # A token of b is -log b(token) surprising, on average its entropy, at every step of an answer.
    error = np.std(surprises) / np.sqrt(len(surprises))
    assert len(surprises) > 100
    assert abs(np.mean(surprises)) <= 4 * error
    for start, (prompt, expected) in first_tokens.items():
        found = np.zeros_like(expected)
        for example in corpus.split("train"):
            if example.token_ids[:start].tobytes() == prompt and not example.loss_mask[start - 1]:
                found[example.token_ids[start]] += example.weight
        _assert_drawn(found, expected)


def _assert_drawn(found: np.ndarray, expected: np.ndarray) -> None:
    """Counts of draws fit their probabilities (chi-square, rare words together)."""
    expected = found.sum() * expected
    often = expected >= 5
    seen, due = (np.append(v[often], v[~often].sum()) for v in (found, expected))
    chi_square = np.sum((seen - due)[due > 0] ** 2 / due[due > 0])
    freedom = len(seen) - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom) + 10


HYBRIDS = ("falcon-h1", "granite-hybrid")


@pytest.mark.vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="what is tried is set for CPUs alone")
@pytest.mark.parametrize("label", HYBRIDS)
def test_hybrid_models_write_under_vllm(label, tmp_path):
    """They keep states beside keys and values, which vLLM caches by prefix in pieces only."""
    model = save(label, tmp_path / "model")
    tiny_models.save_tokenizer(model, vocab_size=512)
    run = run_in(tmp_path / "run", model, n=2, seed=3)
    run = run.model_copy(update={"capture": run.capture.model_copy(update={"check": "always"})})
    corpus = generate(run, engine="vllm")
    (checked,) = corpus.facts["generated"]["definition"]
    assert checked["done"]
    assert checked["logprob"] < 1e-4
    for example in corpus.split("train"):
        ids = torch.tensor(example.token_ids)
        with torch.inference_mode():
            said = load_model(run.teacher)(input_ids=ids[None].long()).logits[0].log_softmax(-1)
        drawn = said[:-1].gather(1, ids[1:, None].long())[:, 0].numpy()
        answer = example.loss_mask[1:]
        np.testing.assert_allclose(example.behaviour_logprob[1:][answer], drawn[answer], atol=1e-4)


@pytest.mark.vllm
def test_a_writer_that_vllm_computes_otherwise_writes_nothing(tmp_path):
    """LongRoPE: one set of factors for all lengths, 3 nats from the definition."""
    model = save("phi3-longrope", tmp_path / "model")
    tiny_models.save_tokenizer(model, vocab_size=512)
    run = run_in(tmp_path / "run", model)
    run = run.model_copy(update={"capture": None})
    with pytest.raises(TeacherError, match="vLLM does not say what the model's definition says"):
        generate(run, engine="vllm")
    assert not list((tmp_path / "run").rglob("part-*"))
