"""A small conditional network with random weights, exported once for all tests of the engines."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from engines.backends.base import EngineCard, Precision
from engines.backends.choice import Build
from engines.backends.export import export_onnx, file_opset, onnx_bytes
from engines.backends.gradient import GradientCard, gradient_bytes
from engines.diffusion.schedule import Schedule, make_schedule
from engines.networks.guide import Guide
from engines.networks.unet import Architecture, UNet
from engines.recipe import ExportSection

T = 50
CLASSES = 4  # three and the null label


class Exported(NamedTuple):
    unet: UNet
    schedule: Schedule
    settings: ExportSection
    path: Path
    card: EngineCard


MakeUNet = Callable[..., UNet]


@pytest.fixture(scope="session")
def make_unet() -> MakeUNet:
    """make_unet(classes) -> a network whose zero-initialized convolutions are random too: else parity would be trivial."""

    def make(classes: int = CLASSES, seed: int = 0) -> UNet:
        torch.manual_seed(seed)
        architecture = Architecture(8, 1, 16, (1,), 1, (), num_head_channels=16, dropout=0.1)
        unet = UNet(architecture, 2, classes)
        for module in unet.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                module.reset_parameters()
        return unet.eval()

    return make


@pytest.fixture(scope="session")
def exported(make_unet: MakeUNet, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The network on the disk as ONNX. To be read only."""
    unet, schedule, settings = make_unet(), make_schedule("cosine", T), ExportSection(max_batch=8)
    path = tmp_path_factory.mktemp("engine") / "target.onnx"
    return Exported(unet, schedule, settings, path, export_onnx(unet, schedule, path, settings, recipe_sha256="of the recipe"))


OnnxOf = Callable[[Build], bytes]


@pytest.fixture(scope="session")
def onnx_of(exported: Exported) -> OnnxOf:
    """onnx_of(build) -> the ONNX file that it runs, of the exported network, cast once for each precision."""

    @functools.cache
    def cast(precision: Precision) -> bytes:
        opset = file_opset(exported.settings, Build("onnx", precision))
        card = exported.card.model_copy(update={"precision": precision, "opset": opset})
        return onnx_bytes(exported.unet, card, "of the recipe")

    def data(build: Build) -> bytes:
        return exported.path.read_bytes() if build.precision == "fp32" or build.kind == "openvino" else cast(build.precision)

    return data


class ExportedGradient(NamedTuple):
    guide: Guide
    data: bytes
    card: GradientCard


MakeGuide = Callable[..., Guide]


@pytest.fixture(scope="session")
def make_guide() -> MakeGuide:
    """make_guide(classes, **architecture) -> a guide whose every weight takes part, with a prior."""

    def make(classes: int = CLASSES - 1, **changes: object) -> Guide:
        torch.manual_seed(1)
        smallest = {"channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (), "num_head_channels": 8}
        architecture = Architecture(**{"image_size_px": 8, "in_channels": 1, "model_channels": 8, **smallest, **changes})  # type: ignore[arg-type]
        guide = Guide(architecture, torch.arange(classes, 0, -1), 12)
        for module in guide.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                module.reset_parameters()
        guide.prototypes.copy_(nn.functional.normalize(torch.randn(classes, 12), dim=1))
        return guide.eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def exported_gradient(make_guide: MakeGuide) -> ExportedGradient:
    """The gradient of a guide of the network's three classes. To be read only."""
    guide = make_guide(channel_mult=(1,))  # one level: exporting a gradient takes ten seconds
    return ExportedGradient(guide, *gradient_bytes(guide, T, ExportSection(max_batch=8)))


@pytest.fixture(scope="session")
def rtx() -> Any:
    """TensorRT for RTX: another product with the same parser, builder and names, and one that builds without a GPU."""
    libraries = importlib.util.find_spec("tensorrt_rtx_libs")
    if libraries is None or libraries.submodule_search_locations is None or importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("no TensorRT for RTX here: pip install --no-deps tensorrt-rtx-cu12-libs tensorrt-rtx-cu12-bindings")
    (folder,) = libraries.submodule_search_locations
    for name in ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"):
        ctypes.CDLL(str(Path(folder, name)), mode=ctypes.RTLD_GLOBAL)
    module = importlib.import_module("tensorrt_rtx_bindings")

    class Builder(module.Builder):  # type: ignore[misc, name-defined]
        def create_builder_config(self) -> Any:
            config = super().create_builder_config()
            config.num_compute_capabilities = 1  # there is no GPU here to ask
            assert config.set_compute_capability(module.ComputeCapability.SM89, 0)
            return config

    return SimpleNamespace(bindings=module, **{name: getattr(module, name) for name in dir(module) if name != "Builder"}, Builder=Builder)
