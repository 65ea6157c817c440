"""The tables of stage two: `[student]`, `[[objective]]`, `[train]`, `[evaluate]`.

One idea: the same file gives the same student on any number of ranks, so a step is counted over all
of them. Objectives bring their own options, checked by `stillroom.pipeline.objectives.registry`.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from stillroom.pipeline.config.strict import PathText, Table, a_number

Attention = Literal[
    "auto",
    "sdpa",
    "eager",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
]
"""Names of transformers 5."""

Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""What numpy (not below 0) and torch (64 bits) both take."""
Beta = Annotated[float, Field(ge=0, lt=1), BeforeValidator(a_number)]

SMALLEST, LARGEST = 1e-12, 1_000_000


def _felt(weight: float) -> float:
    if 0 < weight < SMALLEST:
        raise ValueError(f"expected 0, or {SMALLEST:g} and more")
    return weight


Weight = Annotated[float, Field(ge=0, le=LARGEST), AfterValidator(_felt), BeforeValidator(a_number)]
"""Far beyond these bounds float32 makes infinity or 0 of a weighted loss."""

BELONGS_TO = {
    "keep_every": "prune_layers",
    "keep_layers": "prune_layers",
    "leave_out": "prune_layers",
    "leave_out_tokens": "prune_layers",
    "keep_intermediate": "prune_width",
    "keep_heads": "prune_width",
    "vision_model": "parts",
    "vision_layer": "parts",
}
"""Key of [student] -> the only `init` that reads it."""


class Student(Table):
    """Where the student's first weights come from."""

    init: Literal["prune_layers", "prune_width", "config", "model", "parts"] = "prune_layers"
    """`prune_layers`, `prune_width`: the teacher with fewer blocks, or narrower ones. `config`:
    fresh weights. `model`: a model that is there. `parts`: a LLaVA-type student of a vision tower
    and a language model."""
    model: PathText = ""
    """HF directory or hub id for `model`, JSON config for `config`; empty takes the teacher.
    `parts`: the language model."""
    vision_model: PathText = ""
    """`parts`: HF directory of the vision tower; both are joined by a fresh projector."""
    vision_layer: int = -2
    """`parts`: the tower's layer that the projector reads; LLaVA takes the last but one."""
    keep_every: int = Field(default=3, ge=1)
    """`prune_layers`: keep blocks 0, n, 2n, ..."""
    keep_layers: tuple[int, ...] = ()
    """`prune_layers`: keep exactly these blocks (0-based) instead."""
    leave_out: int = Field(default=0, ge=0)
    """`prune_layers`: keep all but this many blocks instead, those that the teacher misses least.
    That is measured once, on the prepared corpus, when the student is made: the answers' KL with
    every block skipped in turn; after each that goes again, with the few that added least.
    Every pass is kept in `<directory>/blocks-measured.json`."""
    leave_out_tokens: int = Field(default=512, ge=2)
    """Text that `leave_out` is measured on, whole examples; the work is about that of three passes
    of the teacher for every block that goes."""
    keep_intermediate: float = Field(default=0.5, gt=0, le=1)
    """`prune_width`: share of each MLP's inner units that stays, those of largest weight norm."""
    keep_heads: float = Field(default=1.0, gt=0, le=1)
    """`prune_width`: share of key/value head groups that stays."""
    seed: Seed = 0
    """Seed of fresh weights (`config`)."""

    @model_validator(mode="after")
    def _blocks_are_chosen_one_way(self) -> "Student":
        if self.leave_out and self.keep_layers:
            raise ValueError(
                "leave_out measures which blocks stay, and keep_layers names them; take one"
            )
        return self

    @model_validator(mode="after")
    def _what_is_set_is_read(self) -> "Student":
        for key, init in BELONGS_TO.items():
            # A resolved run names every key, so one at its default was not asked for.
            given, default = getattr(self, key), type(self).model_fields[key].default
            if given != default and init != self.init:
                raise ValueError(
                    f"{key} = {_toml(given)} is of init = '{init}', and init is '{self.init}', "
                    f"which would ignore it; leave {key} out ({_toml(default)} is the same), or "
                    f"set init = '{init}'"
                )
        return self


