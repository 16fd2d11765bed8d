"""No engine of any kind that is wrong gets past the gate, and what was measured is told."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engines.backends import choice, export, gate
from engines.backends.base import Engine, EngineFile
from engines.backends.choice import BUILDS, Build
from engines.backends.openvino_engine import MAX_OPSET
from engines.backends.torch_engine import TorchEngine
from engines.errors import EngineError, ParityError


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


class Sabotaged:
    """An engine that loads well and then computes something else."""

    def __init__(self, engine: Engine, how: str) -> None:
        self.engine, self.card, self.how = engine, engine.card, how
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if self.how == "t off by one":
            return self.engine(x, (t + 1).clamp(max=self.card.timesteps - 1), y)
        out = self.engine(x, t, y)
        if self.how == "noise 1e-2":
            return out + 1e-2 * torch.randn(out.shape, generator=self.generator)
        if self.how == "channels swapped":
            return out.flip(1)
        if self.how == "samples swapped":
            return out.flip(0)
        assert self.how == "not a number in one sample"
        out[-1, 0, 3, 4] = float("nan")
        return out


@pytest.mark.parametrize("build", EVERY_BUILD)
@pytest.mark.parametrize("how", ["noise 1e-2", "channels swapped", "samples swapped", "t off by one", "not a number in one sample"])
def test_a_sabotaged_engine_of_any_kind_is_not_published_and_its_numbers_are_told(
    how: str, build: Build, exported: Any, onnx_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = choice.load

    def load(file: EngineFile, *where: Any, **how_run: Any) -> Engine:
        engine = real(file, *where, **how_run)
        return Sabotaged(engine, how) if file.card.precision == build.precision else engine

    monkeypatch.setattr(choice, "load", load)
    path = tmp_path / "engines" / "target.onnx"
    with pytest.raises(ParityError, match=r"relative error \S+ of one evaluation, \S+ allowed; \S+ dB after 50 steps of DDIM") as failure:
        export.export_onnx(exported.unet, exported.schedule, path, exported.settings, "", build, 5, onnx_of(build))
    assert failure.value.exit_code == 6
    assert str(build) in failure.value.problem
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("build", EVERY_BUILD)
def test_an_engine_that_agrees_is_published_with_its_precisions_limit_and_its_speed(
    build: Build, exported: Any, onnx_of: Any, tmp_path: Path
) -> None:
    path = tmp_path / "target.onnx"
    card = export.export_onnx(exported.unet, exported.schedule, path, exported.settings, "", build, 5, onnx_of(build))
    limits = gate.limits_of(exported.settings, build.precision)
    assert (card.kind, card.precision, card.tolerance) == (*build, limits.one_step_tolerance)
    assert 0 < card.one_step_error <= limits.one_step_tolerance
    assert card.trajectory_psnr_db >= limits.trajectory_psnr_db
    assert card.measured_batch == 5
    assert min(card.ms_per_image, card.torch_ms_per_image) > 0
    assert choice.load(choice.read(path, build), "target.onnx", 1, 5).card == card


@pytest.mark.parametrize(
    "build",
    [
        *(parameter for parameter in EVERY_BUILD if "fp32" not in str(parameter.id)),
        pytest.param(Build("onnx", "bf16"), id="onnx bf16", marks=pytest.mark.slow),
    ],
)
def test_half_precision_hides_no_fault_that_float32_shows(build: Build, exported: Any, onnx_of: Any, tmp_path: Path) -> None:
    """The network has a slightly other time embedding than its file: far within a wide limit for bf16, far outside float32's."""
    unet = copy.deepcopy(exported.unet)
    with torch.no_grad():
        unet.time_embed[-1].bias.mul_(1.001)
    wide = {f"{build.precision}_{key}": 1.0 for key in ("one_step_tolerance", "trajectory_psnr_db")}
    settings = exported.settings.model_copy(update=wide)
    with pytest.raises(ParityError, match=rf"on {build.kind} fp32 disagrees .* not tried in {build.precision}"):
        export.export_onnx(unet, exported.schedule, tmp_path / "target.onnx", settings, "", build, 5, onnx_of(build))
    assert not any(tmp_path.iterdir())


