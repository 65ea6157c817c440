"""A student keeps the teacher's tokenizer, whatever class transformers has for its architecture."""

import itertools

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.config.training import Student
from stillroom.pipeline.corpus.tokenizer import tokenizer_facts
from stillroom.pipeline.student import tokenizer_files
from stillroom.pipeline.student.model import initial_student
from stillroom.pipeline.student.tokenizer_files import keep_tokenizer
from tests import student_architectures, tiny_models

VOCAB = 400
SHAPES = ("llama", "qwen2", "mistral", "phi3", "gemma", "gpt2", "cohere", "deepseek_v3")
TEXT = "Hello wörld, it's 12345 of\n\n  them\t<|im_end|> ａ ﬁ"


def save_llama_like(directory):
    """A SentencePiece-like tokenizer: blanks as a letter, bytes where a letter is unknown, BOS."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, show_progress=False, limit_alphabet=60
    )
    core.train_from_iterator([tiny_models.english(50_000)], trainer)
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = tiny_models.PLAIN_CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)


def save_own(architecture, plain, directory):
    """The tokenizer that transformers makes beside a model of an architecture, saved again."""
    student_architectures.save_model(architecture, directory, plain, VOCAB)
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    tiny_models.save_tokenizer(root / "plain", VOCAB)
    save_llama_like(root / "sentencepiece")
    for architecture in ("qwen2", "mistral", "phi3", "gpt2", "cohere", "deepseek_v3"):
        save_own(architecture, root / "plain", root / architecture)
    return {path.name: path for path in sorted(root.iterdir())}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A model of each architecture without a tokenizer."""
    root = tmp_path_factory.mktemp("shapes")
    (root / "nothing").mkdir()
    return {
        name: student_architectures.save_model(name, root / name, root / "nothing", VOCAB)
        for name in SHAPES
    }


TOKENIZERS = (
    "plain", "sentencepiece", "qwen2", "mistral", "phi3", "gpt2", "cohere", "deepseek_v3",
)  # fmt: skip


@pytest.mark.parametrize(("own", "shape"), itertools.product(TOKENIZERS, SHAPES))
def test_every_architecture_keeps_every_tokenizer(tokenizers, shapes, tmp_path, own, shape):
    source = tokenizers[own]
    (tmp_path / "config.json").write_bytes((shapes[shape] / "config.json").read_bytes())
    keep_tokenizer(source, tmp_path)
    assert tokenizer_facts(str(tmp_path)) == tokenizer_facts(str(source))
    there, here = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path)
    ids = there(TEXT)["input_ids"]
    assert here(TEXT)["input_ids"] == ids
    assert here.decode(ids) == there.decode(ids)
    assert here.special_tokens_map == there.special_tokens_map


def test_a_qwen2_student_of_a_llama_tokenizer(tokenizers, shapes, tmp_path):
    teacher = student_architectures.save_model(
        "llama", tmp_path / "teacher", tokenizers["sentencepiece"], VOCAB
    )
    student = Student(init="config", model=str(shapes["qwen2"]))
    made = initial_student(student, Teacher(model=str(teacher)), tmp_path / "made")
    assert tokenizer_facts(str(made)) == tokenizer_facts(str(teacher))
    trusting = AutoTokenizer.from_pretrained(made, trust_remote_code=True)
    assert trusting(TEXT)["input_ids"] == AutoTokenizer.from_pretrained(teacher)(TEXT)["input_ids"]
    model = Student(init="model", model=str(made))
    again = initial_student(model, Teacher(model=str(teacher)), tmp_path / "again")
    assert tokenizer_facts(str(again)) == tokenizer_facts(str(teacher))


def test_a_tokenizer_that_cannot_be_kept_is_refused_with_a_way_out(
    tokenizers, shapes, tmp_path, monkeypatch
):
    monkeypatch.setattr(tokenizer_files, "_name_a_class", lambda *_: None)
    teacher = student_architectures.save_model(
        "llama", tmp_path / "teacher", tokenizers["sentencepiece"], VOCAB
    )
    student = Student(init="config", model=str(shapes["qwen2"]))
    with pytest.raises(StudentError, match=r"another tokenizer: sha256.*prune_layers"):
        initial_student(student, Teacher(model=str(teacher)), tmp_path / "made")
    assert not (tmp_path / "made").exists()
    initial_student(Student(keep_layers=(0, 1)), Teacher(model=str(teacher)), tmp_path / "made")
