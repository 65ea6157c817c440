"""Which reader takes a foreign source.

One idea: choosing one stands above all of them. It reads nothing itself.
"""

from functools import partial
from pathlib import Path

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.config.strict import nearest
from stillroom.pipeline.doors import axolotl_rows, distillkit_files, json_answers
from stillroom.pipeline.doors.foreign import Reader

FORMS = ("axolotl", "distillkit", "prompt_logprobs", "top_logprobs")


def source_of(form: str, source: Path, tokenizer: str, config: str = "") -> tuple[Reader, float]:
    """What reads a source, and by how much its probabilities may exceed 1.

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
        lossy = 0.0 if exact else distillkit_files.LOSSY
        return partial(distillkit_files.read_distillkit, source, settings), lossy
    if form == "prompt_logprobs":
        return partial(json_answers.read_prompt_logprobs, source), 0.0
    from stillroom.pipeline.corpus.tokenizer import load_tokenizer

    words = json_answers.Words(load_tokenizer(tokenizer))
    read = axolotl_rows.read_axolotl if form == "axolotl" else json_answers.read_top_logprobs
    return partial(read, source, words), 0.0
