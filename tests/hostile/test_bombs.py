"""Small files that unpack to any size or take any time: refused, or read in the memory of the file and a bound.

Each is read in a process of its own, whose peak of memory is the kernel's figure. The limits stand in RELIABILITY's promises.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import multiprocessing
import pickle
import resource
import struct
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from engines import recipe as recipes
from engines.data import archives, decode, lists
from engines.data.decode import BadImage, Frame, read_regular_file
from engines.data.sources import load
from engines.errors import DataError, DiffRCError, UsageError
from engines.recipe import DataSection

REFUSED_MIB, TAKEN_MIB = 64, 420  # beyond what the process had
SECONDS = 4.0  # of processor time; each took minutes, or would have had no end
SIDE = 8192  # px; the largest square that is decoded
KIB, MIB = 1 << 10, 1 << 20


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def zeros_png(side: int, color: int, depth: int = 8, claimed: int = 0) -> bytes:
    """A square PNG of zeros, compressed piece by piece: `color` 2 = RGB, 6 = RGBA, 0 = gray; its header may claim another side."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = bytes(1 + side * {0: 1, 2: 3, 6: 4}[color] * depth // 8)
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", claimed or side, claimed or side, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tiled_tiff(side: int) -> bytes:
    """A TIFF of 8 x 8 px, all of one tile of side x side."""
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(bytes(MIB)) for _ in range(side * side >> 20)) + packer.flush()
    tags = ((256, 4, 8), (257, 4, 8), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1), (322, 4, side), (323, 4, side), (324, 4, 134))
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in (*tags, (325, 4, len(body))))
    return b"II*\0" + struct.pack("<IH", 8, len(tags) + 1) + entries + bytes(4) + body


def scanned_jpeg(scans: int, side: int) -> bytes:
    """A progressive JPEG whose last scan stands there again and again."""
    whole = encoded(Image.new("RGB", (side, side)), "JPEG", progressive=True)
    return whole[:-2] + whole[whole.rfind(b"\xff\xda") : -2] * scans + whole[-2:]


def many_frames(count: int) -> bytes:
    """A GIF of so many frames, the second written out again and again."""
    frames = [Image.new("L", (8, 8), value) for value in (0, 100, 200)]
    two = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:2])
    three = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    frame = three[len(two) - 1 : -1]
    return two[:-1] + frame * (count - 2) + two[-1:]


def header(name: str, size_bytes: int, kind: bytes = b"0") -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size_bytes, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def zipped(parts: Callable[[], Any]) -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, compresslevel=1) as file:
        for part in parts():
            file.write(part)
    return buffer.getvalue()


def copied(times: int) -> bytes:
    """A pickle of two megabytes that asks to have them copied, five bytes a time."""
    size = 2_000_000
    head = b"\x80\2(c_codecs\nencode\nq\0X" + size.to_bytes(4, "little") + b"a" * size + b"X\6\0\0\0latin1\x86q\1"
    return head + b"h\0h\1R" * times + b"l."


def alike(count: int) -> bytes:
    """A pickled dictionary whose keys, all different, have one hash."""
    items = b"".join(b"\x8a\x0a" + ((i + 1) * (2**61 - 1)).to_bytes(10, "little") + b"K\0" for i in range(count))
    return b"\x80\2}(" + items + b"u."


