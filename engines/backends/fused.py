"""One guided step as one graph: network, guide's gradient, normalization, scale and update (Eq. 13), for ddpm and ddim; and its gate.

The graph is put together from the two that were exported and passed their own gates, and from the step itself, which is
`engines.diffusion` traced. Rules are part of the graph: the sampler, the gradient's norm, the scale's rule, the direction, the unit,
the clipping. The schedule is an input, so that one file serves any number of steps; so are the noise and the scales.

In bf16 OpenVINO rounds what lies before the last products (convolutions and the like) of a graph and computes what follows in
float32: the whole update here. On trained networks of the digits x_{t-1} is 1e-5 to 5e-4 from torch's, relative L2, t = 0 to 999.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from engines.backends.base import REMEDY, EngineFile, Precision, package_versions, relative_error, thinned
from engines.backends.gate import psnr_db
from engines.backends.gradient import OUTPUTS as GRADIENT_OUTPUTS
from engines.backends.gradient import GradientCard, Limits, limits_of
from engines.backends.graphs import GraphCard, Runtime, open_graph, read_graph, repeated, write_graph
from engines.backends.keys import EXPORTERS, RUNTIMES
from engines.backends.onnx_file import serialized, to_onnx
from engines.backends.ort_engine import OUTPUT
from engines.diffusion.guidance import GradientNorm, LogProbs, class_gradient, prototype_guidance, push_of
from engines.diffusion.noise import batch_noise, image_key
from engines.diffusion.sampler import (
    Denoiser,
    GuidedStep,
    Stepped,
    clipped,
    ddim_step,
    ddpm_step,
    guidance_to_noise,
    sample,
)
from engines.diffusion.schedule import Schedule, at_positions, predict_x0, respace
from engines.errors import ParityError
from engines.recipe import ExportSection, SynthSection

INPUTS = ("x", "t", "y", "z", "schedule", "scales")
OUTPUTS = ("x_next", "guidance_to_noise", "scale", "log_prob")
TABLES = tuple(f.name for f in fields(Schedule) if f.name != "timesteps")  # columns of the input `schedule`, (B, 9)
EXAMPLE_BATCH = 7
EXAMPLE_SCALES = (0.2, 1.0)  # s_0 and s_max of the gate
SELF_TEST_BATCH = 3
TRAJECTORY_STEPS = 20
TRAJECTORY_IMAGES = 4


class Rules(BaseModel):
    """What of a recipe's [synth] is part of a fused graph."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sampler: Literal["ddpm", "ddim"]
    scale_rule: Literal["entropy", "fixed"]
    gradient_norm: GradientNorm
    direction: Literal["toward", "away"]
    step_unit: Literal["sigma", "variance"]
    clip_denoised: bool


class FusedCard(GraphCard):
    """What a fused step is: the JSON beside it."""

    kind: Literal["fused"] = "fused"
    rules: Rules
    weights_sha256: str  # of the network
    guide_sha256: str  # weights of the guide
    labeled: bool  # whether the network takes y too
    step_error: float = math.nan  # the figures of `FusedParity`, not a number until they are measured
    figure_error: float = math.nan
    trajectory_psnr_db: float = math.nan
    self_test_schedule: tuple[tuple[float, ...], ...]  # rows of that input
    measured_batch: int = 0  # batch of the next two: the one that synth runs; 0 = not measured
    ms_per_image: float = 0.0  # of a step, when it was exported, batches side by side
    apart_ms_per_image: float = 0.0  # of a step with the same network on the same runtime and the guide in torch, in the same minute


class Reference(NamedTuple):
    """What a fused step is compared with: the sampler on torch's own network and guide."""

    denoise: Any  # (x, t, y) -> the network's output; y where it is labeled
    log_probs: LogProbs
    schedule: Schedule  # of training


class FusedParity(NamedTuple):
    """The worst of a comparison with torch."""

    step_error: float  # relative L2 of an image's x_{t-1}
    figure_error: float  # relative L2 of the figures of a batch: ratio of guidance to noise, scale, log p
    trajectory_psnr_db: float  # of the worst image


