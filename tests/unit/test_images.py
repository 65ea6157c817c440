"""Pictures through the one door: what is converted, what is refused, and with which words."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from stillroom.pipeline.encoders.preparation import Preparation
from stillroom.pipeline.images import MAX_PIXELS, BadImage, decode_image
from tests.pictures import file, picture


def header_only_png(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds next to nothing: a decompression bomb's header."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def animation() -> bytes:
    stream = io.BytesIO()
    frames = [picture(seed) for seed in range(3)]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (file(picture())[:200], "cut short"),
        (file(picture(), "JPEG")[:150], "cut short|not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (animation(), r"animated \(3 frames\)"),
        (header_only_png(20_000, 20_000), "more pixels than Pillow opens"),
        (header_only_png(9_000, 9_000), "9000 x 9000 pixels"),
        (file(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "without a fixed range"),
    ],
)
def test_what_is_no_sensible_picture_is_refused_with_the_reason(data, message):
    with pytest.raises(BadImage, match=message) as caught:
        decode_image(data, "pictures/x.png")
    assert caught.value.where == "pictures/x.png"


def test_size_is_judged_before_pixels_are_unpacked():
    assert MAX_PIXELS < 9_000 * 9_000
    with pytest.raises(BadImage, match="expected at most"):
        decode_image(header_only_png(9_000, 9_000), "x")


def test_rotation_in_exif_is_applied():
    upright = picture(0, (40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = file(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    np.testing.assert_array_equal(np.asarray(decode_image(turned, "x")), np.asarray(upright))


def test_sixteen_bits_keep_their_high_byte():
    values = np.array([[0, 255, 256], [32768, 65280, 65535]], dtype=np.uint16)
    found = np.asarray(decode_image(file(Image.fromarray(values)), "x"))
    np.testing.assert_array_equal(found[..., 0], values >> 8)
    assert (found == found[..., :1]).all()


@pytest.mark.parametrize(
    ("mode", "form"), [("CMYK", "JPEG"), ("P", "PNG"), ("L", "PNG"), ("1", "PNG")]
)
def test_other_colours_become_rgb(mode, form):
    made = picture().convert(mode)
    with Image.open(io.BytesIO(file(made, form))) as stored:
        assert stored.mode == mode
    found = decode_image(file(made, form), "x")
    assert (found.mode, found.size) == ("RGB", made.size)


def test_transparency_is_dropped_and_colours_stay():
    clear = picture().convert("RGBA")
    clear.putalpha(0)
    np.testing.assert_array_equal(np.asarray(decode_image(file(clear), "x")), np.asarray(picture()))


def test_squash_sees_the_whole_picture_and_center_the_middle():
    wide = Image.fromarray(
        np.concatenate([np.full((8, 8, 3), v, np.uint8) for v in (10, 120, 240)], axis=1)
    )
    middle = Preparation(8, "center", "bilinear").pixels(wide)
    np.testing.assert_array_equal(middle, np.full((3, 8, 8), 120))
    whole = Preparation(3, "squash", "nearest").pixels(wide)
    np.testing.assert_array_equal(whole[0], [[10, 120, 240]] * 3)


def test_preparing_is_pillows_resize():
    made = Preparation(20, "squash", "bicubic").pixels(picture(3))
    wanted = picture(3).resize((20, 20), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(made, np.asarray(wanted).transpose(2, 0, 1))
