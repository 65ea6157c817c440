"""A wire that lies: every fault of `tests/wire_faults.py` on pull, on training from a URL, on push.

    python -m benchmarks.cache_wire --json

Each fault is tried on the first answer of every file, on every answer, and on every answer for one
file. The verb must end with the right bytes (pull: the files; train: the losses of training from
the disk; push: the files in the bucket), or with one message, exit code 2 or 3, no traceback, no
manifest, nothing wrong and nothing outside the target. Needs rclone, and a second or two per trial:
stillroom is made impatient, a second for an answer instead of sixty.
"""

import json
import tempfile
from pathlib import Path

from benchmarks import needs
from benchmarks.cache_trial import asking, publish
from tests import memory_cache, run_texts, tiny_models, wire_trials
from tests.cache_trials import contents, small_plan
from tests.services import ACCESS_KEY, SECRET_KEY, Proxy, rclone
from tests.synthetic_records import write_cache


def pulls(folder: Path, cache: Path) -> dict:
    """Every fault on pull."""
    original = contents(cache)
    with rclone("http", cache) as server, Proxy(server) as proxy:
        return wire_trials.campaign(
            proxy, lambda number, place: wire_trials.pulled(proxy, original, place), folder
        )


def pushes(folder: Path, cache: Path) -> dict:
    """Every fault on push to a bucket."""
    share = folder / "s3"
    (share / "bucket").mkdir(parents=True)
    with (
        rclone("s3", share, "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}") as server,
        Proxy(server) as proxy,
    ):
        return wire_trials.campaign(
            proxy, lambda number, place: wire_trials.pushed(proxy, cache, share, number), folder
        )


def trainings(folder: Path) -> dict:
    """Every fault on training from a URL."""
    teacher = tiny_models.save_llama(folder / "teacher")
    captured = memory_cache.captured(teacher, memory_cache.examples(8))
    cache = captured.write(folder / "small")

    def write_run(url: str, place: Path) -> Path:
        names = {"directory": place / "run", "teacher": teacher, "cache": url}
        names |= {"steps": 3, "more": ""}
        file = place / "run.toml"
        file.write_text(run_texts.TRAIN.format(**names))
        return file

    (folder / "near").mkdir()
    code, told = wire_trials.stillroom("train", write_run(str(cache), folder / "near"))
    assert code == 0, told
    lines = (folder / "near" / "run" / "metrics.jsonl").read_text().splitlines()
    near = [json.loads(line)["loss"] for line in lines]
    with rclone("http", cache) as server, Proxy(server) as proxy:
        return wire_trials.campaign(
            proxy,
            lambda number, place: wire_trials.trained(proxy, write_run, place, near),
            folder,
        )


def main() -> None:
    """Measure and print."""
    parser = asking(__doc__)
    parser.add_argument("--only", choices=["pull", "push", "train"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, wire_trials.impatient():
        folder = Path(name)
        cache = Path(write_cache(folder / "cache", small_plan()))
        trials = {
            "pull": lambda place: pulls(place, cache),
            "push": lambda place: pushes(place, cache),
            "train": trainings,
        }
        result = {}
        for verb in [options.only] if options.only else trials:
            (folder / verb).mkdir()
            result[verb] = trials[verb](folder / verb)
    publish(f"cache_wire_{options.only}" if options.only else "cache_wire", result, options.json)


if __name__ == "__main__":
    needs.run(main)
