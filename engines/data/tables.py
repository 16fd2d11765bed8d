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
# Images are packed already, so a table that unpacks to many times its size holds none; a dictionary or a run makes any size of few bytes.
MAX_GROUP_BYTES = 1 << 28  # of a row group, unpacked, or 8 times its file
MOST_EXPANSION = 8
BATCH_ROWS = 4096
TEXT = ("string", "large_string")
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
        if not self.rows:
            _refuse(self.paths[0], "it has no rows")
        size_bytes = sum(path.stat().st_size for path in self.paths)
        if self.rows > size_bytes:  # an image takes dozens
            _refuse(self.paths[0], f"{self.rows:,} rows in {size_bytes:,} bytes are no rows of images")
        self._starts = np.array([group.first_row for group in self._groups], dtype=np.int64)
        self._lock = threading.Lock()
        self._read_group = lru_cache(maxsize=GROUPS_CACHED)(self._images_of)

    def fetch(self, row: int) -> bytes:
        """The encoded image of a row."""
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        with self._lock:
            images = self._read_group(group)
        at = row - self._groups[group].first_row
        if at >= len(images):
            _refuse(self.paths[self._groups[group].file], "a row group has fewer rows than the file says")
        content = images[at].as_py()
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

        kind = self._files[0].schema_arrow.field(self._label).type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return self._words()
        columns = [_guarded(p, f.read, columns=[self._label]).column(0) for p, f in zip(self.paths, self._files, strict=True)]
        self._refuse_nulls(columns)
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

    def _words(self) -> tuple[Indices, tuple[str, ...]]:
        """Labels that are text: each word is held once, however often and wherever the file repeats it."""
        import pyarrow.parquet as pq

        columns = []
        for path in self.paths:
            file = _guarded(path, pq.ParquetFile, path, read_dictionary=[self._label])
            columns.append(_guarded(path, file.read, columns=[self._label]).column(0))
        self._refuse_nulls(columns)
        if any(str(column.type.value_type if hasattr(column.type, "value_type") else column.type) not in TEXT for column in columns):
            _refuse(self.paths[0], f"the column {self._label} holds text in some tables only")
        chunks = [chunk for column in columns for chunk in column.chunks]
        words = [_guarded(self.paths[0], chunk.dictionary.to_pylist) for chunk in chunks]
        own = sorted({word for known in words for word in known if word is not None})
        place = {name: label for label, name in enumerate(own)}
        parts = [np.array([place.get(word, -1) for word in known], dtype=np.int64) for known in words]
        indices = [np.asarray(chunk.indices) for chunk in chunks]
        if any(len(at) and at.max() >= len(part) for part, at in zip(parts, indices, strict=True)):
            _refuse(self.paths[0], f"the column {self._label} has words that its dictionary lacks")
        labels = [part[at] for part, at in zip(parts, indices, strict=True)]
        return np.concatenate([np.zeros(0, dtype=np.int64), *labels]), tuple(own)

    def _refuse_nulls(self, columns: Sequence[pa.ChunkedArray]) -> None:
        for path, column in zip(self.paths, columns, strict=True):
            if column.null_count:
                _refuse(path, f"{column.null_count} rows have no {self._label}")

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
        column = self._bounded(path, self._files[at.file], at.index)
        if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            column = pc.struct_field(column, "bytes")
        if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
            _refuse(path, f"the column {self._image} holds {column.type}, not encoded images")
        return column

    def _bounded(self, path: Path, file: Any, group: int) -> pa.ChunkedArray:
        """The image column of a row group, unpacked batch by batch so that no table is read that unpacks to any size."""
        import pyarrow as pa

        # Not `column(leaf)`: pyarrow ends the process where the metadata of a column chunk are damaged.
        packed, claimed = path.stat().st_size, file.metadata.row_group(group).total_byte_size
        most = max(MAX_GROUP_BYTES, MOST_EXPANSION * packed)
        if not 0 <= claimed <= most:
            _refuse(path, f"row group {group} unpacks to {claimed:,} bytes, in a file of {packed:,}")
        parts: list[pa.Array] = []
        held = 0
        # A value is no larger than all that is claimed, so this many are no more than half of the most.
        rows = min(BATCH_ROWS, max(1, most // (2 * max(1, claimed))))
        batches = file.iter_batches(rows, row_groups=[group], columns=[self._image])
        while (batch := _guarded(path, next, batches, None)) is not None:
            part = batch.column(0)
            held += part.get_total_buffer_size()
            if held > most:
                _refuse(path, f"row group {group} unpacks to more than {most >> 20} MiB, in a file of {packed:,} bytes")
            parts.append(part)
        return pa.chunked_array(parts, type=parts[0].type if parts else pa.binary())


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
