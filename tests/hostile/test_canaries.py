"""Files that would run something if a reader let them: every one goes through every reader, and no canary is touched.

A canary is a file that the payload would make. Besides, an audit hook notes every process that is started, module that is imported from
the corpus and file that is opened for writing while a reader is at work.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper

from engines import recipe as recipes
from engines import store
from engines.backends import base
from engines.backends.ort_engine import check_graph
from engines.backends.trt_engine import read_file
from engines.data.decode import Frame, decode
from engines.data.sources import load
from engines.errors import DiffRCError
from engines.networks import inception, pretrained
from engines.networks.diffusers_folder import read as read_diffusers
from engines.networks.openai import read_state_dict
from engines.recipe import DataSection
from engines.study import plan as studies
from engines.synthesis.sheet import decode_png


def _load(name: str) -> Any:
    """A file beside this one; test folders are no packages."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


fuzz = _load("fuzz_targets")
STARTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "subprocess.Popen",
    "ctypes.dlopen",
    "socket.connect",
    "webbrowser.open",
)
_watched: list[str] | None = None


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    if event in STARTS:
        _watched.append(f"{event} {arguments!r:.200}")
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+"):
        _watched.append(f"{event} {arguments!r:.200}")


sys.addaudithook(_hear)  # for the life of the process: there is no way to take one away


@pytest.fixture
def watched() -> Iterator[list[str]]:
    """What was started or written since."""
    global _watched
    _watched = []
    yield _watched
    _watched = None


class Calls:
    """Pickled: a call with arguments."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


def payloads(canary: Path) -> dict[str, bytes]:
    """Pickles that would touch the canary, each in its own way."""
    python = f"open({str(canary)!r}, 'w').close()"
    shell = f"touch {canary}"
    found = {
        f"{name}-{protocol}": pickle.dumps(payload, protocol)
        for protocol in (0, 4)
        for name, payload in {
            "system": Calls(os.system, shell),
            "eval": Calls(eval, python),
            "exec": Calls(exec, python),
            "open": Calls(open, str(canary), "w"),
            "popen": Calls(os.popen, shell),
            "chained": Calls(Path.touch, Calls(Path, str(canary))),
            "in a list": [1, {"data": Calls(os.system, shell)}],
            "as a key": {(1, 2): Calls(eval, python), "labels": [0]},
            "numpy load": Calls(np.load, str(canary.with_suffix(".npy")), None, True),
            "memmap": Calls(np.memmap, str(canary), "uint8", "w+", 0, (1,)),
        }.items()
    }
    by_hand = {
        "inst": b"(S'" + shell.encode() + b"'\nios\nsystem\n.",
        "object": b"(cos\nsystem\nS'" + shell.encode() + b"'\no.",
        "stack global": b"\x80\4\x8c\2os\x8c\6system\x93\x8c" + bytes([len(shell)]) + shell.encode() + b"\x85R.",
        "dotted": b"\x80\4\x8c\5numpy\x8c\x0bndarray.dump\x93\x8c" + bytes([len(str(canary))]) + str(canary).encode() + b"\x85R.",
        "build": b"\x80\2ccollections\nOrderedDict\n)R}U\6x\0y\0zzcos\nsystem\nsb.",
        "two pickles": pickle.dumps({"data": 1}) + pickle.dumps(Calls(os.system, shell)),
    }
    return found | by_hand


def torch_archive(pickled: bytes, name: str = "archive/data.pkl") -> bytes:
    """A zip file as torch writes it, of which data.pkl is the payload."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/code/__torch__.py", "import os; os.system('touch canary')")
    return buffer.getvalue()


def pickled_type(payload: bytes) -> bytes:
    """A parquet file whose schema names the extension type that was once unpickled (CVE-2023-47248), with a column of objects."""
    buffer = io.BytesIO()
    field = pa.field(
        "image", pa.binary(), metadata={"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": payload}
    )
    schema = pa.schema([field, pa.field("label", pa.int64())])
    table = pa.table({"image": pa.array([payload] * 4, pa.binary()), "label": [0, 1, 0, 1]}, schema=schema)
    pandas = {"columns": [{"name": "image", "pandas_type": "object", "numpy_type": "object", "metadata": {"encoding": "pickle"}}]}
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), buffer)
    return buffer.getvalue()


