"""Every opset that a recipe may name, in every precision: checked, run and built by what takes it, with every kind of block."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import onnx
import pytest
import torch
from torch import nn

from engines.backends.base import EngineCard, EngineFile, Precision, example_input, relative_error, thinned
from engines.backends.cast import rounded_unet, widened
from engines.backends.choice import Build
from engines.backends.export import file_opset, onnx_bytes
from engines.backends.gate import limits_of, one_step_error
from engines.backends.openvino_engine import MAX_OPSET, OpenVinoEngine
from engines.backends.ort_engine import OrtEngine
from engines.backends.torch_engine import TorchEngine
from engines.backends.trt_engine import Batches, build_plan
from engines.networks.unet import Architecture, UNet
from engines.recipe import ExportSection


class Case(NamedTuple):
    unet: UNet
    file: EngineFile


@pytest.fixture(scope="module")
def case() -> Callable[[int, Precision], Case]:
    """case(opset, precision): a network with attention, labels, and both changes of size, as a file with a card for ONNX Runtime."""
    torch.manual_seed(0)
    unet = UNet(Architecture(8, 3, 16, (1, 2), 1, (4,), num_head_channels=32), 6, 4)
    for module in unet.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            module.reset_parameters()
    unet.eval().requires_grad_(False)
    reference = TorchEngine(unet, 50, 8)

    @functools.cache
    def made(opset: int, precision: Precision) -> Case:
        settings = ExportSection(opset=opset)
        opset = file_opset(settings, Build("onnx", precision))
        tolerance = limits_of(settings, precision).one_step_tolerance
        card = reference.card.model_copy(update={"kind": "onnx", "precision": precision, "opset": opset, "tolerance": tolerance})
        values = thinned(reference(*example_input(card, 3, 0)))
        return Case(unet, EngineFile(onnx_bytes(unet, card), card.model_copy(update={"self_test": tuple(values.tolist())})))

    return made


every = pytest.mark.parametrize(
    ("opset", "precision"), [(opset, precision) for opset in (18, 20, 21, 23) for precision in ("fp32", "fp16", "bf16")]
)


def _as(card: EngineCard, **changes: Any) -> EngineCard:
    return card.model_copy(update=changes)


@pytest.mark.slow
@every
def test_a_file_of_any_opset_is_valid_and_gives_torchs_numbers_where_it_runs(opset: int, precision: Precision, case: Any) -> None:
    unet, file = case(opset, precision)
    onnx.checker.check_model(onnx.load_model_from_string(file.data), full_check=True)
    reference, rounded = TorchEngine(unet, 50, 8), TorchEngine(rounded_unet(unet, precision), 50, 8)
    card = _as(file.card, self_test=tuple(thinned(rounded(*example_input(file.card, 3, 0))).tolist()), precision="fp32", tolerance=1e-5)
    assert one_step_error(OrtEngine(EngineFile(widened(file.data), card), "widened"), rounded) <= 1e-5
    if precision != "bf16":  # which ONNX Runtime cannot run on a CPU
        assert one_step_error(OrtEngine(file, "target.onnx"), reference) <= file.card.tolerance
    if precision == "fp32" and opset <= MAX_OPSET:
        pytest.importorskip("openvino")
        engine = OpenVinoEngine(EngineFile(file.data, _as(file.card, kind="openvino")), "target.onnx")
        assert one_step_error(engine, reference) <= file.card.tolerance
        x, t, y = example_input(card, 5, 7)
        assert relative_error(engine(x, t, y), OrtEngine(file, "target.onnx")(x, t, y)) <= 2 * file.card.tolerance


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorRT for RTX keeps no timing cache, and says so
@pytest.mark.slow
@every
def test_a_real_parser_and_builder_take_a_file_of_any_opset(opset: int, precision: Precision, case: Any, rtx: Any) -> None:
    assert len(build_plan(rtx, case(opset, precision).file, "target.plan", Batches(1, 4, 8), 2**28).plan) > 100_000