class FusedEngine:
    """An exported guided step. Threads may call it side by side.

    Args:
        data, card: of an exported file; `read_fused` gives them.
        threads: of one evaluation; 0 = all that this process may use.
        batch: the batch size that will be asked for, which is what the load-time test runs; 0 = that test's own.

    Raises:
        DataError: the file is not a graph of this kind.
        EngineError: the card's runtime is not here or cannot load it.
        ParityError: its numbers are not those of the card.
    """

    def __init__(self, data: bytes, card: FusedCard, origin: str, threads: int = 0, batch: int = 0) -> None:
        self.card = card
        self._graph = open_graph(data, INPUTS, OUTPUTS, card.opset, origin, card.runtime, threads, card.precision)
        _self_test(self, origin, batch)

    @classmethod
    def load(cls, path: Path, runtime: Runtime = "onnx", precision: Precision = "fp32", threads: int = 0, batch: int = 0) -> FusedEngine:
        """The engine of a file with a card beside it. Raises EngineError where they do not belong together, and as above."""
        return cls(*read_fused(path, runtime, precision), str(path), threads, batch)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, z: Tensor, schedule: Tensor, scales: Tensor) -> Stepped:
        """One step.

        Args:
            x, z: (B, C, H, W) float32, B <= max_batch.  t, y: (B,) int64.  schedule: (B, 9) float32, see `schedule_rows`.
            scales: (B, 2) float32, s_0 and s_max.
        """
        card, batch = self.card, len(x)
        assert x.shape[1:] == card.shape and x.shape == z.shape
        assert x.dtype == z.dtype == schedule.dtype == scales.dtype == torch.float32
        assert 1 <= batch <= card.max_batch, f"batch {batch}, at most {card.max_batch}"
        assert schedule.shape == (batch, len(TABLES)) and scales.shape == (batch, 2)
        for value, limit in ((t, card.timesteps), (y, card.classes)):
            assert value.shape == (batch,) and value.dtype == torch.int64 and int(value.min()) >= 0 and int(value.max()) < limit
        return Stepped(*self._graph({"x": x, "t": t, "y": y, "z": z, "schedule": schedule, "scales": scales}))

    def bind(
        self,
        schedule: Schedule,
        y: Tensor,
        eta: float = 0.0,
        scale: float = EXAMPLE_SCALES[0],
        scale_max: float = EXAMPLE_SCALES[1],
    ) -> GuidedStep:
        """The step as a sampler calls it, in the timesteps in which guidance acts.

        Args:
            y: (B,) int64 classes asked for.  eta: of ddim.  scale, scale_max: s_0 and s_max.
        """
        rows, scales = schedule_rows(schedule, eta), torch.tensor([[scale, scale_max]]).repeat(len(y), 1)

        def guided_step(x: Tensor, j: Tensor, z: Tensor) -> Stepped:
            return self(x, schedule.timesteps[j], y, z, rows[j], scales)

        return guided_step


def rules_of(synth: SynthSection) -> Rules | None:
    """What a fused graph would be made of, or None where there is none: no guidance, a step with a memory, or two evaluations a step."""
    if synth.sampler == "dpmpp_2m" or not synth.guidance_scale or synth.classifier_free_scale:
        return None
    return Rules(**{name: getattr(synth, name) for name in Rules.model_fields})


def schedule_rows(schedule: Schedule, eta: float = 0.0) -> Tensor:
    """(S, 9) float32, a row for each position: what a graph needs to know of a schedule. `eta` is that of ddim; ddpm has none."""
    columns = {name: getattr(schedule, name) for name in TABLES}
    columns["posterior_variance"] = eta**2 * columns["posterior_variance"]  # only ddim reads it
    return torch.stack(list(columns.values()), 1)


def export_fused(
    network: EngineFile,
    gradient: tuple[bytes, GradientCard],
    rules: Rules,
    reference: Reference,
    path: Path,
    settings: ExportSection,
    batch: int = 0,
    data: bytes = b"",
) -> FusedCard:
    """Write `path` and the card for the gradient's runtime and precision, if and only if that runtime gives torch's steps.

    Args:
        network, gradient: exported files of one opset, shape and T, for one runtime and precision.
        path: `<name>.onnx`, which all runtimes share.
        batch: the batch size of synthesis, which is checked beside others; 0 = the largest.
        data: the file where it was made before, for another runtime; empty = made now.

    Raises:
        ParityError: a number disagrees, in this precision or before that in float32; nothing is written.
        EngineError: the exporter or the runtime failed.
        StorageError: the file cannot be written.
    """
    data, card = fused_bytes(network, gradient, rules, reference, settings, data)
    card = held(data, card, reference, path.name, settings, batch)
    write_graph(path, data, card)
    return card


