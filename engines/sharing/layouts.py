"""The formats: how the balanced data set lies in a folder, for whom, and how it is read there.

folder        train/<class>/*.png, test/<class>/*.png, metadata.csv, classes.json: torchvision, ultralytics, Keras, `data.source = "folder"`
imagefolder   the same files with a metadata.jsonl in each split: the Hugging Face imagefolder
parquet       data/train-00000-of-00002.parquet with the images inside: the Hugging Face hub, `data.source = "parquet"`
webdataset    train-000000.tar with <id>.png, <id>.cls and <id>.json: streaming, many machines
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from engines.data.images import Indices
from engines.data.names import slug
from engines.sharing.balanced import Balanced, Sample, Split
from engines.store import Building

if TYPE_CHECKING:
    import pyarrow as pa

Format = Literal["folder", "imagefolder", "parquet", "webdataset"]
FORMATS: tuple[Format, ...] = ("folder", "imagefolder", "parquet", "webdataset")

# Column -> Hugging Face type, in the order of `Sample.row`; the label is a ClassLabel.
COLUMNS: Mapping[str, str] = {
    "id": "string",
    "label": "int64",
    "class_name": "string",
    "synthetic": "bool",
    "group": "string",
    "index": "int64",
    "seed": "int64",
    "plan": "string",
    "weight": "float64",
}
GROUP_ROWS = 100  # rows of a parquet row group, the unit of reading
TAR_BLOCK = 512
ROW_BYTES = 1024  # more than an image's row takes beside pixels and names
MAX_FOLDER_CHARACTERS = 64
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}  # no file names on Windows

Heard = Callable[[], None]


def order_of(balanced: Balanced, split: Split, layout: Format) -> Indices:
    """(N,) the order in which a format lists a split, which is that of its readers.

    Folders are listed by class folder and file name; tables and tars, which may be read as a stream, are shuffled.
    """
    if layout in ("folder", "imagefolder"):
        return split.by_class(np.argsort(np.argsort(class_folders(balanced.names))))
    return split.shuffled(balanced.run.recipe.seed)


def size_bound(balanced: Balanced, split: Split, layout: Format) -> int:
    """Bytes that a split does not exceed."""
    return int(_row_bounds(balanced, split, layout).sum()) + (1 << 16)


def write(
    balanced: Balanced, splits: Sequence[Split], layout: Format, shard_bytes: int, building: Building, heard: Heard
) -> dict[str, dict[str, int]]:
    """Write splits into a folder in the making.

    Args:
        shard_bytes: size that no table or tar exceeds, unless it holds a single image.
        heard: called after every image.

    Returns: bytes and images by split.
    Raises: DataError for a damaged image, StorageError.
    """
    facts: dict[str, dict[str, int]] = {}
    if layout == "folder":
        building.write("metadata.csv", _csv_with_images(balanced, splits, building, heard))
    if layout in ("folder", "imagefolder"):
        building.write("classes.json", [_json({"classes": _class_table(balanced.names)})])
    for split in splits:
        before = building.bytes
        if layout == "imagefolder":
            building.write(f"{split.name}/metadata.jsonl", _lines_with_images(balanced, split, building, heard))
        elif layout == "parquet":
            _write_tables(balanced, split, shard_bytes, building, heard)
        elif layout == "webdataset":
            _write_tars(balanced, split, shard_bytes, building, heard)
        facts[split.name] = {"num_bytes": building.bytes - before, "num_examples": len(split)}
    return facts


# -------------------------------------------------------------------------------------------------------------- folders


def class_folders(names: Sequence[str]) -> list[str]:
    """(K) a folder name for each class, all different, on file systems that ignore case too.

    The name itself where every file system takes it as it is: NFKC letters and digits, inside also " ._-". Else `names.slug`.
    """
    slugs = [slug(name, k) for k, name in enumerate(names)]
    folded = Counter(name.casefold() for name in names)
    taken = set(slugs)
    return [
        name if _is_safe(name) and folded[name.casefold()] == 1 and name.casefold() not in taken else slugs[k]
        for k, name in enumerate(names)
    ]


def _is_safe(name: str) -> bool:
    return (
        0 < len(name) <= MAX_FOLDER_CHARACTERS
        and len(name.encode()) <= 200
        and all(c.isalnum() or c in " ._-" for c in name)
        and name[0].isalnum()
        and name[-1].isalnum()
        and name == unicodedata.normalize("NFKC", name)
        and name.split(".")[0].casefold() not in _RESERVED
    )


def _class_table(names: Sequence[str]) -> list[dict[str, Any]]:
    """Label, name and folder of each class, and its place in the sorted folders: the label that torchvision gives it."""
    folders = class_folders(names)
    place = {folder: i for i, folder in enumerate(sorted(folders))}
    return [{"label": k, "name": name, "folder": folders[k], "folder_index": place[folders[k]]} for k, name in enumerate(names)]


def _placed(balanced: Balanced, split: Split, layout: Format, building: Building, heard: Heard) -> Iterator[tuple[str, Sample]]:
    """Write each image of a split into its class folder, and tell its file within the split."""
    folders = class_folders(balanced.names)
    for sample in balanced.samples(split, order_of(balanced, split, layout)):
        file = f"{folders[sample.label]}/{sample.file}"
        building.write(f"{split.name}/{file}", [sample.png])
        heard()
        yield file, sample


def _csv_with_images(balanced: Balanced, splits: Sequence[Split], building: Building, heard: Heard) -> Iterator[bytes]:
    """The lines of metadata.csv, writing each image on the way: none is held longer than its line takes."""
    yield _csv_line(["file_name", "split", *COLUMNS])
    for split in splits:
        for file, sample in _placed(balanced, split, "folder", building, heard):
            yield _csv_line([f"{split.name}/{file}", split.name, *(_csv_cell(value) for value in sample.row().values())])


def _lines_with_images(balanced: Balanced, split: Split, building: Building, heard: Heard) -> Iterator[bytes]:
    """The lines of metadata.jsonl, writing each image on the way."""
    for file, sample in _placed(balanced, split, "imagefolder", building, heard):
        yield json.dumps({"file_name": file, **sample.row()}, ensure_ascii=False).encode() + b"\n"


def _csv_cell(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _csv_line(cells: Sequence[str]) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\r\n").writerow(cells)  # it quotes the characters of its line end alone, and a reader ends at either
    return line.getvalue().removesuffix("\r\n").encode() + b"\n"


# -------------------------------------------------------------------------------------------------------------- parquet


def features(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The columns of a table as the Hugging Face schema metadata spells them."""
    values: dict[str, dict[str, Any]] = {column: {"dtype": kind, "_type": "Value"} for column, kind in COLUMNS.items()}
    return {"image": {"_type": "Image"}, **values, "label": {"names": list(names), "_type": "ClassLabel"}}


