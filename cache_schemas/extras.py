"""Packages that only some people need.

One idea: each belongs to an extra of this project, and who lacks one is told which. It installs
nothing.
"""

from importlib import import_module
from typing import Any

from stillroom.cache_schemas.errors import ConfigError, first_line


def extra_package(name: str, extra: str, where: str) -> Any:
    """The module `name`, as `import` gives it.

    Args:
        name: with dots, as in an import.
        extra: the project's extra that brings it.
        where: the flag or table that asks for it.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{name.partition('.')[0]} cannot be imported ({first_line(error)})",
            where=where,
            remedy=f"Install it with pip install 'stillroom[{extra}]'.",
        ) from None
