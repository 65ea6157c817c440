"""A directory that is replaced by one rename, behind a symbolic link too.

One idea: what is new is written beside the place where the files really are, so the rename stays on
one disk and a link stays the link that it is; what a killed process left there is put right before
anything is written. What a directory holds is not known here.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from stillroom.cache_schemas.errors import StudentError


@dataclass(frozen=True, slots=True)
class Replacing:
    """A place and its two neighbours.

    Attributes:
        directory: where the files are, or will be; no link.
        staging: where they are written first.
        old: where those before them are for the moment of the swap.
    """

    directory: Path
    staging: Path
    old: Path

    @classmethod
    def of(cls, asked: Path) -> "Replacing":
        """Ready to write: nothing lies in `staging`, and what an interruption left is put right.

        Raises:
            StudentError: nothing can be written beside the place that a link names.
        """
        _beside(asked, "").put_right()
        if not asked.is_symlink():
            return _beside(asked, "")
        # On another person's disk a plain "student.old" may be theirs.
        real = _beside(asked.resolve(), ".stillroom")
        real.put_right()
        try:
            real.staging.mkdir(parents=True)
        except OSError as error:
            raise _not_there(asked, real.directory, error) from None
        return real

    def put_right(self) -> None:
        """Clear what a killed process left; a directory that it had only moved away comes back."""
        if not _is_there(self.directory) and _is_there(self.old):
            self.old.rename(self.directory)
        _remove(self.old)
        _remove(self.staging)

    def swap(self) -> None:
        """Put what was written in its place.

        Raises:
            StudentError: what is there cannot be moved away; it stays.
        """
        if self.directory.exists():
            try:
                self.directory.rename(self.old)
            except OSError as error:  # such as a whole disk, which cannot be renamed
                _remove(self.staging)
                raise _not_there(self.directory, self.directory, error) from None
        self.staging.rename(self.directory)
        _remove(self.old)


def _beside(directory: Path, ending: str) -> Replacing:
    name = directory.name + ending
    staging, old = (directory.with_name(f"{name}.{what}") for what in ("tmp", "old"))
    return Replacing(directory, staging, old)


def _is_there(path: Path) -> bool:
    """True for a link whose target is gone, too."""
    return path.is_symlink() or path.exists()


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _not_there(asked: Path, real: Path, error: OSError) -> StudentError:
    return StudentError(
        f"no student can be put into {real} ({error.strerror})",
        expected="a directory that can be renamed, in one that can be written to",
        where=str(asked),
        remedy="Let it be a link to such a directory, for example a new one on the same disk, and "
        "run the same command again.",
    )