def parquet(images: Any, labels: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": images, "label": labels}), buffer, compression="zstd", **options)
    return buffer.getvalue()


IMAGES: Mapping[str, tuple[Callable[[], bytes], int]] = {  # and what may be taken, in MiB
    "png of 65500 px": (lambda: zeros_png(8, 2, claimed=65500), REFUSED_MIB),
    "webp of 16383 px": (lambda: encoded(Image.new("RGB", (16383, 1025)), "WEBP", lossless=True, method=0), REFUSED_MIB),
    "tiff of one tile of 16384 px": (lambda: tiled_tiff(16384), REFUSED_MIB),
    "jpeg of 500 scans": (lambda: scanned_jpeg(500, 512), REFUSED_MIB),
    "gif of 100,000 frames": (lambda: many_frames(100_000), REFUSED_MIB),
    "rgba png of 4096 px": (lambda: zeros_png(4096, 6), 128),
}
LARGE: Mapping[str, Callable[[], bytes]] = {
    "rgb png": lambda: zeros_png(SIDE, 2),
    "rgba png": lambda: zeros_png(SIDE, 6),
    "16-bit png": lambda: zeros_png(SIDE, 0, 16),
    "palette gif": lambda: encoded(Image.new("P", (SIDE, SIDE)), "GIF"),
    "progressive jpeg": lambda: scanned_jpeg(80, SIDE // 2),
    "webp": lambda: encoded(Image.new("RGB", (4096, 4096)), "WEBP", lossless=True, method=0),
    "tiff of one strip": lambda: encoded(Image.new("RGB", (SIDE, SIDE // 2)), "TIFF", compression="tiff_deflate", tiffinfo={278: SIDE}),
}
CIFAR = DataSection(source="cifar10")
PARQUET = DataSection(source="parquet", image_size_px=4, test_per_class=1)
BATCH = "cifar-10-batches-py/data_batch_1"
DATA: Mapping[str, tuple[str, Callable[[], bytes]]] = {
    "pax header of 600 MiB": (
        "cifar.tar.gz",
        lambda: zipped(lambda: (header("x", 600 * MIB, b"x"), *(b"1" * MIB for _ in range(20)))),
    ),
    "pax header that is all digits": ("cifar.tar", lambda: header("x", 2_000_000, b"x") + b"1" * 2_000_128 + bytes(4096)),
    "member of a negative size": ("cifar.tar", lambda: _negative() + bytes(4096)),
    "member of a terabyte": ("cifar.tar", lambda: header(BATCH, 1 << 40) + bytes(4096)),
    "gzip of 600 MiB that nobody wants": (
        "cifar.tar.gz",
        lambda: zipped(lambda: (b for _ in range(3) for b in (header("x", 200 * MIB), *(bytes(MIB) for _ in range(200))))),
    ),
    "pickle that copies": ("cifar-10-batches-py", lambda: copied(1_000)),
    "pickle of one hash": ("cifar-10-batches-py", lambda: alike(30_000)),
    "parquet of a dictionary of one image": (
        "train.parquet",
        lambda: parquet(pa.array([bytes(MIB)] * 400, pa.binary()), np.arange(400) % 2, dictionary_pagesize_limit=1 << 30),
    ),
    "parquet of 2,000,000 rows of nothing": (
        "train.parquet",
        lambda: parquet(pa.nulls(2_000_000, pa.binary()), np.arange(2_000_000) % 2, row_group_size=2_000_000),
    ),
}


def _negative() -> bytes:
    block = bytearray(header("x", 0))
    block[124:136] = (-1024 & (1 << 96) - 1).to_bytes(12, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _image(path: str) -> None:
    decode.decode(Path(path).read_bytes(), Frame(32, 3), "bomb")


def _data(path: str) -> None:
    place = Path(path)
    splits = load(PARQUET if place.suffix == ".parquet" else CIFAR, place.parent if place.name == "data_batch_1" else place)
    splits[0].pixels(np.array([0]))


def _measured(read: Callable[[str], None], path: str, send: Any) -> None:
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if Path("/proc/self/clear_refs").exists():  # a fork begins with its parent's peak
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak_kib()
    problem = ""
    try:
        read(path)
    except DiffRCError as error:
        problem = error.problem
    after = _peak_kib() if Path("/proc/self/clear_refs").exists() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    send.send((problem, (after - before) / KIB, time.process_time() - began))


def _peak_kib() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def measured(read: Callable[[str], None], path: Path) -> tuple[str, float, float]:
    """The refusal ("" = it was taken), the peak in MiB beyond what the process had, and seconds of processor time."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(read, str(path), send))
    process.start()
    send.close()
    try:
        found: tuple[str, float, float] = receive.recv()
    finally:
        process.join(60)
        receive.close()
    print(
        f"{path.name} of {path.stat().st_size:,} bytes: {found[1]:.0f} MiB, {found[2]:.2f} s: {found[0][:100] or 'taken'}", file=sys.stderr
    )
    return found


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", IMAGES)
def test_an_image_that_unpacks_to_any_size_costs_little(name: str, tmp_path: Path) -> None:
    make, limit = IMAGES[name]
    path = tmp_path / "bomb"
    path.write_bytes(make())
    problem, peak, seconds = measured(_image, path)
    assert peak < limit
    assert seconds < SECONDS
    assert bool(problem) == (name not in ("gif of 100,000 frames", "rgba png of 4096 px")), problem


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", LARGE)
def test_the_largest_image_that_is_taken_costs_what_is_promised(name: str, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(LARGE[name]())
    problem, peak, seconds = measured(_image, path)
    assert not problem
    assert peak < TAKEN_MIB
    assert seconds < 10


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if "dictionary" in name else ()) for name in DATA])
def test_a_data_set_that_unpacks_to_any_size_is_refused_soon(name: str, tmp_path: Path) -> None:
    file, make = DATA[name]
    path = tmp_path / file
    if "." not in file:
        path.mkdir()
        for other in ("data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch", "batches.meta"):
            (path / other).write_bytes(pickle.dumps({"label_names": [str(k) for k in range(10)]}, 2))
        path = path / "data_batch_1"
    path.write_bytes(make())
    problem, peak, seconds = measured(_data, path)
    assert problem
    assert seconds < SECONDS
    assert peak < 2 * (decode.MAX_FILE_BYTES >> 20) + (400 if "dictionary" in name else 0)


# -------------------------------------------------------------------------------------------------- what is large and right


def test_a_large_image_that_is_flattened_band_by_band_is_the_one_that_is_flattened_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (603, 603, 4), dtype=np.uint8)
    images = [Image.fromarray(pixels), Image.fromarray(pixels).convert("LA")]
    images += [Image.fromarray(pixels[..., 0]).convert("P"), Image.fromarray(pixels[..., :3]).convert("CMYK")]
    images += [Image.fromarray(random.integers(0, 65536, (603, 603)).astype(np.uint16))]
    for image in images:
        for frame in (Frame(32, 3), Frame(64, 1), Frame(400, 3)):
            monkeypatch.setattr(decode, "BAND_PX", 1 << 30)
            whole = decode.fit(image, frame)
            monkeypatch.setattr(decode, "BAND_PX", 5000)
            assert (decode.fit(image, frame) == whole).all(), (image.mode, frame)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_large_image_is_turned_as_a_small_one(orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    smooth = np.add.outer(np.linspace(0, 200, 64), np.linspace(0, 55, 64)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(smooth), "PNG", exif=exif)
    before = decode.decode(data, Frame(16, 1), "x").astype(int)
    monkeypatch.setattr(decode, "LARGE_PX", 100)
    assert np.abs(decode.decode(data, Frame(16, 1), "x").astype(int) - before).max() <= 1


def test_color_profiles_change_nothing_and_are_never_interpreted() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    plain = decode.decode(encoded(image, "PNG"), Frame(8, 3), "x")
    for profile in (b"not a profile", bytes(4096)):
        assert (decode.decode(encoded(image, "PNG", icc_profile=profile), Frame(8, 3), "x") == plain).all()


@pytest.mark.parametrize("kind", ["GIF", "BMP", "PPM", "TIFF", "WEBP"])
def test_every_format_that_is_cut_short_is_refused_or_decodes_to_a_whole_image(kind: str) -> None:
    """JPEG and PNG are held to more in tests/data/test_decode.py: there a cut is refused unless nothing but trailing bytes is gone."""
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)), kind)
    refused = 0
    for length in range(0, len(whole), 3):
        try:
            assert decode.decode(whole[:length], Frame(8, 3), "cut").shape == (8, 8, 3)
        except BadImage:
            refused += 1
    assert refused >= 0.6 * len(range(0, len(whole), 3))


def test_no_parser_but_the_seven_sees_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """FITS, EPS, PSD, ICNS and all others of Pillow's, under any name."""
    Image.init()
    for name, (factory, accept) in list(Image.OPEN.items()):
        if name not in decode.FORMATS:

            def seen(*_: object, name: str = name) -> Any:
                pytest.fail(f"the parser of {name} was asked")

            monkeypatch.setitem(Image.OPEN, name, (seen, seen if accept else None))
            assert factory
    heads = (
        b"SIMPLE  =                    T",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"8BPS\0\1",
        b"icns\0\0\0\x08",
        b"\x01\xda\0\1",
        b"/* XPM */",
        b"#define w_width 9\n",
    )
    for head in (
        *heads,
        b"\x00\x00\x01\x00\1\0",
        b"gimp xcf ",
        b"\xd7\xcd\xc6\x9a",
        b"DDS ",
        b"qoif",
        b"\x0a\x05\1\x08",
        b"\0\0\0\x0cjP  ",
    ):
        with pytest.raises(BadImage, match="not an image in a known format"):
            decode.decode(head + bytes(600), Frame(8, 3), "x.png")


@pytest.mark.slow
def test_a_list_of_a_million_lines_is_read_in_half_a_gibibyte(tmp_path: Path) -> None:
    path = tmp_path / "l.csv"
    with path.open("w", encoding="utf-8") as file:
        file.write("path,label\n")
        file.writelines(f"folder_{k % 1000}/image_{k:07d}.jpg,{k % 1000}\n" for k in range(1_000_000))
    problem, peak, seconds = measured(_entries, path)
    assert not problem
    assert peak < 640
    assert seconds < 30


def _entries(path: str) -> None:
    assert len(lists.read_list(Path(path), "train")) == 1_000_000


def test_a_long_line_of_a_list_costs_its_length(tmp_path: Path) -> None:
    for name, content in (
        ("a.txt", b" " * 300_000 + b"x 0"),
        ("b.csv", b"path,label\n" + b'"' * 300_001),
        ("c.csv", b"path,label\n" + b"a" * 300_000),
    ):
        (tmp_path / name).write_bytes(content)
        began = time.process_time()
        with pytest.raises(DataError) if name != "a.txt" else contextlib.nullcontext():
            lists.read_list(tmp_path / name, "train")
        assert time.process_time() - began < 2


def test_a_path_longer_than_any_and_a_recipe_of_a_thousand_mistakes_are_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text(f"{'a' * 5000}.png 0\n{'b' * 5000}.png 1\n", encoding="utf-8")
    with pytest.raises(DataError, match="the images of the list are not there") as failure:
        load(DataSection(source="list", test_per_class=0), tmp_path / "l.txt")
    assert len(failure.value.problem) < 1000
    with pytest.raises(BadImage, match="cannot read") as unread:
        read_regular_file(tmp_path / ("x/" + " " * 50_000))
    assert len(unread.value.problem) < 2000
    with pytest.raises(UsageError, match="1001 mistakes") as refusal:
        recipes.load('name = "/"\n' + "".join(f"key_{k} = 1\n" for k in range(1000)))
    assert len(refusal.value.problem) < 20_000
    assert refusal.value.problem.endswith("and 961 more")


def test_the_limits_are_those_that_are_promised() -> None:
    assert archives.MAX_ARCHIVE_BYTES == 512 * MIB
    assert decode.MAX_IMAGE_PX == SIDE**2
    assert decode.TIGHTER_PX == {"WEBP": 1 << 24, "TIFF": 1 << 25}
