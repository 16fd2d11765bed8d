"""The fused guided step: what the sampler does with torch's network and autograd, in one graph, or it is not published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
)
from engines.backends.graphs import Graph
from engines.diffusion.guidance import prototype_guidance
from engines.diffusion.sampler import GuidedStep, StepLog, Stepped, sample
from engines.diffusion.schedule import Schedule, respace
from engines.errors import DataError, EngineError, ParityError
from engines.recipe import SynthSection

DDPM = Rules(
    sampler="ddpm",
    guidance_scale=0.2,
    guidance_scale_max=1.0,
    scale_rule="entropy",
    gradient_norm="rms",
    direction="toward",
    step_unit="sigma",
    clip_denoised=True,
)
DDIM = DDPM.model_copy(update={"sampler": "ddim", "scale_rule": "fixed", "gradient_norm": "l2", "direction": "away", "guidance_scale": 2.0})
Y = torch.tensor([0, 1, 2, 0])
PSNR_DB = 40.0  # of untrained networks, which enlarge a rounding a thousandfold in 20 steps; single steps are held to 1e-4


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
            made[rules] = Fused(*fused_bytes(read_engine(exported.path), gradient, rules, reference), reference)
        return made[rules]

    return make


def opened(made: Fused, runtime: str = "onnx") -> FusedEngine:
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO is not installed")
    return FusedEngine(made.data, made.card.model_copy(update={"runtime": runtime}), "fused.onnx", threads=1)


def noise(step: int) -> Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(step))


def draw(made: Fused, engine: Any, steps: int = 20, eta: float = 0.0, **options: Any) -> tuple[Tensor, list[StepLog]]:
    """Four images and the log of their steps, by the sampler alone or with the engine's steps."""
    rules, logs = made.card.rules, list[StepLog]()
    schedule = respace(made.reference.schedule, steps)
    guidance = prototype_guidance(
        made.reference.log_probs,
        Y,
        rules.guidance_scale,
        rules.guidance_scale_max,
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
            engine.bind(schedule, Y, eta) if engine else None,
            **options,
        )
    return x, logs


class _Beside:
    """The reference's steps, and beside each of them the engine's."""

    def __init__(self, engine: FusedEngine, reference: Reference, along: list[float]) -> None:
        self.engine, self.reference, self.along = engine, reference, along

    def bind(self, schedule: Schedule, y: Tensor, eta: float = 0.0) -> GuidedStep:
        rows = schedule_rows(schedule, eta)

        def step(x: Tensor, j: Tensor, z: Tensor) -> Stepped:
            t = schedule.timesteps[j]
            expected = reference_step(self.reference, self.engine.card, x, t, y, z, rows[j])
            self.along.append(float((self.engine(x, t, y, z, rows[j]).x - expected.x).abs().max()))
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


@pytest.mark.parametrize("steps", [5, 50])
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
@pytest.mark.parametrize("unit", ["sigma", "variance"])
@pytest.mark.parametrize("norm", ["rms", "linf", "l2", "none"])
@pytest.mark.parametrize("direction", ["toward", "away"])
@pytest.mark.parametrize("rule", ["entropy", "fixed"])
@pytest.mark.parametrize("clip", [True, False])
def test_the_step_that_is_traced_is_the_samplers_under_every_rule(
    sampler: Any, unit: str, norm: str, direction: str, rule: str, clip: bool, exported: Any, exported_gradient: Any
) -> None:
    """Before any export: the sampler with `reference_step` as its steps draws what the sampler draws."""
    rules = Rules.model_validate(
        DDPM.model_dump()
        | {"sampler": sampler, "step_unit": unit, "gradient_norm": norm, "direction": direction, "scale_rule": rule}
        | {"guidance_scale": 0.5, "clip_denoised": clip}
    )
    reference = Reference(exported.unet, exported_gradient.guide.log_probs, exported.schedule)
    schedule = respace(exported.schedule, 3)
    card = FusedCard.model_construct(rules=rules, labeled=True)
    guidance = prototype_guidance(reference.log_probs, Y, 0.5, 1.0, rules.scale_rule, rules.gradient_norm, rules.direction)

    def step(x: Tensor, j: Tensor, z: Tensor) -> Stepped:
        return reference_step(reference, card, x, schedule.timesteps[j], Y, z, schedule_rows(schedule)[j])

    def images(guided_step: Any) -> Tensor:
        with torch.no_grad():
            denoise = lambda x, t: exported.unet(x, t, Y)  # noqa: E731
            return sample(denoise, schedule, noise, guidance, sampler, 0.0, rules.step_unit, clip, guided_step=guided_step)

    torch.testing.assert_close(images(step), images(None), rtol=1e-4, atol=1e-4)


