"""Preparing a corpus: speed on chats, memory at 1 and 10 million tokens, memory on large pictures.

Every arm is a child of its own, so its peak memory is its own. Speed is megabytes of text (what the
messages hold, not the template around it) per second of processor time, after a first small corpus
has paid for imports. The conversations are made of Python's own documentation, 1 to 5 answers each;
the tokenizer is a byte-level BPE of 8,192 tokens trained on the same; the template is ChatML, and,
in the arm `rewritten`, one that shortens earlier answers (as others strip their reasoning), so that
every answer is an example of its own and its history is read again.

    python -m benchmarks.prepare --json
    python -m benchmarks.prepare --gigabytes 20 --pictures-only --json

Pictures are distinct JPEG files of 2.4 MB, 100 in a row group, read by a tiny LLaVA's processor.
"""

import argparse
import io
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import needs
from benchmarks.cache_trial import publish
from tests import tiny_image_models, tiny_models

CHATML = tiny_models.PLAIN_CHAT_TEMPLATE
REWRITTEN = CHATML.replace(
    "{{ message['content']",
    "{% set whole = loop.last or message['role'] != 'assistant' %}"
    "{{ (message['content'] if whole else message['content'][:9])",
)
TEMPLATES = {"chats": CHATML, "rewritten": REWRITTEN}
CHARACTERS_PER_TOKEN = 4.6
PICTURE = 2_400_000


def main() -> None:
    """Measure, write `benchmarks/results/`, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of picture Parquet")
    parser.add_argument("--pictures-only", action="store_true")
    parser.add_argument("--directory", help="where the files go; a temporary one by default")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        print(json.dumps(run_arm(arguments.arm, arguments.size, Path(arguments.directory))))
        return
    arms = [("pictures", arguments.gigabytes)]
    if not arguments.pictures_only:
        arms = [("chats", 1e6), ("chats", 10e6), ("rewritten", 1e6), *arms]
    results = [child(arm, size, arguments.directory) for arm, size in arms]
    publish("prepare", {"arms": results}, arguments.json)


def child(arm: str, size: float, directory: str | None) -> dict:
    """One arm in a process and a folder of its own."""
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        command = [sys.executable, "-m", "benchmarks.prepare", "--arm", arm]
        command += ["--size", str(size), "--directory", folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        return json.loads(done.stdout.splitlines()[-1])


def run_arm(arm: str, size: float, folder: Path) -> dict:
    """Make the files in another process, so that its memory is not this one's, and prepare."""
    if arm == "pictures":
        tiny_image_models.save("llava", folder / "model")
        megabytes = _apart(write_pictures, folder / "rows.parquet", int(size * 1e9))
    else:
        tokenizer = tiny_models.save_tokenizer(folder / "model", 8192, TEMPLATES[arm])
        tokenizer.model_max_length = 1 << 20
        tokenizer.save_pretrained(folder / "model")
        megabytes = _apart(write_chats, folder / "rows.jsonl", size)
    return {"arm": arm, "asked_for": size} | measure(arm, folder, megabytes)


def _apart(write, path: Path, size: float) -> float:
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(write, (path, size))


def measure(arm: str, folder: Path, megabytes: float) -> dict:
    """Prepare the corpus once; seconds of processor and wall time, and the peak of memory."""
    rows = folder / ("rows.parquet" if arm == "pictures" else "rows.jsonl")
    small = folder / "small.jsonl"
    write_chats(small, 20_000)
    prepare_corpus(small, folder / "model", folder / "warm")
    before, wall, begin = peak(), time.monotonic(), time.process_time()
    corpus = prepare_corpus(rows, folder / "model", folder / "corpus")
    seconds = time.process_time() - begin
    counts = corpus.facts["counts"]
    return {
        "megabytes": round(megabytes, 2),
        "processor_seconds": round(seconds, 2),
        "wall_seconds": round(time.monotonic() - wall, 2),
        "megabytes_per_processor_second": round(megabytes / seconds, 3),
        "tokens": sum(split["tokens"] for split in counts.values()),
        "examples": sum(split["examples"] for split in counts.values()),
        "peak_mib": round(peak()),
        "peak_mib_before": round(before),
    }


def prepare_corpus(rows: Path, model: Path, directory: Path):
    """A corpus of one file."""
    from stillroom.pipeline.config import Prepare, Source
    from stillroom.pipeline.corpus.preparing import prepare

    source = Source(name="rows", path=str(rows))
    config = Prepare(source=(source,), tokenizer=str(model), window=4096)
    return prepare(config, "", directory)


def peak() -> float:
    """Most memory that this process held so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_chats(path: Path, tokens: float) -> float:
    """Conversations of about so many tokens; returns the megabytes of their texts."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for messages in conversations():
            file.write(json.dumps({"messages": messages}) + "\n")
            written += sum(len(message["content"].encode()) for message in messages)
            if written >= tokens * CHARACTERS_PER_TOKEN:
                return written / 1e6
    return written / 1e6


def conversations() -> Iterator[list[dict[str, str]]]:
    """Without end: questions of 40 to 300 characters, answers of 100 to 900."""
    english, draw = tiny_models.english(1 << 30), random.Random(0)
    while True:
        messages = []
        for _ in range(draw.randint(1, 5)):
            at = draw.randrange(len(english) - 1200)
            asked, said = draw.randint(40, 300), draw.randint(100, 900)
            messages.append({"role": "user", "content": english[at : at + asked]})
            answer = english[at + asked : at + asked + said]
            messages.append({"role": "assistant", "content": answer})
        yield messages


def write_pictures(path: Path, size: float) -> float:
    """A Parquet file of questions about pictures; returns its megabytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = picture()
    with pq.ParquetWriter(path, schema()) as writer:
        for begin in range(0, max(1, int(size // len(data))), 100):
            rows = [row(data, number) for number in range(begin, begin + 100)]
            writer.write_table(pa.Table.from_pylist(rows, schema()))
    return path.stat().st_size / 1e6


def schema():
    """Columns as data sets of the hub have them."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.schema([("messages", pa.list_(message)), ("images", pa.list_(image))])


def row(data: bytes, number: int) -> dict:
    """A question about a picture; what follows a JPEG's end makes its bytes its own."""
    asked = {"role": "user", "content": f"<image>What is number {number}?"}
    said = {"role": "assistant", "content": f"It is number {number}."}
    own = {"bytes": data + number.to_bytes(8, "little"), "path": None}
    return {"messages": [asked, said], "images": [own]}


def picture() -> bytes:
    """A JPEG file of noise of about 2.4 MB."""
    from PIL import Image

    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (1000, 1200, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG", quality=92)
    return stream.getvalue() + draw.bytes(max(0, PICTURE - stream.tell()))


if __name__ == "__main__":
    needs.run(main)
