"""Whether a student, its tokenizer and its trainer fit a cache, found before the first step.

One idea: whatever would be wrong in silence is asked of the objects themselves: of the tokenizer,
of the rows of a data set, of the methods that a trainer has. Nothing is trained here.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import ConfigError, StudentError
from stillroom.pipeline.corpus.tokenizer import facts_of_tokenizer, tokenizer_facts
from stillroom.pipeline.student.skeleton import positions_of
from stillroom.pipeline.training.run import check_tokenizer

EXAMPLE = "example"
"""Column of a data set: the number of each row's record in the main cache."""

LOOKED_AT = 64
"""Rows of a data set whose tokens are compared before the first step; the others when read."""

TRIED = "transformers 5.19 and TRL 1.16"


def bare(model: Any) -> Any:
    """The model of transformers inside PEFT's.

    Raises:
        StudentError: what PEFT does to it is more than changing weights.
    """
    config = getattr(model, "active_peft_config", None)
    if config is None:
        return model
    if getattr(config, "is_prompt_learning", False):
        raise StudentError(
            f"{type(config).__name__} puts tokens of its own before the text",
            expected="adapters in the weights, as LoRA's",
            remedy="Use LoraConfig; rows of a cache are counted from the text's own first token.",
        )
    return model.get_base_model()


def check_trainer(kind: type) -> None:
    """Refuse a version of a trainer that does not hand over what a right loss needs.

    Raises:
        ConfigError: naming what it lacks.
    """
    from transformers import Trainer

    wanted = {
        "compute_loss": "num_items_in_batch",
        "get_batch_samples": "num_batches",
        "training_step": "num_items_in_batch",
        "evaluation_loop": "metric_key_prefix",
        "prediction_step": "prediction_loss_only",
        "_save": "state_dict",
        "_load_from_checkpoint": "resume_from_checkpoint",
    }
    lacks = [
        f"{name}(..., {argument})"
        for name, argument in wanted.items()
        if argument not in inspect.signature(getattr(Trainer, name, check_trainer)).parameters
    ]
    lacks += [] if hasattr(Trainer, "loss_is_scaled_for_ga") else ["loss_is_scaled_for_ga"]
    if lacks or not issubclass(kind, Trainer):
        import transformers

        raise ConfigError(
            f"this trainer has no {lacks[0] if lacks else 'transformers.Trainer in it'}",
            expected=TRIED,
            where=f"transformers {transformers.__version__}",
            remedy="Install a version that was tried: pip install 'stillroom[hf]'.",
        )


def check_student(model: Any, tokenizer: Any, caches: Mapping[str, Any], longest: int) -> None:
    """Refuse a student whose ids or positions are not the caches'.

    Args:
        model: of transformers.
        tokenizer: the trainer's `processing_class`; None reads that of the model's directory.
        caches: what each is called -> cache.
        longest: tokens of the longest example.

    Raises:
        StudentError: naming the fact that differs.
        CorpusError: there is no tokenizer to compare.
    """
    where = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    own = tokenizer_facts(where) if tokenizer is None else facts_of_tokenizer(tokenizer)
    head = model.get_output_embeddings().weight.shape[0]
    if head < own["vocab_size"]:
        raise StudentError(
            f"the head has {head} rows",
            expected=f"at least the tokenizer's {own['vocab_size']} ids",
            where=where,
        )
    check_tokenizer(own, caches, where)
    limit, fixed = positions_of(model)
    if limit and fixed and longest > limit:
        raise StudentError(
            f"examples of {longest} tokens for a student made for {limit} positions",
            where=where,
            remedy="Capture shorter windows, or take a student with more positions.",
        )


def check_dataset(dataset: Any, data: Any) -> None:
    """Refuse a data set that is not about the cache's examples.

    Args:
        dataset: of `datasets`, map-style.
        data: the `CachedDataset`.

    Raises:
        StudentError: it lacks the column `example`, or its tokens are another example's.
    """
    if EXAMPLE not in (dataset.column_names or ()):
        raise StudentError(
            f"the data set has no column '{EXAMPLE}'",
            where="train_dataset",
            remedy="Leave train_dataset out, and the cache's own examples are taken; or add the "
            f"column: the number of each row's record in the cache, "
            f"dataset.add_column('{EXAMPLE}', range(len(dataset))) where both are in one order.",
        )
    for row in np.unique(np.linspace(0, len(dataset) - 1, LOOKED_AT).astype(int)):
        one = dataset[int(row)]
        check_rows([one], [data.records.main.read(_number(one, len(data)), ())], f"row {row}")


