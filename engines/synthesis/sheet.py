"""Synthesized images as files: PNG with provenance and its verified reading, grids, and the contact sheet (as in the paper's Fig. 2)."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from engines.data.batches import to_pixels
from engines.data.decode import Pixels, read_regular_file
from engines.data.names import slug
from engines.errors import DataError
from engines.synthesis.plan import read_plan
from engines.synthesis.select import REASONS, UNMEASURED, Figures, Reason

MAX_PNG_BYTES = 1 << 26
REJECTED = "rejected"  # the folder, inside a class's, of images that the selection dropped
_LAST_CHUNK = b"\0\0\0\0IEND\xaeB`\x82"
_NAME = re.compile(r"^(\d{6,9})\.png$")
TEXT = (
    *("synthetic", "plan", "class_id", "class", "index", "seed", "kept", "dropped"),
    *("distance", "reach", "confidence", "pixels_sha256", "versions"),
)
_REASON: dict[str, Reason] = {"": "", **{reason: reason for reason in REASONS}}

Labels = npt.NDArray[np.int64]

# ----------------------------------------------------------------------------------------------------------- one image


@dataclass(frozen=True, slots=True)
class Record:
    """What a synthesized PNG says about itself; a line of the manifest."""

    plan: str
    class_id: int
    class_name: str
    index: int
    seed: int
    pixels_sha256: str
    versions: str  # JSON, of what made it
    figures: Figures = UNMEASURED  # of the selection
    dropped: Reason = ""  # why the selection did not keep it; it then lies in `rejected/`
    start: int | None = None  # the training image from which it begins, by its place among them; None = noise alone

    @property
    def kept(self) -> bool:
        return not self.dropped

    def path(self) -> Path:
        """The file's place inside the synthesis folder."""
        return image_path(self.class_name, self.class_id, self.index, self.kept)

    def line(self) -> dict[str, Any]:
        """The manifest's line."""
        return {
            "file": self.path().as_posix(),
            "class_id": self.class_id,
            "class": self.class_name,
            "index": self.index,
            "kept": self.kept,
            "dropped": self.dropped or None,
            **self.figures.told(),
            "pixels_sha256": self.pixels_sha256,
            **({} if self.start is None else {"start": self.start}),
        }


def image_path(class_name: str, class_id: int, index: int, kept: bool = True) -> Path:
    """`<slug>/000012.png`, or `<slug>/rejected/000012.png`: safe for any class name."""
    folder = Path(slug(class_name, class_id))
    return (folder if kept else folder / REJECTED) / f"{index:06d}.png"


def pixels_sha256(pixels: Pixels) -> str:
    """sha256 of an image's shape and values, (H, W, C) uint8."""
    assert pixels.dtype == np.uint8 and pixels.ndim == 3
    return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def encode_png(pixels: Pixels, record: Record) -> bytes:
    """PNG of (H, W, C) uint8, C = 1 or 3, with the record as text chunks; equal arguments give equal bytes."""
    text = PngImagePlugin.PngInfo()
    for key, value in {
        "synthetic": "true",
        "plan": record.plan,
        "class_id": record.class_id,
        "class": record.class_name.encode("unicode_escape").decode("ascii"),
        "index": record.index,
        "seed": record.seed,
        "kept": "true" if record.kept else "false",
        "dropped": record.dropped,
        **{name: "" if figure is None else repr(figure) for name, figure in record.figures.told().items()},
        "pixels_sha256": record.pixels_sha256,
        "versions": record.versions,
        **({} if record.start is None else {"start": record.start}),
    }.items():
        text.add_text(key, str(value))
    return _png(pixels, text)


