"""A run: one TOML file, read strictly.

One idea: every table is a frozen pydantic model that forbids what it does not know, and an
unknown key is refused with the nearest key that exists. `dump` writes the resolved run beside
its result. Flags never appear here: a flag is for an operation, a key for what a run means.
"""

import json
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from stillroom.cache_schemas.errors import ConfigError
from stillroom.cache_schemas.scrubbing import scrubbed
from stillroom.pipeline.config.preparation import Prepare
from stillroom.pipeline.config.recommending import Candidates, Items, Recommender
from stillroom.pipeline.config.strict import PathText, Table, validate
from stillroom.pipeline.config.training import Attention, Evaluate, Objective, Student, Train
from stillroom.pipeline.config.vision import Vision


class Generate(Table):
    """Answers that a model writes to the prompts of [prepare]'s sources, in place of their own."""

    n: int = Field(default=1, ge=1, le=1024)
    """Answers drawn for each prompt; equal ones become one example with their number as weight."""
    max_tokens: int = Field(default=256, ge=1)
    """Tokens of one answer, at most; with its prompt it must fit [prepare] window."""
    temperature: float = Field(default=1.0, ge=0)
    """0 takes the most probable token every time."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the most probable tokens whose mass reaches this."""
    teacher_share: float = Field(default=1.0, ge=0, le=1)
    """Share of the teacher in the mixture a * teacher + (1 - a) * student that every token is drawn
    from (MiniLLM's alpha; they take 0.2). 1 needs no student."""
    student: PathText = ""
    """HF directory or hub id of the mixture's student; same tokenizer as the teacher."""
    turns: Literal["last", "each"] = "last"
    """Conversations: ask for the last answer only, or for every answer anew, each after what the
    source says until then (LLaVADI's data enhancement)."""
    prompt_tokens: int = Field(default=0, ge=0)
    """`text_column` sources: the prompt is a document's first tokens, this many; 0 takes all."""
    long_prompts: Literal["error", "skip"] = "error"
    """What a prompt means that leaves no room for an answer: a mistake, or one to leave out."""
    prompts_per_part: int = Field(default=64, ge=1)
    """Prompts answered between two commits."""
    seed: int = 0
    """Of the draws."""


class Teacher(Table):
    """The model that is run once."""

    model: PathText
    """HF directory or hub id."""
    revision: str = ""
    """Of a hub id: branch, tag or commit."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the forward pass; `auto` takes the checkpoint's."""
    quantization: str = ""
    """vLLM's method, where the checkpoint does not name one."""
    adapter: str = ""
    """Directory of a PEFT adapter that is applied to the model; part of what the teacher is."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model's directory. Read it first: it may do anything."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Any further vLLM engine argument, passed on as it stands; `hf_overrides` also holds where
    transformers runs the teacher."""
    attention: Attention = "auto"
    """Wherever transformers runs the teacher: `auto` takes eager, which computes all that its
    config says; sdpa needs less memory and leaves out what it does not know
    (Gemma 2's soft cap)."""
    scratch_mib: int = Field(default=0, ge=0)
    """MiB beside the model that logits may take while prompts are scored; 0 takes 256, and 1024 on
    accelerators of 70 GB and more. Not part of the plan."""
    _named_by: str = PrivateAttr("[teacher] model")

    def named_by(self, what: str) -> "Teacher":
        """The same, given as `what` (an option, another table's key): messages say that."""
        named = self.model_copy()
        named._named_by = what
        return named

    @property
    def name_given_as(self) -> str:
        """What gave the name of this model."""
        return self._named_by

    @field_validator("engine_args")
    @classmethod
    def _say_elsewhere_or_never(cls, given: dict[str, Any]) -> dict[str, Any]:
        """What has a key here would get round it; random weights are no teacher."""
        twice = sorted(given.keys() & (cls.model_fields.keys() | {"enable_lora"}))
        if twice:
            key = "adapter" if twice[0] == "enable_lora" else twice[0]
            raise ValueError(f"'{twice[0]}' is said by [teacher] {key}, not here")
        if given.get("load_format") == "dummy":
            raise ValueError("load_format = 'dummy' fills the model with random numbers")
        return given


