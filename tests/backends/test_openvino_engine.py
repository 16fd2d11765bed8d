"""OpenVINO runs the exported file in the precision that was asked for, side by side, or says why it does not."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from engines.backends import openvino_engine
from engines.backends.base import EngineFile, Precision, card_path, example_input, read_engine, relative_error
from engines.backends.choice import Build
from engines.backends.export import export_onnx
from engines.backends.openvino_engine import OpenVinoEngine, StaticModel, require_runtime
from engines.backends.torch_engine import TorchEngine
from engines.errors import DataError, EngineError, ParityError

ROOT = Path(__file__).parent.parent.parent


def runs(precision: Precision) -> bool:
    try:
        require_runtime(precision)
    except EngineError as error:
        if precision == "fp32":
            pytest.skip(error.problem, allow_module_level=True)
        return False
    return True


runs("fp32")
PRECISIONS = [
    pytest.param("fp32"),
    pytest.param("bf16", marks=pytest.mark.skipif(not runs("bf16"), reason="OpenVINO has no bf16 on this CPU")),
]


@pytest.fixture(scope="module")
def in_openvino(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported network with cards for OpenVINO beside it. To be read only."""
    path = tmp_path_factory.mktemp("openvino") / "target.onnx"
    for precision in ("fp32", "bf16") if runs("bf16") else ("fp32",):
        build = Build("openvino", cast(Precision, precision))
        export_onnx(exported.unet, exported.schedule, path, exported.settings, "", build, 5, exported.path.read_bytes())
    return path


@pytest.fixture
def own_copy(in_openvino: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(in_openvino.parent, tmp_path / "copy")
    return tmp_path / "copy" / "target.onnx"


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), pytest.param("bf16", 2e-2, marks=PRECISIONS[1].marks)])
def test_it_gives_torchs_numbers_at_any_batch_and_timestep(precision: Precision, limit: float, in_openvino: Path, exported: Any) -> None:
    engine, reference = OpenVinoEngine.load(in_openvino, precision, threads=1), TorchEngine(exported.unet, 50, 8)
    generator = torch.Generator().manual_seed(1)
    for batch in (1, 3, 7, 8):
        x = torch.randn(batch, 1, 8, 8, generator=generator)
        t = torch.randint(0, 50, (batch,), generator=generator)
        y = torch.randint(0, 4, (batch,), generator=generator)
        assert relative_error(engine(x, t, y), reference(x, t, y)) < limit


@pytest.mark.skipif(not runs("bf16"), reason="OpenVINO has no bf16 on this CPU")
def test_the_two_precisions_differ_so_neither_stands_for_the_other(in_openvino: Path, exported: Any) -> None:
    x, t, y = example_input(exported.card, 4, 0)
    reference = TorchEngine(exported.unet, 50, 8)(x, t, y)
    errors = [relative_error(OpenVinoEngine.load(in_openvino, precision)(x, t, y), reference) for precision in ("fp32", "bf16")]
    assert errors[0] < 1e-5 < 1e-3 < errors[1]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_threads_side_by_side_get_the_bits_that_one_alone_gets(precision: Precision, in_openvino: Path, exported: Any) -> None:
    engine = OpenVinoEngine.load(in_openvino, precision, threads=1, streams=2, batch=5)
    inputs = []
    for seed in range(24):
        generator = torch.Generator().manual_seed(seed)
        inputs.append((torch.randn(5, 1, 8, 8, generator=generator), torch.arange(5) * 7 + seed % 9, torch.arange(5) % 4))
    alone = [engine(*arguments) for arguments in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda arguments: engine(*arguments), inputs))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert torch.equal(OpenVinoEngine.load(in_openvino, precision, threads=1, streams=1, batch=5)(*inputs[3]), alone[3])


