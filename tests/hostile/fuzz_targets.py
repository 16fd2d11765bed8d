"""The readers of untrusted bytes: for each, good files to spoil, words that its format knows, and the call that must end well or typed.

`test_fuzz.py` runs them with hypothesis, `fuzz_atheris.py` with atheris. A reader may return, or raise a `DiffRCError`; anything else, a
hang or memory beyond the file's size and a bound is a defect.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import pickle
import struct
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, PngImagePlugin

from engines import recipe as recipes
from engines import store
from engines.backends import base
from engines.backends.ort_engine import check_graph
from engines.data import archives, lists
from engines.data.decode import Frame, decode, header_size
from engines.data.images import ImageSet
from engines.data.sources import load
from engines.errors import DataError, DiffRCError
from engines.networks import pretrained
from engines.networks.openai import read_state_dict
from engines.networks.unet import Architecture, UNet
from engines.recipe import DataSection
from engines.study import plan as studies
from engines.synthesis.sheet import Record, decode_png, encode_png, pixels_sha256

ROOT = Path(__file__).parent.parent.parent
MEMORY_BYTES = 256 << 20  # beyond the file's size, for any input
SECONDS = 10.0  # of processor time, for any input


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        seeds: good files.
        read: reads bytes; the folder is empty at first and the target's own.
        words: of the format, to be strewn in.
    """

    name: str
    seeds: Callable[[], Sequence[bytes]]
    read: Callable[[bytes, Path], object]
    words: tuple[bytes, ...] = ()


def run(target: Target, data: bytes, folder: Path) -> bool:
    """Whether a reader takes the bytes; False where it refuses them with a typed error. Anything else it raises goes on."""
    try:
        target.read(data, folder)
    except DiffRCError as error:
        assert error.problem and error.remedy, "a failure has a cause and a remedy"
        assert len(error.problem) < 20_000, "one line of cause is no page"
        return False
    return True


def spoil(data: bytes, changes: Sequence[tuple[int, int, int]], words: Sequence[bytes] = ()) -> bytes:
    """A file with changes made one after another, each (what, where, with what), any integers >= 0."""
    found = bytearray(data)
    for what, where, value in changes:
        at = where % (len(found) + 1)
        length = 1 + value % 64
        match what % 10:
            case 0:
                found[at : at + 1] = bytes([found[at] ^ 1 << value % 8]) if at < len(found) else b""
            case 1:
                found[at : at + 1] = bytes([value % 256])
            case 2:
                del found[at:]
            case 3:
                del found[at : at + length]
            case 4:
                found[at:at] = found[at : at + length] * (1 + value % 50)
            case 5:
                found[at : at + 4] = struct.pack("<I", EXTREMES[value % len(EXTREMES)] & 0xFFFFFFFF)
            case 6:
                found[at : at + 4] = struct.pack(">I", EXTREMES[value % len(EXTREMES)] & 0xFFFFFFFF)
            case 7:
                found[at : at + 8] = struct.pack("<Q", EXTREMES[value % len(EXTREMES)])
            case 8:
                found[at:at] = words[value % len(words)] if words else bytes([value % 256]) * length
            case 9:
                found[at : at + length] = words[value % len(words)] if words else b""
    return bytes(found)


EXTREMES = (0, 1, 2, 0x7F, 0xFF, 0x100, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)


