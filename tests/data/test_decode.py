"""Untrusted images: every mode and rotation has one result, everything else is a DataError, nothing hangs."""

import contextlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engines.data.decode import Frame, decode, header_size, read_regular_file
from engines.errors import DataError

RGB8 = Frame(8, 3)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def one_color(data: bytes, channels: int = 3) -> tuple[int, ...]:
    pixels = decode(data, Frame(8, channels), "x").reshape(-1, channels)
    assert (pixels == pixels[0]).all()
    return tuple(pixels[0].tolist())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "GIF", "WEBP"])
def test_an_image_of_the_right_size_keeps_its_pixels(kind: str) -> None:
    image = Image.fromarray(noise(8, 8, 3) // 128 * 255)  # eight colors: also GIF's palette holds them
    data = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert (decode(data, RGB8, "x") == np.asarray(image)).all()


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (0, 0), (255, 255, 255)),  # transparent: the white below
        ("RGBA", (200, 100, 50, 255), (200, 100, 50)),
        ("RGBA", (200, 100, 50, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),  # a fifth of black on white
        ("I;16", 257 * 100, (100, 100, 100)),
        ("I;16", 65535, (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(mode: str, color: object, expected: tuple[int, ...]) -> None:
    assert one_color(encoded(Image.new(mode, (8, 8), color))) == expected  # type: ignore[arg-type]


def test_a_palette_with_a_transparent_color_is_laid_over_white() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert one_color(encoded(image)) == (10, 20, 30)
    assert one_color(encoded(image, transparency=1)) == (255, 255, 255)


def test_cmyk_becomes_rgb() -> None:
    assert one_color(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF")) == (0, 255, 255)


def test_gray_is_the_luma_of_the_colors() -> None:
    assert one_color(encoded(Image.new("RGB", (8, 8), (255, 0, 0))), channels=1) == (76,)  # 0.299 * 255


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(DataError, match="floating-point"):
        decode(encoded(Image.new("F", (8, 8), 0.5), "TIFF"), RGB8, "x")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation: int) -> None:
    upright = Image.fromarray(np.kron(np.array([[0, 90], [180, 255]], dtype=np.uint8), np.ones((4, 4), dtype=np.uint8)))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # stored turned left, to be shown turned right
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (decode(encoded(stored, exif=exif), Frame(8, 1), "x")[..., 0] == np.asarray(upright)).all()


def test_the_largest_centered_square_is_taken() -> None:
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = noise(8, 8, 3)
    assert (decode(encoded(Image.fromarray(wide)), RGB8, "x") == wide[:, 8:16]).all()
    tall = wide.transpose(1, 0, 2)
    assert (decode(encoded(Image.fromarray(tall)), RGB8, "x") == tall[8:16]).all()


@pytest.mark.parametrize("size", [(1, 1), (10_000, 1), (1, 10_000), (3, 500), (9, 7)])
def test_any_shape_becomes_the_square(size: tuple[int, int]) -> None:
    assert one_color(encoded(Image.new("RGB", size, (1, 2, 3)))) == (1, 2, 3)


def test_a_large_jpeg_shrinks_to_its_area_means() -> None:
    smooth = np.linspace(0, 255, 512)[None, :] * np.linspace(0.2, 1, 512)[:, None]
    small = decode(encoded(Image.fromarray(smooth.astype(np.uint8)), "JPEG", quality=95), Frame(8, 1), "x")[..., 0]
    means = smooth.reshape(8, 64, 8, 64).mean((1, 3))
    assert np.abs(small.astype(float) - means)[1:-1, 1:-1].max() < 3


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.new("L", (8, 8), value) for value in (10, 200)]
    assert one_color(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == (10, 10, 10)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_file_cut_anywhere_is_refused_or_whole(kind: str) -> None:
    whole = encoded(Image.fromarray(noise(8, 8, 3)), kind)
    expected = decode(whole, RGB8, "x")
    refused = 0
    for length in range(len(whole)):
        try:
            assert (decode(whole[:length], RGB8, "cut.jpg") == expected).all()  # only trailing bytes are gone
        except DataError as error:
            assert "cut.jpg" in error.problem
            refused += 1
    assert refused > 0.9 * len(whole)


@pytest.mark.parametrize(
    "content", [b"<html>no</html>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"8BPS\0\1" + b"\0" * 40, b"\0" * 64]
)
def test_other_parsers_never_see_a_file(content: bytes) -> None:
    with pytest.raises(DataError, match=r"x\.png is not an image in a known format"):
        decode(content, RGB8, "x.png")


def test_zero_bytes_are_named_as_such() -> None:
    with pytest.raises(DataError, match=r"x\.png is empty \(0 bytes\)"):
        decode(b"", RGB8, "x.png")


@pytest.mark.parametrize("side", [8200, 10_000, 65_500])
def test_a_decompression_bomb_is_refused_from_its_header(side: int) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    )
    for read in (lambda: decode(bomb, RGB8, "bomb.png"), lambda: header_size(bomb, "bomb.png")):
        with pytest.raises(DataError, match=r"bomb\.png"):
            read()


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"P6 2 2 255\n", b"RIFF0000WEBP"]),
)
def test_arbitrary_bytes_give_pixels_or_a_data_error(tail: bytes, head: bytes) -> None:
    with contextlib.suppress(DataError):
        assert decode(head + tail, RGB8, "x").shape == (8, 8, 3)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on damaged metadata
@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 255), st.sampled_from(["JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP"]))
def test_a_changed_byte_gives_pixels_or_a_data_error(place: int, value: int, kind: str) -> None:
    data = bytearray(encoded(Image.fromarray(noise(12, 9, 3)), kind))
    data[place % len(data)] = value
    with contextlib.suppress(DataError):
        assert decode(bytes(data), RGB8, "x").shape == (8, 8, 3)


def test_the_original_size_is_read_from_the_header() -> None:
    data = encoded(Image.fromarray(noise(200, 300, 3)), "JPEG")
    assert header_size(data[: len(data) // 2], "x") == (300, 200)


@pytest.mark.timeout(10)
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name in ("pipe.png", "folder.png", "dangling.png", "loop.png", "missing.png", "x" * 300 + ".png", "nul\0.png"):
        with pytest.raises(DataError):
            read_regular_file(tmp_path / name)


def test_a_file_over_the_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    assert read_regular_file(tmp_path / "x", limit_bytes=5) == b"12345"
    with pytest.raises(DataError, match="larger than"):
        read_regular_file(tmp_path / "x", limit_bytes=4)
