"""CIFAR-10 and CIFAR-100 as their authors distribute them: python or binary archive, as a tar file or unpacked.

Nothing is extracted: members are read into memory by the names they are known to have, within size limits. The python
batches are pickles; they are read as a tree of plain values in which a call is only noted down (`_Call`), so that no
file can run anything.
"""

from __future__ import annotations

import gzip
import io
import pickle
import pickletools
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from engines.data.decode import Pixels, read_regular_file
from engines.data.images import ArrayReader, ImageSet, Indices
from engines.data.splits import Splits, image_set
from engines.errors import DataError
from engines.recipe import DataSection

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

IMAGE_BYTES = 3 * 32 * 32
MAX_MEMBER_BYTES = 320 << 20  # the largest member, CIFAR-100's training batch, has 155 MB, half as much again if Python 3 wrote it
MAX_ARCHIVE_BYTES = 512 << 20  # unpacked; the archives have 162 to 186 MB, likewise
MAX_MEMBERS = 64
TAR_BLOCK = 512
BLOCK_BYTES = 1 << 20  # read at a time
PLAIN_FILES = (b"0", b"\0")
MAX_OPCODES = 1 << 20
MAX_TUPLES = 256
REMEDY = "download the archive from https://www.cs.toronto.edu/~kriz/cifar.html again, or give the parquet folder"

Members = Mapping[str, bytes]


@dataclass(frozen=True)
class Layout:
    """One of the four archives."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    label_bytes: int = 0  # in front of each binary record, the last of them the label; 0 = pickles
    labels_key: str = "labels"
    names_key: str = "label_names"


LAYOUTS = {
    "cifar10": (
        Layout("cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",), "batches.meta"),
        Layout("cifar-10-batches-bin", tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",), "batches.meta.txt", 1),
    ),
    "cifar100": (
        Layout("cifar-100-python", ("train",), ("test",), "meta", labels_key="fine_labels", names_key="fine_label_names"),
        Layout("cifar-100-binary", ("train.bin",), ("test.bin",), "fine_label_names.txt", 2),
    ),
}
CLASSES = {"cifar10": 10, "cifar100": 100}


def load(data: DataSection, path: Path) -> Splits:
    """The official training and test images.

    Args:
        path: the tar file (gzipped or not), the unpacked folder, or a folder that holds either.

    Raises:
        DataError: none of these, or a damaged or foreign file in it.
    """
    layouts = LAYOUTS[data.source]
    layout, members = _read_tar(path, layouts) if path.is_file() else _read_folder(path, layouts, data.source)
    missing = [name for name in (*layout.train, *layout.test, layout.meta) if name not in members]
    if missing:
        raise DataError(f"{path} is not the complete {data.source} archive: {missing[0]!r} is missing", REMEDY)
    names = _names(layout, members, CLASSES[data.source])
    train, test = (_split(data, layout, members, files, names) for files in (layout.train, layout.test))
    return train, test


def _split(data: DataSection, layout: Layout, members: Members, files: Sequence[str], names: Sequence[str]) -> ImageSet:
    batches = [(_binary_batch if layout.label_bytes else _pickle_batch)(layout, name, members[name]) for name in files]
    labels = np.concatenate([labels for _, labels in batches])
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= len(names):
        raise DataError(f"{layout.folder} holds labels outside 0..{len(names) - 1}", REMEDY)
    planes = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, 3, 32, 32)  # as stored: (N, C, H, W)
    return image_set(data, labels, names, ArrayReader(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), f"{layout.folder}/{files[0]}"))


def _binary_batch(layout: Layout, name: str, content: bytes) -> tuple[Pixels, Indices]:
    record_bytes = layout.label_bytes + IMAGE_BYTES
    if not content or len(content) % record_bytes:
        raise DataError(f"{layout.folder}/{name} is truncated: {len(content)} bytes are no multiple of {record_bytes}", REMEDY)
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, record_bytes)
    return records[:, layout.label_bytes :], records[:, layout.label_bytes - 1].astype(np.int64)


def _pickle_batch(layout: Layout, name: str, content: bytes) -> tuple[Pixels, Indices]:
    origin = f"{layout.folder}/{name}"
    table = _pickled_table(content, origin)
    pixels = _array(table.get("data"), origin)
    labels = table.get(layout.labels_key)
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 2**31 for label in labels):
        _refuse(origin, f"{layout.labels_key} is not a list of integers")
    if pixels.shape != (len(labels), IMAGE_BYTES):
        _refuse(origin, f"data has the shape {pixels.shape}, not ({len(labels)}, {IMAGE_BYTES})")
    return pixels, np.array(labels, dtype=np.int64)


def _names(layout: Layout, members: Members, classes: int) -> tuple[str, ...]:
    origin = f"{layout.folder}/{layout.meta}"
    if layout.label_bytes:
        names: Any = members[layout.meta].decode("ascii", "replace").split()
    else:
        names = _pickled_table(members[layout.meta], origin).get(layout.names_key)
    if not isinstance(names, list) or len(names) != classes or not all(isinstance(_plain(name), str | bytes) for name in names):
        _refuse(origin, f"it does not name {classes} classes")
    return tuple(_text(name) for name in names)


# --- archives -----------------------------------------------------------------------------------------------------


def _read_folder(path: Path, layouts: Sequence[Layout], source: str) -> tuple[Layout, Members]:
    for layout in layouts:
        for folder in (path, path / layout.folder):
            if (folder / layout.train[0]).is_file() and (folder / layout.meta).exists():
                known = [name for name in (*layout.train, *layout.test, layout.meta) if (folder / name).exists()]
                return layout, {name: read_regular_file(folder / name, MAX_MEMBER_BYTES) for name in known}
    tars = sorted(p for p in path.glob(f"{source.replace('cifar', 'cifar-')}-*.tar*") if p.is_file())
    if tars:
        return _read_tar(tars[0], layouts)
    folders = " nor ".join(layout.folder for layout in layouts)
    raise DataError(f"{path} holds no {source}: neither {folders}, nor a tar file of them, nor parquet files", REMEDY)


def _read_tar(path: Path, layouts: Sequence[Layout]) -> tuple[Layout, Members]:
    wanted = {f"{lay.folder}/{name}": (lay, name) for lay in layouts for name in (*lay.train, *lay.test, lay.meta)}
    found: dict[str, bytes] = {}
    layout = layouts[0]
    try:
        with _unpacked(path) as stream:
            for count, header in enumerate(_headers(stream)):
                if count >= MAX_MEMBERS or header.size_bytes > MAX_MEMBER_BYTES:
                    _refuse(str(path), "it has more or larger members than the official archive")
                padding = -header.size_bytes % TAR_BLOCK
                if header.name not in wanted:  # also whatever lies outside the archive's folder
                    _skip(stream, header.size_bytes + padding)
                    continue
                layout, short = wanted[header.name]
                if header.kind not in PLAIN_FILES or short in found:
                    _refuse(str(path), f"{header.name!r} is a link, a device, or there twice")
                found[short] = stream.read(header.size_bytes)
                if len(found[short]) != header.size_bytes:
                    raise ValueError(f"{header.name} is cut off")
                _skip(stream, padding)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path} is damaged or no tar archive: {error}", REMEDY) from None
    return layout, found


class _Header(NamedTuple):
    """What of a tar member's header counts for files of known, short names."""

    name: str
    kind: bytes  # b"0" or b"\0" for a plain file
    size_bytes: int


