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
from typing import Literal, NamedTuple

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


Kind = Literal["not a file", "empty", "not an image", "bomb", "damaged"]


class BadImage(DataError):
    """An image that cannot be used: stops the work, or is left out, as the recipe says.

    Attributes:
        kind: "not a file": missing, a pipe, a device, too large, no permission; "bomb": more than MAX_IMAGE_PX; "damaged":
            begins like an image and cannot be decoded to its end.
    """

    def __init__(self, kind: Kind, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy or REMEDY)
        self.kind = kind


class Frame(NamedTuple):
    """What every image becomes: (size_px, size_px, channels) uint8."""

    size_px: int
    channels: int  # 1 = gray, 3 = RGB


class Facts(NamedTuple):
    """What an encoded image is, before it is made to fit."""

    format: str  # one of FORMATS
    mode: str  # Pillow's: "RGB", "L", "P", "CMYK", "I;16", ...
    width: int  # px as stored, before any EXIF rotation
    height: int


def decode(data: bytes, frame: Frame, origin: str) -> Pixels:
    """(S, S, C) uint8 of an encoded image.

    Args:
        data: the bytes of a file in one of FORMATS, whatever its name says.
        origin: what the image is called in messages.

    Raises:
        BadImage: not such a file, truncated, damaged, or larger than MAX_IMAGE_PX.
    """
    return inspect(data, frame, origin)[1]


def inspect(data: bytes, frame: Frame, origin: str) -> tuple[Facts, Pixels]:
    """What an encoded image is, and its pixels as `decode` gives them. Raises BadImage."""
    with _opened(data, origin) as image:
        facts = Facts(image.format or "", image.mode, *image.size)
        image.draft(None, (2 * frame.size_px, 2 * frame.size_px))  # JPEG decodes at 1/2, 1/4, 1/8 where that leaves twice the size
        image.load()
        return facts, fit(ImageOps.exif_transpose(image), frame)


def header_size(data: bytes, origin: str) -> tuple[int, int]:
    """Original (width, height) in px as stored, before any EXIF rotation. Raises BadImage as `decode` does."""
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
    """A file's bytes; never hangs on a pipe or device. Raises BadImage where it is missing, no regular file, or too large."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadImage("not a file", f"{path} is not a regular file")
            if status.st_size > limit_bytes:
                raise BadImage("not a file", f"{path} is larger than {limit_bytes >> 20} MiB")
            return file.read(limit_bytes)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadImage("not a file", f"cannot read {path}: {reason}") from None


@contextmanager
def _opened(data: bytes, origin: str) -> Iterator[Image.Image]:
    if not data:
        raise BadImage("empty", f"{origin} is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PX:
                raise BadImage("bomb", f"{origin} is {image.width} x {image.height} px, more than {MAX_IMAGE_PX >> 20} Mpx")
            yield image
    except DataError:
        raise
    except UnidentifiedImageError:
        raise BadImage("not an image", f"{origin} is not an image in a known format ({', '.join(FORMATS)})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("bomb", f"{origin} cannot be decoded: {error}") from None
    except Exception as error:  # the parsers of damaged files raise OSError, SyntaxError, struct.error, IndexError and more
        raise BadImage("damaged", f"{origin} cannot be decoded: {str(error) or type(error).__name__}") from error


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