def test_the_gate_passes_what_agrees_and_measures_it(make_fused: Make) -> None:
    made = make_fused(DDPM)
    parity = fused_parity(opened(made), made.reference)
    assert 0 < parity.step_error < 1e-4
    assert parity.trajectory_psnr_db > PSNR_DB
    refuse_disagreement(parity, "fused.onnx")


def _with(at: int, change: Callable[[Tensor], Tensor]) -> Callable[[Graph], Graph]:
    """A graph one of whose outputs is changed."""

    def changed(graph: Graph) -> Graph:
        def run(feed: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            outputs = list(graph(feed))
            outputs[at] = change(outputs[at])
            return tuple(outputs)

        return run

    return changed


def _next_t(graph: Graph) -> Graph:
    return lambda feed: graph({**feed, "t": (feed["t"] + 1) % 50})


def _last_not_a_number(x: Tensor) -> Tensor:
    spoiled = x.clone()
    spoiled[-1, 0, 0, 0] = float("nan")
    return spoiled


WRONG: dict[str, Callable[[Graph], Graph]] = {
    "noise of 1e-2": _with(0, lambda x: x + 1e-2 * torch.sin(torch.arange(x.numel())).view_as(x)),
    "the state scaled by a part in a thousand": _with(0, lambda x: 1.001 * x),
    "one sample not a number": _with(0, _last_not_a_number),
    "t off by one": _next_t,
    "no noise added": lambda graph: lambda feed: graph({**feed, "z": torch.zeros_like(feed["z"])}),
    "another class": lambda graph: lambda feed: graph({**feed, "y": (feed["y"] + 1) % 3}),
    "a figure": _with(2, lambda scale: 1.01 * scale),
    "log p not a number": _with(3, lambda log_prob: torch.full_like(log_prob, float("nan"))),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_step_that_disagrees_with_torch_is_not_published(
    wrong: str, make_fused: Make, exported: Any, exported_gradient: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, right = make_fused(DDPM), fused.open_graph
    untested = made.card.model_copy(update={"self_test": ()})  # the gate by itself
    monkeypatch.setattr(fused, "open_graph", lambda *arguments: WRONG[wrong](right(*arguments)))
    monkeypatch.setattr(fused, "fused_bytes", lambda *_: (made.data, untested))
    gradient = exported_gradient.data, exported_gradient.card
    with pytest.raises(ParityError, match="disagrees with torch") as failure:
        export_fused(read_engine(exported.path), gradient, DDPM, made.reference, tmp_path / "engines" / "fused.onnx")
    assert failure.value.exit_code == 6
    assert not any(tmp_path.iterdir())


def test_a_step_with_the_guides_gradient_the_wrong_way_is_not_published(make_fused: Make) -> None:
    made = make_fused(DDPM)
    away = made.reference._replace(log_probs=lambda x, t: -made.reference.log_probs(x, t))
    with pytest.raises(ParityError):
        refuse_disagreement(fused_parity(opened(made), away), "fused.onnx")


@pytest.mark.parametrize("wrong", ["one sample not a number", "the state scaled by a part in a thousand", "t off by one"])
def test_a_step_whose_numbers_changed_since_is_refused_when_it_is_loaded(
    wrong: str, make_fused: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, right = make_fused(DDPM), fused.open_graph
    monkeypatch.setattr(fused, "open_graph", lambda *arguments: WRONG[wrong](right(*arguments)))
    if wrong.startswith("the state"):  # another processor may differ that much: ten times the gate's tolerance
        assert opened(made).card == made.card
    else:
        with pytest.raises(ParityError, match="disagrees with torch"):
            opened(made)


def test_a_file_is_loaded_with_its_card_and_refused_with_another_or_none(
    make_fused: Make, exported: Any, exported_gradient: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, path = make_fused(DDPM), tmp_path / "fused.onnx"
    monkeypatch.setattr(fused, "fused_bytes", lambda *_: (made.data, made.card))
    gradient = exported_gradient.data, exported_gradient.card
    card = export_fused(read_engine(exported.path), gradient, DDPM, made.reference, path)
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
    assert [value.name for value in model.graph.input] == ["x", "t", "y", "z", "schedule"]
    assert "ConvTranspose" not in {node.op_type for node in model.graph.node}
    with pytest.raises(DataError, match="inputs and outputs"):
        FusedEngine(exported_gradient.data, made.card, "fused.onnx")


def test_rules_are_those_of_the_recipe_and_none_where_a_step_is_not_of_one_evaluation_and_one_gradient() -> None:
    assert rules_of(SynthSection()) == DDPM
    for changes in ({"sampler": "dpmpp_2m"}, {"guidance_scale": 0.0}, {"classifier_free_scale": 1.0}):
        assert rules_of(SynthSection(**changes)) is None  # type: ignore[arg-type]
