"""Half precision as the graph has it: where it is, where it must not be, and that nothing but rounding parts it from float32."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from engines.backends import onnx_file
from engines.backends.base import Precision, example_input, relative_error
from engines.backends.cast import BF16_OPSET, DTYPES, attend_exactly, cast_unet, rounded_unet, widened
from engines.backends.choice import Build
from engines.backends.export import file_opset
from engines.errors import EngineError
from engines.networks.unet import Architecture, UNet, attend
from engines.recipe import ExportSection

HALF: list[Precision] = ["bf16", "fp16"]
TYPES = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16}
ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11}  # of one value


@pytest.fixture(scope="module")
def unet() -> UNet:
    """Every kind of block: both changes of size, skips with and without a convolution, attention, labels."""
    torch.manual_seed(0)
    unet = UNet(Architecture(8, 3, 16, (1, 2), 1, (4,), num_head_channels=32), 6, 4)
    for module in unet.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            module.reset_parameters()
    return unet.eval().requires_grad_(False)


def example(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, 8, 8, generator=generator), torch.tensor([0, 400, 999][:batch]), torch.arange(batch) % 4


@pytest.mark.parametrize("precision", HALF)
def test_products_are_in_half_precision_and_what_is_delicate_is_not(precision: Precision, unet: UNet) -> None:
    cast, half = cast_unet(unet, precision), DTYPES[precision]
    seen: dict[str, set[torch.dtype]] = {}
    for name, module in cast.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            kind = "out" if name.startswith("out.") else "time" if name.startswith("time_embed") else "product"
            module.register_forward_hook(
                lambda _m, inputs, out, kind=kind: seen.setdefault(kind, set()).update((inputs[0].dtype, out.dtype))
            )
    x, t, y = example()
    out = cast(x, t, y)
    assert seen == {"product": {half}, "out": {torch.float32}}, "the time embedding is computed by its own lines, in float32"
    assert out.dtype == torch.float32
    types = {name: value.dtype for name, value in cast.named_parameters()}
    assert all(dtype == torch.float32 for name, dtype in types.items() if name.startswith(("time_embed", "label_emb", "out.")))
    norms = [name for name, module in cast.named_modules() if type(module).__name__ == "_Norm"]
    assert len(norms) == sum(type(module).__name__ == "GroupNorm32" for module in unet.modules())
    assert all(types[f"{name}.weight"] == types[f"{name}.bias"] == torch.float32 for name in norms)
    assert set(types.values()) == {torch.float32, half}


@pytest.mark.parametrize("precision", HALF)
def test_the_network_that_is_cast_stays_as_it_was_and_rounding_is_all_that_changed(precision: Precision, unet: UNet) -> None:
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    x, t, y = example()
    expected, found, rounded = unet(x, t, y), cast_unet(unet, precision)(x, t, y), rounded_unet(unet, precision)(x, t, y)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert 0 < relative_error(rounded, expected) < 10 * ROUNDING[precision]
    assert 0 < relative_error(found, expected) < 20 * ROUNDING[precision]
    assert all(value.dtype == torch.float32 for value in rounded_unet(unet, precision).state_dict().values())


def test_float32_is_the_network_itself(unet: UNet) -> None:
    assert cast_unet(unet, "fp32") is unet


@pytest.mark.parametrize("size", [8, 16, 24, 32, 64, 128])
def test_attention_is_that_of_the_network_whatever_the_size_of_its_heads(size: int) -> None:
    q, k, v = torch.randn(3, 2, 2, 5, size, generator=torch.Generator().manual_seed(0)).unbind()
    assert relative_error(attend_exactly(q, k, v), attend(q, k, v)) < 1e-6


def test_weights_beyond_fp16_become_infinite_rather_than_wrong(unet: UNet) -> None:
    changed = UNet(unet.architecture, 6, 4).eval().requires_grad_(False)
    changed.load_state_dict(unet.state_dict())
    changed.middle_block[0].in_layers[2].weight.mul_(1e9)
    assert not bool(cast_unet(changed, "fp16")(*example()).isfinite().all())


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_the_file_has_half_precision_where_the_network_has(precision: Precision, onnx_of: Any) -> None:
    model = onnx.load_model_from_string(onnx_of(Build("onnx", precision)))
    onnx.checker.check_model(model, full_check=True)
    assert {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)} == {TensorProto.FLOAT, TensorProto.INT64}
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.output, *inferred.input)}
    half, products = TYPES[precision], [node for node in inferred.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert [types[node.output[0]] for node in products] == [half] * (len(products) - 1) + [TensorProto.FLOAT]
    assert products[-1].op_type == "Conv", "the output's"
    assert {types[node.output[0]] for node in inferred.node if node.op_type in ("InstanceNormalization", "Softmax")} == {TensorProto.FLOAT}
    (table,) = (tensor for tensor in model.graph.initializer if tuple(tensor.dims) == (50, 64))
    assert table.data_type == TensorProto.FLOAT, "the time embedding"


@pytest.mark.parametrize("precision", HALF)
def test_two_independent_ways_to_compute_the_file_agree_with_torch(precision: Precision, onnx_of: Any, exported: Any) -> None:
    """ONNX's own evaluator rounds each operator of the file itself; widened, the file is the rounded network to float32's last digits."""
    data = onnx_of(Build("onnx", precision))
    x, t, y = example_input(exported.card, 3, 49)
    assert y is not None
    feed = {"x": x.numpy(), "t": t.numpy(), "y": y.numpy()}

    def evaluated(file: bytes) -> Tensor:
        return torch.from_numpy(ReferenceEvaluator(onnx.load_model_from_string(file)).run(["out"], feed)[0])

    with torch.no_grad():
        assert relative_error(evaluated(widened(data)), rounded_unet(exported.unet, precision)(x, t, y)) < 1e-6
        found = relative_error(evaluated(data), cast_unet(exported.unet, precision)(x, t, y))
    assert 0 < found < 10 * ROUNDING[precision]


@pytest.mark.parametrize("precision", ["fp32", *HALF])
def test_nvidias_own_inspector_reads_our_files(precision: Precision, onnx_of: Any, tmp_path: Path) -> None:
    if importlib.util.find_spec("polygraphy") is None:
        pytest.skip("no polygraphy here: pip install polygraphy")
    path = tmp_path / "target.onnx"
    path.write_bytes(onnx_of(Build("onnx", precision)))
    program = "import sys; from polygraphy.tools import main; sys.argv[0] = 'polygraphy'; main()"
    told = subprocess.run([sys.executable, "-c", program, "inspect", "model", str(path)], capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    assert f"ONNX Opset: {22 if precision == 'bf16' else 20}" in told.stdout
    assert "x [dtype=float32, shape=('batch', 1, 8, 8)]" in told.stdout
    assert "out [dtype=float32" in told.stdout


def test_widening_a_file_of_float32_changes_nothing(exported: Any) -> None:
    data = exported.path.read_bytes()
    assert widened(data) == data


def test_a_file_in_bf16_has_at_least_the_first_opset_that_knows_its_convolutions() -> None:
    settings = ExportSection()
    assert settings.opset < BF16_OPSET
    for build, opset in {("onnx", "bf16"): 22, ("tensorrt", "bf16"): 22, ("openvino", "bf16"): 20, ("onnx", "fp16"): 20}.items():
        assert file_opset(settings, Build(*build)) == opset
    assert file_opset(ExportSection(opset=23), Build("onnx", "bf16")) == 23


def test_a_graph_that_cannot_be_carried_to_another_opset_is_an_error() -> None:
    with pytest.raises(EngineError, match="cannot carry this network to opset 22"):
        onnx_file.to_opset(onnx.ModelProto(), 22)
