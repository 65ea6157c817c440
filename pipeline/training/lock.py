"""One training at a time in a run's directory, or one making of its student.

One idea: two processes that write the same curves and checkpoints leave neither, so the first holds
a lock that goes with its process, and the second is told. Where a file system has no locks nobody
is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.cache.storage.directory import Claim, DirectoryStorage
from stillroom.pipeline.training.parallel import Parallel

FILE = "training.lock"


@contextmanager
def exclusive(directory: Path, parallel: Parallel) -> Iterator[None]:
    """Within it no other training may start in this directory.

    Raises:
        StudentError: another process trains here.
    """
    held: list[Claim] = []

    def take() -> None:
        claim = DirectoryStorage(directory).claim(FILE)
        if claim is None:
            raise StudentError(
                "another process is training here, or makes its student",
                where=str(directory),
                remedy="Wait for it, or give this run another directory.",
            )
        held.append(claim)

    parallel.together(take)
    try:
        yield
    finally:
        for claim in held:
            claim.release()
