"""The teacher's tokenizer beside a student, whatever architecture the student has.

One idea: transformers chooses a tokenizer's class by the model's type, so the same files may be
read another way beside another model. What was copied is loaded where it lies and compared; where
it behaves otherwise it is written once more under the class that takes a tokenizer as it is.
"""

import json
import shutil
from pathlib import Path

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.corpus.tokenizer import tokenizer_facts

FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
SETTINGS = "tokenizer_config.json"
PLAIN_CLASS = "TokenizersBackend"
"""The class that reads `tokenizer.json` and adds nothing of its own."""
READ_BY_OTHERS = ("vocab.*", "merges.txt", "*.model")
"""Files from which an architecture's own class would build another tokenizer."""


def keep_tokenizer(source: Path, directory: Path) -> None:
    """Put the tokenizer of `source` into a directory that holds a model.

    Raises:
        StudentError: beside this model transformers makes another tokenizer of it.
    """
    copied = [path for pattern in FILES for path in source.glob(pattern)]
    for path in copied:
        shutil.copyfile(path, directory / path.name)
    if not any(path.name.startswith("tokenizer") for path in copied):
        return
    wanted = tokenizer_facts(str(source))
    if tokenizer_facts(str(directory)) == wanted:
        return
    _write_as_it_is(source, directory)
    found = tokenizer_facts(str(directory))
    for key, value in wanted.items():
        if found[key] != value:
            raise StudentError(
                f"beside this student transformers makes another tokenizer: {key} {found[key]}",
                expected=f"{value} as the teacher's",
                where=str(directory),
                remedy="Take a student of the teacher's architecture (init = 'prune_layers').",
            )


def _write_as_it_is(source: Path, directory: Path) -> None:
    from transformers import AutoTokenizer

    for path in [path for pattern in READ_BY_OTHERS for path in directory.glob(pattern)]:
        path.unlink()
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    settings = json.loads((directory / SETTINGS).read_text())
    settings["tokenizer_class"] = PLAIN_CLASS
    (directory / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
