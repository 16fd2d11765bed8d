"""One image from untrusted bytes: any common format, size and mode to a square of 8-bit pixels, or a DataError.

What is done, in this order, and no more: EXIF rotation, transparency over white, conversion to RGB or gray (16-bit
gray is scaled by 1/257, CMYK and the rest as Pillow converts; color profiles are ignored), the largest centered
square, Lanczos to the asked size. Of an animation the first frame counts.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from engines.errors import DataError

Pixels = npt.NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")  # no other of Pillow's parsers ever sees a file
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".tif", ".tiff"))
MAX_IMAGE_PX = 1 << 26  # 8192 x 8192: a header that promises more is refused before anything is decoded
MAX_FILE_BYTES = 1 << 27
REMEDY = "mend or remove it, or leave such images out: --set data.on_bad_image=skip"

# Pillow warns between its limit and twice that, and refuses beyond; here both are errors. Its remarks on damaged metadata
# of images that decode all the same would only be lines that nobody can act on.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class Frame(NamedTuple):
    """What every image becomes: (size_px, size_px, channels) uint8."""

    size_px: int
    channels: int  # 1 = gray, 3 = RGB


def decode(data: bytes, frame: Frame, origin: str) -> Pixels:
    """(S, S, C) uint8 of an encoded image.

    Args:
        data: the bytes of a file in one of FORMATS, whatever its name says.
        origin: what the image is called in messages.

    Raises:
        DataError: not such a file, truncated, damaged, or larger than MAX_IMAGE_PX.
    """
    with _opened(data, origin) as image:
        image.draft(None, (2 * frame.size_px, 2 * frame.size_px))  # JPEG decodes at 1/2, 1/4, 1/8 where that leaves twice the size
        image.load()
        return fit(ImageOps.exif_transpose(image), frame)


def header_size(data: bytes, origin: str) -> tuple[int, int]:
    """Original (width, height) in px as stored, before any EXIF rotation. Raises DataError as `decode` does."""
    with _opened(data, origin) as image:
        return image.size


def fit(image: Image.Image, frame: Frame) -> Pixels:
    """(S, S, C) uint8: the largest centered square of an image, resized. An image of that size keeps its pixels."""
    image = _flatten(image, "L" if frame.channels == 1 else "RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size != (frame.size_px, frame.size_px):
        square = (left, top, left + side, top + side)
        image = image.resize((frame.size_px, frame.size_px), Image.Resampling.LANCZOS, box=square, reducing_gap=3.0)
    return np.asarray(image, dtype=np.uint8).reshape(frame.size_px, frame.size_px, frame.channels)


def read_regular_file(path: Path, limit_bytes: int = MAX_FILE_BYTES) -> bytes:
    """A file's bytes; never hangs on a pipe or device. Raises DataError where it is missing, no regular file, or too large."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{path} is not a regular file", REMEDY)
            if status.st_size > limit_bytes:
                raise DataError(f"{path} is larger than {limit_bytes >> 20} MiB", REMEDY)
            return file.read(limit_bytes)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"cannot read {path}: {reason}", REMEDY) from None


@contextmanager
def _opened(data: bytes, origin: str) -> Iterator[Image.Image]:
    if not data:
        raise DataError(f"{origin} is empty (0 bytes)", REMEDY)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PX:
                raise DataError(f"{origin} is {image.width} x {image.height} px, more than {MAX_IMAGE_PX >> 20} Mpx", REMEDY)
            yield image
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{origin} is not an image in a known format ({', '.join(FORMATS)})", REMEDY) from None
    except Exception as error:  # the parsers of damaged files raise OSError, SyntaxError, struct.error, IndexError and more
        raise DataError(f"{origin} cannot be decoded: {str(error) or type(error).__name__}", REMEDY) from error


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode.startswith("I"):  # 16-bit gray; Pillow's own conversion would clip it at 255
        gray = np.asarray(image).astype(np.int64)
        if gray.min(initial=0) < 0 or gray.max(initial=0) > 0xFFFF:
            raise ValueError("integer pixels outside 0..65535")
        image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    return image if image.mode == mode else image.convert(mode)
