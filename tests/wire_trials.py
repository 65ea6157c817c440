"""Trials of a wire that lies: a verb of the command line, one fault, and a judgement.

One idea: whatever is answered, the verb ends with the right bytes or with one message and nothing
wrong left behind. The real commands run, in this process, with less patience.
"""

import contextlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import fsspec.config

from stillroom.cache_schemas import layout
from stillroom.pipeline.cache.care.verification import verify
from stillroom.pipeline.cache.storage import bucket, web
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from stillroom.stages.__main__ import run
from tests.cache_trials import contents
from tests.services import Proxy, s3_options
from tests.wire_faults import FAULTS, Fault

When = Callable[[int, str, str], bool]
GRACE_SECONDS = 1.0


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Stillroom with a second for an answer, and none between attempts."""
    before = (bucket.GRACE_SECONDS, bucket.PATIENCE_SECONDS, bucket.BucketStorage.__init__)
    bucket.GRACE_SECONDS = web.GRACE_SECONDS = GRACE_SECONDS
    bucket.PATIENCE_SECONDS = 3 * GRACE_SECONDS
    opened = before[2]

    def open_without_pauses(self, url, options=None, pause=lambda seconds: None):
        opened(self, url, options, pause)

    bucket.BucketStorage.__init__ = open_without_pauses
    try:
        yield
    finally:
        bucket.GRACE_SECONDS = web.GRACE_SECONDS = before[0]
        bucket.PATIENCE_SECONDS, bucket.BucketStorage.__init__ = before[1:]


def first_of_every_file() -> When:
    """The first request of every path and verb."""
    seen: set[tuple[str, str]] = set()

    def ask(number: int, verb: str, path: str) -> bool:
        is_new = (verb, path) not in seen
        seen.add((verb, path))
        return is_new

    return ask


def always() -> When:
    """Every request."""
    return lambda number, verb, path: True


def rows_of_one_shard() -> When:
    """Every request for the rows of shard 1."""
    return lambda number, verb, path: layout.rows(1) in path


WHEN = {
    "the first answer of every file": first_of_every_file,
    "every answer": always,
    "every answer for one file": rows_of_one_shard,
}


def inject(proxy: Proxy, made: Fault | str, when: When) -> None:
    """Let the proxy misbehave."""
    proxy.requests.clear()
    proxy.fault = lambda number, verb, path: made if when(number, verb, path) else None


def stillroom(*arguments: str | Path) -> tuple[int | None, str]:
    """Exit code and stderr of a command; None and the error where it would be a traceback."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = run([str(argument) for argument in arguments])
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"
    return code, told.getvalue()


def judged(code: int | None, told: str) -> str:
    """`healed` or `refused`.

    Raises:
        AssertionError: a traceback, or not one message.
    """
    assert code is not None, told
    if code == 0:
        return "healed"
    assert code in (2, 3), (code, told)
    assert told.count("error: ") == 1, told
    assert "Traceback" not in told, told
    return "refused"


def pulled(proxy: Proxy, original: dict[str, bytes], folder: Path) -> tuple[str, str]:
    """Pull through the proxy into `folder/target`; outcome and what was said."""
    target, beside = folder / "target", folder / "beside"
    beside.write_text("mine")
    code, told = stillroom("cache", "pull", f"http://{proxy.address}", target)
    outcome = judged(code, told)
    found = contents(target) if target.exists() else {}
    if outcome == "healed":
        bound = {name: data for name, data in original.items() if name != "README.md"}
        assert {name: data for name, data in found.items() if name != "README.md"} == bound
    else:
        assert layout.MANIFEST not in found
        assert all(data == original[name] for name, data in found.items()), sorted(found)
    assert sorted(p.name for p in folder.iterdir() if p != target) == ["beside"]
    return outcome, told


def pushed(proxy: Proxy, cache: Path, share: Path, number: int) -> tuple[str, str]:
    """Push through the proxy to a bucket whose files lie in `share`."""
    fsspec.config.conf["s3"] = s3_options(proxy.address) | {"skip_instance_cache": True}
    code, told = stillroom("cache", "push", cache, f"s3://bucket/{number}")
    outcome = judged(code, told)
    found = contents(share / "bucket" / str(number)) if (share / "bucket").exists() else {}
    original = contents(cache)
    if outcome == "healed":
        assert found == original
        assert not verify(DirectoryStorage(share / "bucket" / str(number))).problems
    else:
        assert all(data == original[name] for name, data in found.items()), sorted(found)
    return outcome, told


def trained(proxy: Proxy, write_run: Callable[[str, Path], Path], folder: Path, near: list[float]):
    """Train through the proxy; the losses are those of training from the disk."""
    file = write_run(f"http://{proxy.address}", folder)
    code, told = stillroom("train", file)
    outcome = judged(code, told)
    if outcome == "healed":
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["loss"] for line in lines] == near
    return outcome, told


TRIES = 4
"""Of a trial that gave up before it asked anything: a busy machine outlasts a second's patience."""


def campaign(proxy: Proxy, trial: Callable[[int, Path], tuple[str, str]], folder: Path) -> dict:
    """Every fault at every time; what came of each, and how long the longest took."""
    found, failed, longest, number = {}, [], 0.0, 0
    for name, made in FAULTS.items():
        for when, ask in WHEN.items():
            for _ in range(TRIES):
                number += 1
                began = time.perf_counter()
                inject(proxy, made, ask())
                outcome, told = _tried(trial, number, folder)
                longest = max(longest, time.perf_counter() - began)
                if proxy.requests:
                    break
            else:
                outcome = "not asked"
            if outcome == "failed":
                failed.append(f"{name}, {when}: {told}")
            found.setdefault(name, {})[when] = outcome
            if os.environ.get("STILLROOM_TRIALS_SAY"):
                print(f"{time.perf_counter() - began:6.1f} s {outcome}: {name}, {when}", told[:300])
    counts = [outcome for times in found.values() for outcome in times.values()]
    return {
        "trials": len(counts),
        "faults": len(FAULTS),
        "healed": counts.count("healed"),
        "refused_with_one_message": counts.count("refused"),
        "not_asked": counts.count("not asked"),
        "failed": failed,
        "longest_seconds": round(longest, 1),
        "outcomes": found,
    }


def _tried(
    trial: Callable[[int, Path], tuple[str, str]], number: int, folder: Path
) -> tuple[str, str]:
    place = folder / str(number)
    place.mkdir()
    try:
        return trial(number, place)
    except AssertionError as error:
        return "failed", str(error)[:600]
    finally:
        shutil.rmtree(place, ignore_errors=True)
