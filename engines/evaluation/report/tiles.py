"""The images of a report: originals, generated and dropped ones of some classes, and the closest pairs, small enough to lie in the page.

Nothing is picked for its looks: the classes are evenly spaced from the largest to the smallest, the images are the first of each.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engines.data.decode import Pixels, read_regular_file
from engines.data.longtail import LongTail
from engines.errors import DataError
from engines.synthesis.sheet import MAX_PNG_BYTES, decode_png, image_path

CLASSES_SHOWN, CLOSEST_CLASSES_SHOWN = 20, 12
ORIGINALS_SHOWN, GENERATED_SHOWN, DROPPED_SHOWN = 5, 12, 5  # of a class
PAIRS_SHOWN = 3  # of a class and space
SPACES = ("pixel", "feature")
LARGEST_PX = 96  # larger images are reduced to this, and kept as JPEG
JPEG_QUALITY = 85


@dataclass(frozen=True)
class Tile:
    """An image as a `data:` address, what is said under it, and whether that is a warning."""

    source: str
    words: str = ""
    warns: bool = False


@dataclass(frozen=True)
class PairTiles:
    """A generated image beside its nearest real one."""

    generated: Tile
    real: Tile


@dataclass(frozen=True)
class Gallery:
    """What a report shows of one class."""

    class_id: int
    side_px: int  # of an image, before it is enlarged
    originals: Sequence[Tile]
    generated: Sequence[Tile]
    dropped: Sequence[Tile]


@dataclass
class Unread:
    """Images that are damaged or that another version made, by their place in the folder."""

    places: set[str] = field(default_factory=set)

    def read(self, path: Path, name: str) -> Pixels | None:
        """The image of a synthesized PNG, None where it cannot be read or is gone."""
        if not path.exists():
            return None
        try:
            return decode_png(read_regular_file(path, MAX_PNG_BYTES), name, str(path))[0]
        except DataError:
            self.places.add(str(path))
            return None


def read_galleries(
    folder: Path, classes: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], tail: LongTail | None, unread: Unread
) -> tuple[list[Gallery], int]:
    """Images of some of the classes that were filled, and how many filled classes are left out.

    Args:
        folder: of the synthesis.
        classes: the run's class table.
        lines: of the folder's manifest.
        tail: the run's data; None leaves out the originals.
        unread: gets what cannot be read; an image that is gone is left out without a word.

    Raises: DataError for a damaged original.
    """
    if not classes:
        return [], 0
    names, counts = classes["names"], classes["counts"]
    of_class: dict[int, list[Mapping[str, Any]]] = {}
    for line in lines:
        of_class.setdefault(line["class_id"], []).append(line)
    filled = sorted((k for k in of_class if 0 <= k < len(names)), key=lambda k: (-counts[k], k))
    shown = [filled[i * len(filled) // CLASSES_SHOWN] for i in range(CLASSES_SHOWN)] if len(filled) > CLASSES_SHOWN else filled
    galleries = [_gallery(folder, names[k], k, of_class[k], tail, unread) for k in shown]
    return [g for g in galleries if g.generated or g.dropped], len(filled) - len(shown)


def _gallery(folder: Path, name: str, class_id: int, lines: Sequence[Mapping[str, Any]], tail: LongTail | None, unread: Unread) -> Gallery:
    def images(of: Iterable[Mapping[str, Any]], most: int) -> list[tuple[Pixels, Mapping[str, Any]]]:
        """The first images that can be read, with their lines; so many are tried at most, and as many again."""
        found: list[tuple[Pixels, Mapping[str, Any]]] = []
        for line in itertools.islice(of, 2 * most):
            path = folder / image_path(name, class_id, int(line["index"]), bool(line.get("kept", True)))
            if len(found) < most and (pixels := unread.read(path, name)) is not None:
                found.append((pixels, line))
        return found

    kept = images((line for line in lines if line.get("kept", True)), GENERATED_SHOWN)
    dropped = images((line for line in lines if not line.get("kept", True)), DROPPED_SHOWN)
    return Gallery(
        class_id,
        max((pixels.shape[0] for pixels, _ in (*kept, *dropped)), default=0),
        [Tile(encoded(pixels)) for pixels in (_originals(tail, class_id) if tail else [])],
        [Tile(encoded(pixels)) for pixels, _ in kept],
        [Tile(encoded(pixels), line.get("dropped") or "") for pixels, line in dropped],
    )


def _originals(tail: LongTail, class_id: int) -> list[Pixels]:
    members = np.flatnonzero(tail.train.labels == class_id)[:ORIGINALS_SHOWN]
    return list(tail.train.subset(members).pixels(np.arange(len(members), dtype=np.int64)))


@dataclass(frozen=True)
class Closest:
    """The pairs of one class with the smallest ratios, by the space they are close in: "pixel", "feature"."""

    name: str
    side_px: int
    pairs: Mapping[str, Sequence[PairTiles]]


def read_closest(
    folder: Path, classes: Mapping[str, Any], copies: Mapping[str, Any], tail: LongTail | None, unread: Unread
) -> tuple[list[Closest], int]:
    """Generated images beside their nearest real ones, of the classes with the closest ones, and how many classes are left out.

    A pair of which an image is gone or cannot be read is left out. Raises DataError for a damaged real image.
    """
    if tail is None or not copies:
        return [], 0
    ids = {name: k for k, name in enumerate(classes["names"])}
    found = [row for row in copies["classes"] if row["class"] in ids and any(row[space]["closest"] for space in SPACES if space in row)]
    found.sort(key=lambda row: min(c["ratio"] for space in SPACES if space in row for c in row[space]["closest"]))
    places = {tail.train.origin(i): i for i in range(len(tail.train))}
    limit = float(copies["copy_ratio"])

    def pair(name: str, closest: Mapping[str, Any]) -> tuple[PairTiles, int] | None:
        generated = unread.read(folder / image_path(name, ids[name], int(Path(closest["file"]).stem)), name)
        place = places.get(closest["real"])
        if generated is None or place is None:
            return None
        real = tail.train.subset(np.array([place])).pixels(np.array([0]))[0]
        real = real[:, ::-1] if closest["mirrored"] else real
        tile = Tile(encoded(generated), f"{closest['ratio']:.2f}", closest["ratio"] <= limit)
        return PairTiles(tile, Tile(encoded(real))), generated.shape[0]

    shown = []
    for row in found[:CLOSEST_CLASSES_SHOWN]:
        pairs = {s: [p for c in row[s]["closest"][:PAIRS_SHOWN] if (p := pair(row["class"], c))] for s in SPACES if s in row}
        side = max((side for several in pairs.values() for _, side in several), default=0)
        if side:
            shown.append(Closest(row["class"], side, {s: [tiles for tiles, _ in several] for s, several in pairs.items() if several}))
    return shown, len(found) - len(found[:CLOSEST_CLASSES_SHOWN])


def data_of_run(classes: Mapping[str, Any], tail: LongTail | None) -> LongTail | None:
    """The data if it is what the run was trained on."""
    if not tail or list(tail.names) != classes.get("names") or tail.kept_sha256 != classes.get("kept_sha256"):
        return None
    return tail


def encoded(pixels: Pixels) -> str:
    """A `data:` address of (H, W, C) uint8, C = 1 or 3: PNG as it is, or JPEG of LARGEST_PX where it is larger."""
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
    buffer = io.BytesIO()
    if max(image.size) > LARGEST_PX:
        image.thumbnail((LARGEST_PX, LARGEST_PX), Image.Resampling.LANCZOS)
        image.save(buffer, format="JPEG", quality=JPEG_QUALITY)
        return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    image.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