def decode_png(data: bytes, class_name: str, origin: str) -> tuple[Pixels, Record]:
    """The image and record of a synthesized PNG. Raises DataError where it is damaged, or no such file.

    Args:
        class_name: the class in whose folder it lies; the name inside the file is for people only.
    """
    remedy = "the same diffrc synth command makes it again"
    try:
        if not data.endswith(_LAST_CHUNK):  # Pillow is content with a file that lacks its end
            raise ValueError("it is cut off")
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.verify()  # the checksums of all chunks; an image that was verified cannot be loaded
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            assert isinstance(image, PngImagePlugin.PngImageFile)
            image.load()
            pixels = np.asarray(image, dtype=np.uint8)
            text = image.text
        if missing := [key for key in TEXT if key not in text]:
            raise ValueError(f"its text lacks {', '.join(missing)}")
        if text["synthetic"] != "true":
            raise ValueError(f"its text says synthetic={text['synthetic'][:20]!r}")
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        record = Record(
            plan=sys.intern(text["plan"]),  # equal in all images of a folder, which a shelf remembers
            class_id=int(text["class_id"]),
            class_name=class_name,
            index=int(text["index"]),
            seed=int(text["seed"]),
            pixels_sha256=text["pixels_sha256"],
            versions=sys.intern(text["versions"]),
            figures=Figures(**{name: float(text[name]) if text.get(name) else None for name in Figures._fields}),
            dropped=_REASON[text["dropped"]],
            start=_start(text["start"]) if "start" in text else None,
        )
    except Exception as error:  # the parsers of damaged files raise OSError, SyntaxError, struct.error, KeyError and more
        reason = "it holds no PNG" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
        raise DataError(f"{origin} is damaged or not a synthesized image: {reason}", remedy) from error
    if pixels_sha256(pixels) != record.pixels_sha256:
        raise DataError(f"{origin}: its pixels do not match their sha256", remedy)
    return pixels, record


def _start(told: str) -> int:
    if not 0 <= (start := int(told)) < 1 << 63:
        raise ValueError(f"its text says start={told[:20]!r}")
    return start


# ------------------------------------------------------------------------------------------------------------ a folder


@dataclass(frozen=True)
class Stored:
    """A synthesized image on the disk: verified pixels (H, W, C) uint8 and their record."""

    pixels: Pixels
    record: Record


def scan_class(folder: Path, names: Sequence[str], class_id: int, plan: str) -> Iterator[tuple[Path, Stored | None]]:
    """What looks like an image of a class in a synthesis folder, one after another; None where it is damaged or of another plan."""
    for kept in (True, False):
        place = (folder / image_path(names[class_id], class_id, 0, kept)).parent
        for name in sorted(path.name for path in place.iterdir()) if place.is_dir() else ():
            if match := _NAME.match(name):
                try:
                    pixels, record = decode_png(read_regular_file(place / name, MAX_PNG_BYTES), names[class_id], str(place / name))
                except DataError:
                    yield place / name, None
                    continue
                ours = (record.plan, record.class_id, record.index, record.kept) == (plan, class_id, int(match[1]), kept)
                yield place / name, Stored(pixels, record) if ours else None


def read_images(folder: Path) -> tuple[Pixels, Labels]:
    """The kept images of a synthesis folder: (N, H, W, C) uint8 and labels (N,) int64, by class and index.

    Raises DataError where the folder was not made by `diffrc synth`, holds no image, or holds a damaged one.
    """
    remedy = "diffrc synth --fill makes the images"
    if not (folder / "plan.json").exists():
        raise DataError(f"{folder} holds no synthesized images", remedy)
    plan = read_plan(folder)
    names = plan["identity"]["classes"]
    images: list[Pixels] = []
    labels: list[int] = []
    for class_id in range(len(names)):
        kept: dict[int, Pixels] = {}
        for path, image in scan_class(folder, names, class_id, plan["plan"]):
            if image is None:
                raise DataError(f"{path} is damaged or of another plan", "the same diffrc synth command makes it again")
            if image.record.kept:
                kept[image.record.index] = image.pixels
        images += [kept[index] for index in sorted(kept)]
        labels += [class_id] * len(kept)
    if not images:
        raise DataError(f"{folder} holds no synthesized images", remedy)
    return np.stack(images), np.array(labels, dtype=np.int64)


