"""The guide's gradient as a graph: what autograd gives, on every runtime, or it is not published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from engines import store
from engines.backends import gradient
from engines.backends.gradient import GradientEngine, export_gradient, gradient_module, gradient_parity, refuse_disagreement
from engines.backends.graphs import open_graph
from engines.diffusion.guidance import class_gradient, prototype_guidance
from engines.errors import DataError, EngineError, NumericsError, ParityError

Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def opened(exported_gradient: Any, runtime: str = "onnx") -> GradientEngine:
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO is not installed")
    return GradientEngine(exported_gradient.data, exported_gradient.card.model_copy(update={"runtime": runtime}), "guide.onnx", threads=1)


def inputs(batch: int, t: int, channels: int = 1, classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, channels, 8, 8, generator=generator), torch.full((batch,), t), torch.arange(batch) % classes


def assert_equal_gradients(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    cosine = torch.nn.functional.cosine_similarity(found[0].double().flatten(1), expected[0].double().flatten(1))
    assert cosine.min() >= 0.9999
    assert ((found[0] - expected[0]).abs().amax((1, 2, 3)) <= 1e-4 * expected[0].abs().amax((1, 2, 3))).all()
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_an_exported_gradient_is_autograds_at_any_batch_and_timestep(runtime: str, exported_gradient: Any) -> None:
    engine = opened(exported_gradient, runtime)
    for batch in (1, 2, 7, 32):
        for t in (0, 25, 49):
            x, at, y = inputs(batch, t)
            assert_equal_gradients(engine(x, at, y), class_gradient(exported_gradient.guide.log_probs, x, at, y))
    refuse_disagreement(gradient_parity(engine, exported_gradient.guide), "guide.onnx")


@pytest.mark.parametrize(
    ("classes", "changes"),
    [
        (100, {"attention_resolutions": (4,), "channel_mult": (1, 1.5), "num_head_channels": 4}),
        (10, {"resblock_updown": False, "use_scale_shift_norm": False, "in_channels": 3}),  # convolutions of stride 2
    ],
)
def test_the_traced_backward_pass_is_autograds_for_other_guides_at_a_batch_it_was_not_traced_with(
    classes: int, changes: dict[str, Any], make_guide: Any
) -> None:
    guide = make_guide(classes, **changes)
    x, t, y = inputs(5, 20, guide.encoder.architecture.in_channels, classes)
    assert_equal_gradients(gradient_module(guide, 50)(x, t, y), class_gradient(guide.log_probs, x, t, y))


def test_the_file_is_one_piece_in_the_convolution_form_with_its_time_embedding_as_a_table(exported_gradient: Any) -> None:
    model = onnx.load_model_from_string(exported_gradient.data)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    operators = {node.op_type for node in model.graph.node}
    assert "Conv" in operators
    assert not operators & {"ConvTranspose", "Sin", "Cos", "ScatterElements", "ScatterND"}
    for value in (*model.graph.input, *model.graph.output):
        first, *others = value.type.tensor_type.shape.dim
        assert first.dim_param and all(size.dim_value for size in others), "the batch is the only dynamic size"
    assert any(tuple(tensor.dims) == (50, 32) for tensor in model.graph.initializer)
    assert str(Path(gradient.__file__).parent.parent).encode() not in exported_gradient.data
    assert str(Path(torch.__file__).parent).encode() not in exported_gradient.data


def test_guidance_by_the_engine_is_guidance_by_autograd(exported_gradient: Any) -> None:
    x, t, y = inputs(4, 25)
    log_probs = exported_gradient.guide.log_probs
    expected = prototype_guidance(log_probs, y)(x, t)
    found = prototype_guidance(log_probs, y, gradient=opened(exported_gradient))(x, t)
    assert expected is not None
    assert found is not None
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def _one_not_a_number(gradient: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    spoiled = gradient.clone()
    spoiled[-1, 0, 0, 0] = float("nan")
    return spoiled, log_probs


WRONG: dict[str, Change] = {
    "the sign": lambda g, p: (-g, p),
    "the scale by a part in a thousand": lambda g, p: (1.001 * g, p),
    "one sample not a number": _one_not_a_number,
    "two images exchanged": lambda g, p: (g.roll(1, 0), p) if len(g) > 1 else (g, p),
    "noise": lambda g, p: (g + 1e-2 * g.abs().amax() * torch.sin(torch.arange(g.numel())).view_as(g), p),
    "zeros": lambda g, p: (torch.zeros_like(g), p),
    "log p alone": lambda g, p: (g, p - 0.01),
    "log p not a number": lambda g, p: (g, torch.full_like(p, float("nan"))),
}


def with_wrong(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """From now on graphs give changed results."""
    right = gradient.open_graph

    def open_wrong(*arguments: Any) -> Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]:
        graph = right(*arguments)
        return lambda feed: change(*graph(feed))

    monkeypatch.setattr(gradient, "open_graph", open_wrong)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_gradient_that_disagrees_with_torch_is_not_published(
    wrong: str, exported_gradient: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_wrong(monkeypatch, WRONG[wrong])
    untested = exported_gradient.card.model_copy(update={"self_test": ()})  # the gate by itself
    monkeypatch.setattr(gradient, "gradient_bytes", lambda *_: (exported_gradient.data, untested))
    with pytest.raises(ParityError, match="disagrees with torch") as failure:
        export_gradient(exported_gradient.guide, 50, tmp_path / "engines" / "guide.onnx", 32)
    assert failure.value.exit_code == 6
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", ["the sign", "one sample not a number", "zeros", "log p alone"])
def test_an_engine_whose_numbers_changed_since_is_refused_when_it_is_loaded(
    wrong: str, exported_gradient: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_wrong(monkeypatch, WRONG[wrong])
    with pytest.raises(ParityError, match="disagrees with torch"):
        opened(exported_gradient)


def test_a_file_is_loaded_with_its_card_and_refused_with_another_or_none(
    exported_gradient: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient, "gradient_bytes", lambda *_: (exported_gradient.data, exported_gradient.card))
    path = tmp_path / "guide.onnx"
    card = export_gradient(exported_gradient.guide, 50, path, 32)
    assert card.cosine >= 0.9999
    assert 0 < card.max_error <= 1e-4
    assert GradientEngine.load(path, threads=1).card == card
    store.write_bytes(path, exported_gradient.data + b" ")
    with pytest.raises(EngineError, match="not the file that its card describes"):
        GradientEngine.load(path)
    store.write_text(path.with_suffix(".json"), "{}")
    with pytest.raises(EngineError, match="not the card of a gradient"):
        GradientEngine.load(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(EngineError, match="cannot read"):
        GradientEngine.load(path)


def test_a_graph_of_another_kind_is_refused_before_a_session_is_made(exported_gradient: Any, exported: Any) -> None:
    with pytest.raises(DataError, match="inputs and outputs"):
        GradientEngine(exported.path.read_bytes(), exported_gradient.card, "guide.onnx")


def test_a_guide_that_gives_values_that_are_not_finite_is_not_exported(make_guide: Any, tmp_path: Path) -> None:
    guide = make_guide()
    guide.prototypes.fill_(float("nan"))
    with pytest.raises(NumericsError):
        export_gradient(guide, 50, tmp_path / "guide.onnx", 32)
    assert not any(tmp_path.iterdir())


def test_a_graph_that_openvino_would_crash_on_is_refused() -> None:
    value = onnx.helper.make_tensor_value_info
    x, y = value("x", onnx.TensorProto.FLOAT, ["batch", 4, 2, 2]), value("y", onnx.TensorProto.FLOAT, ["batch", 4, 2, 2])
    weights = [onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [4], [1.0] * 4) for name in ("scale", "bias")]
    node = onnx.helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=2)
    graph = onnx.helper.make_graph([node], "norm", [x], [y], weights)
    data = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)]).SerializeToString()
    with pytest.raises(EngineError, match="GroupNormalization") as failure:
        open_graph(data, ["x"], ["y"], 21, "norm.onnx", "openvino")
    assert failure.value.exit_code == 4
    assert "export.opset=20" in failure.value.remedy
