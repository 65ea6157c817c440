"""DistillKit's Parquet: ids packed in bits, log-probabilities as a curve and residuals.

One idea: the file says nothing of how it was written, so the YAML beside it is part of it; bits and
terms are unpacked by that alone. The format is that of github.com/arcee-ai/DistillKit
(`distillkit/compression`); it is written here without loss.

A file of `sample_logits_vllm` has a row for every prediction inside its text, L - 1 of L tokens.
A packed one has as many as tokens, and numbers its documents in `attention_mask`; the last row of
each document is about a token that is not there, and goes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from pydantic import Field, model_validator

from stillroom.cache_schemas.errors import ConfigError, first_line
from stillroom.pipeline.config.strict import Table, validate
from stillroom.pipeline.doors.foreign_answer import ForeignAnswer
from stillroom.pipeline.doors.foreign_rows import integers, numbers, rows_of, wrong

SETTINGS = "compression_config.yaml"
Number = Literal["float16", "bfloat16", "float32", "float64"]
SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""Bytes of each."""
LENGTHS = {0: "as many", 1: "one less"}
"""Tokens of a text beyond its rows of answers -> how many rows these are, in words."""
EITHER = ", or ".join(LENGTHS.values())
LOSSY = 0.05
"""By how much probabilities of a fitted curve may exceed 1 in sum."""


class Bin(Table):
    """Residuals that share a scale."""

    scale_dtype: Number
    element_bits: int = Field(gt=0, le=64)
    num_elements: int = Field(gt=0)


class Compression(Table):
    """Keys of `compression_config.yaml`, as DistillKit names them."""

    d: int = Field(gt=1, lt=2**31)
    k: int = Field(gt=0)
    exact_k: int = Field(ge=0)
    exact_dtype: Number = "float32"
    polynomial_terms: tuple[int | Literal["sqrt", "exp"], ...] | None = None
    term_dtype: Number = "float32"
    residual_bins: tuple[Bin, ...] = ()
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @model_validator(mode="after")
    def _fits(self):
        binned = sum(one.num_elements for one in self.residual_bins)
        if self.exact_k > self.k or self.exact_k + binned > self.k:
            raise ValueError(f"exact_k = {self.exact_k} and {binned} in bins, of k = {self.k}")
        return self

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's log-probabilities."""
        terms = len(self.polynomial_terms or ()) * SIZES[self.term_dtype]
        bins = (
            SIZES[b.scale_dtype] + -(-b.element_bits * b.num_elements // 8)
            for b in self.residual_bins
        )
        return self.exact_k * SIZES[self.exact_dtype] + terms + sum(bins)

    @property
    def index_bits(self) -> int:
        """Bits of an id: ceil(log2 d), as the writer computes it in float32."""
        return int(np.ceil(np.log2(np.float32(self.d))))

    @property
    def exact(self) -> bool:
        """Whether every value is kept as it was."""
        return self.exact_k == self.k and self.exact_dtype in ("float32", "float64")


def read_settings(directory: Path, config: str | Path = "") -> Compression | None:
    """The YAML beside the files, or another; None where there is none.

    Raises:
        ConfigError: it has keys or values that the format does not know.
    """
    path = Path(config) if config else directory / SETTINGS
    if not path.is_file():
        if config:
            raise ConfigError("no such file", where=str(path), remedy="Correct --config.")
        return None
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"is no YAML ({first_line(error)})", where=str(path)) from None
    if isinstance(told, dict):
        told = told.get("logprob_compressor", told)
    return validate(Compression, told, str(path))


