"""Whether a student, its tokenizer and a data set fit a cache, found before the first step.

One idea: whatever would be wrong in silence is asked of the objects themselves: of the tokenizer,
of the rows of a data set. What a trainer and its settings must be is in `settings`. Nothing is
trained here.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import Any

import numpy as np

from stillroom.cache_schemas.errors import StillroomError, StudentError
from stillroom.pipeline.corpus.tokenizer import facts_of_tokenizer, tokenizer_facts
from stillroom.pipeline.data.batch import NO_LABEL
from stillroom.pipeline.objectives.weighting import Term
from stillroom.pipeline.student.skeleton import positions_of
from stillroom.pipeline.student.states import check_head_rows
from stillroom.pipeline.training.run import check_tokenizer

EXAMPLE = "example"
"""Column of a data set: the number of each row's record in the main cache."""

CACHE = "cache_digest"
"""Column that says which cache the numbers are of; what `dataset_of` makes has it."""

COLUMNS = (EXAMPLE, CACHE, "input_ids")
"""What is read of every row."""

MAKE = (
    "make it with stillroom.hf.dataset_of(CachedDataset(cache)), and select, filter or shuffle that"
)

MASKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "labels": lambda labels: labels != NO_LABEL,
    "completion_mask": lambda mask: mask != 0,
    "assistant_masks": lambda mask: mask != 0,
}
"""Columns with which other trainers are told what to learn -> bool, the tokens that are meant."""

GIVE_TOKENIZER = (
    "Give processing_class = the teacher's tokenizer, where AutoTokenizer makes another class of "
    "the student's files. "
)
LOOKED_AT = 64
"""Rows of a data set whose tokens are compared before the first step; the others when read."""


def bare(model: Any) -> Any:
    """The model of transformers inside PEFT's; an adapter on its head is read with it.

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
    from stillroom.pipeline.student.lora import check_adapted_head, read_with_adapter

    read_with_adapter(model.get_base_model())
    check_adapted_head(model.get_base_model())
    return model.get_base_model()


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
    own = _facts(model, getattr(tokenizer, "tokenizer", tokenizer), where)
    head = model.get_output_embeddings().weight.shape[0]
    check_head_rows(head, own["vocab_size"], where)
    check_tokenizer(own, caches, where, GIVE_TOKENIZER)
    limit, fixed = positions_of(model)
    if limit and fixed and longest > limit:
        raise StudentError(
            f"examples of {longest} tokens for a student made for {limit} positions",
            where=where,
            remedy="Capture shorter windows, or take a student with more positions.",
        )


def _facts(model: Any, tokenizer: Any, where: str) -> dict[str, Any]:
    if tokenizer is not None:
        return facts_of_tokenizer(tokenizer)
    try:
        return tokenizer_facts(where)
    except StillroomError as error:
        raise StudentError(
            f"there is no tokenizer to compare with the cache's ({error.found})",
            where=where,
            remedy="Give processing_class = the student's tokenizer.",
        ) from None


def check_terms(terms: Sequence[Term]) -> None:
    """Refuse objectives that a trainer of others would compute wrongly or save in part.

    Raises:
        StudentError: naming the objective and where it is served.
    """
    for term in terms:
        if term.spec.unit == "image":
            raise StudentError(
                f"objective {term.label} brings task tokens, which a trainer's checkpoints leave "
                "out",
                where="objectives",
                remedy="Use `stillroom train`, which keeps them beside the student.",
            )
        if term.needs.teacher_head and term.table.cache:
            raise StudentError(
                f"objective {term.label} reads the head of a further cache's teacher",
                expected="the main cache's",
                where="objectives",
                remedy="Give that cache as cache, and the other one by name.",
            )


def check_dataset(dataset: Any, data: Any) -> None:
    """Refuse a data set that is not about the cache's examples.

    Args:
        dataset: of `datasets`, map-style.
        data: the `CachedDataset`.

    Raises:
        StudentError: it lacks the column `example`, or its tokens are another example's.
    """
    if not hasattr(dataset, "column_names") or not hasattr(dataset, "__len__"):
        raise StudentError(
            f"the data set is a {type(dataset).__name__}",
            expected="a datasets.Dataset: rows that have numbers",
            where="train_dataset",
            remedy="Leave train_dataset out, or build one with Dataset.from_list(list(...)). A "
            "CachedDataset is given as cache.",
        )
    if EXAMPLE not in (dataset.column_names or ()):
        raise StudentError(
            f"the data set has no column '{EXAMPLE}'",
            where="train_dataset",
            remedy=f"Leave train_dataset out, and the cache's own examples are taken; or {MAKE}. "
            "Where the trainer dropped the column, set remove_unused_columns = False.",
        )
    if not len(dataset):
        raise StudentError("the data set is empty", where="train_dataset")
    main, digest = data.sources[""], data.digest
    for row in np.unique(np.linspace(0, len(dataset) - 1, LOOKED_AT).astype(int)):
        one = dataset[int(row)]
        record = main.read(_number(one, len(data)), ())
        check_rows([one], [record], digest, f"row {row}")
        _check_masks(one, record.example.loss_mask, f"row {row}")


def _check_masks(row: Mapping[str, Any], learned: np.ndarray, where: str) -> None:
    """Refuse a row that says what is to be learned, and says something else than the cache."""
    for name, meant in MASKS.items():
        if row.get(name) is None:
            continue
        said = meant(np.asarray(row[name]))
        if said.shape != learned.shape or (said[1:] != learned[1:]).any():  # none predicts token 0
            raise StudentError(
                f"{where}: its {name} do not mark the tokens under the cache's loss mask",
                expected=f"{int(learned[1:].sum())} of {len(learned)} tokens, those that the "
                "corpus was prepared to teach",
                where="train_dataset",
                remedy=f"dataset.remove_columns('{name}'), and the cache's mask is followed; to "
                "learn other tokens, prepare and capture with another mask.",
            )


def check_kept(trainer: Any, collator: type) -> None:
    """Refuse a trainer that would drop the column of numbers, or collates by itself.

    Args:
        trainer: made, with the data set that it was given.
        collator: what it was given to collate with.

    Raises:
        StudentError: naming what to set.
    """
    trainer._set_signature_columns_if_needed()
    if trainer.args.remove_unused_columns and EXAMPLE not in trainer._signature_columns:
        raise StudentError(
            f"the trainer would drop the column '{EXAMPLE}'",
            where=type(trainer).__name__,
            remedy="Set remove_unused_columns = False.",
        )
    strategy = getattr(trainer.args, "train_sampling_strategy", "")
    column = trainer.args.length_column_name
    by_length = strategy in ("group_by_length", "batch_rebalance")
    if by_length and column not in trainer.train_dataset.column_names:
        raise StudentError(
            f"train_sampling_strategy = '{strategy}' with a data set that has no column '{column}'",
            where="train_dataset",
            remedy=f"dataset.add_column('{column}', CachedDataset(cache).lengths[dataset"
            f"['{EXAMPLE}']]), or make it with stillroom.hf.dataset_of.",
        )
    if not isinstance(trainer.data_collator, collator):
        raise StudentError(
            f"the trainer took a {type(trainer.data_collator).__name__} for its collator",
            expected=f"the cache's {collator.__name__}",
            where=type(trainer).__name__,
            remedy="Have its __init__ keep the data_collator that it is given.",
        )


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
    try:
        number = index(row[EXAMPLE])
    except TypeError:
        raise StudentError(
            f"{EXAMPLE} = {row[EXAMPLE]!r}",
            expected="a whole number",
            where="train_dataset",
            remedy="Make the column of whole numbers, none of them missing.",
        ) from None
    if not 0 <= number < count:
        raise StudentError(
            f"{EXAMPLE} = {number}", expected=f"0 to {count - 1}", where="train_dataset"
        )
    return number


def order_of(dataset: Any) -> str:
    """What a data set's rows are, in their order: sha256 over the numbers of their records."""
    numbers = np.fromiter(map(index, dataset[EXAMPLE]), dtype=np.int64, count=len(dataset))
    return hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()