def held(data: bytes, card: FusedCard, reference: Reference, name: str, settings: ExportSection, batch: int = 0) -> FusedCard:
    """The card with its parity; in a lower precision, whose rounding hides small errors, after the same file in float32.

    Trajectories measure an engine on trained networks alone. With random weights and without clipping, torch's own states, disturbed
    by 3e-6 a step (relative, normal), are 42 dB away after 20 steps, and 23 dB by 3e-5; with clipping 109 and 89 dB. Engines of
    such networks, at opset 18 and 20 alike, are within 1e-6 after one step, and 65 to 75 dB after 20 without clipping.

    Raises ParityError, EngineError.
    """
    if card.precision != "fp32":
        limits, origin = limits_of(settings, "fp32"), f"{name} on {card.runtime} fp32"
        twin = card.model_copy(update={"precision": "fp32", "tolerance": limits.step_error})
        errors = step_errors(FusedEngine(data, twin, origin, batch=batch), reference, batch)
        refuse_disagreement(FusedParity(*errors, math.inf), origin, limits)
    origin = f"{name} on {card.runtime} {card.precision}"
    parity = fused_parity(FusedEngine(data, card, origin, batch=batch), reference, batch)
    refuse_disagreement(parity, origin, limits_of(settings, card.precision))
    return card.model_copy(update=parity._asdict())


def fused_bytes(
    network: EngineFile,
    gradient: tuple[bytes, GradientCard],
    rules: Rules,
    reference: Reference,
    settings: ExportSection,
    data: bytes = b"",
) -> tuple[bytes, FusedCard]:
    """The graph, and a card whose parity is not measured yet. Raises EngineError. See `export_fused`."""
    (guide_data, guide), unet = gradient, network.card
    assert (unet.shape, unet.timesteps, unet.opset) == (guide.shape, guide.timesteps, guide.opset), "two engines of one run"
    card = FusedCard(
        runtime=guide.runtime,
        precision=guide.precision,
        rules=rules,
        recipe_sha256=unet.recipe_sha256,
        weights_sha256=unet.weights_sha256,
        guide_sha256=guide.weights_sha256,
        file_sha256="",
        image_size_px=unet.image_size_px,
        image_channels=unet.image_channels,
        labeled=bool(unet.classes),
        classes=guide.classes,
        timesteps=unet.timesteps,
        max_batch=min(unet.max_batch, guide.max_batch),
        opset=unet.opset,
        versions=package_versions((*EXPORTERS, *RUNTIMES[guide.runtime])),
        tolerance=limits_of(settings, guide.precision).step_error,
        self_test=(),
        self_test_schedule=(),
    )
    first = example(card, SELF_TEST_BATCH, 0, reference.schedule)
    values = torch.cat(_thinned_step(reference_step(reference, card, *first)))
    tested = {"self_test": tuple(values.tolist()), "self_test_schedule": tuple(map(tuple, first[-2].tolist()))}
    data = data or _merged_bytes(network, guide_data, card, reference)
    return data, card.model_copy(update={"file_sha256": hashlib.sha256(data).hexdigest(), **tested})


def _merged_bytes(network: EngineFile, guide_data: bytes, card: FusedCard, reference: Reference) -> bytes:
    import onnx

    x, _, y, z, rows, scales = example(card, EXAMPLE_BATCH, 0, reference.schedule)
    inner = dict(zip(GRADIENT_OUTPUTS, (torch.zeros_like(x), torch.zeros(len(x), card.classes)), strict=True))
    output = torch.zeros(len(x), network.card.out_channels, *x.shape[2:])
    inputs = {"x": x, "y": y, "z": z, "schedule": rows, "scales": scales, OUTPUT: output} | inner
    step = to_onnx(_Step(card.rules).eval(), inputs, OUTPUTS, card.opset)
    read = onnx.load_model_from_string
    model = merged({"network": read(network.data), "guide": read(guide_data), "step": step})
    provenance = {"weights_sha256": card.weights_sha256, "guide_sha256": card.guide_sha256, "rules": card.rules.model_dump_json()}
    return serialized(model, provenance)


def read_fused(path: Path, runtime: Runtime = "onnx", precision: Precision = "fp32") -> tuple[bytes, FusedCard]:
    """A file that is what its card says. Raises EngineError where one is missing or they do not belong together."""
    return read_graph(path, FusedCard, runtime, precision, "a fused step")


def fused_parity(engine: FusedEngine, reference: Reference, batch: int = 0) -> FusedParity:
    """One step, see `step_errors`, and a short trajectory. The arguments are those of `held`."""
    return FusedParity(*step_errors(engine, reference, batch), trajectory_psnr_db(engine, reference))


