"""The same seeds through every engine: the images that a user gets."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines import store
from engines.backends import choice, guided
from engines.backends.base import Precision
from engines.backends.choice import BUILDS, Build
from engines.backends.export import export_run
from engines.backends.fused import read_fused
from engines.data.decode import Pixels
from engines.errors import ConflictError, EngineError
from engines.synthesis.synthesize import Synthesis, synthesize

WANTED = {9: 32, 8: 32}  # 64 seeds
Make = Callable[..., tuple[Synthesis, Pixels]]


def required(build: Build) -> None:
    try:
        choice.require(build)
    except EngineError as error:
        pytest.skip(error.problem)


@pytest.fixture(scope="module")
def run_of_all(exported_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run, exported for every engine that runs here."""
    required(Build("openvino", "fp32"))
    path = tmp_path_factory.mktemp("all") / "runs" / "digits-lt"
    shutil.copytree(exported_run, path)
    for build in BUILDS:
        try:
            choice.require(build)
        except EngineError:
            continue
        export_run(store.open_run(path), builds=(build,))
    return path


@pytest.fixture
def make(run_of_all: Path, tmp_path: Path) -> Make:
    """make("openvino", "bf16") -> the outcome and (64, 8, 8) uint8."""

    def images(engine: str, precision: Precision = "fp32") -> tuple[Synthesis, Pixels]:
        run = store.open_run(run_of_all, (f"synth.engine={engine}", f"synth.precision={precision}"))
        (made,) = synthesize(run, WANTED, out=tmp_path / f"{engine}-{precision}", workers=2)
        files = sorted(made.folder.glob("*/*.png"))
        return made, np.stack([np.asarray(Image.open(file)) for file in files])

    return images


def test_the_same_64_seeds_give_the_same_images_on_torch_onnx_runtime_and_openvino(make: Make) -> None:
    _, expected = make("torch")
    assert len(expected) == 64
    for engine in ("onnx", "openvino"):
        made, found = make(engine)
        assert (made.engine, made.precision) == (engine, "fp32")
        near = np.abs(found.astype(int) - expected.astype(int)) <= 1
        assert near.mean() >= 0.999


def test_in_bf16_the_same_seeds_give_images_of_at_least_30_db(make: Make) -> None:
    required(Build("openvino", "bf16"))
    _, expected = make("torch")
    made, found = make("openvino", "bf16")
    assert (made.engine, made.precision) == ("openvino", "bf16")
    error = np.square(found.astype(float) - expected.astype(float)).mean()
    psnr = 10 * np.log10(255**2 / error)
    print(f"{psnr:.1f} dB")
    assert psnr >= 30
    assert not np.array_equal(found, expected), "bf16 rounds: equal images would be another engine's"


def test_engines_share_one_onnx_file_unless_their_precision_is_in_it(run_of_all: Path) -> None:
    folder = run_of_all / "engines" / "onnx"
    assert {file.name for file in folder.glob("*.onnx")} == {"target.onnx", "target.fp16.onnx"}
    cards = [store.read_json(file) for file in folder.glob("*.json")]
    assert len({card["file_sha256"] for card in cards if card["kind"] == "openvino" or card["precision"] == "fp32"}) == 1
    assert {card["measured_batch"] for card in cards} == {4}


def test_the_plan_names_the_engine_its_precision_and_its_file(run_of_all: Path, make: Make) -> None:
    made, _ = make("openvino")
    identity = store.read_json(made.folder / "plan.json")["identity"]
    card = choice.read_engine(run_of_all / "engines" / "onnx" / "target.onnx", "openvino").card
    assert [identity[f"engine.{key}"] for key in ("kind", "precision", "file_sha256")] == ["openvino", "fp32", card.file_sha256]
    assert "synth.precision" not in identity


# ---------------------------------------------------------------------------------------------------------- whole guided steps


@pytest.fixture(scope="module")
def run_of_steps(exported_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run with whole guided steps beside its network, their speeds such that they are taken."""
    path = tmp_path_factory.mktemp("steps") / "runs" / "digits-lt"
    shutil.copytree(exported_run, path)
    export_run(store.open_run(path, FUSED))
    step = path / "engines" / "onnx" / "target.guided-ddpm.onnx"
    data, card = read_fused(step)
    guided.write_graph(step, data, card.model_copy(update={"ms_per_image": 1.0, "apart_ms_per_image": 2.0}))
    return path


FUSED = ("synth.fused=true", "synth.guidance_interval=[0, 1000]", "synth.guidance_scale=0.2")


@pytest.mark.slow
def test_the_same_64_seeds_give_the_same_images_in_one_graph_a_step(run_of_steps: Path, tmp_path: Path) -> None:
    def images(engine: str, fused: str) -> tuple[Path, Pixels]:
        told: list[str] = []
        run = store.open_run(run_of_steps, (*FUSED, f"synth.fused={fused}", f"synth.engine={engine}", "synth.precision=fp32"))
        (made,) = synthesize(run, WANTED, out=tmp_path / f"{engine}-{fused}", workers=2, tell=told.append)
        assert any(line.startswith("guided step: one graph") for line in told) == (fused == "true")
        return made.folder, np.stack([np.asarray(Image.open(file)) for file in sorted(made.folder.glob("*/*.png"))])

    _, expected = images("torch", "false")
    folder, found = images("onnx", "true")
    assert (np.abs(found.astype(int) - expected.astype(int)) <= 1).mean() >= 0.999
    assert store.read_json(folder / "plan.json")["identity"]["guided_step.file_sha256"]


@pytest.mark.slow
def test_a_folder_that_was_begun_one_way_is_continued_that_way(run_of_steps: Path, tmp_path: Path) -> None:
    settings = (*FUSED, "synth.engine=onnx")
    for fused in ("false", "true"):
        told: list[str] = []
        out = tmp_path / fused
        synthesize(store.open_run(run_of_steps, (*settings, f"synth.fused={fused}")), {9: 3}, out=out, workers=1)
        plan = (out / "plan.json").read_bytes()
        synthesize(store.open_run(run_of_steps, settings), {9: 6}, out=out, workers=1, tell=told.append)
        assert (out / "plan.json").read_bytes() == plan
        assert any("the images there were made with it" in line for line in told)
    with pytest.raises(ConflictError, match="guided_step"):
        synthesize(store.open_run(run_of_steps, (*settings, "synth.fused=false")), {9: 9}, out=tmp_path / "true", workers=1)
