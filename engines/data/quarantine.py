"""The quarantine: a list of images to leave out, and of what every image was when it was checked. `diffrc data check` writes it.

No image is moved or removed. The list is a JSON document; images are named by where they lie below the data set's folder
("train/cat/7.jpg", "row 12 of test-00000-of-00001.parquet"), so that it stays true when the folder moves. It is obeyed after
test images have been held out: leaving one out changes no other image's split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from engines.data.decode import read_regular_file
from engines.data.images import ImageSet
from engines.errors import DataError

FORMAT = "diffrc-quarantine-1"
MAX_LIST_BYTES = 1 << 30
DIGEST_CHARACTERS = 32  # of sha256 in hex: half of it tells any two files apart


@dataclass(frozen=True)
class Quarantine:
    """A list that was read.

    Attributes:
        left_out: why, by image.
        digests: `digest` of the file, by image; only of those that had one.
    """

    left_out: Mapping[str, str]
    digests: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The document that `read` reads."""
        return {"format": FORMAT, "leave_out": dict(self.left_out), "sha256": dict(self.digests)}


def read(path: Path) -> Quarantine:
    """Read a list. Raises DataError where it is missing, damaged or something else."""
    remedy = f"diffrc data check --quarantine {path} writes it, with the same --recipe and --data"
    try:
        table = json.loads(read_regular_file(path.expanduser(), MAX_LIST_BYTES))
    except DataError as error:
        raise DataError(f"{error.problem} (data.quarantine)", remedy) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no quarantine list: {error}", remedy) from None
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise DataError(f"{path} is no quarantine list of this version ({FORMAT})", remedy)
    left_out, digests = table.get("leave_out"), table.get("sha256")
    if not (_words(left_out) and _words(digests)):
        raise DataError(f"{path} is damaged: leave_out and sha256 should map images to words", remedy)
    return Quarantine(left_out, digests)


def obey(images: ImageSet, listed: Quarantine, path: Path | None) -> ImageSet:
    """The set without what the list leaves out; an image whose file changed since is bad, and told so when it is read.

    Args:
        path: the data set's folder or file, as its source was given it.
    """
    names = image_names(images, path)
    kept = [i for i, name in enumerate(names) if name not in listed.left_out]
    out = images.subset(np.array(kept, dtype=np.int64))
    out.left_out = tuple(sorted(name for name in names if name in listed.left_out))
    return out.watched({i: listed.digests[names[place]] for i, place in enumerate(kept) if names[place] in listed.digests}, digest)


def image_names(images: ImageSet, path: Path | None) -> list[str]:
    """(N) the images' names in a list: origins without the folder of the data set; bytes that are no UTF-8 are spelled out."""
    base = "" if path is None else f"{path if path.is_dir() else path.parent}/"
    base = "" if base == "./" else base
    return [images.origin(i).replace(base, "", 1).encode("utf-8", "backslashreplace").decode() for i in range(len(images))]


def digest(data: bytes) -> str:
    """What a file's bytes are known by."""
    return hashlib.sha256(data).hexdigest()[:DIGEST_CHARACTERS]


def _words(table: object) -> TypeGuard[dict[str, str]]:
    return isinstance(table, dict) and all(isinstance(value, str) for value in table.values())