def _headers(stream: io.BufferedReader) -> Iterator[_Header]:
    """The headers of a tar archive, one after another; whoever asks for the next has read the member.

    Our own because nothing but names, kinds and sizes is needed: the extensions that a general reader interprets (of pax and GNU: long
    names, sparse files) are members like any other here, and what is in them costs the time of reading past it, not more.
    Raises ValueError.
    """
    first = True
    while (block := stream.read(TAR_BLOCK)).strip(b"\0"):
        if len(block) < TAR_BLOCK or _number(block[148:156]) != sum(block[:148]) + 8 * ord(" ") + sum(block[156:]):
            raise ValueError("it is cut off" if len(block) < TAR_BLOCK else "the checksum of a header is wrong")
        first = False
        parts = (block[345:500], block[:100]) if block[257:262] == b"ustar" and block[262:264] != b" \0" else (block[:100],)
        name = "/".join(part.partition(b"\0")[0].decode("utf-8", "replace") for part in parts if part[:1] != b"\0")
        yield _Header(name.removeprefix("./").rstrip("/"), block[156:157], _number(block[124:136]))
    if first:
        raise ValueError("it holds no member")


def _number(field: bytes) -> int:
    """Octal digits of a tar header; or, where a size has more of them than fit, the bytes of a number whose first bit is set."""
    if field[0] & 0x80:
        value = int.from_bytes(field[1:])
        if field[0] != 0x80:
            raise ValueError("a member has a negative size")
        return value
    digits = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise ValueError("a number of a header is none")
    return int(digits or b"0", 8)


def _skip(stream: io.BufferedReader, length: int) -> None:
    while length > 0 and (block := stream.read(min(length, BLOCK_BYTES))):
        length -= len(block)