def check_rows(
    rows: Sequence[Mapping[str, Any]], records: Sequence[Any], digest: str, where: str
) -> None:
    """Refuse rows whose `input_ids` are not those of their records, or whose numbers are another
    cache's; and rows that say neither: a number alone may be that of a row of another list of texts
    (a filtered one, say), and what the trainer would learn from is not what stands beside it.

    Args:
        rows: of a data set.
        records: that they name.
        digest: of the cache.
        where: a row, for messages.

    Raises:
        StudentError: a row is about another text or cache, or was cut.
    """
    for row, record in zip(rows, records, strict=True):
        if row.get(CACHE, digest) != digest:
            raise StudentError(
                f"{where}: its number is of the cache {row[CACHE][:12]}",
                expected=f"numbers of {digest[:12]}, the cache (or joined caches) of the trainer",
                where="train_dataset",
                remedy="Of the same cache = that the trainer is given, " + MAKE + ".",
            )
        if "input_ids" not in row and CACHE not in row:
            raise StudentError(
                f"{where}: its number {row[EXAMPLE]} stands beside nothing of the cache",
                expected=f"input_ids, which are compared with the record's, or {CACHE}",
                where="train_dataset",
                remedy=f"Leave train_dataset out, or {MAKE}.",
            )
        if "input_ids" not in row:
            continue
        given, kept = np.asarray(row["input_ids"]), record.example.token_ids
        if len(given) != len(kept) or (given != kept).any():
            raise StudentError(
                f"{where}: its input_ids are not those of record {row[EXAMPLE]} "
                f"({len(given)} and {len(kept)} tokens)",
                expected="the tokens that the teacher was asked about, whole and in their order",
                where="train_dataset",
                remedy=f"Leave train_dataset out, or {MAKE}.",
            )