# -------------------------------------------------------------------------------------------------------------- sheets

BACKGROUND, INK, FAINT = 255, 32, 150  # gray levels: dark on light
RED = (200, 30, 30)
LEGIBLE_PX = 48  # images smaller than this are scaled up by a whole factor
LARGEST_PAIR_PX = 128  # images of a pair larger than this are reduced by a whole factor


def grid_png(images: Tensor, columns: int, scale: int = 0) -> bytes:
    """PNG of images side by side, row by row.

    Args:
        images: (N, C, H, W) in [-1, 1], C = 1 or 3.
        columns: images in a row.
        scale: whole factor, nearest neighbor; 0 = so that an image has at least 48 px.
    """
    tiles = _scaled(to_pixels(images), scale)  # (N, h, w, C)
    rows = math.ceil(len(tiles) / columns)
    height, width, channels = tiles.shape[1:]
    gap = 2
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), BACKGROUND, dtype=np.uint8)
    for i, tile in enumerate(tiles):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = tile
    return _png(canvas)


@dataclass(frozen=True)
class SheetRow:
    """One class of a contact sheet: (n, H, W, C) uint8 originals, or none of them, and generated images."""

    name: str
    originals: Pixels
    generated: Pixels


def contact_sheet(rows: Sequence[SheetRow], originals: int = 4, generated: int = 10) -> bytes:
    """PNG: a row a class, its name, up to `originals` real images, a gap, up to `generated` synthesized ones."""
    assert rows, "a sheet needs a class"
    left_count = min(originals, max(len(row.originals) for row in rows))
    right_count = max(1, min(generated, max(len(row.generated) for row in rows)))
    height, width, _ = _scaled(rows[0].generated if len(rows[0].generated) else rows[0].originals, 0).shape[1:]
    gap, split, margin, head = 4, 24, 16, 28
    font = ImageFont.load_default(size=15)
    small = ImageFont.load_default(size=13)
    label_width = max(40, min(200, max(math.ceil(font.getlength(_legible(row.name))) for row in rows)))
    left = margin + label_width + 12
    right = left + left_count * (width + gap) + (split if left_count else 0)
    canvas = Image.new("RGB", (right + right_count * (width + gap) + margin, margin + head + len(rows) * (height + gap) + margin), "white")
    draw = ImageDraw.Draw(canvas)
    if left_count:
        draw.text((left, margin), _fitted("original", small, left_count * (width + gap) + split), fill=(FAINT,) * 3, font=small)
    draw.text((right, margin), "generated", fill=(FAINT,) * 3, font=small)
    for i, row in enumerate(rows):
        top = margin + head + i * (height + gap)
        draw.text((margin, top + height / 2), _fitted(row.name, font, label_width), fill=(INK,) * 3, font=font, anchor="lm")
        for images, start, count in ((row.originals, left, left_count), (row.generated, right, right_count)):
            if len(images):
                for j, tile in enumerate(_scaled(images[:count], 0)):
                    canvas.paste(_image(tile), (start + j * (width + gap), top))
    if left_count:
        x = right - split / 2 - gap / 2
        draw.line([(x, margin + head), (x, margin + head + len(rows) * (height + gap) - gap)], fill=(FAINT,) * 3)
    return _png(np.asarray(canvas))


@dataclass(frozen=True)
class PairTile:
    """A generated image beside its nearest real one, (H, W, C) uint8 each."""

    generated: Pixels
    real: Pixels
    distance: float
    ratio: float


@dataclass(frozen=True)
class PairsRow:
    """One class of a sheet of pairs: the pairs found by pixels, and those found by features."""

    name: str
    by_pixels: Sequence[PairTile]
    by_features: Sequence[PairTile]


