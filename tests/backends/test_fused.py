"""The fused guided step: what the sampler does with torch's network and autograd, in one graph, or it is not published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
import torch
from torch import Tensor

from engines import store
from engines.backends import fused
from engines.backends.base import read_engine
from engines.backends.fused import (
    FusedCard,
    FusedEngine,
    FusedParity,
    Reference,
    Rules,
    export_fused,
    fused_bytes,
    fused_parity,
    read_fused,
    reference_step,
    refuse_disagreement,
    rules_of,
    schedule_rows,
    step_errors,
)
from engines.backends.gradient import limits_of
from engines.backends.graphs import Graph
from engines.backends.openvino_engine import require_runtime
from engines.diffusion.guidance import prototype_guidance
from engines.diffusion.sampler import GuidedStep, StepLog, Stepped, sample
from engines.diffusion.schedule import Schedule, respace
from engines.errors import DataError, EngineError, ParityError
from engines.networks.unet import Architecture, UNet
from engines.recipe import ExportSection, SynthSection

DDPM = Rules(sampler="ddpm", scale_rule="entropy", gradient_norm="rms", direction="toward", step_unit="sigma", clip_denoised=True)
DDIM = DDPM.model_copy(update={"sampler": "ddim", "scale_rule": "fixed", "gradient_norm": "l2", "direction": "away"})
SETTINGS = ExportSection(max_batch=4)
SCALES = {"ddpm": (0.2, 1.0), "ddim": (2.0, 1.0)}
Y = torch.tensor([0, 1, 2, 0])
PSNR_DB = 40.0


class Fused(NamedTuple):
    data: bytes
    card: FusedCard
    reference: Reference


Make = Callable[[Rules], Fused]


@pytest.fixture(scope="session")
def make_fused(exported: Any, exported_gradient: Any) -> Make:
    """make_fused(rules) -> the two exported networks and the step, merged. Made once for each."""
    made: dict[Rules, Fused] = {}
    reference = Reference(exported.unet, exported_gradient.guide.log_probs, exported.schedule)

    def make(rules: Rules) -> Fused:
        if rules not in made:
            gradient = exported_gradient.data, exported_gradient.card
            made[rules] = Fused(*fused_bytes(read_engine(exported.path), gradient, rules, reference, SETTINGS), reference)
        return made[rules]

    return make


def required(runtime: str, precision: Any = "fp32") -> None:
    if runtime == "openvino":
        try:
            require_runtime(precision)
        except EngineError as error:
            pytest.skip(error.problem)


def opened(made: Fused, runtime: str = "onnx", precision: Any = "fp32") -> FusedEngine:
    required(runtime, precision)
    tolerance = limits_of(SETTINGS, precision).step_error
    card = made.card.model_copy(update={"runtime": runtime, "precision": precision, "tolerance": tolerance})
    return FusedEngine(made.data, card, "fused.onnx", threads=1, batch=4)


def noise(step: int) -> Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(step))


def draw(made: Fused, engine: Any, steps: int = 20, eta: float = 0.0, **options: Any) -> tuple[Tensor, list[StepLog]]:
    """Four images and the log of their steps, by the sampler alone or with the engine's steps."""
    rules, logs = made.card.rules, list[StepLog]()
    schedule = respace(made.reference.schedule, steps)
    guidance = prototype_guidance(
        made.reference.log_probs,
        Y,
        *SCALES[rules.sampler],
        rules.scale_rule,
        rules.gradient_norm,
        rules.direction,
    )
    with torch.no_grad():
        x = sample(
            lambda x, t: made.reference.denoise(x, t, Y),
            schedule,
            noise,
            guidance,
            rules.sampler,
            eta,
            rules.step_unit,
            rules.clip_denoised,
            logs.append,
            engine.bind(schedule, Y, eta, *SCALES[rules.sampler]) if engine else None,
            **options,
        )
    return x, logs


class _Beside:
    """The reference's steps, and beside each of them the engine's."""

    def __init__(self, engine: FusedEngine, reference: Reference, along: list[float]) -> None:
        self.engine, self.reference, self.along = engine, reference, along

    def bind(self, schedule: Schedule, y: Tensor, eta: float, scale: float, scale_max: float) -> GuidedStep:
        rows, scales = schedule_rows(schedule, eta), torch.tensor([[scale, scale_max]]).repeat(len(y), 1)

        def step(x: Tensor, j: Tensor, z: Tensor) -> Stepped:
            t = schedule.timesteps[j]
            expected = reference_step(self.reference, self.engine.card, x, t, y, z, rows[j], scales)
            self.along.append(float((self.engine(x, t, y, z, rows[j], scales).x - expected.x).abs().max()))
            return expected

        return step