def numbers_of(rows: Sequence[Mapping[str, Any]], count: int) -> list[int]:
    """Numbers of the records that rows of a data set name."""
    return [_number(row, count) for row in rows]


def _number(row: Mapping[str, Any], count: int) -> int:
    if EXAMPLE not in row:
        raise StudentError(
            f"a row came without its column '{EXAMPLE}' (it has {', '.join(row) or 'none'})",
            where="train_dataset",
            remedy="Set remove_unused_columns = False, and keep the column in what maps the rows.",
        )
    number = int(row[EXAMPLE])
    if not 0 <= number < count:
        raise StudentError(
            f"{EXAMPLE} = {number}", expected=f"0 to {count - 1}", where="train_dataset"
        )
    return number


def check_rows(rows: Sequence[Mapping[str, Any]], records: Sequence[Any], where: str) -> None:
    """Refuse rows whose `input_ids` are not those of their records; rows without any are taken.

    Raises:
        StudentError: a row is about another text, or was cut.
    """
    for row, record in zip(rows, records, strict=True):
        if "input_ids" not in row:
            continue
        given, kept = np.asarray(row["input_ids"]), record.example.token_ids
        if len(given) != len(kept) or (given != kept).any():
            raise StudentError(
                f"{where}: its input_ids are not those of record {row[EXAMPLE]} "
                f"({len(given)} and {len(kept)} tokens)",
                expected="the tokens that the teacher was asked about, whole and in their order",
                where="train_dataset",
                remedy=f"Make the column '{EXAMPLE}' before the data set is shuffled, filtered or "
                "cut, or leave train_dataset out.",
            )


OURS = {
    "data_collator": "The collator is the cache's.",
    "eval_dataset": "Name the held-out cache as eval_cache.",
    "compute_loss_func": "Name what is to be learned in objectives.",
    "compute_metrics": "There are no logits to measure; use `stillroom evaluate`.",
    "preprocess_logits_for_metrics": "There are no logits to measure; use `stillroom evaluate`.",
    "formatting_func": "The tokens are the cache's.",
    "model_init": "Give the model itself: it is measured before the first step.",
}
"""Arguments of trainers that a cache leaves no room for, and what to do instead."""

UNHEARD = {
    "label_smoothing_factor": (0, 0.0, None),
    "torch_compile": (False, None),
    "deepspeed": (None, ""),
    "loss_type": (None, "nll", "chunked_nll"),
    "packing": (None, False),
    "padding_free": (None, False),
}
"""Settings that would change nothing or go wrong, and the values that ask for nothing."""

INSTEAD = {
    "label_smoothing_factor": "Leave it out: the teacher's own distribution is what is learned.",
    "torch_compile": "Compile the blocks before: `for block in model.model.layers: "
    "block.compile()`.",
    "deepspeed": "Use DDP or FSDP.",
    "loss_type": "Leave it out: objectives say what is learned.",
    "packing": "Leave it out: the collator packs where the student keeps examples apart.",
    "padding_free": "Leave it out: the collator lays rows end to end where attention allows it.",
}


def check_arguments(args: Any, more: Mapping[str, Any], trainer: Any = None) -> None:
    """Refuse settings that a trainer would take and not follow.

    Args:
        args: the trainer's arguments; None for its defaults.
        more: what else the trainer was given.
        trainer: the same once it is made; None before.

    Raises:
        ConfigError: naming the setting and what to do instead.
    """
    for name, remedy in OURS.items():
        if more.get(name) is not None:
            raise ConfigError(f"{name} beside a cache", where="the trainer", remedy=remedy)
    for name, nothing in UNHEARD.items():
        if getattr(args, name, nothing[0]) not in nothing:
            raise ConfigError(
                f"{name} = {getattr(args, name)!r}",
                where="the trainer's arguments",
                remedy=INSTEAD[name],
            )
    if trainer is not None:
        _check_ranks(trainer)


def _check_ranks(trainer: Any) -> None:
    """Refuse ways of sharing a batch that would count it wrongly."""
    told = getattr(trainer.accelerator, "parallelism_config", None)
    shared = [n for n in ("tp", "cp", "sp") if told is not None and getattr(told, f"{n}_size") > 1]
    if trainer.args.n_gpu > 1 or trainer.is_deepspeed_enabled or shared:
        found = f"{shared[0]}_size above 1" if shared else "nn.DataParallel or DeepSpeed"
        raise ConfigError(
            found,
            expected="DDP or FSDP, a process for each device",
            where="the trainer",
            remedy="Start with accelerate launch or torchrun, or make one device visible.",
        )
