"""What the files of synthesized images tell, and whether they agree: the text of each PNG, its place, the manifest."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from engines.data.decode import Pixels, read_regular_file
from engines.data.names import shorten, slug
from engines.errors import DataError, Interrupted
from engines.interrupt import StopRequest
from engines.progress import Report
from engines.synthesis.places import Place, pngs
from engines.synthesis.plan import MANIFEST_FILE, ImageId
from engines.synthesis.sheet import MAX_PNG_BYTES, REJECTED, Record, decode_png
from engines.synthesis.shelf import Records

SHEETS = ("sheet.png", "copies.png")  # pictures of a synthesis folder that are no images of the plan
_IMAGE = re.compile(rf"([^/]+)/({REJECTED}/)?(\d{{6,9}})\.png")


class Disagreement(NamedTuple):
    """One thing that is not as it should be."""

    file: str  # relative to the folder of the plan, with "/"
    what: str


class Files:
    """The images of a place, and what is wrong with them as files."""

    def __init__(self, place: Place, identity: Mapping[str, Any], plan: str, names: Sequence[str]) -> None:
        self.place, self.plan, self.names = place, plan, names
        self.seed = identity.get("synth.seed")
        self.classes = {slug(name, k): k for k, name in enumerate(names)}
        self.records: dict[int, Records] = {}
        self.moved: dict[ImageId, Path] = {}  # of images elsewhere, whose place says nothing
        self.disagreements: list[Disagreement] = []
        self.count = 0

    def examine(self, report: Report, stop: StopRequest) -> None:
        """Read every image and the manifest. Raises Interrupted."""
        lines = self._lines()
        paths = [path for path in pngs(self.place.images) if not (path.parent == self.place.folder and path.name in SHEETS)]
        for path in paths:
            if stop.requested:
                raise stopped(stop, f"{self.count:,} of {len(paths):,} files are examined")
            self.count += 1
            record = self._record(path)
            name = record.path().as_posix() if self.place.elsewhere and isinstance(record, Record) else self._name(path)
            line = lines.get(name) if self.place.elsewhere else lines.pop(name, None)
            if isinstance(record, str):
                self._disagree(path, record)
            elif wrong := _held_to(record, line):
                self._disagree(path, wrong)
            elif (image := ImageId(record.class_id, record.index)) in self.moved:
                self._disagree(path, "is the same image as another file")
            else:
                self.records.setdefault(record.class_id, Records())[record.index] = record
                if self.place.elsewhere:
                    self.moved[image] = path
            report("check", self.count, len(paths), {})
        if not self.place.elsewhere:
            inside = "" if self.place.images == self.place.folder else f"{self._name(self.place.images)}/"
            missing = [name for name in lines if name.startswith(inside)]
            self.disagreements += [Disagreement(name, f"has a line in {MANIFEST_FILE}, and no file") for name in missing]

    def sample(self, count: int, seed: int) -> list[ImageId]:
        """So many images, by class and index."""
        everything = [ImageId(k, index) for k in sorted(self.records) for index in sorted(self.records[k])]
        return sorted(random.Random(seed).sample(everything, count))

    def record(self, image: ImageId) -> Record:
        """What an image says of itself."""
        return self.records[image.class_id][image.index]

    def path(self, image: ImageId) -> Path:
        """Where it lies."""
        return self.moved.get(image) or self.place.folder / self.record(image).path()

    def pixels(self, image: ImageId) -> Pixels:
        """Read again. Raises DataError where it was damaged meanwhile."""
        path = self.path(image)
        return decode_png(read_regular_file(path, MAX_PNG_BYTES), self.names[image.class_id], str(path))[0]

    def _record(self, path: Path) -> Record | str:
        """What an image says of itself, where it is whole, of this plan, and lies where it belongs; else what is wrong."""
        name = self._name(path)
        place = _IMAGE.fullmatch(name)
        if path.is_symlink():
            return "is a symbolic link"
        if not self.place.elsewhere and (place is None or place[1] not in self.classes):
            return "is in no place where an image of this plan lies"
        try:
            record = decode_png(read_regular_file(path, MAX_PNG_BYTES), "", name)[1]
        except DataError as error:
            return error.problem.removeprefix(f"{name}: ").removeprefix(name).strip()
        if record.plan != self.plan:
            return f"is of another plan ({record.plan[:8]})"
        if record.class_id not in range(len(self.names)):
            return f"says that it is of class {record.class_id}, of {len(self.names)}"
        says = replace(record, class_name=self.names[record.class_id])
        if not self.place.elsewhere and says.path().as_posix() != name:
            return f"says that it is {says.path().as_posix()}"
        if self.seed is not None and record.seed != self.seed:
            return f"says that its seed is {record.seed}, not the plan's {self.seed}"
        if not versions_of(record):
            return "does not name the versions that made it"
        return says

    def _lines(self) -> dict[str, dict[str, Any]]:
        """The manifest by file. A line that cannot be read, or that is there twice, disagrees."""
        path, found = self.place.folder / MANIFEST_FILE, dict[str, dict[str, Any]]()
        if not path.is_file():
            self.disagreements.append(Disagreement(MANIFEST_FILE, "is not there"))
            return found
        for number, text in enumerate(path.read_bytes().splitlines(), 1):
            try:
                line = json.loads(text)
                name = str(line["file"])
            except (ValueError, KeyError, TypeError, RecursionError):
                self.disagreements.append(Disagreement(MANIFEST_FILE, f"line {number} cannot be read"))
                continue
            if name in found:
                self.disagreements.append(Disagreement(MANIFEST_FILE, f"line {number} names {shorten(name)} again"))
            found[name] = line
        return found

    def _name(self, path: Path) -> str:
        return path.relative_to(self.place.root).as_posix()

    def _disagree(self, path: Path, what: str) -> None:
        self.disagreements.append(Disagreement(self._name(path), what))


def _held_to(record: Record, line: Mapping[str, Any] | None) -> str:
    """How a line of the manifest differs from what its image says, "" where it does not. Lines of older versions say less."""
    if line is None:
        return f"has no line in {MANIFEST_FILE}"
    expected = record.line()
    needed = ("class_id", "class", "index", "pixels_sha256")
    other = [key for key, value in expected.items() if (key in line or key in needed) and line.get(key) != value]
    return f"its line in {MANIFEST_FILE} says otherwise: {', '.join(other)}" if other else ""


def versions_of(record: Record) -> dict[str, str]:
    """The packages that made an image; {} where its text is no such table."""
    try:
        versions = json.loads(record.versions)
    except ValueError:
        return {}
    return versions if isinstance(versions, dict) else {}


def stopped(stop: StopRequest, what: str) -> Interrupted:
    """The end of a job that keeps nothing, so that there is nothing to continue."""
    error = stop.error(what)
    return Interrupted(error.problem, "the same command begins again", error.signal_number)
