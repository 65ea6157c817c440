"""Other ways to store top-k rows, written by us from their public descriptions, to compare with.

One idea: a layout is `encode(rows) -> bytes` and `decode(bytes) -> ids, logprobs`, whatever library
it rests on. None stores a tail or token ids unless it says so, which favours them.

- raw: int32 ids, float32 log-probabilities and tail.
- Parquet: uint16 or int32 ids, byte-stream split, float16 values, zstd: the best of eight tried.
- Megatron-LM's logits saver: uint16 ids with a 17th bit as bool, float16, torch.save, zstd 3.
- DistillKit's recommended shape: packed ids, 16 exact bfloat16 values, a polynomial for the rest.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numcodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class Layout:
    """A way to store rows.

    Attributes:
        name: for the report.
        encode: rows -> bytes.
        decode: (bytes, rows, k) -> (int ids [R, k], float32 log-probabilities [R, k]).
    """

    name: str
    encode: Callable[[Rows], bytes]
    decode: Callable[[bytes, int, int], tuple[np.ndarray, np.ndarray]]


def layouts(vocab_size: int) -> list[Layout]:
    """The layouts that can hold ids of this vocabulary."""
    all_of_them = [
        Layout("raw int32+float32", _raw_encode, _raw_decode),
        Layout("parquet", _parquet_encode, _parquet_decode),
        Layout(
            "distillkit-shaped",
            lambda rows: _distillkit_encode(rows, _id_bits(vocab_size)),
            lambda blob, rows, k: _distillkit_decode(blob, rows, k, _id_bits(vocab_size)),
        ),
    ]
    if vocab_size <= 1 << 17:
        all_of_them.append(Layout("megatron-shaped", _megatron_encode, _megatron_decode))
    return all_of_them


def _raw_encode(rows: Rows) -> bytes:
    parts = rows["topk_ids"], rows["topk_logprobs"], rows["tail_logprob"]
    return b"".join(part.tobytes() for part in parts)


def _raw_decode(blob: bytes, rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    flat = np.frombuffer(blob, dtype=np.int32)
    ids, logprobs = flat[: rows * k], flat[rows * k : 2 * rows * k].view(np.float32)
    return ids.reshape(rows, k).copy(), logprobs.reshape(rows, k).copy()


def _parquet_encode(rows: Rows) -> bytes:
    ids = rows["topk_ids"].reshape(-1)
    narrow = ids.astype(np.uint16) if ids.max() < 1 << 16 else ids
    table = pa.table({"ids": narrow, "lp": rows["topk_logprobs"].reshape(-1).astype(np.float16)})
    split = "BYTE_STREAM_SPLIT"
    encodings = {"ids": split, "lp": split}
    out = io.BytesIO()
    pq.write_table(
        table,
        out,
        compression="zstd",
        use_dictionary=False,
        column_encoding=encodings,
        write_page_checksum=True,
    )
    return out.getvalue()


def _parquet_decode(blob: bytes, rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    table = pq.read_table(io.BytesIO(blob), page_checksum_verification=True)
    ids, logprobs = (table[name].to_numpy().reshape(rows, k) for name in ("ids", "lp"))
    return ids.astype(np.int32), logprobs.astype(np.float32)


def _megatron_encode(rows: Rows) -> bytes:
    import torch

    ids = rows["topk_ids"]
    saved = {
        "ids": torch.from_numpy((ids & 0xFFFF).astype(np.uint16)),
        "high": torch.from_numpy((ids >> 16).astype(bool)),
        "logprobs": torch.from_numpy(rows["topk_logprobs"].astype(np.float16)),
    }
    out = io.BytesIO()
    torch.save(saved, out)
    return numcodecs.Zstd(level=3).encode(out.getvalue())


def _megatron_decode(blob: bytes, rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    import torch

    saved = torch.load(io.BytesIO(numcodecs.Zstd().decode(blob)), weights_only=True)
    ids = saved["ids"].numpy().astype(np.int32) | (saved["high"].numpy().astype(np.int32) << 16)
    return ids, saved["logprobs"].numpy().astype(np.float32)


EXACT = 16


def _id_bits(vocab_size: int) -> int:
    return int(vocab_size - 1).bit_length()


def _basis(k: int) -> np.ndarray:
    """float64 [k - EXACT, 6]: powers 0 to 4 and the root of the normalised place."""
    place = np.linspace(0, 1, k - EXACT)
    return np.stack([place**power for power in (0, 1, 2, 3, 4, 0.5)], axis=1)


def _distillkit_encode(rows: Rows, bits: int) -> bytes:
    ids, logprobs = rows["topk_ids"], rows["topk_logprobs"].astype(np.float64)
    planes = (ids.reshape(-1, 1) >> np.arange(bits)) & 1
    packed = np.packbits(planes.astype(np.uint8).reshape(-1))
    exact = (logprobs[:, :EXACT].astype(np.float32).view(np.uint32) + 0x8000 >> 16).astype("<u2")
    fitted = np.linalg.pinv(_basis(ids.shape[1])) @ logprobs[:, EXACT:].T
    return packed.tobytes() + exact.tobytes() + fitted.T.astype(np.float32).tobytes()


def _distillkit_decode(blob: bytes, rows: int, k: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    packed = -(-rows * k * bits // 8)
    planes = np.unpackbits(np.frombuffer(blob, np.uint8, packed), count=rows * k * bits)
    ids = planes.reshape(-1, bits) @ (1 << np.arange(bits, dtype=np.int32))
    exact = np.frombuffer(blob, "<u2", rows * EXACT, packed).astype(np.uint32) << 16
    fitted = np.frombuffer(blob, np.float32, rows * 6, packed + 2 * rows * EXACT).reshape(rows, 6)
    rest = fitted @ _basis(k).T.astype(np.float32)
    logprobs = np.concatenate([exact.view(np.float32).reshape(rows, EXACT), rest], axis=1)
    return ids.reshape(rows, k).astype(np.int32), logprobs.astype(np.float32)
