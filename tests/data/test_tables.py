"""Parquet tables in the Hugging Face layout, whole and damaged."""

import json
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from engines.data import tables
from engines.data.longtail import prepare
from engines.data.sources import load
from engines.errors import DataError
from engines.recipe import DataSection

DATA = DataSection(source="parquet", image_size_px=4, image_channels=1, test_per_class=1)


def png(value: int) -> bytes:
    buffer = BytesIO()
    Image.new("L", (4, 4), value).save(buffer, "PNG")
    return buffer.getvalue()


def write(
    path: Path,
    values: list[Any],
    labels: list[Any],
    names: list[str] | None = None,
    image: str = "img",
    label: str = "label",
    plain: bool = False,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images: list[Any] = [v if v is None or isinstance(v, bytes) else png(v) for v in values]
    column = pa.array(images, pa.binary()) if plain else pa.array([{"bytes": b, "path": "x.png"} for b in images])
    table = pa.table({image: column, label: pa.array(labels)})
    if names:
        features = {"info": {"features": {label: {"_type": "ClassLabel", "names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path, row_group_size=3)
    return path


def values_of(images: Any) -> list[int]:
    return [int(v) for v in images.pixels(np.arange(len(images)))[:, 0, 0, 0]]


@pytest.mark.parametrize("folder", ["", "data", "plain_text"])
@pytest.mark.parametrize("held", ["test", "validation"])
def test_shards_are_one_table_in_any_of_the_usual_folders(tmp_path: Path, folder: str, held: str) -> None:
    write(tmp_path / folder / "train-00000-of-00002.parquet", [1, 2, 3, 4], [0, 1, 0, 1], ["cat", "dog"])
    write(tmp_path / folder / "train-00001-of-00002.parquet", [5, 6, 7, 8], [1, 1, 0, 0], ["cat", "dog"])
    write(tmp_path / folder / f"{held}-00000-of-00001.parquet", [9, 10], [1, 0], ["cat", "dog"])
    train, test = load(DATA, tmp_path)
    assert train.names == ("cat", "dog")
    assert train.labels.tolist() == [0, 1, 0, 1, 1, 1, 0, 0]
    assert values_of(train) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert values_of(train.subset(np.array([7, 0, 4]))) == [8, 1, 5]
    assert (test.labels.tolist(), values_of(test)) == ([1, 0], [9, 10])
    assert train.origin(5) == f"row 1 of {tmp_path / folder / 'train-00001-of-00002.parquet'}"


@pytest.mark.parametrize(("image", "label", "plain"), [("image", "labels", False), ("img", "fine_label", True), ("image", "label", True)])
def test_the_columns_may_have_their_usual_names(tmp_path: Path, image: str, label: str, plain: bool) -> None:
    write(tmp_path / "train.parquet", [1, 2], [0, 1], ["a", "b"], image, label, plain)
    write(tmp_path / "test.parquet", [3], [1], ["a", "b"], image, label, plain)
    train, _ = load(DATA, tmp_path)
    assert train.names == ("a", "b")
    assert values_of(train) == [1, 2]


def test_without_names_in_the_metadata_classes_are_called_by_number(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [1, 2, 3], [0, 1, 2])
    write(tmp_path / "test.parquet", [1], [1])
    assert load(DATA, tmp_path)[0].names == ("0", "1", "2")


def test_text_labels_are_sorted_and_matched_by_name(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [1, 2, 3], ["dog", "cat", "eel"])
    write(tmp_path / "test.parquet", [1, 2], ["eel", "cat"])
    train, test = load(DATA, tmp_path)
    assert train.names == ("cat", "dog", "eel")
    assert (train.labels.tolist(), test.labels.tolist()) == ([1, 0, 2], [2, 0])


def test_a_test_table_with_its_names_in_another_order_is_matched_by_name(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [1, 2], [0, 1], ["cat", "dog"])
    write(tmp_path / "test.parquet", [3], [0], ["dog", "cat"])
    assert load(DATA, tmp_path)[1].labels.tolist() == [1]


def test_a_single_file_or_a_lone_training_table_has_its_test_images_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", list(range(8)), [0, 1] * 4, ["cat", "dog"])
    for at in (tmp_path, path):
        train, test = load(DATA, at)
        assert (len(train), len(test)) == (6, 2)
        assert sorted(values_of(train) + values_of(test)) == list(range(8))


def test_cifar_recipes_take_parquet_too(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [1, 2], [0, 1], ["a", "b"])
    write(tmp_path / "test.parquet", [3], [1], ["a", "b"])
    assert load(DataSection(source="cifar10"), tmp_path)[0].names == ("a", "b")


def test_an_unreadable_image_is_named_by_row_and_shard_or_left_out(tmp_path: Path) -> None:
    shard = write(tmp_path / "train-00000-of-00001.parquet", [1, b"junk", 3, None, 5], [0, 0, 1, 1, 0], ["a", "b"])
    write(tmp_path / "test.parquet", [3], [1], ["a", "b"])
    train, _ = load(DATA, tmp_path)
    with pytest.raises(DataError, match=f"row 1 of {shard} is not an image"):
        train.pixels(np.array([0]))
    train, _ = load(DATA.model_copy(update={"on_bad_image": "skip"}), tmp_path)
    assert (train.skipped, train.labels.tolist(), values_of(train)) == (2, [0, 1, 0], [1, 3, 5])


@pytest.mark.parametrize(
    ("labels", "names", "reason"),
    [
        ([0, 2], ["a", "b"], "row 1 of .* has the label 2, outside 0..1"),
        ([0, -1], ["a", "b"], "row 1 of .* has the label -1"),
        ([0, 10**12], None, "row 1 of .* has the label 1000000000000"),
        ([0, None], ["a", "b"], "2 rows have no label"),
        ([0.0, 1.0], None, "holds double, not integers"),
        ([[0], [1]], None, "not integers"),
        ([1, 2], None, "class '0' .* has no training image"),
        ([0, 0], None, "has 1 class"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, labels: list[Any], names: list[str] | None, reason: str) -> None:
    write(tmp_path / "train.parquet", [1, 2, 3, 3], [*labels, *labels], names)
    write(tmp_path / "test.parquet", [3], labels[:1], names)
    with pytest.raises(DataError, match=reason):
        load(DATA, tmp_path)


@pytest.mark.parametrize("metadata", [b"{", b"[]", b'{"info": 1}', b"[" * 100_000, b'{"info": {"features": {"label": {"names": [1]}}}}'])
def test_metadata_of_other_tools_gives_no_names(tmp_path: Path, metadata: bytes) -> None:
    write(tmp_path / "test.parquet", [3], [1])
    table = pq.read_table(write(tmp_path / "train.parquet", [1, 2], [0, 1]))
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "train.parquet")
    assert load(DATA, tmp_path)[0].names == ("0", "1")


def test_missing_columns_are_told_with_those_that_are_there(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [1], [0], image="picture")
    with pytest.raises(DataError, match=r"no column img or image, but picture, label"):
        load(DATA, tmp_path)


def test_a_table_of_no_rows_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [], [], plain=True)
    with pytest.raises(DataError, match="it has no rows"):
        load(DATA, tmp_path)


def test_images_that_are_no_bytes_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"img": ["a", "b"], "label": [0, 1]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"img": ["a", "b"], "label": [0, 1]}), tmp_path / "test.parquet")
    with pytest.raises(DataError, match="holds string, not encoded images"):
        load(DATA, tmp_path)[0].pixels(np.array([0]))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path / "train-00001-of-00003.parquet", [1], [0])
    with pytest.raises(DataError, match="lacks shard 00000 of 00003 of train"):
        load(DATA, tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.95])