def read_distillkit(source: Path, settings: Compression | None) -> Iterator[ForeignAnswer]:
    """Every text of a file or directory, in order of names and rows.

    Raises:
        CacheError: there are no files, a row is not of this format, or of the other of its two
            lengths than the first: one answer that went missing looks like the shorter one.
    """
    first = None
    for row, where in rows_of(source, "parquet"):
        if "input_ids" not in row:
            raise wrong(where, "no input_ids", f"input_ids beside {', '.join(row)}")
        tokens = integers(row["input_ids"], "input_ids", where)
        ids, logprobs = _lists(row, settings, where)
        short = len(tokens) - len(ids)
        first = first or (short, where)
        if short not in LENGTHS or short != first[0]:
            expected = f"{LENGTHS[first[0]]}, as {first[1]} has" if short in LENGTHS else EITHER
            raise wrong(where, f"{len(ids)} rows of answers for {len(tokens)} tokens", expected)
        if short:
            yield _answer(where, tokens, ids, logprobs)
        else:
            yield from _documents(row, tokens, ids, logprobs, where)


def _documents(
    row: dict[str, Any], tokens: np.ndarray, ids: np.ndarray, logprobs: np.ndarray, where: str
) -> Iterator[ForeignAnswer]:
    """Those of a row that `attention_mask` numbers; the last answer of each goes."""
    documents = integers(row.get("attention_mask") or [1] * len(ids), "attention_mask", where)
    if len(documents) != len(tokens):
        raise wrong(where, f"{len(documents)} in attention_mask for {len(tokens)} tokens")
    for number in np.unique(documents[documents > 0]):
        at, own = np.flatnonzero(documents == number), f"{where} document {int(number)}"
        if at[-1] - at[0] >= len(at):
            raise wrong(own, "stands in two places of attention_mask", "one run of its number")
        if len(at) > 1:
            yield _answer(own, tokens[at], ids[at[:-1]], logprobs[at[:-1]])


def _answer(where: str, tokens: np.ndarray, ids: np.ndarray, logprobs: np.ndarray):
    return ForeignAnswer(where, tokens, np.ones(len(tokens), dtype=bool), 0, ids, logprobs)