def test_a_file_in_bf16_is_published_for_tensorrt_without_a_speed_of_its_own(exported: Any, onnx_of: Any, tmp_path: Path) -> None:
    build, path = Build("onnx", "bf16"), tmp_path / "target.onnx"
    card = export.export_onnx(exported.unet, exported.schedule, path, exported.settings, "", build, 5, onnx_of(build))
    assert (card.kind, card.precision, card.opset, card.ms_per_image, card.measured_batch) == ("onnx", "bf16", 22, 0, 5)
    assert 1e-4 < card.one_step_error <= card.tolerance == exported.settings.bf16_one_step_tolerance
    assert {file.name for file in tmp_path.iterdir()} == {"target.bf16.onnx", "target.bf16.json"}
    with pytest.raises(EngineError, match="cannot load"):  # what ONNX Runtime says to a convolution in bf16
        choice.load(choice.read(path, build), "target.bf16.onnx", 1)


def test_a_rejected_engine_leaves_what_was_published_for_the_same_file(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "target.onnx"
    arguments = (exported.unet, exported.schedule, path, exported.settings, "")
    export.export_onnx(*arguments, BUILDS[0], 5, exported.path.read_bytes())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(gate, "one_step_error", lambda *_: float("nan"))
    with pytest.raises(ParityError):
        export.export_onnx(*arguments, BUILDS[0], 5, exported.path.read_bytes())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_batch_of_synthesis_is_checked_beside_one_two_and_the_largest(exported: Any) -> None:
    seen: set[int] = set()

    class Spy:
        card = exported.card

        def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            seen.add(len(x))
            return x

    gate.one_step_error(Spy(), Spy(), 5)
    assert seen == {1, 2, 5, 8}


@pytest.mark.parametrize("build", [parameter for parameter in EVERY_BUILD if "openvino" in str(parameter.id)])
def test_an_opset_that_would_crash_openvino_is_refused_before_it_sees_the_file(build: Build, exported: Any, tmp_path: Path) -> None:
    settings = exported.settings.model_copy(update={"opset": MAX_OPSET + 1})
    with pytest.raises(EngineError, match=f"opsets up to {MAX_OPSET}"):
        export.export_onnx(exported.unet, exported.schedule, tmp_path / "target.onnx", settings, "", build, 5, b"not looked at")
    assert not any(tmp_path.iterdir())


BRIGHTNESS = gate.Labeler("recognizer", lambda x: torch.stack([-x.flatten(1).mean(1), x.flatten(1).mean(1)], 1))  # dark, bright


def test_labels_agree_by_the_share_of_images_that_are_of_the_same_class() -> None:
    expected = torch.tensor([-0.5, -0.2, 0.2, 0.5]).view(4, 1, 1, 1)
    assert gate.label_agreement(expected + 0.1, expected, BRIGHTNESS) == 1.0
    assert gate.label_agreement(expected + 0.3, expected, BRIGHTNESS) == 0.75
    assert gate.label_agreement(-expected, expected, BRIGHTNESS) == 0.0


@pytest.mark.parametrize(("share", "images", "allowed"), [(0.99, 64, 1), (0.97, 64, 2), (0.99, 100, 1), (0.97, 4, 1), (1.0, 64, 0)])
def test_labels_that_may_change_are_whole_images_rounded_up(share: float, images: int, allowed: int) -> None:
    assert gate.allowed_changes(gate.Limits(1e-5, 40.0, share, ("", "", "")), images) == allowed


def test_a_trajectory_is_of_64_images_or_of_what_half_a_minute_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "TRAJECTORY_IMAGES", 64)
    assert gate.trajectory_images(1e-4, 50) == 64
    assert gate.trajectory_images(0.03, 50) == 20
    assert gate.trajectory_images(10.0, 50) == gate.LEAST_TRAJECTORY_IMAGES


def test_an_engine_whose_numbers_are_near_and_whose_labels_change_is_refused_by_the_labels_alone(exported: Any) -> None:
    """A labeler that sees the last digits: no limit on numbers would notice."""
    flips = iter((0.0, 1.0))

    def scores(x: Tensor) -> Tensor:
        flip = next(flips)
        return torch.tensor([[flip, 1 - flip]]).repeat(len(x), 1)

    reference, limits = TorchEngine(exported.unet, 50, 8), gate.limits_of(exported.settings, "fp32")
    with pytest.raises(ParityError, match=r"8 of 8 labels changed \(by guide\), 1 allowed; nothing was written") as failure:
        gate.hold(reference, reference, exported.schedule, limits, 4, "it", gate.Labeler("guide", scores))
    assert failure.value.remedy == "report it, or loosen export.label_agreement"
    parity = gate.hold(reference, reference, exported.schedule, limits, 4, "it", BRIGHTNESS)
    assert (parity.label_agreement, parity.labels_by, parity.one_step_error) == (1.0, "recognizer", 0.0)