def put(folder: Path, name: str, data: bytes) -> Path:
    """A file in the target's folder."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def look(splits: tuple[ImageSet, ImageSet]) -> None:
    """Read every image of both splits."""
    for images in splits:
        images.pixels(np.arange(len(images)))


# ------------------------------------------------------------------------------------------------------------- archives

CIFAR = DataSection(source="cifar10")
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@functools.cache
def cifar_files(kind: str = "python") -> Mapping[str, bytes]:
    """The smallest archive: an image a class in the first batch, one in each other."""
    files = {}
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        labels = list(range(10)) if number == 0 else [number]
        pixels = np.arange(len(labels) * 3072, dtype=np.uint64).astype(np.uint8).reshape(-1, 3072)
        if kind == "python":
            files[name] = pickle.dumps({b"data": pixels, b"labels": labels, b"batch_label": b"x", b"filenames": [b"a.png"]}, 2)
        else:
            files[f"{name}.bin"] = np.concatenate([np.array(labels, dtype=np.uint8)[:, None], pixels], axis=1).tobytes()
    if kind == "python":
        return files | {"batches.meta": pickle.dumps({"label_names": NAMES, "num_vis": 3072}, 2)}
    return files | {"batches.meta.txt": "\n".join(NAMES).encode()}


def _tar(files: Mapping[str, bytes], folder: str, form: int, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=form) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size, member.pax_headers = len(content), {"comment": "é" * 20}
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@functools.cache
def _tars() -> list[bytes]:
    plain = [_tar(cifar_files("binary"), "cifar-10-batches-bin", form) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    return [*plain, gzip.compress(plain[0], mtime=0), _tar(cifar_files(), "cifar-10-batches-py", tarfile.USTAR_FORMAT)]


def _read_tar(data: bytes, folder: Path) -> None:
    look(load(CIFAR, put(folder, "cifar-10.tar.gz", data)))


def _read_zip(data: bytes, folder: Path) -> None:
    """The tar inside whole gzip: changes before compression, so that the checksum of gzip does not refuse them all."""
    _read_tar(gzip.compress(data, 1, mtime=0), folder)


def _read_batch(data: bytes, folder: Path) -> None:
    for name, content in cifar_files().items():
        if not (folder / "cifar-10-batches-py" / name).exists():
            put(folder, f"cifar-10-batches-py/{name}", content)
    put(folder, "cifar-10-batches-py/data_batch_2", data)  # the first has an image of every class
    look(load(CIFAR, folder))
    archives._pickled_table(data, "it")


BINARY_FILES = ("batches.meta.txt", "data_batch_1.bin", "data_batch_2.bin")


def _read_binary(data: bytes, folder: Path) -> None:
    """Binary batches of which one file is the bytes, the first of them telling which."""
    which = BINARY_FILES[data[0] % len(BINARY_FILES)] if data else BINARY_FILES[0]
    for name, content in cifar_files("binary").items():
        put(folder, f"cifar-10-batches-bin/{name}", data[1:] if name == which else content)
    look(load(CIFAR, folder))


@functools.cache
def _batches() -> list[bytes]:
    table = {"data": np.zeros((1, 3072), dtype=np.uint8), "labels": [0], b"x": None, "t": (1, True)}
    return [pickle.dumps(table, protocol) for protocol in (0, 2, 4)] + [cifar_files()["data_batch_2"]]


PICKLE_WORDS = (
    *(b"\x80\2", b"\x80\4", b"}", b"]", b")", b"(", b".", b"N", b"\x88", b"K\0", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\x7f" * 8, b"I1\n"),
    *(b"U\1a", b"T\4\0\0\0data", b"X\4\0\0\0data", b"C\1a", b"B\1\0\0\0a", b"\x8c\4data", b"Vdata\n", b"S'a'\n", b"q\0", b"r\0\0\1\0"),
    *(b"h\0", b"j\0\0\0\0", b"g0\n", b"p0\n", b"\x94", b"s", b"u", b"a", b"e", b"d", b"l", b"t", b"\x85", b"\x86", b"\x87", b"R", b"b"),
    *(b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n", b"\x93", b"\x81"),
    *(
        b"cposix\nsystem\n",
        b"cbuiltins\neval\n",
        b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x82\1",
        b"Pid\n",
        b"Q",
        b"i",
        b"o",
        b"0",
        b"2",
    ),
)
# --------------------------------------------------------------------------------------------------------------- tables


@functools.cache
def png(value: int, side: int = 4) -> bytes:
    """A gray image."""
    buffer = io.BytesIO()
    Image.new("L", (side, side), value).save(buffer, "PNG")
    return buffer.getvalue()


def _read_list(name: str, data: bytes, folder: Path) -> None:
    for k in (0, 1):
        if not (folder / f"{k}.png").exists():
            put(folder, f"{k}.png", png(k))
    path = put(folder, name, data)
    entries = lists.read_list(path, "train")
    assert all((folder / entry.path).resolve().is_relative_to(folder.resolve()) for entry in entries), "a path leads outside"
    look(load(DataSection(source="list", image_size_px=4, test_per_class=0), path))


@functools.cache
def _tables() -> list[bytes]:
    images = [png(k % 5) for k in range(12)]
    names = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}}}
    made = (
        (
            pa.array([{"bytes": image, "path": "x.png"} for image in images]),
            pa.array([0, 1] * 6),
            {"huggingface": json.dumps(names)},
            "snappy",
        ),
        (pa.array(images, pa.binary()), pa.array(["cat", "dog"] * 6), None, "none"),
        (pa.array(images, pa.large_binary()), pa.array([0, 1] * 6, pa.int8()), None, "zstd"),
    )
    found = []
    for image, label, metadata, compression in made:
        buffer = io.BytesIO()
        table = pa.table({"image": image, "label": label}).replace_schema_metadata(metadata)
        pq.write_table(table, buffer, row_group_size=5, compression=compression)
        found.append(buffer.getvalue())
    return found


def _read_parquet(data: bytes, folder: Path) -> None:
    look(load(DataSection(source="parquet", image_size_px=4, test_per_class=1), put(folder, "train.parquet", data)))


# -------------------------------------------------------------------------------------------------------------- recipes


@functools.cache
def _recipes() -> list[bytes]:
    own = recipes.to_toml(recipes.load('name = "x"')).encode()
    return [own, b'name = "x"\n[source]\ntrain_steps = 5\nlr = 1e-4\n', (ROOT / "recipes" / "digits-lt.toml").read_bytes()]


def _read_recipe(data: bytes, folder: Path) -> None:
    found = recipes.read(put(folder, "recipe.toml", data))
    assert recipes.load(recipes.to_toml(found)) == found


def _read_study(data: bytes, folder: Path) -> None:
    path = put(folder, "study.toml", data)
    studies.is_study(path)
    studies.resolve_arms(studies.read(path), lambda name, overrides: recipes.load(f"name = {json.dumps(name)}", overrides))


TOML_WORDS = (
    *(
        b"[source]\n",
        b"[[arms]]\n",
        b"lr = nan\n",
        b"lr = inf\n",
        b"seed = -1\n",
        b"seed = 99999999999999999999\n",
        b"= ",
        b"[",
        b"]",
        b"{",
        b'"',
    ),
    *(
        b"'''",
        b"\\u0000",
        b"\x00",
        b"\xff",
        b"\n",
        b"\r",
        b"#",
        b"2026-01-01",
        b"true",
        b"[1,",
        b"{a={",
        b"a.b.c=1\n",
        b"unknown = 1\n",
        b"-",
    ),
    *(b'name = "../x"\n', b"data = 1\n", b"1e999", b"0x" + b"f" * 40, b'"\\ud800"', b"\xf0\x9f\xa6\xa2", b"channel_mult = []\n", b"1_0"),
)

# -------------------------------------------------------------------------------------------------------------- weights


@functools.cache
def _unet() -> UNet:
    torch.manual_seed(0)
    return UNet(Architecture(8, 1, 16, (1,), 1, (), num_head_channels=16), 2, 3)


@functools.cache
def _weights() -> list[bytes]:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "w.safetensors"
        small = {"a": torch.ones(2, 3), "b": torch.zeros(0, dtype=torch.int64), "c": torch.ones(3, dtype=torch.bfloat16)}
        store.write_tensors(path, small, {"k": "v"})
        found = [path.read_bytes()]
        unet = _unet()
        card = pretrained.WeightsCard(architecture=unet.architecture, out_channels=2, classes=2, null_label=True)
        pretrained.write(path, unet.state_dict(), card)
        return [*found, path.read_bytes()]


def _read_weights(data: bytes, folder: Path) -> None:
    path = put(folder, "w.safetensors", data)
    refused = []
    for read in (store.read_tensors, pretrained.describe, lambda path: pretrained.load_into(_unet(), path)):
        try:
            read(path)
        except DiffRCError as error:
            refused.append(error)
    if len(refused) == 3:
        raise refused[0]


CHECKPOINT_FILES = ("MANIFEST.json", "state.json", "model.safetensors", "ema.safetensors")


@functools.cache
def _checkpoint() -> Mapping[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        group = {"w": torch.ones(2, 2)}
        path = store.save_checkpoint(Path(name), store.Checkpoint(2, {"model": group, "ema": group}, {"loss": 0.5, "made_of": {}}))
        return {file: (path / file).read_bytes() for file in CHECKPOINT_FILES}


def _read_checkpoint(data: bytes, folder: Path) -> None:
    """A checkpoint of which one file is the bytes, the first of them telling which."""
    which = CHECKPOINT_FILES[data[0] % len(CHECKPOINT_FILES)] if data else CHECKPOINT_FILES[0]
    for name, content in _checkpoint().items():
        put(folder, f"step-000000002/{name}", data[1:] if name == which else content)
    store.newest_state(folder)
    found = store.load_checkpoint(folder)
    if found:
        found.fitting("model", {"w": torch.ones(2, 2)})


@functools.cache
def _torch_files() -> list[bytes]:
    found = []
    for zipped in (True, False):
        buffer = io.BytesIO()
        state = {"a.weight": torch.ones(3, 2), "b": torch.zeros(4, dtype=torch.float16)}
        torch.save(state, buffer, _use_new_zipfile_serialization=zipped)  # noqa: TID251 - what a stranger would
        found.append(buffer.getvalue())
    return found


def _read_torch(data: bytes, folder: Path) -> None:
    read_state_dict(put(folder, "w.pt", data))


# -------------------------------------------------------------------------------------------------------------- engines


@functools.cache
def onnx_model() -> bytes:
    """out = w x + x, with an If whose branches hold tensors of their own."""
    x, out = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "out"))
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    inner = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("v", TensorProto.FLOAT, [1], [0.0]))
    branch = helper.make_graph([inner], "branch", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, [1])])
    condition = helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("y", TensorProto.BOOL, [], [True]))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["wx"]),
        helper.make_node("Add", ["wx", "x"], ["sum"]),
        condition,
        helper.make_node("If", ["yes"], ["zero"], then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["sum", "zero"], ["out"]),
    ]
    graph = helper.make_graph(nodes, "g", [x], [out], [weight])
    data: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()
    return data


def _read_onnx(data: bytes, folder: Path) -> None:
    check_graph(data, 18, ["x"], ["out"], "it.onnx")


def engine_card() -> base.EngineCard:
    """A card of nothing that is there."""
    return base.EngineCard(
        kind="onnx",
        precision="fp32",
        recipe_sha256="",
        weights_sha256="",
        file_sha256="",
        image_size_px=8,
        image_channels=1,
        out_channels=2,
        classes=3,
        timesteps=50,
        max_batch=8,
        opset=18,
        versions={"torch": "2"},
        tolerance=1e-4,
        one_step_error=1e-6,
        trajectory_psnr_db=90.0,
        self_test=(0.5, -1.0),
    )


def _read_card(data: bytes, folder: Path) -> None:
    put(folder, "target.onnx", b"x")
    put(folder, "target.json", data)
    base.read_engine(folder / "target.onnx")


# --------------------------------------------------------------------------------------------------------------- images


@functools.cache
def _images() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    found = []
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode in ("RGB", "L", "P", "RGBA", "1", "I;16"):
        image = Image.fromarray(pixels[..., 0]).convert("I").convert("I;16") if mode == "I;16" else Image.fromarray(pixels).convert(mode)
        for kind, options in (
            ("PNG", {"exif": exif}),
            ("PNG", {"pnginfo": _text_chunks()}),
            ("GIF", {}),
            ("BMP", {}),
            ("PPM", {}),
            ("JPEG", {"exif": exif}),
            ("JPEG", {"progressive": True}),
            ("WEBP", {"exif": exif}),
            ("WEBP", {"lossless": True}),
            ("TIFF", {}),
            ("TIFF", {"compression": "tiff_lzw"}),
            ("TIFF", {"compression": "tiff_deflate", "tiffinfo": {278: 2}}),
            ("TIFF", {"compression": "jpeg"}),
        ):
            buffer = io.BytesIO()
            try:
                image.save(buffer, kind, **options)  # type: ignore[arg-type]
            except (OSError, ValueError, KeyError):  # not every format has every mode
                continue
            found.append(buffer.getvalue())
    return found


def _text_chunks() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "b" * 300, zip=True)
    info.add_itxt("c", "d" * 300, zip=True)
    return info


def _read_image(data: bytes, folder: Path) -> None:
    pixels = decode(data, Frame(8, 3), "it")
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
    assert decode(data, Frame(8, 1), "it").shape == (8, 8, 1)
    width, height = header_size(data, "it")
    assert width > 0 and height > 0


@functools.cache
def _made() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    record = Record("0" * 32, 3, "cat", 0, 7, pixels_sha256(pixels), "{}")
    return [encode_png(pixels, record)]


def _read_made(data: bytes, folder: Path) -> None:
    decode_png(data, "cat", "it")


def _read_json(data: bytes, folder: Path) -> None:
    path = put(folder, "x.jsonl", data)
    refused = []
    for read in (store.read_json, store.read_json_lines):
        try:
            read(path)
        except DataError as error:
            refused.append(error)
    if len(refused) == 2:
        raise refused[0]


JSON_WORDS = (
    *(b"{", b"}", b"[", b"]", b":", b",", b'"', b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"-1", b"0.5", b'"\\ud800"'),
    *(b"\\u0000", b"\xff", b"\n", b"[" * 3000, b'{"a":' * 3000, b'"dtype"', b'"data_offsets":[0,99999999999]', b'"shape":[4294967296]'),
)
PNG_WORDS = (
    *(b"IHDR", b"IDAT", b"IEND", b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"PLTE", b"tRNS", b"iCCP", b"fdAT", b"acTL", b"\xff\xd8", b"\xff\xda"),
    *(
        b"\xff\xc0",
        b"\xff\xc2",
        b"\xff\xe1",
        b"\xff\xd9",
        b"II*\0",
        b"MM\0*",
        b"GIF89a",
        b"RIFF",
        b"VP8L",
        b"VP8X",
        b"BM",
        b"P5 ",
        b"P7\n",
        b"Pf",
    ),
)

TARGETS = {
    target.name: target
    for target in (
        Target("tar", _tars, _read_tar, (b"ustar\0" + b"00", b"ustar  \0", b"7777777", b"\x80", b"cifar-10-batches-bin/", b"\0" * 512)),
        Target("tar.gz", lambda: _tars()[:2], _read_zip, (b"ustar\0" + b"00", b"x", b"g", b"L", b"S", b"\xff" * 12)),
        Target("pickle", _batches, _read_batch, PICKLE_WORDS),
        Target("binary batch", lambda: [bytes([i]) + cifar_files("binary")[BINARY_FILES[i]] for i in range(3)], _read_binary),
        Target(
            "csv",
            lambda: [b"path,label,split\n0.png,0,train\n1.png,1,train\n", b'\xef\xbb\xbfpath,label\r\n"0.png",0\r\n1.png,1\r\n'],
            functools.partial(_read_list, "l.csv"),
            (
                b'"',
                b",",
                b"\n",
                b"\r",
                b"../",
                b"/",
                b"\0",
                b"\xff",
                b"path",
                b"label",
                b"-1",
                b"99999999999",
                b"\xe2\x80\xa8",
                b"a" * 200_000,
            ),
        ),
        Target(
            "txt",
            lambda: [b"0.png 0\n1.png 1\n", b"\xef\xbb\xbf./0.png 0\r\n\r\nx/../1.png\t1\r\n"],
            functools.partial(_read_list, "l.txt"),
            (b"\n", b" ", b"\t", b"../", b"/", b"\0", b"\xff", b"1_0", b"-1", b"99999999999", b"\xe2\x80\xa8", b"\xc2\x85", b" " * 50_000),
        ),
        Target(
            "parquet", _tables, _read_parquet, (b"PAR1", b"image", b"label", b"ARROW:schema", b"huggingface", b"\x15\xfe\xff\xff\xff\x0f")
        ),
        Target("recipe", _recipes, _read_recipe, TOML_WORDS),
        Target(
            "study",
            lambda: [(ROOT / "recipes" / "studies" / name).read_bytes() for name in ("table1.toml", "fig3.toml")],
            _read_study,
            TOML_WORDS,
        ),
        Target("safetensors", _weights, _read_weights, JSON_WORDS),
        Target("checkpoint", lambda: [bytes([i]) + _checkpoint()[CHECKPOINT_FILES[i]] for i in range(4)], _read_checkpoint, JSON_WORDS),
        Target("torch file", _torch_files, _read_torch, (*PICKLE_WORDS, b"PK\3\4", b"PK\1\2", b"PK\5\6", b"data.pkl", b"ctorch\nload\n")),
        Target(
            "onnx", lambda: [onnx_model()], _read_onnx, (b"\x0a", b"\x12", b"\x3a", b"ai.onnx", b"com.example", b"\xff\xff\xff\xff\x0f")
        ),
        Target("engine card", lambda: [engine_card().model_dump_json().encode()], _read_card, JSON_WORDS),
        Target("image", _images, _read_image, PNG_WORDS),
        Target("synthesized image", _made, _read_made, PNG_WORDS),
        Target("json", lambda: [b'{"a": [1, {"b": null}]}', b'{"a": 1}\n{"b": 2}\n'], _read_json, JSON_WORDS),
    )
}