def test_each_batch_size_is_compiled_once_and_the_one_of_the_job_first(in_openvino: Path, exported: Any) -> None:
    engine = OpenVinoEngine.load(in_openvino, threads=1, batch=5)
    assert list(engine._model.compiled) == [5]
    for batch in (2, 5, 2):
        engine(*example_input(exported.card, batch, 0))
    assert list(engine._model.compiled) == [5, 2]
    assert OpenVinoEngine.load(in_openvino, batch=1)._model.compiled.keys() == {1}, "the self-test of three images runs one by one"
    assert OpenVinoEngine.load(in_openvino)._model.compiled.keys() == {3}


def test_threads_and_streams_are_what_was_asked_for(in_openvino: Path) -> None:
    for threads, streams, expected in ((1, 2, (2, 2)), (1, 1, (1, 1)), (0, 0, (len(os.sched_getaffinity(0)), 1))):
        (compiled,) = OpenVinoEngine.load(in_openvino, threads=threads, streams=streams)._model.compiled.values()
        assert (compiled.get_property("INFERENCE_NUM_THREADS"), compiled.get_property("NUM_STREAMS")) == expected


def test_each_call_gives_a_tensor_of_its_own(in_openvino: Path) -> None:
    engine = OpenVinoEngine.load(in_openvino, threads=1)
    x, t, y = torch.zeros(2, 1, 8, 8), torch.tensor([3, 40]), torch.tensor([0, 3])
    first = engine(x, t, y)
    kept = first.clone()
    engine(x, t, y).zero_()
    engine(x + 1, t, y)
    assert torch.equal(first, kept)
    assert (first.dtype, tuple(first.shape)) == (torch.float32, (2, 2, 8, 8))


def test_the_cards_share_one_file_and_none_stands_for_another(own_copy: Path, exported: Any) -> None:
    assert [path.name for path in own_copy.parent.glob("*.onnx")] == ["target.onnx"]
    assert (read_engine(own_copy, "openvino").card.kind, "openvino" in read_engine(own_copy, "openvino").card.versions) == (
        "openvino",
        True,
    )
    with pytest.raises(EngineError, match="no card"):
        read_engine(own_copy)
    shutil.copy(card_path(exported.path), card_path(own_copy, "openvino", "fp32"))
    with pytest.raises(EngineError, match="the card of onnx in fp32, not of openvino in fp32"):
        OpenVinoEngine.load(own_copy)


def test_without_a_card_or_with_one_flipped_bit_nothing_is_loaded(own_copy: Path) -> None:
    data = bytearray(own_copy.read_bytes())
    data[len(data) // 2] ^= 1
    own_copy.write_bytes(data)
    with pytest.raises(EngineError, match="not the file that its card describes"):
        OpenVinoEngine.load(own_copy)
    card_path(own_copy, "openvino", "fp32").unlink()
    with pytest.raises(EngineError, match="no card") as failure:
        OpenVinoEngine.load(own_copy)
    assert failure.value.exit_code == 4


def altered(path: Path, change: Callable[[onnx.ModelProto], None]) -> EngineFile:
    """The engine file with another model, and a card that says it is right."""
    file = read_engine(path, "openvino")
    model = onnx.load_model_from_string(file.data)
    change(model)
    data = model.SerializeToString()
    return EngineFile(data, file.card.model_copy(update={"file_sha256": hashlib.sha256(data).hexdigest()}))


def test_a_foreign_model_is_refused_before_openvino_sees_it(in_openvino: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def external(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../../etc/passwd")

    monkeypatch.setattr(StaticModel, "_read", lambda *_: pytest.fail("OpenVINO saw it"))
    with pytest.raises(DataError, match="other files"):
        OpenVinoEngine(altered(in_openvino, external), "target.onnx")


def test_an_opset_that_would_end_the_process_is_refused_before_openvino_sees_it(in_openvino: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StaticModel, "_read", lambda *_: pytest.fail("OpenVINO saw it"))
    file = read_engine(in_openvino, "openvino")
    newer = EngineFile(file.data, file.card.model_copy(update={"opset": 21}))
    with pytest.raises(EngineError, match=r"opsets up to 20 here; target\.onnx has 21"):
        OpenVinoEngine(newer, "target.onnx")


def test_numbers_that_are_not_those_of_the_card_fail_the_load_time_test(in_openvino: Path) -> None:
    def scale(model: onnx.ModelProto) -> None:
        (tensor,) = (t for t in model.graph.initializer if t.name == "unet.out.2.weight")
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.001), tensor.name))

    with pytest.raises(ParityError) as failure:
        OpenVinoEngine(altered(in_openvino, scale), "target.onnx")
    assert failure.value.exit_code == 6