def spoiled_models(folder: Path) -> dict[str, bytes]:
    """ONNX files that would read or run what lies elsewhere."""
    found = {}
    secret = folder / "secret.bin"
    secret.write_bytes(bytes(64))
    (folder / "link.bin").symlink_to(secret)

    def change(name: str, spoil: Callable[[onnx.ModelProto], None]) -> None:
        model = onnx.load_model_from_string(fuzz.onnx_model())
        spoil(model)
        found[name] = model.SerializeToString()

    def outside(place: str) -> Callable[[onnx.ModelProto], None]:
        def spoil(model: onnx.ModelProto) -> None:
            tensor = model.graph.initializer[0]
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=place)

        return spoil

    for name, place in {
        "relative": "secret.bin",
        "upward": "../../../../etc/passwd",
        "absolute": str(secret),
        "symlink": "link.bin",
        "memory address": "*/_ORT_MEM_ADDR_/*",
        "empty": "",
        "url": "file:///etc/passwd",
    }.items():
        change(f"external data: {name}", outside(place))
    change(
        "external data without its flag", lambda m: m.graph.initializer[0].external_data.add(key="location", value="/etc/passwd") and None
    )
    change("external data in training info", lambda m: m.training_info.add() and None)
    change("custom domain", lambda m: m.opset_import.add(domain="com.microsoft", version=1) and None)
    change("custom operator", lambda m: setattr(m.graph.node[0], "domain", "evil"))
    change("unknown operator of ONNX", lambda m: setattr(m.graph.node[0], "op_type", "PyOp"))
    change("machine learning domain", lambda m: m.opset_import.add(domain="ai.onnx.ml", version=3) and None)
    change("local function", lambda m: m.functions.add(name="MatMul", domain="") and None)
    change("another opset", lambda m: setattr(m.opset_import[0], "version", 17))
    change("no opset", lambda m: m.ClearField("opset_import"))
    change("another input", lambda m: setattr(m.graph.input[0], "name", "z"))
    change("one more input", lambda m: m.graph.input.add(name="more") and None)
    change("another output", lambda m: setattr(m.graph.output[0], "name", "z"))
    value = helper.make_tensor("v", TensorProto.FLOAT, [1], [0.0])
    deep = helper.make_graph([helper.make_node("Constant", [], ["c"], value=value)], "g", [], [])
    for _ in range(25):  # protobuf itself refuses a hundred levels, three to a body
        deep = helper.make_graph([helper.make_node("Loop", [], [], body=deep)], "g", [], [])
    deep.initializer.add(name="outside", data_location=TensorProto.EXTERNAL)
    change("external data in bodies of bodies", lambda m: m.graph.node.append(helper.make_node("Loop", [], [], body=deep)))
    found["a text"] = b"PK\3\4 is no model"
    found["longer than it is"] = b"\x3a\xff\xff\xff\xff\x07" + fuzz.onnx_model()
    return found


def readers(folder: Path) -> dict[str, Callable[[Path], object]]:
    """Everything that reads a file of a stranger, by what it is called; each is given every file of the corpus."""

    def as_batch(path: Path) -> None:
        place = folder / "cifar" / "cifar-10-batches-py"
        for name, content in fuzz.cifar_files().items():
            if not (place / name).exists():
                fuzz.put(place, name, content)
        (place / "data_batch_3").write_bytes(path.read_bytes())
        fuzz.look(load(fuzz.CIFAR, folder / "cifar"))

    def as_tar(path: Path) -> None:
        target = folder / "cifar.tar"
        with tarfile.open(target, "w") as archive:
            for name, content in (fuzz.cifar_files() | {"batches.meta": path.read_bytes()}).items():
                member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        fuzz.look(load(fuzz.CIFAR, target))

    def as_checkpoint(path: Path) -> None:
        data = path.read_bytes()
        for number in range(len(fuzz.CHECKPOINT_FILES)):
            fuzz.TARGETS["checkpoint"].read(bytes([number]) + data, folder / "checkpoint")

    def as_diffusers(path: Path) -> None:
        fuzz.put(folder / "unet", "config.json", b'{"_class_name": "UNet2DModel"}')
        fuzz.put(folder / "unet", "diffusion_pytorch_model.safetensors", path.read_bytes())
        read_diffusers(folder / "unet")

    def as_engine(path: Path) -> None:
        check_graph(path.read_bytes(), 18, ["x"], ["out"], str(path))

    def as_plan(path: Path) -> None:
        place = folder / "tensorrt" / "target.plan"
        fuzz.put(place.parent, place.name, path.read_bytes())
        fuzz.put(place.parent, "target.json", path.read_bytes())
        read_file(place, fuzz.engine_card())

    def as_card(path: Path) -> None:
        fuzz.put(folder / "onnx", "target.onnx", path.read_bytes())
        fuzz.put(folder / "onnx", "target.json", path.read_bytes())
        base.read_engine(folder / "onnx" / "target.onnx")

    data = DataSection(image_size_px=4, test_per_class=0)
    return {
        "batch": as_batch,
        "tar": as_tar,
        "archive": lambda path: load(fuzz.CIFAR, path),
        "parquet": lambda path: fuzz.look(load(data.model_copy(update={"source": "parquet"}), path)),
        "list": lambda path: fuzz.look(load(data.model_copy(update={"source": "list"}), path)),
        "image": lambda path: decode(path.read_bytes(), Frame(8, 3), str(path)),
        "synthesized image": lambda path: decode_png(path.read_bytes(), "cat", str(path)),
        "torch file": lambda path: read_state_dict(path, also={"torch LongStorage"}),
        "inception": inception.read,
        "inception, imported": inception.load,
        "tensors": store.read_tensors,
        "pretrained": pretrained.describe,
        "diffusers": as_diffusers,
        "checkpoint": as_checkpoint,
        "engine": as_engine,
        "plan": as_plan,
        "card": as_card,
        "recipe": recipes.read,
        "study": studies.read,
        "json": store.read_json,
        "json lines": store.read_json_lines,
    }


