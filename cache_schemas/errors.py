"""The errors a person may meet, and the exit code each one means.

One idea: an error says what was found, what was expected, where, and what to do about it, and
never holds a credential, whoever prints or keeps it. Programming mistakes are not here: those stay
ordinary Python exceptions with a traceback.
"""

from stillroom.cache_schemas.scrubbing import scrub

EXIT_USER_ERROR = 2
EXIT_INCOMPLETE = 3


LONGEST = 300
"""Letters of another library's message that are told."""


def first_line(error: BaseException) -> str:
    """The first line of any exception that says something, and what it announces; or its name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or isinstance(error, KeyError):  # a key alone says nothing
        lines = [": ".join([type(error).__name__, *lines])]
    told = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return told[:LONGEST]


class StillroomError(Exception):
    """A mistake in the input or the surroundings that a person can put right.

    Args:
        found: what is wrong, in one clause.
        expected: what would have been right.
        where: the file, key, example or argument that holds the mistake.
        remedy: what to do next, as an imperative sentence.
    """

    exit_code = EXIT_USER_ERROR

    def __init__(self, found: str, *, expected: str = "", where: str = "", remedy: str = ""):
        self.found, self.expected = scrub(found), scrub(expected)
        self.where, self.remedy = scrub(where), scrub(remedy)
        super().__init__(self._sentence())

    def _sentence(self) -> str:
        text = f"{self.where}: {self.found}" if self.where else self.found
        if self.expected:
            text += f"; expected {self.expected}"
        if self.remedy:
            text += f". {self.remedy}"
        return text


class ConfigError(StillroomError):
    """A TOML file or a flag that cannot mean what it says."""


class CorpusError(StillroomError):
    """Source text, images or a prepared corpus that cannot be used."""


class TeacherError(StillroomError):
    """A teacher that cannot be loaded, served or trusted."""


class StudentError(StillroomError):
    """A student, checkpoint or objective that does not fit the cache."""


class CacheError(StillroomError):
    """A cache that cannot be read as what it claims to be."""


class PlanMismatch(CacheError):
    """Two identities that must be equal are not (teacher, tokenizer, corpus, plan)."""


class ShardCorrupt(CacheError):
    """Bytes of a finished shard are not the bytes its receipt names."""


class FormatTooNew(CacheError):
    """A manifest, receipt or record of a format version this release cannot read."""


class CacheMissing(CacheError):
    """There is no cache where one is named."""


class CacheIncomplete(CacheError):
    """Shards are still missing; the same command run again continues."""

    exit_code = EXIT_INCOMPLETE
