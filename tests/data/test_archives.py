"""CIFAR's own archives, and files that only pretend to be one."""

import gzip
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.data import archives
from engines.data.sources import load
from engines.errors import DataError
from engines.recipe import DataSection

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
DATA = DataSection(source="cifar10")
Files = dict[str, bytes]


def batch(number: int, per_class: int = 2) -> tuple[np.ndarray, list[int]]:
    labels = [k for k in range(10) for _ in range(per_class)]
    return np.random.default_rng(number).integers(0, 256, (len(labels), 3072), dtype=np.uint8), labels


def python_files(protocol: int = 2, names: tuple[Any, ...] = ("data", "labels")) -> Files:
    files = {}
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels, labels = batch(number)
        files[name] = pickle.dumps({names[0]: pixels, names[1]: labels, b"batch_label": b"x", b"filenames": [b"a.png"] * 20}, protocol)
    files["batches.meta"] = pickle.dumps({"label_names": NAMES, "num_vis": 3072}, protocol)
    return files


def binary_files() -> Files:
    files = {}
    for number, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        pixels, labels = batch(number)
        files[name] = np.concatenate([np.array(labels, dtype=np.uint8)[:, None], pixels], axis=1).tobytes()
    files["batches.meta.txt"] = "\n".join(NAMES).encode() + b"\n\n"
    return files


def unpacked(root: Path, folder: str, files: Files) -> Path:
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / folder / name).write_bytes(content)
    return root


def packed(path: Path, folder: str, files: Files, mode: str = "w:gz", prefix: str = "") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            add(archive, f"{prefix}{folder}/{name}", content)
    return path


def add(archive: tarfile.TarFile, name: str, content: bytes = b"", **header: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in header.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def check(path: Path) -> None:
    train, test = load(DATA, path)
    assert train.names == tuple(NAMES)
    assert np.bincount(train.labels).tolist() == [10] * 10
    assert np.bincount(test.labels).tolist() == [2] * 10
    for images, number, offset in ((train, 0, 0), (train, 4, 80), (test, 5, 0)):
        pixels, labels = batch(number)
        assert images.labels[offset : offset + 20].tolist() == labels
        assert (images.pixels(np.arange(offset, offset + 20)) == pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)).all()
    assert train.sizes == {(32, 32): 100}


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_unpacked_python_batches_are_read(tmp_path: Path, protocol: int) -> None:
    check(unpacked(tmp_path, "cifar-10-batches-py", python_files(protocol)))


def test_python_batches_with_byte_keys_are_read_from_their_own_folder(tmp_path: Path) -> None:
    check(unpacked(tmp_path, "cifar-10-batches-py", python_files(2, (b"data", b"labels"))) / "cifar-10-batches-py")