def step_errors(engine: FusedEngine, reference: Reference, batch: int = 0) -> tuple[float, float]:
    """The worst of x_{t-1} and of the figures at small, middle and large t for batches of 1, 2, `batch` and the largest; NaN gives NaN."""
    card = engine.card
    steps, figures = list[float](), list[float]()
    for size in sorted({1, min(2, card.max_batch), batch or card.max_batch, card.max_batch}):
        for first_t in (0, card.timesteps // 2, card.timesteps - 1):
            inputs = example(card, size, first_t, reference.schedule)
            found, expected = engine(*inputs), reference_step(reference, card, *inputs)
            steps += [relative_error(f, e) for f, e in zip(found.x, expected.x, strict=True)]
            figures += [relative_error(found.guidance_to_noise, expected.guidance_to_noise), relative_error(found.scale, expected.scale)]
            figures += [float((found.log_prob - expected.log_prob).abs().max() / expected.log_prob.abs().max().clamp(min=1))]
    step_error, figure_error = (float(torch.tensor(errors).max()) for errors in (steps, figures))  # NaN is the largest
    return step_error, figure_error


def trajectory_psnr_db(engine: FusedEngine, reference: Reference) -> float:
    """PSNR of the worst image after a short guided trajectory of the sampler from the same noise; the peak is 2."""
    short = respace(reference.schedule, min(TRAJECTORY_STEPS, len(reference.schedule)))
    card, rules = engine.card, engine.card.rules
    pair = min(2, card.max_batch)  # a batch size that single steps are compared at: OpenVINO compiles for each

    def drawn(first: int, guided: bool) -> Tensor:
        images = range(first, first + pair)
        y = torch.tensor(images) % card.classes
        keys = [image_key(0, 3, i) for i in images]
        return sample(
            _bound(reference, card, y),
            short,
            lambda step: batch_noise(keys, step, card.shape),
            prototype_guidance(reference.log_probs, y, *EXAMPLE_SCALES, rules.scale_rule, rules.gradient_norm, rules.direction),
            rules.sampler,
            step_unit=rules.step_unit,
            clip_denoised=rules.clip_denoised,
            guided_step=engine.bind(short, y) if guided else None,
        )

    with torch.no_grad():
        found, expected = (torch.cat([drawn(i, guided) for i in range(0, TRAJECTORY_IMAGES, pair)]) for guided in (True, False))
    return float(psnr_db(found, expected).min())


def refuse_disagreement(parity: FusedParity, name: str, limits: Limits) -> None:
    """Raise ParityError, with the numbers, where a fused step lies outside the gate."""
    inside = (
        parity.step_error <= limits.step_error,
        parity.figure_error <= limits.max_error,
        parity.trajectory_psnr_db >= limits.trajectory_psnr_db,
    )
    if not all(inside):  # also where one is not a number
        keys = ("one_step_tolerance", "gradient_max_error", "trajectory_psnr_db")
        outside = " or ".join(f"export.{limits.prefix}{key}" for key, good in zip(keys, inside, strict=True) if not good)
        raise ParityError(
            f"{name} disagrees with torch's guided step: error {parity.step_error:.2g} of one step, {limits.step_error:.2g} allowed; "
            f"of its figures {parity.figure_error:.2g}, {limits.max_error:.2g} allowed; {parity.trajectory_psnr_db:.1f} dB after "
            f"{TRAJECTORY_STEPS} steps, at least {limits.trajectory_psnr_db:.1f} dB asked for; nothing was written",
            f"report it, or loosen {outside}; --set synth.fused=false does without",
        )


def reference_step(
    reference: Reference, card: FusedCard, x: Tensor, t: Tensor, y: Tensor, z: Tensor, schedule: Tensor, scales: Tensor
) -> Stepped:
    """What the graph should give: torch's network, autograd, and the same step."""
    with torch.no_grad():
        output = _bound(reference, card, y)(x, t).float()
        return Stepped(*_Step(card.rules)(x, y, z, schedule, scales, output, *class_gradient(reference.log_probs, x, t, y)))


def example(card: FusedCard, batch: int, first_t: int, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A fixed input at timesteps spread from `first_t` on, of the training schedule, where a position is its timestep."""
    x, t, y, z = _inputs(card, batch, first_t)
    return x, t, y, z, schedule_rows(schedule)[t], _example_scales(batch)


def _inputs(card: FusedCard, batch: int, first_t: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, z = (batch_noise([image_key(0, 2, i) for i in range(batch)], step, card.shape) for step in (0, 1))
    t = (first_t + torch.arange(batch) * max(1, card.timesteps // 7)) % card.timesteps
    return x, t, torch.arange(batch) % card.classes, z


def _example_scales(batch: int) -> Tensor:
    return torch.tensor([EXAMPLE_SCALES]).repeat(batch, 1)


def merged(parts: Mapping[str, Any]) -> Any:
    """One onnx.ModelProto of several, in order: what has one of the shared names is one value, all other names get a prefix."""
    from onnx import helper

    shared = {*INPUTS, *OUTPUTS, *GRADIENT_OUTPUTS, OUTPUT}
    nodes: list[Any] = []
    weights: list[Any] = []
    declared: dict[str, Any] = {}
    versions: set[tuple[str, int]] = set()
    for part, model in parts.items():
        versions |= {(entry.domain, entry.version) for entry in model.opset_import}

        def name(old: str, part: str = part) -> str:
            return old if old in shared or not old else f"{part}/{old}"

        for node in model.graph.node:
            assert not any(attribute.g.node or attribute.graphs for attribute in node.attribute), "no graphs inside graphs"
            node.name = name(node.name)
            node.input[:], node.output[:] = [name(value) for value in node.input], [name(value) for value in node.output]
            nodes.append(node)
        for tensor in model.graph.initializer:
            tensor.name = name(tensor.name)
            weights.append(tensor)
        declared |= {value.name: value for value in (*model.graph.input, *model.graph.output)}
    assert len(versions) == 1, f"parts of one opset, not {versions}"
    graph = helper.make_graph(nodes, "guided_step", [declared[name] for name in INPUTS], [declared[name] for name in OUTPUTS], weights)
    opsets = [helper.make_opsetid(*version) for version in versions]
    return helper.make_model(graph, opset_imports=opsets, ir_version=max(model.ir_version for model in parts.values()))


class _Step(nn.Module):
    """The end of a guided step, after the network and the gradient: Eq. 13 as `engines.diffusion` has it."""

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self.rules = rules

    def forward(
        self, x: Tensor, y: Tensor, z: Tensor, schedule: Tensor, scales: Tensor, output: Tensor, gradient: Tensor, log_probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rules, channels = self.rules, x.shape[1]
        tables = Schedule(timesteps=y, **dict(zip(TABLES, schedule.unbind(1), strict=True)))  # a position an image
        j = torch.arange(x.shape[0])
        scale, scale_max = scales.unbind(1)
        push = push_of(gradient, log_probs, y, scale, scale_max, rules.scale_rule, rules.gradient_norm, rules.direction)
        if rules.sampler == "ddpm":
            x_next, guided, random = ddpm_step(tables, x, j, output, push.gradient, z, rules.step_unit, rules.clip_denoised)
        else:
            random = output[:, :channels]  # eps
            guided = -at_positions(tables.noise_variance, j).sqrt() * push.gradient
            x0 = clipped(predict_x0(tables, x, j, random + guided), rules.clip_denoised)
            x_next = ddim_step(tables, x, j, x0, z, eta=1.0)  # eta is in the schedule's rows
        return x_next, guidance_to_noise(guided, random), push.scale, push.log_prob


def _bound(reference: Reference, card: FusedCard, y: Tensor) -> Denoiser:
    return (lambda x, t: reference.denoise(x, t, y)) if card.labeled else (lambda x, t: reference.denoise(x, t))


def _self_test(engine: FusedEngine, origin: str, batch: int = 0) -> None:
    """Compare with what torch gave, in batches of `batch`. Raises ParityError."""
    card = engine.card
    rows = torch.tensor(card.self_test_schedule, dtype=torch.float32)
    if not len(rows):
        raise ParityError(f"{origin} has a card that says nothing to hold it to", REMEDY)
    inputs = *_inputs(card, len(rows), 0), rows, _example_scales(len(rows))
    steps = [engine(*part) for part in repeated(inputs, len(rows), min(batch or len(rows), card.max_batch))]
    step = Stepped(*(torch.cat(outputs) for outputs in zip(*steps, strict=True)))
    found = _thinned_step(Stepped(*(output[: len(rows)] for output in step)))
    values = torch.tensor(card.self_test, dtype=torch.float32)
    sound = len(values) == sum(map(len, found)) and all(bool(output.isfinite().all()) for output in step)
    expected = values[: len(found[0])], values[len(found[0]) :]
    error = max(relative_error(f, e) for f, e in zip(found, expected, strict=True)) if sound else math.inf
    if not error <= card.self_test_limit:
        raise ParityError(
            f"{origin} disagrees with torch's guided step: relative error {error:.2g}, {card.self_test_limit:.2g} allowed", REMEDY
        )


def _thinned_step(step: Stepped) -> tuple[Tensor, Tensor]:
    """Values of x_{t-1}, and the figures."""
    return thinned(step.x), torch.cat(step[1:])