class _Limited(io.RawIOBase):
    """A stream that ends in an error after MAX_ARCHIVE_BYTES: a small file can unpack to any size."""

    def __init__(self, stream: gzip.GzipFile | IO[bytes], file: IO[bytes]) -> None:
        self._stream = stream
        self._file = file
        self._left = MAX_ARCHIVE_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, target: Buffer) -> int:
        view = memoryview(target)
        block = self._stream.read(min(len(view), BLOCK_BYTES))
        self._left -= len(block)
        if self._left < 0:
            raise ValueError(f"it unpacks to more than {MAX_ARCHIVE_BYTES >> 20} MiB")
        view[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self._file.close()
        super().close()


def _unpacked(path: Path) -> io.BufferedReader:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    stream = path.open("rb")
    return io.BufferedReader(_Limited(gzip.GzipFile(fileobj=stream) if zipped else stream, stream))


# --- pickles ------------------------------------------------------------------------------------------------------


class _Call:
    """A callable that a pickle names, or what calling it would have made: noted down, not called."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...] | None = None) -> None:
        self.name = name
        self.args = args
        self.state: Any = None

    def __call__(self, *args: Any) -> _Call:
        return _Call(self.name, args)

    def __setstate__(self, state: Any) -> None:
        self.state = state


KNOWN_CALLS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),  # written by NumPy 2
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),  # how Python 3 writes bytes at protocol 2
}

# What dictionaries, lists, numbers, strings and one array need; no instances, no persistent ids, no extension codes.
OPCODES = (
    "PROTO FRAME STOP MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 "
    "LONG1 STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES UNICODE BINUNICODE SHORT_BINUNICODE "
    "EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "GLOBAL STACK_GLOBAL REDUCE BUILD"
)
KNOWN_OPCODES = frozenset(OPCODES.split())


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Call:
        if (module, name) not in KNOWN_CALLS:
            raise pickle.UnpicklingError(f"it asks for {module[:40]}.{name[:40]}, which no CIFAR file does")
        return _Call(name)


def _pickled_table(content: bytes, origin: str) -> dict[str, Any]:
    """The dictionary that a pickle holds, with text keys."""
    try:
        _scan(content)
        table = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{origin} is no CIFAR batch: {str(error)[:200] or type(error).__name__}", REMEDY) from None
    if not isinstance(table, dict):
        _refuse(origin, "it holds no dictionary")
    return {_text(key): value for key, value in table.items() if isinstance(_plain(key), str | bytes)}


def _scan(content: bytes) -> None:
    """Refuse what would make the unpickler itself misbehave: deep nesting, a huge memo, rare opcodes, numbers that all hash alike."""
    tuples = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if isinstance(argument, int) and abs(argument) >= 1 << 63:
            raise pickle.UnpicklingError(f"{opcode.name} at operation {count} holds a number larger than any of CIFAR's")
        tuples += opcode.name.startswith("TUPLE")
        if opcode.name not in KNOWN_OPCODES or tuples > MAX_TUPLES or count > MAX_OPCODES:
            raise pickle.UnpicklingError(f"{opcode.name} at operation {count} is more than any CIFAR file uses")
        if opcode.name.endswith("PUT") and int(argument or 0) > MAX_OPCODES:
            raise pickle.UnpicklingError(f"memo entry {argument} is more than any CIFAR file uses")


def _array(call: Any, origin: str) -> Pixels:
    """The uint8 array that NumPy would have rebuilt from `_reconstruct(...)` and its state."""
    if not isinstance(call, _Call) or call.name != "_reconstruct" or not isinstance(call.state, tuple) or len(call.state) != 5:
        _refuse(origin, "data is not an array")
    _, shape, dtype, column_major, raw = call.state
    raw = _plain(raw)
    if isinstance(raw, str) and all(ord(character) < 256 for character in set(raw)):
        raw = raw.encode("latin-1")
    if not isinstance(dtype, _Call) or dtype.name != "dtype" or not dtype.args or _text(dtype.args[0]) not in ("u1", "|u1"):
        _refuse(origin, "data is not of type uint8")
    if not isinstance(raw, bytes) or not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        _refuse(origin, "data is not an array of bytes")
    if int(np.prod(shape, dtype=object)) != len(raw):
        _refuse(origin, f"data has {len(raw)} bytes for the shape {shape}")
    return np.frombuffer(raw, dtype=np.uint8).reshape(shape, order="F" if column_major else "C")


def _plain(value: Any) -> Any:
    """A value, or of the call by which Python 3 writes bytes at protocol 2 the text that holds them, a character a byte.

    Made only where it is asked for: a pickle can ask for the same call a million times.
    """
    if isinstance(value, _Call) and value.name == "encode" and value.args and len(value.args) == 2 and isinstance(value.args[0], str):
        return value.args[0]  # whatever codec it names: latin-1 is the one in which bytes are written
    return value


def _text(value: Any) -> str:
    plain = _plain(value)
    return plain.decode("latin-1") if isinstance(plain, bytes) else str(plain)


def _refuse(origin: str, reason: str) -> NoReturn:
    raise DataError(f"{origin} is not one of CIFAR's own files: {reason}", REMEDY)