def test_a_model_that_openvino_cannot_take_is_an_engine_error(in_openvino: Path) -> None:
    def unknown(model: onnx.ModelProto) -> None:
        model.graph.node[0].op_type = "NoSuchOperator"

    with pytest.raises(EngineError, match=r"OpenVINO cannot (read|compile) target\.onnx"):
        OpenVinoEngine(altered(in_openvino, unknown), "target.onnx")


def test_a_caller_that_breaks_the_contract_meets_an_assertion(in_openvino: Path) -> None:
    engine = OpenVinoEngine.load(in_openvino)
    with pytest.raises(AssertionError):
        engine(torch.zeros(9, 1, 8, 8), torch.zeros(9, dtype=torch.int64), torch.zeros(9, dtype=torch.int64))
    with pytest.raises(AssertionError):
        engine(torch.zeros(1, 1, 8, 8), torch.tensor([50]), torch.tensor([0]))


def test_a_cpu_without_bf16_says_so_and_still_runs_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    core = SimpleNamespace(available_devices=["CPU"], get_property=lambda *_: ["FP32", "INT8"])
    monkeypatch.setattr(openvino_engine, "_core", lambda: core)
    require_runtime("fp32")
    with pytest.raises(EngineError, match="no bf16 in OpenVINO, only FP32, INT8") as failure:
        require_runtime("bf16")
    assert "fp32" in failure.value.remedy
    with pytest.raises(EngineError, match="fp16"):
        require_runtime("fp16")


def test_a_precision_that_openvino_replaces_silently_is_an_error(in_openvino: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_engine, "_name", lambda _: "bf16")
    with pytest.raises(EngineError, match="would run in bf16, not in f32"):
        OpenVinoEngine.load(in_openvino)


def test_without_openvino_the_message_holds_the_line_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match="cannot be imported") as failure:
        require_runtime()
    assert (failure.value.exit_code, failure.value.remedy) == (4, 'pip install "diffrc[openvino]"')


WATCHED = """
import os, sys
events = []
watched = ("socket.", "os.fork", "subprocess.", "os.posix_spawn")
sys.addaudithook(lambda event, _: events.append(event) if event.startswith(watched) else None)
from engines.backends.openvino_engine import require_runtime
before = len(events)
openvino = require_runtime()
assert openvino.Core().available_devices
assert events[before:] == [], events[before:]
assert not any(name.startswith("openvino_telemetry") for name in sys.modules)
import openvino_telemetry
"""


def test_importing_it_reports_to_nobody_and_leaves_nothing_in_the_home_folder(tmp_path: Path) -> None:
    """OpenVINO's own import starts a process that tells a statistics server, and keeps an id in ~/intel. The last line: it is there."""
    pytest.importorskip("openvino_telemetry", reason="this OpenVINO came without its statistics")
    clean = {name: value for name, value in os.environ.items() if name != "CI"}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED], env={**clean, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


SIGNALED = """
import gc, signal, sys
from pathlib import Path
from engines.backends.openvino_engine import OpenVinoEngine
heard = []
signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
first, second = (OpenVinoEngine.load(Path(sys.argv[1]), "fp32", threads=1) for _ in range(2))
del first
gc.collect()
del second
gc.collect()
signal.raise_signal(signal.SIGINT)
assert heard == [signal.SIGINT]
"""


def test_a_signal_is_heard_after_engines_came_and_went(in_openvino: Path) -> None:
    """OpenVINO gives a thread's signal handlers other memory to run on, and with two cores does not give it back: the process ended."""
    command = [sys.executable, "-c", SIGNALED, str(in_openvino)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
