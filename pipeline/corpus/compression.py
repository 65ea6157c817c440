"""Files that may be compressed, as streams of bytes.

One idea: a name's last suffix says how it is compressed; whoever reads lines or members never
knows. Nothing is unpacked to disk or held whole.
"""

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import Any

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged file raises."""


def open_bytes(path: Path) -> io.BufferedReader:
    """A file's content, decompressed while it is read."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    opened: Any = openers[suffix](path, "rb") if suffix in openers else path.open("rb")
    return opened if isinstance(opened, io.BufferedReader) else io.BufferedReader(opened)


def plain_name(path: str | Path) -> str:
    """A file's name in small letters without the suffix of a compression."""
    name = Path(path).name.lower()
    return name.removesuffix(next((end for end in SUFFIXES if name.endswith(end)), ""))
