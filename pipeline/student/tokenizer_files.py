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
CODE = "tokenizer_kept.py"
_CODE = """# tokenizer.json as it is: the class that transformers has for this model's type ignores
# parts of it. Loaded with trust_remote_code=True this is used; else transformers' plain class.
from transformers import PreTrainedTokenizerFast


class KeptTokenizer(PreTrainedTokenizerFast):
    pass
"""


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
    for mend in (_leave, _write_plain, _name_a_class):
        mend(source, directory)
        found = tokenizer_facts(str(directory))
        if found == wanted:
            return
    key = next(key for key in wanted if found[key] != wanted[key])
    raise StudentError(
        f"beside this student transformers makes another tokenizer: {key} is {found[key]}",
        expected=f"{wanted[key]} as the teacher's",
        where=str(directory),
        remedy="Take a student of the teacher's architecture, for example init = 'prune_layers'.",
    )


def _leave(_source: Path, _directory: Path) -> None:
    """The files as they were copied."""


def _write_plain(source: Path, directory: Path) -> None:
    """What the teacher's tokenizer does, as one file, for the class that takes it as it is."""
    from transformers import AutoTokenizer

    for path in [path for pattern in READ_BY_OTHERS for path in directory.glob(pattern)]:
        path.unlink()
    plain = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    plain.save_pretrained(directory)
    _set(directory, {"tokenizer_class": PLAIN_CLASS})


def _name_a_class(_source: Path, directory: Path) -> None:
    """Some model types override the class that is named (transformers holds what the hub has to be
    wrong), but not where the directory brings a class of its own."""
    (directory / CODE).write_text(_CODE)
    _set(directory, {"auto_map": {"AutoTokenizer": [None, f"{Path(CODE).stem}.KeptTokenizer"]}})


def _set(directory: Path, changes: dict) -> None:
    settings = json.loads((directory / SETTINGS).read_text()) | changes
    (directory / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
