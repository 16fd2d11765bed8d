"""The formats: what lies in each, and that readers find the same pixels and labels there."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from engines import store
from engines.data.images import ImageSet
from engines.data.names import slug
from engines.data.sources import load
from engines.recipe import DataSection
from engines.sharing.balanced import Balanced, Sample
from engines.sharing.layouts import COLUMNS, FORMATS, Format, class_folders, order_of, size_bound, tar_stream, write


def written(balanced: Balanced, layout: Format, folder: Path, shard_bytes: int = 1 << 30) -> tuple[Path, dict[str, dict[str, int]]]:
    with store.building(folder, 0) as building:
        sizes = write(balanced, [balanced.train, balanced.test], layout, shard_bytes, building, lambda: None)
    return folder, sizes


def samples(balanced: Balanced, layout: Format) -> list[Sample]:
    return list(balanced.samples(balanced.train, order_of(balanced, balanced.train, layout)))


def by_name(images: ImageSet) -> list[tuple[str, bytes]]:
    pixels = images.pixels(np.arange(len(images)))
    return sorted((images.names[label], image.tobytes()) for label, image in zip(images.labels, pixels, strict=True))


def expected(balanced: Balanced, split: str) -> list[tuple[str, bytes]]:
    part = balanced.train if split == "train" else balanced.test
    pixels = balanced.pixels(part, np.arange(len(part)))
    return sorted((balanced.names[label], image.tobytes()) for label, image in zip(part.labels, pixels, strict=True))


def metadata(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "metadata.csv").read_bytes().decode(), newline="")))


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -------------------------------------------------------------------------------------------------------------- folders


def test_our_own_folder_source_reads_the_same_pixels_and_class_names_back(digits: Balanced, tmp_path: Path) -> None:
    folder, _ = written(digits, "folder", tmp_path / "out")
    data = DataSection(source="folder", image_size_px=8, image_channels=1, profile="as-is")
    for images, split in zip(load(data, folder), ("train", "test"), strict=True):
        assert by_name(images) == expected(digits, split)


def test_a_folder_has_a_row_for_every_image_and_an_image_for_every_row(digits: Balanced, tmp_path: Path) -> None:
    folder, _ = written(digits, "folder", tmp_path / "out")
    table = metadata(folder)
    assert list(table[0]) == ["file_name", "split", *COLUMNS]
    images = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    assert {row["file_name"] for row in table} == images
    assert len(table) == len(images) == len(digits.train) + len(digits.test)
    for row in table:
        kind = "synthetic" if row["synthetic"] == "true" else "real"
        assert Path(row["file_name"]).name == f"{kind}-{int(row['index']):06d}.png"
        assert row["class_name"] == digits.names[int(row["label"])]
        assert row["file_name"].startswith(f"{row['split']}/{row['class_name']}/")
    assert {row["split"] for row in table if row["synthetic"] == "true"} == {"train"}


def test_the_rows_of_a_folder_stand_in_the_order_in_which_loaders_list_it(digits: Balanced, tmp_path: Path) -> None:
    folder, _ = written(digits, "folder", tmp_path / "out")
    train = [row["file_name"] for row in metadata(folder) if row["split"] == "train"]
    assert train == sorted(train)
    classes = json.loads((folder / "classes.json").read_text(encoding="utf-8"))["classes"]
    listed = sorted(path.name for path in (folder / "train").iterdir())
    assert [listed[entry["folder_index"]] for entry in classes] == [entry["folder"] for entry in classes] == list(digits.names)


def test_an_imagefolder_has_typed_columns_for_every_image_of_a_split(digits: Balanced, tmp_path: Path) -> None:
    folder, sizes = written(digits, "imagefolder", tmp_path / "out")
    for split, part in (("train", digits.train), ("test", digits.test)):
        rows = store.read_json_lines(folder / split / "metadata.jsonl")
        assert sizes[split]["num_examples"] == len(rows) == len(part)
        assert sorted(row["file_name"] for row in rows) == sorted(
            path.relative_to(folder / split).as_posix() for path in (folder / split).rglob("*.png")
        )
        for row in rows:  # a null, or 1 for 1.0, would give readers a column of another type
            kinds = {"string": str, "int64": int, "bool": bool, "float64": float}
            assert {key: type(value) for key, value in row.items()} == {"file_name": str} | {c: kinds[k] for c, k in COLUMNS.items()}


# ------------------------------------------------------------------------------------------------------ parquet and tars


def test_our_own_parquet_source_reads_the_same_pixels_labels_and_names_back(hostile: Balanced, tmp_path: Path) -> None:
    folder, _ = written(hostile, "parquet", tmp_path / "out", shard_bytes=200_000)
    assert len(list((folder / "data").glob("train-*-of-*.parquet"))) > 1
    train, test = load(hostile.run.recipe.data, folder)
    assert train.names == test.names == hostile.names
    order = order_of(hostile, hostile.train, "parquet")
    assert np.array_equal(train.labels, hostile.train.labels[order])
    assert np.array_equal(train.pixels(np.arange(len(train))), hostile.pixels(hostile.train, order))
    assert by_name(test) == expected(hostile, "test")


def test_a_table_says_in_its_schema_what_hugging_face_datasets_read_there(digits: Balanced, tmp_path: Path) -> None:
    folder, sizes = written(digits, "parquet", tmp_path / "out")
    table = pq.read_table(folder / "data" / "train-00000-of-00001.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == table.column_names == ["image", *COLUMNS]
    assert features["image"] == {"_type": "Image"}
    assert features["label"] == {"names": list(digits.names), "_type": "ClassLabel"}
    assert features["synthetic"] == {"dtype": "bool", "_type": "Value"}
    assert str(table.schema.field("image").type) == "struct<bytes: binary, path: string>"
    assert all(str(table.schema.field(c).type) == {"float64": "double"}.get(kind, kind) for c, kind in COLUMNS.items())
    rows: list[dict[str, Any]] = table.to_pylist()
    assert [{c: row[c] for c in COLUMNS} for row in rows] == [sample.row() for sample in samples(digits, "parquet")]
    assert [row["image"] for row in rows] == [{"bytes": s.png, "path": f"{s.id}.png"} for s in samples(digits, "parquet")]
    assert sizes["train"]["num_examples"] == len(rows)


def test_tars_hold_every_sample_whole_and_are_no_larger_than_asked(hostile: Balanced, tmp_path: Path) -> None:
    folder, _ = written(hostile, "webdataset", tmp_path / "out", shard_bytes=300_000)
    index = json.loads((folder / "train-index.json").read_text(encoding="utf-8"))
    assert index["classes"] == list(hostile.names)
    assert [shard["url"] for shard in index["shardlist"]] == [f"train-{n:06d}.tar" for n in range(len(index["shardlist"]))]
    assert len(index["shardlist"]) > 1
    want = iter(samples(hostile, "webdataset"))
    for shard in index["shardlist"]:
        path = folder / shard["url"]
        assert path.stat().st_size == shard["filesize"] <= 300_000
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            assert len(members) == 3 * shard["nsamples"]
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in members} == {
                (0, 0, 0, "", "", 0o644, tarfile.REGTYPE)
            }
            contents = [(m.name, tar.extractfile(m).read()) for m in members]  # type: ignore[union-attr]
        for place in range(0, len(contents), 3):
            sample = next(want)
            png, cls, told = contents[place : place + 3]
            assert png == (f"{sample.id}.png", sample.png)
            assert cls == (f"{sample.id}.cls", str(sample.label).encode())
            assert told[0] == f"{sample.id}.json"
            assert json.loads(told[1]) == sample.row()
    assert next(want, None) is None


def test_a_tar_stream_is_the_tar_that_tarfile_writes() -> None:
    members = [("a.png", b"x" * 700), ("a.cls", b""), ("b.json", b"y" * 512)]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    ours = b"".join(tar_stream(members))
    assert buffer.getvalue().startswith(ours)
    assert not any(buffer.getvalue()[len(ours) :])  # tarfile pads to its block of 10 KiB


def test_a_shuffled_order_mixes_classes_and_kinds_from_the_start(digits: Balanced) -> None:
    first = order_of(digits, digits.train, "webdataset")[:40]
    assert len(set(digits.train.labels[first])) > 5
    assert set(digits.train.synthetic[first]) == {True, False}


# ------------------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("layout", FORMATS)
def test_equal_runs_give_equal_bytes_below_the_bound_of_their_size(layout: Format, digits: Balanced, tmp_path: Path) -> None:
    first, second = (files(written(digits, layout, tmp_path / name)[0]) for name in ("a", "b"))
    assert first == second
    bound = sum(size_bound(digits, split, layout) for split in (digits.train, digits.test))
    assert sum(map(len, first.values())) <= bound


@pytest.mark.parametrize("layout", FORMATS)
def test_no_class_name_reaches_a_path_that_it_could_break(layout: Format, hostile: Balanced, tmp_path: Path) -> None:
    folder, _ = written(hostile, layout, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for name in files(folder):
        parts = name.split("/")
        assert len(parts) <= 3
        assert all(part.isprintable() and part.strip(". ") == part and not set(part) & set('<>:"\\|?*') for part in parts)
        assert all(len(part.encode()) <= 255 for part in parts)
    if layout in ("folder", "imagefolder"):
        classes = json.loads((folder / "classes.json").read_text(encoding="utf-8"))["classes"]
        assert [entry["name"] for entry in classes] == list(hostile.names)
        assert sorted(entry["folder"] for entry in classes) == sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())


def test_folders_bear_the_names_that_every_file_system_takes_and_slugs_for_the_rest(hostile: Balanced) -> None:
    names = ["zero", "black swan", "é", "v1.0", "Cat", "cat", "con", "a/b", "a_b-0007", ".hidden", "x ", "e\u0301", "ﬁ", "", "8"]
    kept = {"zero", "black swan", "é", "v1.0", "8"}
    folders = class_folders(names)
    assert folders == [name if name in kept else slug(name, k) for k, name in enumerate(names)]
    assert len({folder.casefold() for folder in class_folders(hostile.names)}) == len(hostile.names)