def _lists(row: dict[str, Any], settings, where: str) -> tuple[np.ndarray, np.ndarray]:
    if "token_ids" in row and "top_values" in row:
        ids = integers(row["token_ids"], "token_ids", where, axes=2)
        values = numbers(row["top_values"], "top_values", where, axes=2)
        return _as_many(ids, values, where)
    if "packed_indices" in row:
        raise wrong(
            where,
            "DistillKit's legacy columns (packed_indices, exact_values, coeffs)",
            "compressed_logprobs and bytepacked_indices",
            "Write them anew with DistillKit's own reader.",
        )
    if settings is None or not {"compressed_logprobs", "bytepacked_indices"} <= row.keys():
        raise wrong(
            where,
            f"columns {', '.join(row)} without a description of how they are compressed",
            f"compressed_logprobs, bytepacked_indices and {SETTINGS} beside the file",
            "Name the YAML with --config: its values stand in the data set's card.",
        )
    values = _bytes(row["compressed_logprobs"], "compressed_logprobs", where)
    packed = _bytes(row["bytepacked_indices"], "bytepacked_indices", where)
    wanted = -(-settings.k * settings.index_bits // 8)
    if packed.shape[1] != wanted:
        raise wrong(
            where,
            f"{packed.shape[1]} bytes of ids a row",
            f"{wanted}, for k = {settings.k} ids below d = {settings.d}",
            f"Set d and k in {SETTINGS} to what the file was written with.",
        )
    ids = unpack(packed, settings.index_bits, settings.k)
    return _as_many(ids, decompress(values, settings, where), where)


def _as_many(ids: np.ndarray, values: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    if ids.shape != values.shape:
        raise wrong(where, f"ids {ids.shape} and log-probabilities {values.shape}", "one of each")
    return ids, values.astype(np.float32)


def _bytes(lists: Any, name: str, where: str) -> np.ndarray:
    found = integers(lists, name, where, axes=2)
    if not found.size:
        raise wrong(where, f"{name} has no rows", "one for each prediction")
    if not 0 <= found.min() <= found.max() <= 255:
        raise wrong(where, f"{name} holds {found.max()}", "bytes, 0 to 255")
    return found.astype(np.uint8)


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """int64 [R, count] of uint8 [R, bytes]: elements of `bits` bits, most significant first."""
    stream = np.unpackbits(packed, axis=1)[:, : bits * count].reshape(len(packed), count, bits)
    powers = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    return stream @ powers


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [R, bytes] of int64 [R, count]: what `unpack` takes."""
    at = np.arange(bits - 1, -1, -1, dtype=np.int64)
    stream = (values.astype(np.int64)[..., None] >> at & 1).astype(np.uint8)
    return np.packbits(stream.reshape(len(values), -1), axis=1)


def decompress(data: np.ndarray, settings: Compression, where: str) -> np.ndarray:
    """float32 [R, k] of uint8 [R, bytes].

    Raises:
        CacheError: a row has another number of bytes than the settings make.
    """
    if data.shape[1] != settings.row_bytes:
        raise wrong(
            where,
            f"{data.shape[1]} bytes of log-probabilities a row",
            f"{settings.row_bytes} by {SETTINGS}",
            "Take the settings that the file was written with.",
        )
    parts = _Parts(data)
    exact = parts.take(settings.exact_k, settings.exact_dtype)
    left = settings.k - settings.exact_k
    curve = np.zeros((len(data), left))
    if settings.polynomial_terms:
        coefficients = parts.take(len(settings.polynomial_terms), settings.term_dtype)
        curve = _curve(settings, coefficients, left)
    start = 0
    for one in settings.residual_bins:
        scale = parts.take(1, one.scale_dtype)
        size = -(-one.element_bits * one.num_elements // 8)
        levels = unpack(parts.raw(size), one.element_bits, one.num_elements).astype(np.float64)
        middle = 2.0 ** (one.element_bits - 1)
        centred = levels * 2 - 1 if one.element_bits == 1 else levels - middle
        curve[:, start : start + one.num_elements] += centred * scale
        start += one.num_elements
    values = np.concatenate([exact, curve], axis=1)
    return (values.cumsum(axis=1) if settings.delta_encoding else values).astype(np.float32)


def _curve(settings: Compression, coefficients: np.ndarray, count: int) -> np.ndarray:
    """float64 [R, count]: sums of powers of 0 .. count - 1, or of the same mapped to 0 .. 1.

    In the arithmetic of the coefficients' dtype, because the residuals were taken from that.
    """
    kind = getattr(torch, settings.term_dtype)
    at = torch.arange(count, dtype=kind)
    at = torch.linspace(0, 1, count, dtype=kind) if settings.normalize_t else at
    named = {"sqrt": torch.sqrt, "exp": torch.exp}
    terms = settings.polynomial_terms or ()
    powers = torch.stack([named[t](at) if isinstance(t, str) else at**t for t in terms], dim=-1)
    weighed = powers * torch.from_numpy(coefficients).to(kind)[:, None]
    return weighed.sum(dim=-1).double().numpy()


class _Parts:
    """Reads the bytes of all rows from left to right."""

    def __init__(self, data: np.ndarray):
        self.data, self.at = data, 0

    def raw(self, size: int) -> np.ndarray:
        part = np.ascontiguousarray(self.data[:, self.at : self.at + size])
        self.at += size
        return part

    def take(self, count: int, kind: str) -> np.ndarray:
        """float64 [R, count]."""
        part = self.raw(SIZES[kind] * count)
        if kind == "bfloat16":
            return (part.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return part.view(np.dtype(kind).newbyteorder("<")).astype(np.float64)


def write_settings(directory: Path, vocab_size: int, k: int) -> Compression:
    """Settings under which nothing is lost, left beside the files."""
    settings = Compression(d=vocab_size, k=k, exact_k=k, delta_encoding=False)
    told = settings.model_dump(mode="json")
    (directory / SETTINGS).write_text(yaml.safe_dump(told))
    return settings