def _toml(given: Any) -> str:
    return json.dumps(given)


class Lora(Table):
    """Low-rank adapters in place of full training (PEFT)."""

    rank: int = Field(default=16, ge=1)
    """Of the two matrices."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapter's output is multiplied with alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs left out in training."""
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of modules, embeddings and head among them; `all-linear` leaves the head out."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole beside the adapters."""
    export: Literal["merged", "adapter"] = "merged"
    """`merged`: a plain model. `adapter`: PEFT's files, which name `<directory>/student-initial` as
    the model that they belong to."""

    @field_validator("targets", mode="before")
    @classmethod
    def _names_or_all(cls, given: Any) -> Any:
        """Of a choice of types pydantic tells its own name for the first, not what to write."""
        names = given if isinstance(given, list | tuple) else (None,)
        if given != "all-linear" and not all(isinstance(name, str) for name in names):
            raise ValueError('expected a list of names as in ["q_proj"], or "all-linear"')
        return given


class Objective(Table):
    """One `[[objective]]`: a loss, its weight, the rows it is about and its own options."""

    name: str
    """Which loss; the objectives and their options are listed at the end of the reference."""
    weight: Weight = 1.0
    """Factor of this loss in the sum that is trained on; 0 computes and shows it."""
    final_weight: Weight | None = None
    """Weight at the last step; the weight moves to it linearly. Unset keeps `weight`."""
    mask: Literal["answer", "all", "text", "image"] = "answer"
    """`answer`: predictions of tokens under the loss mask; `all`: every scored row; `text` and
    `image`: rows outside and inside image spans."""
    reduction: Literal["token", "sample"] = "token"
    """`token`: mean over rows of the whole step; `sample`: mean over examples of their row means
    (as LLaVADI does)."""
    cache: str = ""
    """Name of one of `[train.caches]`; empty takes `train.cache`."""
    source_weights: dict[str, Weight] = Field(default_factory=dict)
    """Corpus source -> factor on its rows; sources not named keep 1."""
    curriculum: Literal[
        "none", "low_entropy_first", "high_entropy_first", "small_gap_first", "large_gap_first"
    ] = "none"
    """Which rows come first: those where the teacher's entropy, or its advantage over the student
    on the text's own token, is low or high; all of them at the end. A gap costs one more sweep."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of this objective; see the runbook on objectives."""


class HeldOutCaches(Table):
    """One held-out set, `[train.heldout.NAME]`: text that no step trains on."""

    cache: PathText
    """What stands for `train.cache` on held-out text."""
    caches: dict[str, PathText] = Field(default_factory=dict)
    """What stands for each of `[train.caches]`, by the same names."""


