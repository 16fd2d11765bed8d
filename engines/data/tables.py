"""Parquet tables in the Hugging Face layout: encoded images in a column, labels beside them, class names in the metadata."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from engines.data.decode import BadImage
from engines.data.images import EncodedReader, ImageSet, Indices
from engines.data.splits import Splits, hold_out, image_set
from engines.errors import DataError
from engines.recipe import DataSection

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label")
TEST_SPLITS = ("test", "validation", "val")
GROUPS_CACHED = 4  # row groups whose encoded images stay in memory
MAX_METADATA_BYTES = 1 << 24
REMEDY = "expected: train-*.parquet and test-*.parquet with the columns image (or img) and label"


def holds_parquet(path: Path) -> bool:
    """Whether a path is a parquet file or a folder that `load` would find some in."""
    return path.suffix == ".parquet" or any(_files(folder, "train") for folder in _folders(path))


def load(data: DataSection, path: Path) -> Splits:
    """Train and test tables; without a test (or validation) table the test split is held out of train.

    Args:
        path: a folder with `train-*.parquet`, in itself or in one folder below it (`data/`, `plain_text/`), or a single file.

    Raises:
        DataError: no or incomplete tables, missing columns, labels that are no class, splits that name different classes.
    """
    if path.is_file():
        return hold_out(_split(data, _Tables([path]), None), data.test_per_class)
    found = [folder for folder in _folders(path) if _files(folder, "train")]
    if not found:
        raise DataError(f"{path} holds no train-*.parquet", REMEDY)
    if len(found) > 1 and found[0] != path:
        raise DataError(f"{path} holds several data sets: {found[0].name}, {found[1].name}", f"--data {found[0]}")
    train = _split(data, _Tables(_files(found[0], "train")), None)
    held = next((files for split in TEST_SPLITS if (files := _files(found[0], split))), None)
    if held is None:
        return hold_out(train, data.test_per_class, f"add a table {found[0]}/test-00000-of-00001.parquet")
    return train, _split(data, _Tables(held), train.names)


def _split(data: DataSection, tables: _Tables, names: Sequence[str] | None) -> ImageSet:
    """One split; `names` are those of the training split, which a test split must not exceed."""
    labels, own_names = tables.labels(names)
    if names is not None and list(own_names) != list(names):
        unknown = [name for name in own_names if name not in names]
        if unknown:
            _refuse(tables.paths[0], f"class {unknown[0]!r} is not in the training table")
        labels = np.array([names.index(name) for name in own_names], dtype=np.int64)[labels]  # by name, never by position
    return image_set(data, labels, names or own_names, EncodedReader(len(labels), tables.fetch, tables.origin))


@dataclass(frozen=True)
class _Group:
    """A row group: the unit in which parquet is read."""

    file: int
    index: int
    first_row: int


class _Tables:
    """The shards of one split, read as one table."""

    def __init__(self, paths: Sequence[Path]) -> None:
        import pyarrow.parquet as pq  # a third of a second, and only this source needs it

        self.paths = tuple(paths)
        self._files = [_guarded(path, pq.ParquetFile, path) for path in paths]
        self._image, self._label = (self._column(known) for known in (IMAGE_COLUMNS, LABEL_COLUMNS))
        self._groups: list[_Group] = []
        self.rows = 0
        for number, file in enumerate(self._files):
            for index in range(file.metadata.num_row_groups):
                self._groups.append(_Group(number, index, self.rows))
                self.rows += file.metadata.row_group(index).num_rows
        self._starts = np.array([group.first_row for group in self._groups], dtype=np.int64)
        self._lock = threading.Lock()
        self._read_group = lru_cache(maxsize=GROUPS_CACHED)(self._images_of)

    def fetch(self, row: int) -> bytes:
        """The encoded image of a row."""
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        with self._lock:
            images = self._read_group(group)
        content = images[row - self._groups[group].first_row].as_py()
        if content is None:
            raise BadImage("empty", f"{self.origin(row)} has no image bytes", "--set data.on_bad_image=skip leaves it out")
        assert isinstance(content, bytes)
        return content

    def origin(self, row: int) -> str:
        group = self._groups[int(np.searchsorted(self._starts, row, side="right")) - 1]
        first = next(g.first_row for g in self._groups if g.file == group.file)
        return f"row {row - first} of {self.paths[group.file]}"

    def labels(self, known: Sequence[str] | None) -> tuple[Indices, tuple[str, ...]]:
        """(N,) labels and K names: those of the schema's ClassLabel, a text column's words in order, `known`, or the numbers."""
        import pyarrow as pa

        columns = [_guarded(p, f.read, columns=[self._label]).column(0) for p, f in zip(self.paths, self._files, strict=True)]
        for path, column in zip(self.paths, columns, strict=True):
            if column.null_count:
                _refuse(path, f"{column.null_count} rows have no {self._label}")
        kind = columns[0].type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            words = [word for column in columns for word in column.to_pylist()]
            own = sorted(set(words))
            place = {name: label for label, name in enumerate(own)}
            return np.array([place[word] for word in words], dtype=np.int64), tuple(own)
        if not all(pa.types.is_integer(column.type) for column in columns):
            _refuse(self.paths[0], f"the column {self._label} holds {kind}, not integers or text")
        values = np.concatenate([column.to_numpy().astype(np.int64) for column in columns])
        names = self._class_names() or known
        top = len(names) if names else len(values)  # without names there are no more classes than images
        wrong = np.flatnonzero((values < 0) | (values >= top))
        if len(wrong):
            row = int(wrong[0])
            raise DataError(f"{self.origin(row)} has the label {values[row]}, outside 0..{top - 1}", REMEDY)
        return values, tuple(names) if names else tuple(str(k) for k in range(int(values.max(initial=-1)) + 1))

    def _class_names(self) -> tuple[str, ...] | None:
        metadata = (self._files[0].schema_arrow.metadata or {}).get(b"huggingface", b"")
        if not metadata or len(metadata) > MAX_METADATA_BYTES:
            return None
        try:
            names = json.loads(metadata)["info"]["features"][self._label]["names"]
        except (ValueError, KeyError, TypeError, RecursionError):  # other tools write this key too; then there are no names
            return None
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            return None
        return tuple(names)

    def _column(self, known: Sequence[str]) -> str:
        there = self._files[0].schema_arrow.names
        name = next((name for name in known if name in there), None)
        if name is None:
            _refuse(self.paths[0], f"it has no column {' or '.join(known)}, but {', '.join(there[:8])}")
        for path, file in zip(self.paths, self._files, strict=True):
            if name not in file.schema_arrow.names:
                _refuse(path, f"it has no column {name}, unlike {self.paths[0].name}")
        return name

    def _images_of(self, group: int) -> pa.ChunkedArray:
        import pyarrow as pa
        import pyarrow.compute as pc

        at = self._groups[group]
        path = self.paths[at.file]
        column = _guarded(path, self._files[at.file].read_row_group, at.index, columns=[self._image]).column(0)
        if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            column = pc.struct_field(column, "bytes")
        if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
            _refuse(path, f"the column {self._image} holds {column.type}, not encoded images")
        return column


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return [path, *sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))]


def _files(folder: Path, split: str) -> list[Path]:
    """The shards of a split, in order. Raises DataError where one of `-of-` many is missing."""
    shards = sorted(p for p in folder.glob(f"{split}*.parquet") if re.fullmatch(rf"{split}([-.].*)?\.parquet", p.name))
    numbered = [match for p in shards if (match := re.search(r"-(\d{5})-of-(\d{5})", p.name))]
    if len(numbered) == len(shards) and numbered:
        there = [int(match[1]) for match in numbered]
        absent = sorted(set(range(int(numbered[0][2]))) - set(there))
        if absent:
            raise DataError(f"{folder} lacks shard {absent[0]:05d} of {numbered[0][2]} of {split}", "download the missing shard")
        assert all(a < b for a, b in pairwise(there))
    return shards


def _guarded(path: Path, call: Any, *args: Any, **options: Any) -> Any:
    """What pyarrow returns; its errors as DataError naming the shard."""
    import pyarrow as pa

    try:
        return call(*args, **options)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(f"{path} cannot be read as parquet: {reason}", "download it again") from None


def _refuse(path: Path, reason: str) -> NoReturn:
    raise DataError(f"{path}: {reason}", REMEDY)
