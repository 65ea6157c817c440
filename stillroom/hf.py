"""Trainers of transformers and TRL on a cache: `pip install 'stillroom[hf]'`.

One idea: a name is loaded when it is first asked for, so that transformers' Trainer needs no TRL.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stillroom.pipeline.doors.axolotl_plugin import AxolotlArguments, AxolotlPlugin
    from stillroom.pipeline.doors.collator import CachedCollator, dataset_of
    from stillroom.pipeline.doors.mixin import CachedDistillationMixin
    from stillroom.pipeline.doors.sft import CachedSFTTrainer
    from stillroom.pipeline.doors.swift_plugin import distil_in_swift
    from stillroom.pipeline.doors.trainers import CachedTrainer

__all__ = [
    "AxolotlArguments",
    "AxolotlPlugin",
    "CachedCollator",
    "CachedDistillationMixin",
    "CachedSFTTrainer",
    "CachedTrainer",
    "dataset_of",
    "distil_in_swift",
]

HOMES = {
    "AxolotlArguments": "axolotl_plugin",
    "AxolotlPlugin": "axolotl_plugin",
    "CachedCollator": "collator",
    "CachedDistillationMixin": "mixin",
    "CachedSFTTrainer": "sft",
    "CachedTrainer": "trainers",
    "dataset_of": "collator",
    "distil_in_swift": "swift_plugin",
}

THEIRS = "Install stillroom into its environment: runbooks/84-axolotl-and-ms-swift.md."
REMEDIES = {"axolotl": THEIRS, "swift": THEIRS} | dict.fromkeys(
    ("trl", "datasets", "accelerate"), "pip install 'stillroom[hf]'."
)


def __getattr__(name: str):
    if name not in HOMES:
        raise AttributeError(f"module 'stillroom.hf' has no attribute {name!r}")
    try:
        value = getattr(import_module(f"stillroom.pipeline.doors.{HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name not in REMEDIES:
            raise
        from stillroom.cache_schemas.errors import ConfigError

        raise ConfigError(
            f"{error.name} is not installed",
            where=f"stillroom.hf.{name}",
            remedy=REMEDIES[error.name],
        ) from None
    except ImportError as error:  # a package is there, and lacks what is asked of it
        from stillroom.cache_schemas.errors import ConfigError, first_line

        raise ConfigError(
            f"the installed versions do not go together ({first_line(error)})",
            where=f"stillroom.hf.{name}",
            remedy="pip install 'stillroom[hf]'.",
        ) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *HOMES])
