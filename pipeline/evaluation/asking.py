"""What a teacher and its students answer to a prompt, side by side.

One idea: every model writes its most probable token each time, so what differs is the models and
nothing was drawn; the reference writer writes. It shows, and measures nothing.
"""

from collections.abc import Callable, Mapping, Sequence

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.config import Generate, Teacher
from stillroom.pipeline.corpus.documents import Document
from stillroom.pipeline.corpus.tokenizer import CorpusTokenizer
from stillroom.pipeline.evaluation.answers import text_of, written
from stillroom.pipeline.evaluation.compared import as_model
from stillroom.pipeline.record import Example, content_id


def ask(
    teacher: Teacher,
    students: Mapping[str, str],
    prompts: Sequence[str],
    tokens: int = 48,
    plain: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[str]]:
    """Let the teacher and every student answer every prompt.

    Args:
        teacher: whose tokenizer and chat template all of them use.
        students: label -> HF directory.
        prompts: what a user says; with `plain`, texts to be continued.
        tokens: of an answer, at most.
        plain: without the chat template.
        on_progress: told (models that have answered, models in all).

    Returns:
        "teacher" and every label -> its answers, in the order of the prompts.

    Raises:
        CorpusError: the tokenizer has no chat template, or cannot be loaded; a prompt is empty.
        TeacherError: a model cannot be loaded.
    """
    tokenizer = CorpusTokenizer.open("", teacher.model, teacher.revision, teacher.trust_remote_code)
    asked = [_prompt(tokenizer, text, plain) for text in prompts]
    settings = Generate(temperature=0, max_tokens=tokens)
    models = {"teacher": teacher} | {label: as_model(one) for label, one in students.items()}
    said = {}
    for label, model in models.items():
        model = model.model_copy(update={"dtype": "float32"})
        answers = written(model, asked, settings, tokenizer.stop_ids)
        said[label] = [text_of(tokenizer, ids) for (ids,) in answers]
        if on_progress is not None:
            on_progress(len(said), len(models))
    return said


def _prompt(tokenizer: CorpusTokenizer, text: str, plain: bool) -> Example:
    messages = () if plain else ({"role": "user", "content": text},)
    ids = tokenizer.prompt(Document("the prompt", text=text, messages=messages))
    if not len(ids):
        raise CorpusError("an empty prompt is nothing to continue", where="ask")
    mask = ids < 0  # nothing of it is a target
    return Example(content_id(ids, mask, ()), "", "", ids, mask, ())