def test_batches_that_python_2_wrote_are_read(tmp_path: Path) -> None:
    """Protocol 2 with byte strings, as in the archive itself: written out by hand."""

    def text(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value

    files = python_files()
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels, labels = batch(number)
        array = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R"
        dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\0K\1\x87R(K\3" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        state = b"(K\1K\x14M\0\x0c\x86" + dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
        listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
        files[name] = b"\x80\2}(" + text(b"data") + array + state + text(b"labels") + listed + b"u."
    check(unpacked(tmp_path, "cifar-10-batches-py", files))


def test_binary_batches_are_read(tmp_path: Path) -> None:
    check(unpacked(tmp_path, "cifar-10-batches-bin", binary_files()))


@pytest.mark.parametrize("mode", ["w:gz", "w"])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_archives_are_read_packed(tmp_path: Path, mode: str, prefix: str) -> None:
    check(packed(tmp_path / "a.tar", "cifar-10-batches-py", python_files(), mode, prefix))
    check(packed(tmp_path / "b.tar", "cifar-10-batches-bin", binary_files(), mode, prefix))


def test_a_folder_that_holds_the_archive_will_do(tmp_path: Path) -> None:
    packed(tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", python_files())
    check(tmp_path)


@pytest.mark.parametrize("kind", ["python", "binary"])
def test_cifar100_takes_the_fine_labels(tmp_path: Path, kind: str) -> None:
    pixels, fine = np.zeros((100, 3072), dtype=np.uint8), list(range(100))
    names = [f"class_{k}" for k in range(100)]
    if kind == "python":
        table = pickle.dumps({"data": pixels, "fine_labels": fine, "coarse_labels": [0] * 100}, 2)
        unpacked(tmp_path, "cifar-100-python", {"train": table, "test": table, "meta": pickle.dumps({"fine_label_names": names}, 2)})
    else:
        records = np.concatenate([np.zeros((100, 1), dtype=np.uint8), np.arange(100, dtype=np.uint8)[:, None], pixels], axis=1).tobytes()
        files = {"train.bin": records, "test.bin": records, "fine_label_names.txt": "\n".join(names).encode()}
        unpacked(tmp_path, "cifar-100-binary", files)
    train, test = load(DataSection(source="cifar100"), tmp_path)
    assert train.labels.tolist() == test.labels.tolist() == fine
    assert train.names == tuple(names)


class Payload:
    """What a malicious pickle would do: call something with an argument."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.args


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("call", [os.system, eval, exec, getattr, __import__, np.load, tarfile.open])
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, call: Callable[..., Any], protocol: int) -> None:
    canary = tmp_path / "canary"
    payload = Payload(call, f"touch {canary}" if call is os.system else f"open({str(canary)!r}, 'w').close()")
    files = python_files() | {"data_batch_3": pickle.dumps({"data": payload, "labels": []}, protocol)}
    with pytest.raises(DataError, match="data_batch_3"):
        load(DATA, unpacked(tmp_path, "cifar-10-batches-py", files))
    assert not canary.exists()


@pytest.mark.parametrize("method", ["dump", "tofile"])
def test_an_allowed_name_with_a_dotted_tail_reaches_nothing(tmp_path: Path, method: str) -> None:
    canary = tmp_path / "canary"
    attack = b"\x80\4\x8c\5numpy\x8c" + bytes([8 + len(method)]) + f"ndarray.{method}".encode() + b"\x93\x8c" + bytes([len(str(canary))])
    attack += str(canary).encode() + b"\x85R."
    with pytest.raises(DataError, match="which no CIFAR file does"):
        load(DATA, unpacked(tmp_path, "cifar-10-batches-py", python_files() | {"data_batch_1": attack}))
    assert not canary.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"\x80\2}.",  # an empty table
        b"\x80\2K\1.",  # a number
        b"\x80\2" + b")" + b"\x85" * 200_000 + b".",  # tuples nested until hashing one would overflow the stack
        b"\x80\2" + b"]" * 100_000 + b"a" * 99_999 + b".",  # nested lists
        b"\x80\2}r\xff\xff\xff\x7f.",  # a memo of two thousand million entries
        b"\x80\4\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",  # bytes longer than any memory
        b"B\xff\xff\xff\x7fabc.",
        b"\x80\2X\xff\xff\xff\xffabc.",
        b"\x80\2cnumpy\nndarray\n)\x81.",  # an instance without its constructor
        b"\x80\2Pid\n.",
        pickle.dumps({"data": np.zeros((1, 3072), dtype=np.float32), "labels": [0]}, 2),
        pickle.dumps({"data": np.array([None, []], dtype=object), "labels": [0]}, 2),
        pickle.dumps({"data": np.zeros((1, 3071), dtype=np.uint8), "labels": [0]}, 2),
        pickle.dumps({"data": np.zeros((2, 3072), dtype=np.uint8), "labels": [0]}, 2),
        pickle.dumps({"data": np.zeros((1, 3072), dtype=np.uint8), "labels": ["cat"]}, 2),
        pickle.dumps({"data": np.zeros((1, 3072), dtype=np.uint8), "labels": [10]}, 2),
        pickle.dumps({"data": np.zeros((1, 3072), dtype=np.uint8), "labels": [-1]}, 2),
        pickle.dumps({"labels": [0]}, 2),
    ],
)
def test_a_foreign_or_damaged_batch_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError):
        load(DATA, unpacked(tmp_path, "cifar-10-batches-py", python_files() | {"data_batch_1": content}))


def test_a_batch_cut_anywhere_is_refused(tmp_path: Path) -> None:
    files = python_files()
    whole = files["data_batch_1"]
    for length in range(0, len(whole), len(whole) // 15):
        with pytest.raises(DataError, match="data_batch_1"):
            load(DATA, unpacked(tmp_path, "cifar-10-batches-py", files | {"data_batch_1": whole[:length]}))


def test_a_truncated_binary_batch_is_refused(tmp_path: Path) -> None:
    files = binary_files()
    files["test_batch.bin"] = files["test_batch.bin"][:-1]
    with pytest.raises(DataError, match=r"test_batch\.bin is truncated"):
        load(DATA, unpacked(tmp_path, "cifar-10-batches-bin", files))


def test_a_missing_batch_is_named(tmp_path: Path) -> None:
    files = python_files()
    del files["data_batch_4"]
    with pytest.raises(DataError, match="'data_batch_4' is missing"):
        load(DATA, unpacked(tmp_path, "cifar-10-batches-py", files))


def test_a_folder_without_cifar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no cifar10"):
        load(DATA, tmp_path)


def test_hostile_members_are_neither_extracted_nor_read(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    path = folder / "x.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "../escaped", b"x")
        add(archive, f"{tmp_path}/absolute", b"x")
        add(archive, "link", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(archive, "device", type=tarfile.CHRTYPE)
        add(archive, "../cifar-10-batches-py/data_batch_1", b"not this one")
        for name, content in python_files().items():
            add(archive, f"cifar-10-batches-py/{name}", content)
    check(path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "x.tar.gz"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_a_batch_that_is_no_plain_member_is_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "cifar-10-batches-py/data_batch_1", type=kind, linkname="/etc/passwd")
    with pytest.raises(DataError, match="is a link, a device, or there twice"):
        load(DATA, tmp_path / "x.tar")


def test_a_batch_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "cifar-10-batches-py/data_batch_1", b"1")
        add(archive, "cifar-10-batches-py/data_batch_1", b"2")
    with pytest.raises(DataError, match="there twice"):
        load(DATA, tmp_path / "x.tar")


def test_a_member_larger_than_any_of_the_archive_is_refused_from_its_header(tmp_path: Path) -> None:
    header = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    header.size = 10**12
    (tmp_path / "x.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)
    with pytest.raises(DataError, match="larger members"):
        load(DATA, tmp_path / "x.tar")


def test_a_small_file_that_unpacks_to_more_than_the_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_ARCHIVE_BYTES", 1 << 20)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        add(archive, "zeros", b"\0" * (2 << 20))
    with pytest.raises(DataError, match="unpacks to more than 1 MiB"):
        load(DATA, tmp_path / "x.tar.gz")


def test_an_archive_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = packed(tmp_path / "x.tar.gz", "cifar-10-batches-py", python_files()).read_bytes()
    for length in (0, 1, 5, 30, len(whole) // 3, len(whole) // 2, len(whole) - 2000):
        (tmp_path / "cut.tar.gz").write_bytes(whole[:length])
        with pytest.raises(DataError):
            load(DATA, tmp_path / "cut.tar.gz")


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", gzip.compress(b"hello", mtime=0), gzip.compress(b"", mtime=0)],
    ids=["nothing", "text", "gzip of text", "gzip of nothing"],
)
def test_what_is_no_tar_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar.gz").write_bytes(content)
    with pytest.raises(DataError):
        load(DATA, tmp_path / "x.tar.gz")
