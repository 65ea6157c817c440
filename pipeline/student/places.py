"""Where a student lies on disk, as far as the names of files say.

One idea: whether a student is there is asked before anything is loaded, so no torch is needed.
What is in the files is `loading`'s.
"""

import json
from pathlib import Path

ADAPTER = "adapter_config.json"
"""File by which PEFT and transformers know an adapter."""
BASE = "base_model_name_or_path"
"""Key of that file: the model that the adapter belongs to."""


def is_model(directory: Path) -> bool:
    """True where `load` finds a model or an adapter."""
    return any((directory / name).is_file() for name in ("config.json", ADAPTER))


def plain_model(directory: str | Path) -> str:
    """Where the config lies: in the directory, or in that of the model that its adapter names."""
    if not is_adapter(directory):
        return str(directory)
    return json.loads((Path(directory) / ADAPTER).read_text())[BASE]


def is_adapter(directory: str | Path) -> bool:
    """True where it holds what was trained of a model, and names that model."""
    return (Path(directory) / ADAPTER).is_file()