class Train(Table):
    """The student's training."""

    cache: PathText = ""
    """Directory or URL of the cache; empty takes `<directory>/cache`."""
    local_copy: PathText = ""
    """Directory that keeps what was read of caches behind a URL, so that a second epoch and other
    runs read it from disk; empty keeps nothing."""
    local_copy_gigabytes: float = Field(default=16, gt=0)
    """What `local_copy` may hold; what was used longest ago goes first."""
    caches: dict[str, PathText] = Field(default_factory=dict)
    """Further caches of the same corpus, by name: other teachers, other signals."""
    images: dict[str, PathText] = Field(default_factory=dict)
    """Caches of vision targets, by name; joined by image, whatever corpus they were made from."""
    corpus: PathText = ""
    """Directory of the prepared corpus that holds the image files; empty takes
    `<directory>/corpus`. Read only for a student with a vision tower, and by `leave_out`."""
    freeze: tuple[str, ...] = ()
    """Patterns (as in file names, `*vision_tower*`) of student weights that stay as they are."""
    steps: int = Field(default=100, ge=1)
    """May grow between two calls, after the end too: steps that were taken stay, and rate, weights
    and curricula follow the new number of steps from there."""
    batch_tokens: int = Field(default=2048, ge=2)
    """Tokens of one microbatch, padding included."""
    accumulate: int = Field(default=1, ge=1)
    """Microbatches of one step over all ranks together; a multiple of the number of ranks."""
    sequence_length: int = Field(default=0, ge=0)
    """Tokens of one packed row, at most `batch_tokens`; 0 takes the longest example of the
    cache."""
    shuffle_shards: int = Field(default=16, ge=1)
    """Shards that are shuffled together; bounds how far apart a step's reads lie."""
    learning_rate: float = Field(default=6e-4, gt=0)
    """Highest rate, after the warm-up."""
    warmup: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """How the rate falls; `wsd` (warm-up, stable, decay) holds it and falls at the end."""
    decay: float = Field(default=0.2, ge=0, le=1)
    """`wsd`: share of the steps at the end in which the rate falls."""
    final_rate: float = Field(default=0.0, ge=0, le=1)
    """Rate at the last step, as a share of `learning_rate`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW, on matrices."""
    clip: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Of AdamW."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`bfloat16`: autocast over fp32 master weights; `auto` is that on CUDA and fp32 elsewhere."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights in the trained student's directory."""
    lora: Lora | None = None
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of an average of the weights, which is then what is exported; 0 keeps none."""
    attention: Attention = "auto"
    """`auto` is what transformers takes for the architecture (sdpa where it has that). The
    `flash_attention`s train padding-free: rows are laid end to end without padding."""
    packing: Literal["auto", "never"] = "auto"
    """`auto` puts several examples into a row where the student keeps them apart in rows of this
    length, which is measured; `never` (and `auto` elsewhere) one example."""
    load_balancing: bool = True
    """Add the router's load-balancing loss, times the config's `router_aux_loss_coef`, where the
    student has experts and a coefficient."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more work."""
    compile: bool = False
    """Run the student through `torch.compile`."""
    kernel: Literal["auto", "chunked", "eager", "triton"] = "auto"
    """Implementation of the divergences: `auto` is triton on CUDA and chunked elsewhere; one that
    is named and cannot run here is an error."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several ranks share the work; `fsdp` is not for `embedding`."""
    workers: int = Field(default=1, ge=0)
    """Threads that decode ahead of training; 0 decodes between steps."""
    seed: Seed = 0
    """Of the order of examples, and of what is drawn in training."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between two checkpoints."""
    async_checkpoint: bool = False
    """Write checkpoints while training goes on."""
    keep_last: int = Field(default=2, ge=1)
    """Checkpoints that stay."""
    log_every: int = Field(default=1, ge=1)
    """Steps between two lines of the curves."""
    evaluate_every: int = Field(default=0, ge=0)
    """Steps between measurements on `heldout_cache`; 0 measures only with `stillroom evaluate`."""
    joined: tuple[PathText, ...] = ()
    """Caches of other texts, trained on with those of `cache`: each text keeps its own teacher
    (one for each source, say). Alike in tokenizer, vocabulary, k, temperatures and signals."""
    heldout_cache: PathText = ""
    """Cache of the held-out split, for measurement during training."""
    heldout: dict[str, HeldOutCaches] = Field(default_factory=dict)
    """Further held-out sets by name; their measures are `heldout/NAME/...`."""
    keep_best: str = ""
    """A held-out measure, such as `1.forward_kl` or `NAME/1.forward_kl`: the student of its lowest
    value is exported, not that of the last step."""
    patience: int = Field(default=0, ge=0)
    """Stop after this many measurements without a new best of `keep_best`; 0 takes all steps."""
    tracker: Literal["none", "wandb", "trackio"] = "none"
    """A second place for the curves, beside TensorBoard."""


class Evaluate(Table):
    """Held-out measurement."""

    students: dict[str, PathText] = Field(default_factory=dict)
    """Label -> HF directory, beside this run's student before and after training; a run without
    [train] measures these alone."""
    corpus: PathText = ""
    """Directory of a prepared corpus; empty takes `<directory>/corpus`."""
    split: Literal["heldout", "train"] = "heldout"
    """Which of its examples; `train` for a text that was prepared only to measure on."""
    examples: int = Field(default=0, ge=0)
    """Examples to use; 0 takes all."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward passes; log-probabilities are always fp32."""
    attention: Attention = "auto"
    """Of every model that is measured; `auto` takes `[teacher] attention` for the teacher, and
    eager for students."""