def corpus(folder: Path, canary: Path) -> dict[str, bytes]:
    """Every hostile file by name."""
    made = payloads(canary)
    found = {f"pickle {name}": data for name, data in made.items()}
    found |= {f"torch {name}": torch_archive(data) for name, data in made.items()}
    found |= {f"torch, named otherwise, {name}": torch_archive(data, "archive/constants.pkl") for name, data in list(made.items())[:3]}
    found |= {f"parquet {name}": pickled_type(data) for name, data in list(made.items())[:3]}
    found |= {f"onnx {name}": data for name, data in spoiled_models(folder).items()}
    array = io.BytesIO()
    np.save(array, np.array([Calls(os.system, f"touch {canary}")], dtype=object), allow_pickle=True)
    found["array of objects"] = array.getvalue()
    found["python"] = f"import os; os.system('touch {canary}')\n".encode()
    found["toml"] = f'name = "$(touch {canary})"\n[data]\npath = "`touch {canary}`"\n'.encode()
    found["postscript"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(" + str(canary).encode() + b") (w) file closefile\n"
    found["svg"] = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    return found


def test_no_reader_runs_or_writes_anything_of_any_file(tmp_path: Path, watched: list[str]) -> None:
    global _watched
    _watched = None  # until a reader is at work
    canary = tmp_path / "canary"
    files = corpus(tmp_path, canary)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, data in enumerate(files.values()):
        (folder / f"{number:03d}.bin").write_bytes(data)
    ways = readers(tmp_path / "readers")
    for target in fuzz.TARGETS.values():
        target.seeds()  # made of files, once
    refused = taken = 0
    for number, name in enumerate(files):
        path = folder / f"{number:03d}.bin"
        for way, read in ways.items():
            _watched = watched
            try:
                read(path)
                taken += 1
                harmless = way in TAKES.get(name, ()) or way == "json lines"  # whose last line, without an end, is none
                assert not name.startswith(("pickle", "torch", "onnx")) or harmless, f"{way} takes {name}"
            except DiffRCError:
                refused += 1
            finally:
                _watched = None
    assert not canary.exists(), "a canary was touched"
    ours = (str(tmp_path / "readers"),)
    assert not [note for note in watched if not any(place in note for place in ours)], "something was started or written"
    assert len(files) >= 80
    assert refused > 0.94 * len(files) * len(ways), (refused, taken)


# What a reader may take of the corpus, and why that is no harm.
TAKES: dict[str, tuple[str, ...]] = {
    "onnx external data in training info": ("engine",),  # empty training info, which no runtime reads
    "onnx unknown operator of ONNX": ("engine",),  # of ONNX's own domain: the runtime refuses what it does not know
}


def test_the_hook_hears_what_the_corpus_would_do(tmp_path: Path, watched: list[str]) -> None:
    """The corpus is live: read by pickle itself, its payloads touch the canary, and the hook tells of it."""
    canary = tmp_path / "canary"
    touched = 0
    for data in payloads(canary).values():
        with contextlib.suppress(Exception):  # not all of them end well
            close = getattr(pickle.loads(data), "close", None)  # noqa: S301 - to show what it does
            if close:
                close()
        touched += canary.exists()
        canary.unlink(missing_ok=True)
    assert touched > 20
    assert any(note.startswith("os.system") for note in watched)
    assert any(note.startswith("open") for note in watched)
