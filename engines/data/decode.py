"""One image from untrusted bytes: any common format, size and mode to a square of 8-bit pixels, or a DataError.

What is done, in this order, and no more: EXIF rotation, transparency over white, conversion to RGB or gray (16-bit
gray is scaled by 1/257, CMYK and the rest as Pillow converts; color profiles are ignored), the largest centered
square, Lanczos to the asked size. Of an animation the first frame counts.

A file of some kilobytes can unpack to any size. What no header may promise is refused before anything is decoded; the largest that
is taken costs 0.4 GiB while it is decoded, and images that large are decoded one at a time, whatever the number of threads.
"""

from __future__ import annotations

import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from engines.errors import DataError

Pixels = npt.NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")  # no other of Pillow's parsers ever sees a file
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".tif", ".tiff"))
MAX_IMAGE_PX = 1 << 26  # 8192 x 8192: a header that promises more is refused before anything is decoded
TIGHTER_PX = {"WEBP": 1 << 24, "TIFF": 1 << 25}  # formats whose decoders hold an image several times over
MAX_SCANS = 100  # of a JPEG file; encoders write 1 to 20, and each decodes the whole image again
LARGE_PX = 1 << 22  # images of more are decoded one at a time
BAND_PX = 1 << 18  # of an image of more, this much is converted at a time
MAX_FILE_BYTES = 1 << 27
MAX_TOLD = 1000  # characters of a path, which a list may make as long as it likes
REMEDY = "mend or remove it, or leave such images out: --set data.on_bad_image=skip; diffrc data check finds them all"

TURNS = {  # by EXIF orientation: what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_one_at_a_time = threading.Lock()

# Pillow warns between its limit and twice that, and refuses beyond; here both are errors. Its remarks on damaged metadata
# of images that decode all the same would only be lines that nobody can act on.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


Kind = Literal["not a file", "empty", "not an image", "bomb", "damaged", "changed"]


class BadImage(DataError):
    """An image that cannot be used: stops the work, or is left out, as the recipe says.

    Attributes:
        kind: "not a file": missing, a pipe, a device, too large, no permission; "bomb": more than MAX_IMAGE_PX; "damaged":
            begins like an image and cannot be decoded to its end; "changed": not what a quarantine list says it was.
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
        scans = data.count(b"\xff\xda") if data.startswith(b"\xff\xd8") else 0
        if scans > MAX_SCANS:
            raise BadImage("bomb", f"{origin} is a JPEG file of {scans:,} scans, more than {MAX_SCANS}")
        held = image.width * image.height  # of several scans the decoder holds every coefficient, whatever it shrinks the image to
        image.draft(None, (2 * frame.size_px, 2 * frame.size_px))  # JPEG decodes at 1/2, 1/4, 1/8 where that leaves twice the size
        held = held if scans > 1 else image.width * image.height
        with _one_at_a_time if held > LARGE_PX else nullcontext():
            image.load()
            turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
            if turn is None:
                return facts, fit(image, frame)
            if image.width * image.height <= LARGE_PX:
                return facts, fit(image.transpose(turn), frame)
            small = Image.fromarray(fit(image, frame).squeeze()).transpose(turn)  # a copy of the whole would cost too much
            return facts, np.asarray(small, dtype=np.uint8).reshape(frame.size_px, frame.size_px, frame.channels)


def header_size(data: bytes, origin: str) -> tuple[int, int]:
    """Original (width, height) in px as stored, before any EXIF rotation. Raises BadImage as `decode` does."""
    with _opened(data, origin) as image:
        return image.size


def fit(image: Image.Image, frame: Frame) -> Pixels:
    """(S, S, C) uint8: the largest centered square of an image, resized. An image of that size keeps its pixels."""
    mode = "L" if frame.channels == 1 else "RGB"
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square: tuple[float, float, float, float] = (left, top, left + side, top + side)
    if (image.mode != mode or image.has_transparency_data) and image.width * image.height > BAND_PX:
        image, square = _reduced(image, left, top, mode, frame.size_px)
    image = _flatten(image, mode)
    if image.size != (frame.size_px, frame.size_px):
        image = image.resize((frame.size_px, frame.size_px), Image.Resampling.LANCZOS, box=square, reducing_gap=3.0)
    return np.asarray(image, dtype=np.uint8).reshape(frame.size_px, frame.size_px, frame.channels)


def read_regular_file(path: Path, limit_bytes: int = MAX_FILE_BYTES) -> bytes:
    """A file's bytes; never hangs on a pipe or device. Raises BadImage where it is missing, no regular file, or too large."""
    told = str(path)[:MAX_TOLD]
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadImage("not a file", f"{told} is not a regular file")
            if status.st_size > limit_bytes:
                raise BadImage("not a file", f"{told} is larger than {limit_bytes >> 20} MiB")
            return file.read(limit_bytes)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadImage("not a file", f"cannot read {told}: {reason}") from None


@contextmanager
def _opened(data: bytes, origin: str) -> Iterator[Image.Image]:
    if not data:
        raise BadImage("empty", f"{origin} is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            most = TIGHTER_PX.get(image.format or "", MAX_IMAGE_PX)
            if image.width * image.height > most:
                raise BadImage("bomb", f"{origin} is {image.width} x {image.height} px, more than {most >> 20} Mpx")
            if isinstance(image, TiffImagePlugin.TiffImageFile) and _tile_px(image) > most:
                raise BadImage("bomb", f"{origin} is made of tiles of {_tile_px(image):,} px, more than {most >> 20} Mpx")
            yield image
    except DataError:
        raise
    except UnidentifiedImageError:
        raise BadImage("not an image", f"{origin} is not an image in a known format ({', '.join(FORMATS)})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("bomb", f"{origin} cannot be decoded: {error}") from None
    except Exception as error:  # the parsers of damaged files raise OSError, SyntaxError, struct.error, IndexError and more
        raise BadImage("damaged", f"{origin} cannot be decoded: {str(error) or type(error).__name__}") from error


def _tile_px(image: TiffImagePlugin.TiffImageFile) -> int:
    """Pixels of one tile, which is unpacked whole however little of it the image shows; 0 where it is made of strips."""
    width, height = (image.tag_v2.get(tag, 0) for tag in (322, 323))
    return width * height if isinstance(width, int) and isinstance(height, int) else MAX_IMAGE_PX + 1


def _reduced(image: Image.Image, left: int, top: int, mode: str, size_px: int) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """A large image's square, flattened band by band and reduced by the factor by which `resize` would have begun, and what counts of it.

    So no converted copy of the whole is made.
    """
    side = min(image.size)
    factor = max(1, side // (3 * size_px))
    small = Image.new(mode, (-(-side // factor),) * 2)  # the last row and column may be of less than `factor` pixels
    rows = factor * max(1, BAND_PX // (side * factor))
    for y in range(0, side, rows):
        band = _flatten(image.crop((left, top + y, left + side, top + min(y + rows, side))), mode)
        small.paste(band.reduce(factor) if factor > 1 else band, (0, y // factor))
    return small, (0.0, 0.0, side / factor, side / factor)


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode.startswith("I"):  # 16-bit gray; Pillow's own conversion would clip it at 255
        gray = np.asarray(image).astype(np.int64)  # of a band, where the image is large
        if gray.min(initial=0) < 0 or gray.max(initial=0) > 0xFFFF:
            raise ValueError("integer pixels outside 0..65535")
        image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    return image if image.mode == mode else image.convert(mode)
