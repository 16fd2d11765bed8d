"""CSV and text lists: read as people write them, refused by line number."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from engines.data.lists import Entry, read_list
from engines.data.sources import load
from engines.errors import DataError
from engines.recipe import DataSection

DATA = DataSection(source="list", image_size_px=4, image_channels=1, test_per_class=1)


def draw(root: Path, paths: list[str]) -> None:
    for value, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), value).save(root / path, "PNG")


def write(root: Path, name: str, text: str | bytes) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root / name


def test_imagenet_lt_lists_are_read_with_synsets_as_names(tmp_path: Path) -> None:
    paths = ["train/n02/a.JPEG", "train/n01/b.JPEG", "train/n02/c.JPEG", "val/n01/d.JPEG"]
    draw(tmp_path, paths)
    write(tmp_path, "ImageNet_LT_train.txt", "train/n02/a.JPEG 1\ntrain/n01/b.JPEG 0\ntrain/n02/c.JPEG 1\n")
    write(tmp_path, "ImageNet_LT_val.txt", "train/n01/other.JPEG 0\n")
    write(tmp_path, "ImageNet_LT_test.txt", "val/n01/d.JPEG 0\n")
    train, test = load(DATA, tmp_path)
    assert train.names == ("n01", "n02")
    assert train.labels.tolist() == [1, 0, 1]
    assert train.pixels(np.arange(3))[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert (test.labels.tolist(), test.pixels(np.array([0])).max()) == ([0], 3)


def test_one_csv_file_may_hold_both_splits(tmp_path: Path) -> None:
    draw(tmp_path, ["a.png", "b c.png", "d,e.png"])
    path = write(tmp_path, "all.csv", b'\xef\xbb\xbfSplit,Path,Label,note\r\ntrain,a.png,0,\r\ntrain,"b c.png",1,x\r\nval,"d,e.png",1,\r\n')
    for at in (path, tmp_path):
        train, test = load(DATA, at)
        assert train.names == ("0", "1")  # one folder for all: no names in it
        assert train.pixels(np.arange(2))[:, 0, 0, 0].tolist() == [0, 1]
        assert test.pixels(np.array([0])).max() == 2


def test_without_a_test_list_images_are_held_out(tmp_path: Path) -> None:
    paths = [f"{k}/{i}.png" for k in "ab" for i in range(3)]
    draw(tmp_path, paths)
    path = write(tmp_path, "list.txt", "\n".join(f"{p} {'ab'.index(p[0])}" for p in paths))
    train, test = load(DATA, path)
    assert (len(train), len(test), train.names) == (4, 2, ("a", "b"))


def test_bom_line_ends_blank_lines_and_blanks_in_paths_are_fine(tmp_path: Path) -> None:
    path = write(tmp_path, "train.txt", b"\xef\xbb\xbfa b/x.png 0\r\n\r\n  c.png\t12  \nd\xc3\xa9.png 3")
    assert read_list(path, "train") == [
        Entry("a b/x.png", 0, "train", 1),
        Entry("c.png", 12, "train", 3),
        Entry("dé.png", 3, "train", 4),
    ]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("l.csv", "path,class\na.png,0\n", "line 1: no column 'label'"),
        ("l.csv", "", "line 1: no column 'path'"),
        ("l.csv", "path,label\na.png,0\nb.png,cat\n", "line 3: the label 'cat' is not a class number"),
        ("l.csv", "path,label\na.png\n", "line 2: 1 fields, not 2"),
        ("l.csv", 'path,label\n"a.png,0\n', "no valid CSV"),
        ("l.csv", "path,label,split\na.png,0,holdout\n", "line 2: split 'holdout'"),
        ("l.csv", 'path,label\n"a\nb.png",0\nc.png,x\n', "line 4: the label 'x'"),  # a quoted line break is counted
        ("l.txt", "a.png 0\nb.png -1\n", "line 2: the label '-1'"),
        ("l.txt", "a.png 1.0\n", "line 1: the label '1.0'"),
        ("l.txt", "a.png 1_0\n", "line 1"),
        ("l.txt", "a.png ٣\n", "line 1"),
        ("l.txt", "a.png 99999999999999\n", "line 1"),
        ("l.txt", "a.png\n", "line 1: 'a.png' is not a path and a label"),
        ("l.txt", "a.png 0\n../b.png 0\n", "line 2: the path '../b.png'"),
        ("l.txt", "a/../../b.png 0\n", "line 1: the path"),
        ("l.txt", "/etc/passwd 0\n", "line 1: the path '/etc/passwd'"),
        ("l.csv", "path,label\n,0\n", "line 2: the path ''"),
        ("l.txt", b"a.png 0\nb\0.png 0\n", "line 2: a NUL byte"),
        ("l.csv", b"path,label\na\0,0\n", "line 2: a NUL byte"),
        ("l.txt", b"a.png 0\n\xff\xfe.png 0\n", "line 2: not UTF-8"),
        ("l.txt", "a.png 0\nb.png 0\nx/../a.png 1\n", "line 3: 'a.png' is on line 1 already"),
    ],
)
def test_mistakes_are_told_with_their_line(tmp_path: Path, name: str, content: str | bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_list(write(tmp_path, name, content), "train")


def test_an_image_in_both_splits_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "train.txt", "a.png 0\nb.png 1\n")
    write(tmp_path, "test.txt", "./b.png 1\n")
    with pytest.raises(DataError, match=r"'b\.png' is listed for training and for testing"):
        load(DATA, tmp_path)


def test_a_test_label_that_training_lacks_is_refused_with_its_line(tmp_path: Path) -> None:
    write(tmp_path, "train.txt", "a.png 0\nb.png 1\n")
    write(tmp_path, "test.txt", "c.png 1\nd.png 2\n")
    with pytest.raises(DataError, match=r"test\.txt, line 2: label 2 is not in the training list"):
        load(DATA, tmp_path)


def test_a_label_that_no_training_image_has_is_refused(tmp_path: Path) -> None:
    draw(tmp_path, ["a.png", "b.png"])
    write(tmp_path, "train.txt", "a.png 0\n")
    write(tmp_path, "test.txt", "b.png 0\n")
    with pytest.raises(DataError, match="at least two"):
        load(DATA, tmp_path)
    write(tmp_path, "train.txt", "a.png 2\n")
    with pytest.raises(DataError, match=r"class '0' .* has no training image \(nor have 1 more classes\)"):
        load(DATA, tmp_path)


def test_images_that_are_not_below_the_list_are_told_at_once(tmp_path: Path) -> None:
    write(tmp_path, "train.txt", "train/a.png 0\ntrain/b.png 1\n")
    with pytest.raises(DataError, match="the images of the list are not there"):
        load(DATA, tmp_path)


def test_a_folder_with_no_or_several_training_lists_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found: none"):
        load(DATA, tmp_path)
    for name in ("train_a.txt", "train_b.txt"):
        write(tmp_path, name, "a 0\n")
    with pytest.raises(DataError, match=r"found: train_a\.txt, train_b\.txt"):
        load(DATA, tmp_path)


NAME = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="/\\"), min_size=1, max_size=8).filter(
    lambda s: s.strip(".") == s
)
ROWS = st.lists(st.tuples(st.lists(NAME, min_size=1, max_size=3).map("/".join), st.integers(0, 999)), max_size=12, unique_by=lambda r: r[0])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, newline=st.sampled_from(["\n", "\r\n"]), bom=st.booleans())
def test_what_is_written_is_read(tmp_path: Path, rows: list[tuple[str, int]], newline: str, bom: bool) -> None:
    mark = "\ufeff" if bom else ""
    text = write(tmp_path, "l.txt", mark + newline.join(f"{path} {label}" for path, label in rows))
    quoted = ['"' + path.replace('"', '""') + '"' for path, _ in rows]
    table = write(
        tmp_path, "l.csv", mark + newline.join(["label,path", *(f"{label},{q}" for (_, label), q in zip(rows, quoted, strict=True))])
    )
    assert [(e.path, e.label) for e in read_list(text, "train")] == rows
    assert [(e.path, e.label) for e in read_list(table, "train")] == rows


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=80), st.text('ab/.,"\n\r 01', max_size=40).map(str.encode)), csv=st.booleans())
def test_any_content_gives_entries_inside_the_folder_or_a_line_number(tmp_path: Path, content: bytes, csv: bool) -> None:
    path = write(tmp_path, "f.csv" if csv else "f.txt", (b"path,label\n" if csv else b"") + content)
    try:
        entries = read_list(path, "train")
    except DataError as error:
        assert ", line " in error.problem
    else:
        assert all((tmp_path / entry.path).resolve().is_relative_to(tmp_path.resolve()) for entry in entries)