def psnr_db(found: Tensor, expected: Tensor) -> float:
    return float((10 * (4 / (found - expected).double().square().flatten(1).mean(1).clamp(min=1e-20)).log10()).min())


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
@pytest.mark.parametrize("rules", [DDPM, DDIM], ids=["ddpm", "ddim"])
def test_each_of_twenty_fused_steps_is_the_samplers_and_so_are_the_images_and_the_figures(
    rules: Rules, runtime: str, make_fused: Make
) -> None:
    made = make_fused(rules)
    engine = opened(made, runtime)
    expected, logs = draw(made, None)
    along: list[float] = []  # the largest difference of each step from the reference's own state
    again, _ = draw(made, _Beside(engine, made.reference, along))
    assert torch.equal(again, expected) or float((again - expected).abs().max()) < 1e-5
    assert len(along) == 20
    assert max(along) < 1e-4
    found, fused_logs = draw(made, engine)
    assert psnr_db(found, expected) > PSNR_DB
    assert [log.t for log in fused_logs] == [log.t for log in logs]
    for step, expected_step in zip(fused_logs, logs, strict=True):
        torch.testing.assert_close(torch.stack(step[1:]), torch.stack(expected_step[1:]), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("steps", [3, 25])
def test_one_file_serves_any_number_of_steps_and_any_eta(steps: int, make_fused: Make) -> None:
    ddpm, ddim = make_fused(DDPM), make_fused(DDIM)
    assert psnr_db(draw(ddpm, opened(ddpm), steps)[0], draw(ddpm, None, steps)[0]) > PSNR_DB
    assert psnr_db(draw(ddim, opened(ddim), steps, eta=0.7)[0], draw(ddim, None, steps, eta=0.7)[0]) > PSNR_DB


def test_outside_the_interval_the_sampler_makes_its_own_steps(make_fused: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = make_fused(DDPM), list[int]()
    engine = opened(made)
    step = FusedEngine.__call__

    def counted(self: FusedEngine, x: Tensor, t: Tensor, *others: Tensor) -> Stepped:
        asked.append(int(t[0]))
        return step(self, x, t, *others)

    monkeypatch.setattr(FusedEngine, "__call__", counted)
    expected, logs = draw(made, None, interval=(10, 30))
    found, fused_logs = draw(made, engine, interval=(10, 30))
    assert asked == [log.t for log in logs if 10 <= log.t <= 30]
    assert psnr_db(found, expected) > PSNR_DB
    assert [float(log.scale) > 0 for log in fused_logs] == [float(log.scale) > 0 for log in logs]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("norm", ["rms", "linf", "l2", "none"])
@pytest.mark.parametrize(
    ("unit", "direction", "rule", "clip"),  # each value with each value of two others
    [
        ("sigma", "toward", "entropy", True),
        ("sigma", "away", "fixed", False),
        ("variance", "toward", "fixed", False),
        ("variance", "away", "entropy", True),
    ],
)
def test_the_step_that_is_traced_is_the_samplers_under_every_rule(
    sampler: Any, unit: str, norm: str, direction: str, rule: str, clip: bool, exported: Any, exported_gradient: Any
) -> None:
    """Before any export: the sampler with `reference_step` as its steps draws what the sampler draws."""
    rules = Rules.model_validate(
        DDPM.model_dump()
        | {"sampler": sampler, "step_unit": unit, "gradient_norm": norm, "direction": direction, "scale_rule": rule}
        | {"clip_denoised": clip}
    )
    reference = Reference(exported.unet, exported_gradient.guide.log_probs, exported.schedule)
    schedule = respace(exported.schedule, 3)
    card, scales = FusedCard.model_construct(rules=rules, labeled=True), torch.tensor([[0.5, 1.0]]).repeat(4, 1)
    guidance = prototype_guidance(reference.log_probs, Y, 0.5, 1.0, rules.scale_rule, rules.gradient_norm, rules.direction)

    def step(x: Tensor, j: Tensor, z: Tensor) -> Stepped:
        return reference_step(reference, card, x, schedule.timesteps[j], Y, z, schedule_rows(schedule)[j], scales)

    def images(guided_step: Any) -> Tensor:
        with torch.no_grad():
            denoise = lambda x, t: exported.unet(x, t, Y)  # noqa: E731
            return sample(denoise, schedule, noise, guidance, sampler, 0.0, rules.step_unit, clip, guided_step=guided_step)

    torch.testing.assert_close(images(step), images(None), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ the gate


def test_the_gate_passes_what_agrees_and_measures_it(make_fused: Make) -> None:
    made = make_fused(DDPM)
    parity = fused_parity(opened(made), made.reference)
    assert 0 < parity.step_error < 1e-5
    assert 0 < parity.figure_error < 1e-4
    assert parity.trajectory_psnr_db > PSNR_DB
    refuse_disagreement(parity, "fused.onnx", limits_of(SETTINGS, "fp32"))


def test_in_bf16_single_steps_are_within_the_limits_of_bf16_and_outside_those_of_float32(make_fused: Make) -> None:
    """Limits are those of trained networks: an untrained one rounds to twice as much, and its trajectories are no measure at all."""
    made = make_fused(DDPM)
    parity = FusedParity(*step_errors(opened(made, "openvino", "bf16"), made.reference), 200.0)
    assert parity.step_error > 1e-5
    refuse_disagreement(parity, "fused.onnx", limits_of(SETTINGS, "bf16")._replace(step_error=5e-2))
    with pytest.raises(ParityError, match="of one step"):
        refuse_disagreement(parity, "fused.onnx", limits_of(SETTINGS, "fp32"))


Call = Callable[..., Stepped]


def _with(**changes: Callable[[Tensor], Tensor]) -> Callable[[Call], Call]:
    """A step some of whose results are changed."""
    return lambda right: (
        lambda *inputs: (step := right(*inputs))._replace(**{name: change(getattr(step, name)) for name, change in changes.items()})
    )


def _last_not_a_number(x: Tensor) -> Tensor:
    spoiled = x.clone()
    spoiled[-1, 0, 0, 0] = float("nan")
    return spoiled


WRONG: dict[str, Callable[[Call], Call]] = {
    "noise of 1e-2": _with(x=lambda x: x + 1e-2 * torch.sin(torch.arange(x.numel())).view_as(x)),
    "swapped channels": _with(x=lambda x: x.flip(1)),
    "t off by one": lambda right: lambda x, t, *others: right(x, (t + 1) % 50, *others),
    "one sample not a number": _with(x=_last_not_a_number),
    "the state scaled by a part in ten thousand": _with(x=lambda x: 1.0001 * x),
    "no noise added": lambda right: lambda x, t, y, z, *others: right(x, t, y, torch.zeros_like(z), *others),
    "another class": lambda right: lambda x, t, y, *others: right(x, t, (y + 1) % 3, *others),
    "a figure": _with(scale=lambda scale: 1.01 * scale),
    "log p not a number": _with(log_prob=lambda log_prob: torch.full_like(log_prob, float("nan"))),
}
SEEN_IN_BF16 = {"swapped channels", "one sample not a number", "no noise added", "another class", "log p not a number"}


class Fake:
    """The reference's steps, changed, under a card: what the gate sees of an engine."""

    def __init__(self, reference: Reference, change: Callable[[Call], Call]) -> None:
        self.card = FusedCard.model_construct(
            rules=DDPM, labeled=True, image_channels=3, image_size_px=8, classes=3, timesteps=50, max_batch=4
        )
        self.step = change(lambda *inputs: reference_step(reference, self.card, *inputs))

    def __call__(self, *inputs: Tensor) -> Stepped:
        return self.step(*inputs)


@pytest.fixture(scope="module")
def in_color(make_guide: Any, exported: Any) -> Reference:
    """Networks of three channels, untrained."""
    torch.manual_seed(2)
    unet = UNet(Architecture(8, 3, 16, (1,), 1, (), num_head_channels=16), 6, 4).eval()
    for module in unet.modules():
        if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d):
            module.reset_parameters()
    return Reference(unet, make_guide(in_channels=3, channel_mult=(1,)).log_probs, exported.schedule)


@pytest.mark.parametrize("wrong", [None, "wrong gradient sign", *WRONG])
def test_the_gate_refuses_every_sabotaged_step_and_only_those(wrong: str | None, in_color: Reference) -> None:
    if wrong == "wrong gradient sign":
        away = in_color._replace(log_probs=lambda x, t: -in_color.log_probs(x, t))
        engine = Fake(away, lambda right: right)
    else:
        engine = Fake(in_color, WRONG[wrong] if wrong else lambda right: right)
    parity = FusedParity(*step_errors(engine, in_color), 200.0)  # type: ignore[arg-type]
    for precision in ("fp32", "bf16"):
        limits = limits_of(SETTINGS, precision)  # type: ignore[arg-type]
        if not wrong:
            refuse_disagreement(parity, "fused.onnx", limits)
        elif precision == "fp32" or wrong in SEEN_IN_BF16:  # the rest is seen when the same file is held to float32's first: see below
            with pytest.raises(ParityError, match="disagrees with torch") as failure:
                refuse_disagreement(parity, "fused.onnx", limits)
            assert failure.value.exit_code == 6
            assert "synth.fused=false" in failure.value.remedy


def with_wrong(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """From now on graphs give changed results."""
    right = fused.open_graph

    def open_wrong(*arguments: Any) -> Graph:
        graph = right(*arguments)
        step = WRONG[wrong](lambda *inputs: Stepped(*graph(dict(zip(fused.INPUTS, inputs, strict=True)))))
        return lambda feed: step(*feed.values())

    monkeypatch.setattr(fused, "open_graph", open_wrong)


@pytest.mark.parametrize(("runtime", "precision"), [("onnx", "fp32"), ("openvino", "bf16")])
def test_a_step_that_disagrees_with_torch_is_not_published_and_in_bf16_not_before_float32_agreed(
    runtime: Any, precision: Any, make_fused: Make, exported: Any, exported_gradient: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    required(runtime, precision)
    made = make_fused(DDPM)
    with_wrong(monkeypatch, "noise of 1e-2")
    gradient = exported_gradient.data, exported_gradient.card.model_copy(update={"runtime": runtime, "precision": precision})
    monkeypatch.setattr(fused, "_self_test", lambda *_: None)  # the gate by itself
    network, path, settings = read_engine(exported.path), tmp_path / "engines" / "fused.onnx", ExportSection(max_batch=1)
    with pytest.raises(ParityError, match=rf"fused\.onnx on {runtime} fp32 disagrees with torch") as failure:
        export_fused(network, gradient, DDPM, made.reference, path, settings, data=made.data)
    assert failure.value.exit_code == 6
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", ["one sample not a number", "noise of 1e-2", "t off by one"])
def test_a_step_whose_numbers_changed_since_is_refused_when_it_is_loaded(
    wrong: str, make_fused: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_fused(DDPM)
    with_wrong(monkeypatch, wrong)
    with pytest.raises(ParityError, match="disagrees with torch"):
        opened(made)


# ------------------------------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize("field", ["self_test", "self_test_schedule"])
def test_a_card_without_values_to_hold_the_engine_to_loads_none(field: str, make_fused: Make) -> None:
    made = make_fused(DDPM)
    with pytest.raises(ParityError):
        FusedEngine(made.data, made.card.model_copy(update={field: ()}), "fused.onnx", 1)


def test_a_file_is_loaded_with_its_card_and_refused_with_another_or_none(
    make_fused: Make, exported: Any, exported_gradient: Any, tmp_path: Path
) -> None:
    made, path = make_fused(DDPM), tmp_path / "fused.onnx"
    gradient = exported_gradient.data, exported_gradient.card
    card = export_fused(read_engine(exported.path), gradient, DDPM, made.reference, path, SETTINGS, data=made.data)
    assert card.rules == DDPM
    assert FusedEngine.load(path, threads=1).card == card == read_fused(path)[1]
    store.write_bytes(path, made.data + b" ")
    with pytest.raises(EngineError, match="not the file that its card describes"):
        FusedEngine.load(path)
    store.write_text(path.with_suffix(".json"), "{}")
    with pytest.raises(EngineError, match="not the card of a fused step"):
        FusedEngine.load(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(EngineError, match="cannot read"):
        FusedEngine.load(path)


def test_the_file_is_one_piece_of_standard_operators(make_fused: Make, exported_gradient: Any) -> None:
    made = make_fused(DDPM)
    model = onnx.load_model_from_string(made.data)
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == ["x", "t", "y", "z", "schedule", "scales"]
    assert "ConvTranspose" not in {node.op_type for node in model.graph.node}
    with pytest.raises(DataError, match="inputs and outputs"):
        FusedEngine(exported_gradient.data, made.card, "fused.onnx")


def test_rules_are_those_of_the_recipe_and_none_where_a_step_is_not_of_one_evaluation_and_one_gradient() -> None:
    assert rules_of(SynthSection()) == DDPM
    for changes in ({"sampler": "dpmpp_2m"}, {"guidance_scale": 0.0}, {"classifier_free_scale": 1.0}):
        assert rules_of(SynthSection(**changes)) is None  # type: ignore[arg-type]