def test_a_truncated_shard_is_named(tmp_path: Path, keep: float) -> None:
    path = write(tmp_path / "train.parquet", list(range(20)), [0, 1] * 10)
    os.truncate(path, int(keep if keep >= 1 else path.stat().st_size * keep))
    with pytest.raises(DataError, match=r"train\.parquet cannot be read as parquet"):
        load(DATA, tmp_path)


def test_damaged_pages_are_a_data_error(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", list(range(20)), [0, 1] * 10)
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396
    path.write_bytes(content)
    with pytest.raises(DataError):
        load(DATA, tmp_path)[0].pixels(np.array([0]))


def test_no_flipped_bit_of_the_schema_ends_the_process(tmp_path: Path) -> None:
    content = write(tmp_path / "train.parquet", [1, 2], [0, 1]).read_bytes()
    begin = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    refused = 0
    for bit in range(8 * 48):  # one of them makes `image` nullable, and pyarrow abort where a column chunk is asked for
        flipped = bytearray(content)
        flipped[begin + bit // 8] ^= 1 << bit % 8
        (tmp_path / "train.parquet").write_bytes(flipped)
        try:
            load(DATA.model_copy(update={"test_per_class": 0}), tmp_path)[0].pixels(np.array([0]))
        except DataError:
            refused += 1
    assert refused > 100


def test_a_row_group_of_fewer_rows_than_the_file_says_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "train.parquet", list(range(20)), [0, 1] * 10)
    whole = tables._Tables._images_of
    monkeypatch.setattr(tables._Tables, "_images_of", lambda self, group: whole(self, group)[:1])
    images, _ = load(DATA, tmp_path)
    with pytest.raises(DataError, match="fewer rows than the file says"):
        images.pixels(np.arange(len(images)))


def test_a_test_class_that_training_lacks_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [1, 2], ["cat", "dog"])
    write(tmp_path / "test.parquet", [1], ["eel"])
    with pytest.raises(DataError, match="class 'eel' is not in the training table"):
        load(DATA, tmp_path)


def test_the_profile_is_cut_without_reading_an_image(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", [b"not an image"] * 60, [0, 1, 2] * 20)
    write(tmp_path / "test.parquet", [1], [0])
    data = DATA.model_copy(update={"groups": "ranks", "group_sizes": (1, 1, 1), "imbalance": 10.0})
    assert prepare(data, path.parent).counts.tolist() == [20, 6, 2]


CIFAR10 = Path(os.environ.get("DIFFRC_TEST_DATA", "../shared/data")) / "cifar10"


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="needs CIFAR-10 as parquet in $DIFFRC_TEST_DATA/cifar10")
def test_cifar10_itself_gives_the_published_long_tail() -> None:
    tail = prepare(DataSection(source="cifar10", groups="ranks"), CIFAR10)
    assert tail.counts.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert (len(tail.train), len(tail.test), tail.names[9]) == (12_406, 10_000, "truck")
    trucks = tail.train.subset(np.flatnonzero(tail.train.labels == 9))
    assert trucks.pixels(np.arange(50)).std() > 30
