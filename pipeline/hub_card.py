"""A card of the hub (YAML in front of Markdown) that a person may have changed, read or refused.

One idea: what a person wrote is never guessed at: a card that the hub's own library cannot read is
an error with its place. What cards say is written elsewhere.
"""

from typing import Any

from stillroom.cache_schemas.errors import CacheError, first_line


def card_of(kind: type, data: bytes, where: str) -> Any:
    """A card by the hub's own library.

    Args:
        kind: `ModelCard` or `DatasetCard`.
        data: the file.
        where: the file, for messages.

    Raises:
        CacheError: it cannot be read.
    """
    from yaml import YAMLError

    try:
        return kind(data.decode(), ignore_metadata_errors=True)
    except (YAMLError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CacheError(
            f"the card cannot be read ({first_line(error)})",
            expected="YAML between two lines of ---, then Markdown, all of it UTF-8",
            where=where,
            remedy="Mend the card, or delete it, and run the same command again.",
        ) from None
