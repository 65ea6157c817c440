"""Codecs of dense signals (hidden states, image targets) as Zarr v3 chains; bounds are checked.

One idea: a few tokens' hidden states are a hundred times larger than the rest, so every lossy codec
scales each position by itself. `bf16` and `fp16` use Zarr's own codecs and open in any Zarr
library; the others are one codec that this module registers, `stillroom.row_scaled`. It shapes no
array and writes no file.
"""

import importlib
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import zarr.codecs
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.common import parse_named_configuration
from zarr.registry import register_codec

from stillroom.cache_schemas import row_scaling
from stillroom.cache_schemas.errors import CacheError

blosc: Any = importlib.import_module("numcodecs.blosc")  # compiled, without type stubs
NAMES = ("bf16", "fp16", "int8", "fp8", "step")
CODEC_NAME = "stillroom.row_scaled"
FREE_ELEMENTS, MAX_RATIO = 1 << 24, 1 << 6
"""The used part of a chunk has at most MAX_RATIO elements per byte, and FREE_ELEMENTS besides, so
that a short chunk cannot ask for much memory."""


HOW_TO_READ = "how_to_read"
"""Attribute of arrays and of their group: words for people, which nothing else depends on."""
PLAIN = (
    "One chunk is one example. It uses its first positions, as many as dense_lengths in "
    "rows/*/*.arrow says; the rest is zeros."
)
BFLOAT16 = (
    "The numbers are the bits of bfloat16: (array[i].astype('uint32') << 16).view('float32'). "
    + PLAIN
)
ROW_SCALED = (
    f"Codec {CODEC_NAME} comes with stillroom and needs no torch: pip install --no-deps stillroom; "
    f"pip install 'zarr>=3.1.6' pcodec xxhash. Then zarr opens it as any array. {PLAIN}"
)


@dataclass(frozen=True)
class RowScaled(ArrayBytesCodec):
    """Zarr codec from float32 chunks [..., positions, width] to bytes.

    Attributes:
        form: `step`, `int8` or `fp8` (see `row_scaling`).
        step: width of one step of `step`, relative to a position's root mean square.
    """

    form: str = "step"
    step: float = 0.05

    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read the codec's entry in zarr.json."""
        _, configuration = parse_named_configuration(data, CODEC_NAME)
        return cls(**configuration)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """The codec's entry in zarr.json."""
        return {"name": CODEC_NAME, "configuration": {"form": self.form, "step": self.step}}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        """Not known before encoding."""
        raise NotImplementedError

    def _encode_sync(self, chunk_array: Any, chunk_spec: Any) -> Any:
        rows = np.asarray(chunk_array.as_numpy_array(), dtype=np.float32)
        blob = row_scaling.encode(rows.reshape(-1, rows.shape[-1]), self.form, self.step)
        return chunk_spec.prototype.buffer.from_bytes(blob)

    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        *outer, width = chunk_spec.shape
        rows = row_scaling.decode(
            chunk_bytes.to_bytes(), int(np.prod(outer)), width, self.form, self.step
        )
        return chunk_spec.prototype.nd_buffer.from_numpy_array(rows.reshape(chunk_spec.shape))

    async def _encode_single(self, chunk_array: Any, chunk_spec: Any) -> Any:
        return self._encode_sync(chunk_array, chunk_spec)

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        return self._decode_sync(chunk_bytes, chunk_spec)


register_codec(CODEC_NAME, RowScaled)


def chain(codec: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `zarr.create_array` for a codec of a plan: dtype, fill value, serializer,
    compressors and attributes. Every chain ends in crc32c.

    Args:
        codec: `{"name": one of NAMES, "step": float}`.

    Raises:
        CacheError: there is no such codec.
    """
    name = _name(codec)
    crc = zarr.codecs.Crc32cCodec()
    if name in ("bf16", "fp16"):
        shuffle = zarr.codecs.BloscCodec(cname="zstd", clevel=5, shuffle="shuffle", typesize=2)
        dtype = "uint16" if name == "bf16" else "float16"
        attributes = {"dtype": "bfloat16"} if name == "bf16" else {}
        attributes |= {HOW_TO_READ: BFLOAT16 if name == "bf16" else PLAIN}
        return {
            "dtype": dtype,
            "fill_value": 0,
            "serializer": zarr.codecs.BytesCodec(endian="little"),
            "compressors": [shuffle, crc],
            "attributes": attributes,
        }
    return {
        "dtype": "float32",
        "fill_value": 0.0,
        "serializer": RowScaled(name, _step(codec)),
        "compressors": [crc],
        "attributes": {HOW_TO_READ: ROW_SCALED},
    }


def to_stored(codec: dict[str, Any], array: np.ndarray) -> np.ndarray:
    """A float32 array in the dtype that its Zarr array has.

    Raises:
        CacheError: a value that is not finite, or that fp16 cannot hold.
    """
    array = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(array).all():
        raise CacheError("a value that is not finite", where="dense signal")
    name = _name(codec)
    if name == "bf16":
        return _to_bfloat16(array)
    if name == "fp16":
        largest = float(np.abs(array).max(initial=0))
        if largest > float(np.finfo(np.float16).max):
            remedy = "Use codec 'bf16' or 'step'."
            raise CacheError(f"{largest:.6g}", expected="at most 65504 (fp16)", remedy=remedy)
        return array.astype(np.float16)
    return array


def from_stored(codec: dict[str, Any], stored: np.ndarray) -> np.ndarray:
    """The inverse of `to_stored`: float32."""
    if _name(codec) == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def decode(codec: dict[str, Any], body: bytes, used: int, width: int) -> np.ndarray:
    """float32 [used, width]: the first positions of a chunk, from its bytes without the crc32c.

    Raises:
        ShardCorrupt: the bytes are not such a chunk.
        RuntimeError: Blosc cannot unpack them.
    """
    name = _name(codec)
    if name not in ("bf16", "fp16"):
        return row_scaling.decode(body, used, width, name, _step(codec))
    dtype = np.dtype("<u2" if name == "bf16" else "<f2")
    whole = np.frombuffer(blosc.decompress(body), dtype=dtype)
    return from_stored(codec, whole[: used * width].reshape(used, width))


def _step(codec: dict[str, Any]) -> float:
    return float(codec["step"]) if codec["name"] == "step" else 0.0


def _name(codec: dict[str, Any]) -> str:
    name = codec.get("name")
    if name not in NAMES:
        known = ", ".join(NAMES)
        raise CacheError(f"dense codec {name!r}", expected=f"one of {known}", where="plan")
    return name


def _to_bfloat16(array: np.ndarray) -> np.ndarray:
    """uint16 bits, rounded to nearest even: exact for what a bfloat16 model computed."""
    bits = array.view(np.uint32)
    # Just under a half, or a half where the last kept bit is odd: ties go to the even one.
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