class Capture(Table):
    """What is kept of the teacher's answers. All of it changes meaning, so it is in the plan."""

    k: int = Field(default=12, ge=0, le=512)
    """Ids kept exactly. With 0 the tail is everything, and draws are all that is kept of it: every
    probability rounded at random to the multiple of 1 / tail_draws below or above it (random
    sampling KD, arXiv 2503.16870, with evenly spaced draws)."""
    tail_draws: int = Field(default=56, ge=0, le=512, validate_default=True)
    """Draws from the tail, in proportion to p: one for every 1 / tail_draws of probability, so a
    row whose tail weighs a quarter gets a quarter of them; 0 keeps only the tail's mass. The
    default is 0 where k or nucleus is given, else 56 (runbooks/decisions/0032)."""
    nucleus: float = Field(default=0.0, ge=0, lt=1)
    """Of the k ids keep only the fewest whose mass reaches this, row by row; 0 keeps all k."""
    temperatures: tuple[float, ...] = (1.0,)
    """Log-sum-exps are kept at each; 1.0 is always among them."""
    entropy: bool = True
    """Keep the entropy of every row's full softmax, in nats."""
    moments: bool = False
    """Logit mean, standard deviation and z-score log-sum-exp (LLaVADI's `norm_logits`)."""
    hidden_layers: tuple[int | Literal["final"], ...] = ()
    """Blocks (1-based) whose output is kept; "final" is what the LM head's
    matrix is multiplied with."""
    hidden_rows: Literal["all", "answer"] = "all"
    """States of every scored row, or of rows under the loss mask only."""
    hidden_stride: int = Field(default=1, ge=1)
    """Keep the states of every so-many-th of those rows."""
    hidden_codec: Literal["bf16", "fp16", "int8", "fp8", "step"] = "step"
    """How a state is stored; FORMAT.md states each one's error."""
    hidden_step: float = Field(default=0.05, gt=0)
    """Step of the RMS-scaled integers of codec `step`; normalised squared error is step^2/12."""
    profile: Literal["small", "strict", "exact", "portable"] = "small"
    """Codec profile of the top-k records (see FORMAT.md)."""
    mean_kl: float = Field(default=1e-4, gt=0)
    """Mean KL divergence, nats per row, that profile `small` may add; no row adds thrice it."""
    check: Literal["auto", "always", "never"] = "auto"
    """Compare vLLM with the model's definition before the first shard is kept: `auto` in at most
    two minutes or 1 % of the capture, `always` however long it takes. Not part of the plan."""
    score_images: bool = False
    """Also keep rows at image placeholder positions."""
    examples_per_shard: int = Field(default=16, ge=1)
    """Examples between two commits."""
    seed: int = 0
    """Of the tail's draws."""

    @model_validator(mode="before")
    @classmethod
    def _lists_that_are_asked_for_come_without_draws(cls, given: Any) -> Any:
        if isinstance(given, dict) and not {"k", "nucleus"}.isdisjoint(given):
            return {"tail_draws": 0} | given
        return given

    @field_validator("tail_draws")
    @classmethod
    def _something_is_kept(cls, draws: int, info: ValidationInfo) -> int:
        if draws == 0 and info.data.get("k") == 0:
            raise ValueError("k = 0 keeps no exact ids, so draws are needed")
        return draws

    @field_validator("nucleus")
    @classmethod
    def _what_is_cut_off_is_not_drawn_from(cls, mass: float, info: ValidationInfo) -> float:
        if mass and (info.data.get("tail_draws") or not info.data.get("k")):
            raise ValueError("draws are from beyond all k ids, so nucleus goes without tail_draws")
        return mass


class Run(Table):
    """A whole TOML file. Stages read the tables they need; all tables are checked by all stages."""

    name: str
    """What tables, pictures and cards call the run."""
    directory: PathText
    """Where results go, relative to the working directory."""
    prepare: Prepare | None = None
    generate: Generate | None = None
    teacher: Teacher | None = None
    capture: Capture | None = None
    vision: Vision | None = None
    items: Items | None = None
    candidates: Candidates | None = None
    recommender: Recommender | None = None
    student: Student | None = None
    objective: tuple[Objective, ...] = ()
    train: Train | None = None
    evaluate: Evaluate | None = None

    @model_validator(mode="after")
    def _one_purpose(self) -> "Run":
        """Token logits of a recommender's questions take hours, and nothing there reads them."""
        named = [f"[{n}]" for n in ("items", "candidates") if getattr(self, n) is not None]
        if named and self.capture is not None:
            raise ValueError(
                f"[capture] beside {' and '.join(named)}: token logits of every question, which "
                "no recommender reads. Remove [capture]; `check` is a key of [items] and "
                "[candidates] too. To tune a teacher on the questions, give [capture] a run file "
                "and a directory of its own"
            )
        return self

    @model_validator(mode="after")
    def _something_is_trained_on(self) -> "Run":
        """One line of weight 0 among others is computed and shown; alone it moves no weight."""
        if self.objective and not any(line.weight or line.final_weight for line in self.objective):
            raise ValueError(
                "every [[objective]] has weight 0, so no step would change the student; expected "
                "one with a weight (or final_weight) above 0. Set one, such as weight = 1"
            )
        return self

    def path(self, *parts: str) -> Path:
        """A path inside the run's directory."""
        return Path(self.directory, *parts)


def load(path: str | Path) -> Run:
    """Read a run.

    Raises:
        ConfigError: the file is missing, is not TOML, or has a key or value that is not allowed.
    """
    return parse(read_toml(Path(path)), where=str(path))


def parse(data: dict[str, Any], where: str) -> Run:
    """Validate a parsed TOML document; `where` names it in errors."""
    return validate(Run, data, where)


def require(table: Any, name: str, where: str) -> Any:
    """A table that this stage cannot do without."""
    if table is None:
        raise ConfigError(
            f"table [{name}] is missing", where=where, remedy=f"Add a [{name}] table."
        )
    return table


def dump(run: Table, path: str | Path) -> None:
    """Write the resolved run as JSON (every default spelled out, no credential) beside its
    result."""
    text = json.dumps(scrubbed(run.model_dump(mode="json")), indent=2, sort_keys=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text + "\n")


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as plain data, with or without the byte order mark that some editors write.

    Raises:
        ConfigError: it is missing, cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError("no such file", where=str(path), remedy="Check the path.") from None
    except IsADirectoryError:
        raise ConfigError("is a directory", expected="a TOML file", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"byte {error.start} is not UTF-8", where=str(path), remedy="Save the file as UTF-8."
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})", where=str(path)) from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"is not TOML: {error}", where=str(path)) from None
