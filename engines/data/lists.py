"""Image lists: CSV with the columns path and label, or text lines `train/n01440764/x.JPEG 0` as ImageNet-LT has them."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, NoReturn

import numpy as np

from engines.data.decode import read_regular_file
from engines.data.images import EncodedReader, ImageSet
from engines.data.splits import Splits, hold_out, image_set
from engines.errors import DataError
from engines.recipe import DataSection

MAX_LIST_BYTES = 1 << 28
MAX_CLASSES = 1 << 20
SPLITS = {"train": "train", "test": "test", "val": "test", "validation": "test"}
REMEDY = "a line is `folder/image.jpg 0`; a CSV file has the columns path, label and, if it holds both splits, split"


class Entry(NamedTuple):
    """One line of a list."""

    path: str  # relative to the list's folder, with /
    label: int
    split: str  # "train" | "test"
    line: int


def load(data: DataSection, path: Path) -> Splits:
    """Train and test images of one or two lists. Image paths are relative to the list's folder.

    A class is named after the folder its images lie in, where labels and folders are one to one; else by its number.

    Args:
        path: a folder with `*train*.txt` (or .csv) and `*test*` (or `*val*`), or one list: then a CSV file's column `split`
            tells test images, or `test_per_class` are held out.

    Raises:
        DataError: with the line number: a missing column, a label that is no number, a path outside the folder, NUL bytes, a
            path that is there twice.
    """
    train_list, test_list = _find(path) if path.is_dir() else (path, None)
    root = train_list.parent
    train = read_list(train_list, "train")
    test = [entry for entry in train if entry.split == "test"]
    train = [entry for entry in train if entry.split == "train"]
    if test_list is not None:
        test = [entry._replace(split="test") for entry in read_list(test_list, "test")]
    if not train:
        raise DataError(f"{train_list} lists no training image", REMEDY)
    both = {entry.path for entry in train} & {entry.path for entry in test}
    if both:
        raise DataError(f"{min(both)!r} is listed for training and for testing", "keep test images out of the training list")
    names = _names(train)
    unknown = next((entry for entry in test if entry.label >= len(names)), None)
    if unknown:
        _refuse(test_list or train_list, unknown.line, f"label {unknown.label} is not in the training list")
    images = _split(data, root, train, names)
    if test:
        return images, _split(data, root, test, names)
    return hold_out(images, data.test_per_class, f"add a test list, {root / 'test.txt'}")


def read_list(path: Path, split: str) -> list[Entry]:
    """The entries of a list; those that name no split of their own belong to `split`. Raises DataError with the line number."""
    content = read_regular_file(path, MAX_LIST_BYTES)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _refuse(path, content.count(b"\n", 0, error.start) + 1, "not UTF-8 text")
    if "\0" in text:
        _refuse(path, text.count("\n", 0, text.index("\0")) + 1, "a NUL byte")
    lines: dict[str, int] = {}
    entries: list[Entry] = []
    for entry in _csv_entries(path, text, split) if path.suffix.lower() == ".csv" else _text_entries(path, text, split):
        if entry.path in lines:
            _refuse(path, entry.line, f"{entry.path!r} is on line {lines[entry.path]} already")
        lines[entry.path] = entry.line
        entries.append(entry)
    return entries


def _text_entries(path: Path, text: str, split: str) -> Iterator[Entry]:
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        if not line.strip():
            continue
        words = line.strip().rsplit(maxsplit=1)
        if len(words) < 2:
            _refuse(path, number, f"{line.strip()[:80]!r} is not a path and a label")
        yield _entry(path, number, words[0], words[1], split)


def _csv_entries(path: Path, text: str, split: str) -> Iterator[Entry]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        missing = [name for name in ("path", "label") if name not in header]
        if missing:
            _refuse(path, 1, f"no column {missing[0]!r} in the header")
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                _refuse(path, reader.line_num, f"{len(row)} fields, not {len(header)}")
            cells = dict(zip(header, (cell.strip() for cell in row), strict=True))
            own = cells.get("split", split)
            if own not in SPLITS:
                _refuse(path, reader.line_num, f"split {own[:80]!r} is none of {', '.join(SPLITS)}")
            yield _entry(path, reader.line_num, cells["path"], cells["label"], SPLITS[own])
    except csv.Error as error:
        _refuse(path, reader.line_num, f"no valid CSV: {error}")


def _entry(path: Path, line: int, image: str, label: str, split: str) -> Entry:
    if not re.fullmatch(r"[0-9]{1,9}", label, re.ASCII) or int(label) >= MAX_CLASSES:
        _refuse(path, line, f"the label {label[:80]!r} is not a class number")
    clean = os.path.normpath(image)  # "" becomes "."
    if clean.startswith("/") or clean.split("/")[0] in (".", ".."):
        _refuse(path, line, f"the path {image[:80]!r} is not one of an image inside the list's folder")
    return Entry(clean, int(label), split, line)


def _names(train: Sequence[Entry]) -> tuple[str, ...]:
    folders: dict[int, set[str]] = {}
    for entry in train:
        folders.setdefault(entry.label, set()).add(PurePosixPath(entry.path).parent.name)
    count = max(folders) + 1
    single = [next(iter(folders[k])) if len(folders.get(k, ())) == 1 else "" for k in range(count)]
    return tuple(single) if all(single) and len(set(single)) == count else tuple(str(k) for k in range(count))


def _split(data: DataSection, root: Path, entries: Sequence[Entry], names: Sequence[str]) -> ImageSet:
    first = root / entries[0].path
    if not os.path.exists(first):  # noqa: PTH110 - Path.exists raises for a name longer than any file's
        raise DataError(
            f"the images of the list are not there: {str(first)[:400]} does not exist", "put the list into the folder its paths start from"
        )
    paths = [entry.path for entry in entries]
    reader = EncodedReader(len(paths), lambda row: read_regular_file(root / paths[row]), lambda row: str(root / paths[row]))
    return image_set(data, np.array([entry.label for entry in entries], dtype=np.int64), names, reader)


def _find(folder: Path) -> tuple[Path, Path | None]:
    lists = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".txt", ".csv") and p.is_file())
    train, test, val = ([p for p in lists if word in p.stem.lower()] for word in ("train", "test", "val"))
    if len(train) == 1:
        held = test or val
        if len(held) > 1:
            raise DataError(f"{folder} holds several test lists: {held[0].name}, {held[1].name}", "keep one of them there")
        return train[0], held[0] if held else None
    if len(lists) == 1:
        return lists[0], None
    found = ", ".join(p.name for p in (train or lists)[:4]) or "none"
    raise DataError(
        f"{folder} needs one training list, *train*.txt or .csv; found: {found}",
        f"put one there, or name it: --data {folder}/LIST.txt; {REMEDY}",
    )


def _refuse(path: Path, line: int, reason: str) -> NoReturn:
    raise DataError(f"{path}, line {line}: {reason}", REMEDY)
