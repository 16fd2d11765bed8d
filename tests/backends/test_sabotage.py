"""Five ways to spoil a file, each by editing its graph: none is published, none is loaded. (Of the guidance, see test_gradient.)"""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from diffrc_cli.app import main
from engines import store
from engines.backends import choice, export
from engines.backends.base import EngineCard, EngineFile
from engines.backends.choice import BUILDS, Build
from engines.errors import EngineError, ParityError

BATCH = 8  # the largest, and that of synthesis


def _skip_reason(build: Build) -> str:
    try:
        choice.require(build)
    except EngineError as error:
        return error.problem
    return ""


EVERY_BUILD = [
    pytest.param(build, id=str(build), marks=pytest.mark.skipif(bool(reason := _skip_reason(build)), reason=reason))
    for build in BUILDS
    if build.kind != "tensorrt"  # whose plans have tests of their own
]


def behind_output(model: Any, nodes: Sequence[Any], **constants: np.ndarray) -> None:
    """Put nodes that read "clean" and write "out" between the network and its output."""
    for node in model.graph.node:
        node.output[:] = ["clean" if name == "out" else name for name in node.output]
        node.input[:] = ["clean" if name == "out" else name for name in node.input]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())


def noise(model: Any) -> None:
    """Noise of 1e-2 on every value, always the same."""
    values = 1e-2 * np.random.default_rng(0).standard_normal((1, 2, 8, 8))
    behind_output(model, [helper.make_node("Add", ["clean", "noise"], ["out"])], noise=values.astype(np.float32))


def channels(model: Any) -> None:
    """The output's channels the other way round."""
    behind_output(model, [helper.make_node("Gather", ["clean", "order"], ["out"], axis=1)], order=np.array([1, 0]))


def later(model: Any) -> None:
    """t off by one."""
    for node in model.graph.node:
        node.input[:] = ["later" if name == "t" else name for name in node.input]
    nodes = [helper.make_node("Add", ["t", "one"], ["next"]), helper.make_node("Min", ["next", "last"], ["later"])]
    for at, node in enumerate(nodes):
        model.graph.node.insert(at, node)
    model.graph.initializer.extend([numpy_helper.from_array(np.array(1), "one"), numpy_helper.from_array(np.array(49), "last")])


def not_a_number(model: Any, batch: int = 0) -> None:
    """NaN in the last sample of a batch: of any batch, or of one size alone."""
    nodes = [
        helper.make_node("Shape", ["clean"], ["size"], start=0, end=1),  # (1,)
        helper.make_node("Squeeze", ["size"], ["rows"]),
        helper.make_node("Range", ["zero", "rows", "one"], ["row"]),  # (B,)
        helper.make_node("Sub", ["rows", "one"], ["last"]),
        helper.make_node("Equal", ["row", "last"], ["is_last"]),
        helper.make_node("Equal", ["rows", "batch"], ["is_batch"]),
        helper.make_node("Or", ["is_batch", "any"], ["counts"]),
        helper.make_node("And", ["is_last", "counts"], ["bad"]),
        helper.make_node("Where", ["bad", "nan", "nothing"], ["spoiled"]),
        helper.make_node("Reshape", ["spoiled", "shape"], ["added"]),  # (B, 1, 1, 1)
        helper.make_node("Add", ["clean", "added"], ["out"]),
    ]
    constants = {"zero": np.array(0), "one": np.array(1), "batch": np.array(batch), "any": np.array(batch == 0)}
    values = {"nan": np.array(np.nan, np.float32), "nothing": np.array(0, np.float32), "shape": np.array([-1, 1, 1, 1])}
    behind_output(model, nodes, **constants, **values)


SPOILED: dict[str, Callable[[Any], None]] = {
    "noise of 1e-2": noise,
    "channels swapped": channels,
    "t off by one": later,
    "not a number in one sample": not_a_number,
    "not a number in the last row of the largest batch alone": functools.partial(not_a_number, batch=BATCH),
}


def spoiled(data: bytes, how: str) -> bytes:
    model = onnx.load_model_from_string(data)
    SPOILED[how](model)
    onnx.checker.check_model(model)
    return model.SerializeToString()


CardOf = Callable[[Build], EngineCard]


@pytest.fixture(scope="module")
def card_of(exported: Any, onnx_of: Any, tmp_path_factory: pytest.TempPathFactory) -> CardOf:
    """card_of(build) -> the card of the network's engine that passed the gate."""

    @functools.cache
    def made(build: Build) -> EngineCard:
        path = tmp_path_factory.mktemp("good") / "target.onnx"
        return export.export_onnx(exported.unet, exported.schedule, path, exported.settings, "", build, BATCH, onnx_of(build))

    return made


@pytest.mark.parametrize("build", EVERY_BUILD)
@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_file_is_not_published_and_not_loaded_if_it_were(
    how: str, build: Build, exported: Any, onnx_of: Any, card_of: CardOf, tmp_path: Path
) -> None:
    bad = spoiled(onnx_of(build), how)
    with pytest.raises(ParityError) as failure:
        export.export_onnx(exported.unet, exported.schedule, tmp_path / "e" / "target.onnx", exported.settings, "", build, BATCH, bad)
    assert failure.value.exit_code == 6
    assert not any(tmp_path.iterdir())

    card = card_of(build).model_copy(update={"file_sha256": hashlib.sha256(bad).hexdigest()})
    if how == "t off by one" and build.precision != "fp32":
        return  # less than the rounding: that is why the gate looks at the same file in float32 first
    if how == "noise of 1e-2" and build == Build("onnx", "fp16"):
        return  # less than ten times fp16's tolerance, which the load-time test has to leave to other devices
    with pytest.raises(ParityError, match="disagrees with torch"):
        choice.load(EngineFile(bad, card), "the engine", batch=BATCH)


@pytest.mark.parametrize("build", EVERY_BUILD)
def test_the_same_file_unspoiled_is_loaded(build: Build, onnx_of: Any, card_of: CardOf) -> None:
    choice.load(EngineFile(onnx_of(build), card_of(build)), "the engine", batch=BATCH)


@pytest.mark.slow
def test_on_the_command_line_a_spoiled_export_ends_with_6_and_what_was_published_is_as_before(
    exported_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(exported_run, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    real = export.onnx_bytes
    monkeypatch.setattr(export, "onnx_bytes", lambda *arguments: spoiled(real(*arguments), "channels swapped"))
    with pytest.raises(SystemExit) as end:
        main(["export", "--run", str(run), "--opset", "21"])
    assert end.value.code == 6
    told = capsys.readouterr().err
    assert "disagrees with torch: relative error" in told
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert store.open_run(run).engines.is_dir()
