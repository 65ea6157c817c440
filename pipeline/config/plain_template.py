"""Texts with named places, such as "{title} ({year})", that a run file may give.

One idea: a place is a name and nothing else, so what stands in it is put there letter by letter and
never looked into: a title may hold braces. `{{` and `}}` stand for braces. It knows no names.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from string import Formatter


@dataclass(frozen=True, slots=True)
class PlainTemplate:
    """A text with named places.

    Attributes:
        parts: (text, name of the place behind it); the last name is "" where text ends it.
    """

    parts: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, text: str, known: Iterable[str]) -> "PlainTemplate":
        """Read a template.

        Args:
            known: names that may stand in it.

        Raises:
            ValueError: a brace stands alone, or a place is something else than a known name.
        """
        names, parts = list(known), []
        for before, name, form, conversion in _pieces(text):
            if name is not None and (name not in names or form or conversion):
                shown = "{" + name + (f"!{conversion}" if conversion else "")
                shown += (f":{form}" if form else "") + "}"
                listed = ", ".join("{" + one + "}" for one in names)
                raise ValueError(f"{text!r} has {shown}, and only {listed} can stand in it")
            parts.append((before, name or ""))
        return cls(tuple(parts))

    def count(self, name: str) -> int:
        """How often a place is there."""
        return sum(place == name for _, place in self.parts)

    def fill(self, values: Mapping[str, str]) -> str:
        """The text with values in its places."""
        return "".join(text + (values[name] if name else "") for text, name in self.parts)

    def around(self, name: str) -> tuple[str, str]:
        """What stands before and behind the only place that has this name."""
        at = next(n for n, (_, place) in enumerate(self.parts) if place == name)
        before = PlainTemplate((*self.parts[:at], (self.parts[at][0], "")))
        return before.fill({}), PlainTemplate(self.parts[at + 1 :]).fill({})


def _pieces(text: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}; a brace that is meant is written twice") from None