def table_schema(names: Sequence[str]) -> pa.Schema:
    """Arrow types of the columns, with the class names in the metadata key `huggingface`."""
    import pyarrow as pa

    types = {"string": pa.string(), "int64": pa.int64(), "bool": pa.bool_(), "float64": pa.float64()}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields = [("image", image), *((column, types[kind]) for column, kind in COLUMNS.items())]
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features(names)}})})


def _write_tables(balanced: Balanced, split: Split, shard_bytes: int, building: Building, heard: Heard) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = table_schema(balanced.names)
    order = order_of(balanced, split, "parquet")
    parts = _shards(order, _row_bounds(balanced, split, "parquet"), shard_bytes)
    for number, part in enumerate(parts):
        buffer = pa.BufferOutputStream()
        with pq.ParquetWriter(buffer, schema, use_dictionary=["class_name", "group", "plan"]) as writer:
            for rows in _groups(balanced.samples(split, part), heard):
                columns = {"image": [{"bytes": sample.png, "path": f"{sample.id}.png"} for sample in rows]}
                columns |= {column: [getattr(sample, column) for sample in rows] for column in COLUMNS}
                writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))
        building.write(f"data/{split.name}-{number:05d}-of-{len(parts):05d}.parquet", [buffer.getvalue()])


def _groups(samples: Iterable[Sample], heard: Heard) -> Iterator[list[Sample]]:
    rows: list[Sample] = []
    for sample in samples:
        rows.append(sample)
        heard()
        if len(rows) == GROUP_ROWS:
            yield rows
            rows = []
    if rows:
        yield rows


# ----------------------------------------------------------------------------------------------------------- webdataset


def _write_tars(balanced: Balanced, split: Split, shard_bytes: int, building: Building, heard: Heard) -> None:
    order = order_of(balanced, split, "webdataset")
    shards = []
    for number, part in enumerate(_shards(order, _row_bounds(balanced, split, "webdataset"), shard_bytes)):
        name, before, sha256 = f"{split.name}-{number:06d}.tar", building.bytes, hashlib.sha256()
        members = _members(balanced.samples(split, part), heard)
        building.write(name, _hashed(tar_stream(members), sha256))
        size = building.bytes - before
        shards.append({"url": name, "nsamples": len(part), "filesize": size, "sha256": sha256.hexdigest()})
    index = {"wids_version": 1, "name": f"{balanced.run.recipe.name} {split.name}", "classes": list(balanced.names), "shardlist": shards}
    building.write(f"{split.name}-index.json", [_json(index)])


def _members(samples: Iterable[Sample], heard: Heard) -> Iterator[tuple[str, bytes]]:
    for sample in samples:
        yield f"{sample.id}.png", sample.png
        yield f"{sample.id}.cls", str(sample.label).encode()
        yield f"{sample.id}.json", json.dumps(sample.row(), ensure_ascii=False).encode()
        heard()


def tar_stream(members: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    """A tar of files as a stream of bytes that depends on nothing but names and contents: no owner, time 0, mode 644."""
    for name, data in members:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        yield member.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
        yield data
        yield bytes(-len(data) % TAR_BLOCK)
    yield bytes(2 * TAR_BLOCK)


def _hashed(parts: Iterable[bytes], digest: Any) -> Iterator[bytes]:
    for part in parts:
        digest.update(part)
        yield part


# --------------------------------------------------------------------------------------------------------------- shards


def _row_bounds(balanced: Balanced, split: Split, layout: Format) -> Indices:
    """(N,) bytes that no image takes more of, with all that is told of it: shards are cut before an image is encoded."""
    told = ROW_BYTES + 2 * np.array([len(name.encode()) * 6 for name in balanced.names], dtype=np.int64)[split.labels]
    around = 6 * TAR_BLOCK if layout == "webdataset" else 0  # three headers, three paddings
    return np.asarray(split.png_bytes + told + around, dtype=np.int64)


def _shards(order: Indices, bounds: Indices, shard_bytes: int) -> list[Indices]:
    """The order cut into pieces of at most `shard_bytes`, or of one image; at least one piece."""
    cuts, size = [], 0
    for place, row in enumerate(order):
        if size and size + bounds[row] > shard_bytes:
            cuts.append(place)
            size = 0
        size += int(bounds[row])
    return np.split(order, cuts)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
