"""`stillroom cache import | export`: caches from and for other programs.

One idea: both read the whole of what they are given and leave either all of it or nothing; what
they made is named on stdout.
"""

from pathlib import Path
from typing import Annotated

import typer

from stillroom.cache_schemas.errors import ConfigError
from stillroom.stages.cache.arguments import Cache, location
from stillroom.stages.console import progress, put, say, warn


def import_(
    source: Annotated[Path, typer.Argument(help="File or directory.", metavar="SOURCE")],
    target: Annotated[str, typer.Argument(help="Directory or URL.", metavar="TARGET")],
    form: Annotated[
        str,
        typer.Option("--from", help="axolotl, distillkit, prompt_logprobs (vLLM), top_logprobs."),
    ],
    teacher: Annotated[str, typer.Option(help="Name of the teacher; nothing vouches for it.")],
    tokenizer: Annotated[str, typer.Option(help="The teacher's tokenizer: directory or hub id.")],
    vocab_size: Annotated[
        int, typer.Option(min=0, help="Columns of its softmax; 0: the tokenizer's size.")
    ] = 0,
    config: Annotated[str, typer.Option(help="DistillKit's compression YAML.")] = "",
    examples_per_shard: Annotated[int, typer.Option(min=1, help="Size of the shards.")] = 64,
) -> None:
    """A sealed cache of top-k answers that another program kept."""
    from stillroom.pipeline.doors.foreign import Origin, import_answers
    from stillroom.pipeline.doors.sources import columns_of, source_of

    found = source_of(form, source, tokenizer, config)
    origin = Origin(form, teacher, tokenizer, columns_of(found, vocab_size), found.lossy)
    with progress("import", "shards") as report:
        made = import_answers(found.read, origin, target, examples_per_shard, report)
    if again := made.plan["engine"]["texts_given_again"]:
        say(f"{again:,} texts stood there again with like answers; the first is kept")
    if not made.plan["engine"]["own_tokens_likelier"]:
        warn(
            "warning: nothing shows that the lists are about the tokens they stand at: they give "
            "these hardly more than their neighbours, or are too few to tell"
        )
    put(target)


def export(
    cache: Cache,
    target: Annotated[str, typer.Argument(help="A new directory.", metavar="TARGET")],
    form: Annotated[
        str, typer.Option("--to", help="parquet, jsonl, distillkit, speculators, safetensors.")
    ],
) -> None:
    """The examples of a cache in another program's format."""
    from stillroom.pipeline.cache.reader import TeacherCache
    from stillroom.pipeline.doors.leaving import export

    opened = TeacherCache.open(location(cache))
    if "catalogue" in opened.plan.facts["capture"]:
        raise ConfigError("is about items", where=str(cache), expected="a cache of texts")
    with progress("export", "examples") as report:
        export(opened, target, form, report)
    put(target)