def pairs_sheet(rows: Sequence[PairsRow], copy_ratio: float) -> bytes:
    """PNG: a row a class, generated images each beside its nearest real one, under them their ratio and distance; copies in red."""
    assert rows and rows[0].by_pixels, "a sheet needs a pair"
    blocks = [
        ("nearest real images by pixels", [row.by_pixels for row in rows]),
        ("nearest real images by features", [row.by_features for row in rows]),
    ]
    blocks = [(title, column) for title, column in blocks if any(column)]
    side = _shown(rows[0].by_pixels[0].generated).shape[0]
    gap, split, margin, head, foot, caption = 10, 28, 16, 28, 30, 20
    pair = 2 * side + 2
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=12)
    label_width = max(40, min(200, max(math.ceil(font.getlength(_legible(row.name))) for row in rows)))
    widths = [max(max(map(len, column)) * (pair + gap) - gap, math.ceil(small.getlength(title))) for title, column in blocks]
    left = margin + label_width + 12
    legend = f"Generated | its nearest real image. Under it: d1 / d2 \N{MIDDLE DOT} d1. In red: copies, d1 / d2 at most {copy_ratio:.2g}."
    width = max(left + sum(widths) + split * (len(blocks) - 1), margin + math.ceil(small.getlength(legend))) + margin
    row_height = side + caption + gap
    canvas = Image.new("RGB", (width, margin + head + len(rows) * row_height + foot), "white")
    draw = ImageDraw.Draw(canvas)
    for i, row in enumerate(rows):
        name = _fitted(row.name, font, label_width)
        draw.text((margin, margin + head + i * row_height + side / 2), name, fill=(INK,) * 3, font=font, anchor="lm")
    for (title, column), block_width in zip(blocks, widths, strict=True):
        draw.text((left, margin), title, fill=(FAINT,) * 3, font=small)
        for i, tiles in enumerate(column):
            for j, tile in enumerate(tiles):
                x, y = left + j * (pair + gap), margin + head + i * row_height
                color = RED if tile.ratio <= copy_ratio else (FAINT,) * 3
                canvas.paste(_image(_shown(tile.generated)), (x, y))
                canvas.paste(_image(_shown(tile.real)), (x + side + 2, y))
                if tile.ratio <= copy_ratio:
                    draw.rectangle([x - 3, y - 3, x + pair + 2, y + side + 2], outline=RED, width=2)
                draw.text(
                    (x + pair / 2, y + side + 5),
                    f"{tile.ratio:.2f} \N{MIDDLE DOT} {tile.distance:.3g}",
                    fill=color,
                    font=small,
                    anchor="mt",
                )
        left += block_width + split
    draw.text((margin, margin + head + len(rows) * row_height + 4), legend, fill=(FAINT,) * 3, font=small)
    return _png(np.asarray(canvas))


def _shown(pixels: Pixels) -> Pixels:
    """One image at a size to look at: small ones enlarged without blur, large ones reduced."""
    factor = math.ceil(pixels.shape[0] / LARGEST_PAIR_PX)
    if factor > 1:
        reduced: Pixels = np.asarray(_image(pixels).reduce(factor), dtype=np.uint8)
        pixels = reduced.reshape((*reduced.shape[:2], pixels.shape[2]))
    enlarged: Pixels = _scaled(pixels[None], 0)[0]
    return enlarged


def _scaled(images: Pixels, scale: int) -> Pixels:
    factor = scale or math.ceil(LEGIBLE_PX / images.shape[1])
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def _legible(name: str) -> str:
    return "".join(c if c.isprintable() else " " for c in name[:200]).replace("_", " ")


def _fitted(name: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width_px: int) -> str:
    text = _legible(name)
    while len(text) > 1 and font.getlength(text) > width_px:
        text = text[:-2] + "…"
    return text


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _png(pixels: Pixels, text: PngImagePlugin.PngInfo | None = None) -> bytes:
    buffer = io.BytesIO()
    _image(pixels).save(buffer, format="PNG", pnginfo=text)
    return buffer.getvalue()


def versions_text(versions: Mapping[str, str]) -> str:
    """Versions as one line of JSON, sorted."""
    return json.dumps(dict(versions), sort_keys=True)
