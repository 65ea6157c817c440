"""Which reader takes a foreign source.

One idea: choosing one stands above all of them. It reads nothing itself.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.config.strict import nearest
from stillroom.pipeline.doors import axolotl_rows, distillkit_files, json_answers, words
from stillroom.pipeline.doors.foreign_answer import Reader

FORMS = ("axolotl", "distillkit", "prompt_logprobs", "top_logprobs")


class Source(NamedTuple):
    """How a source is read.

    Attributes:
        read: from its beginning.
        lossy: by how much its probabilities may exceed 1.
        vocab_size: columns of the softmax, where the format says; else 0.
    """

    read: Reader
    lossy: float = 0.0
    vocab_size: int = 0


def source_of(form: str, source: Path, tokenizer: str, config: str = "") -> Source:
    """What reads a source.

    Args:
        form: one of `FORMS`.
        source: file or directory.
        tokenizer: HF directory or hub id; read for words where a format has no ids.
        config: DistillKit's YAML, where it does not lie beside the files.

    Raises:
        ConfigError: no such format, or a YAML that is none.
        CacheError: there is no such source.
    """
    if form not in FORMS:
        raise ConfigError(
            f"no format '{form}'",
            expected=f"one of {', '.join(FORMS)}",
            where="--from",
            remedy=nearest(form, FORMS),
        )
    if form == "distillkit":
        directory = source.parent if source.is_file() else source
        settings = distillkit_files.read_settings(directory, config)
        exact = settings is None or settings.exact
        read = partial(distillkit_files.read_distillkit, source, settings)
        lossy = 0.0 if exact else distillkit_files.LOSSY
        return Source(read, lossy, settings.d if settings else 0)
    if config:
        raise ConfigError(
            f"--config with --from {form}", where="--config", remedy="It is of distillkit alone."
        )
    from stillroom.pipeline.corpus.tokenizer import load_tokenizer

    read = {
        "axolotl": axolotl_rows.read_axolotl,
        "prompt_logprobs": json_answers.read_prompt_logprobs,
        "top_logprobs": json_answers.read_top_logprobs,
    }[form]
    return Source(partial(read, source, words.Words(load_tokenizer(tokenizer))))


def columns_of(source: Source, told: int) -> int:
    """Columns of the teacher's softmax; 0 where neither the person nor the format says.

    Raises:
        ConfigError: both say, and not the same.
    """
    if told and source.vocab_size and told != source.vocab_size:
        raise ConfigError(
            f"{told} columns, and the files were written for {source.vocab_size}",
            where="--vocab-size",
            remedy="Leave --vocab-size out, or correct d in the compression YAML.",
        )
    return told or source.vocab_size
