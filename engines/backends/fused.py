"""One guided step as one graph: network, guide's gradient, normalization, scale and update (Eq. 13), for ddpm and ddim; and its gate.

The graph is put together from the two that were exported and passed their own gates, and from the step itself, which is
`engines.diffusion` traced. Rules are part of the graph: the sampler, the gradient's norm, the scale and its rule, the direction, the
unit, the clipping. The schedule is an input, so that one file serves any number of steps, and so is the noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from engines import store
from engines.backends.base import REMEDY, SELF_TEST_MARGIN, EngineFile, package_versions, relative_error, thinned
from engines.backends.gradient import OUTPUTS as GRADIENT_OUTPUTS
from engines.backends.gradient import PACKAGES, GradientCard
from engines.backends.graphs import Runtime, open_graph
from engines.backends.onnx_file import serialized, to_onnx
from engines.backends.ort_engine import OUTPUT
from engines.diffusion.guidance import ClassGradient, GradientNorm, LogProbs, class_gradient, prototype_guidance
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
from engines.errors import EngineError, ParityError
from engines.recipe import SynthSection

INPUTS = ("x", "t", "y", "z", "schedule")
OUTPUTS = ("x_next", "guidance_to_noise", "scale", "log_prob")
TABLES = tuple(f.name for f in fields(Schedule) if f.name != "timesteps")  # columns of the input `schedule`, (B, 9)
EXAMPLE_BATCH = 7
SELF_TEST_BATCH = 3
TRAJECTORY_STEPS = 20
TRAJECTORY_IMAGES = 4

# The gate, in float32: of x_{t-1} and of each figure after one step; and of the images after a short trajectory from the same noise.
MAX_STEP_ERROR = 1e-4
MIN_PSNR_DB = 40.0


class Rules(BaseModel):
    """What of a recipe's [synth] is part of a fused graph."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sampler: Literal["ddpm", "ddim"]
    guidance_scale: float
    guidance_scale_max: float
    scale_rule: Literal["entropy", "fixed"]
    gradient_norm: GradientNorm
    direction: Literal["toward", "away"]
    step_unit: Literal["sigma", "variance"]
    clip_denoised: bool


class FusedCard(BaseModel):
    """What a fused step is: the JSON beside it. Without one, none is loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    kind: Literal["fused"] = "fused"
    precision: Literal["fp32"] = "fp32"
    runtime: Runtime  # the one that passed the gate
    rules: Rules
    recipe_sha256: str  # of the network's card
    weights_sha256: str  # of the network
    guide_sha256: str  # weights of the guide
    file_sha256: str
    image_size_px: int
    image_channels: int  # C
    labeled: bool  # whether the network takes y too
    classes: int  # K; y is 0..K-1
    timesteps: int  # T
    max_batch: int
    opset: int
    versions: dict[str, str]
    step_error: float
    trajectory_psnr_db: float
    self_test: tuple[float, ...]  # torch's values at `example`, thinned out: x_{t-1}'s, then the figures
    self_test_schedule: tuple[tuple[float, ...], ...]  # rows of that input

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.image_channels, self.image_size_px, self.image_size_px


class Reference(NamedTuple):
    """What a fused step is compared with: the sampler on torch's own network and guide."""

    denoise: Any  # (x, t, y) -> the network's output; y where it is labeled
    log_probs: LogProbs
    schedule: Schedule  # of training


class FusedParity(NamedTuple):
    """The worst of a comparison with torch."""

    step_error: float  # relative L2 of an image's x_{t-1} or of a batch's figure
    trajectory_psnr_db: float  # of the worst image


class FusedEngine:
    """An exported guided step.

    Args:
        data, card: of an exported file; `read_fused` gives them.
        threads: of one evaluation; 0 = all that this process may use.

    Raises:
        DataError: the file is not a graph of this kind.
        EngineError: the card's runtime is not here or cannot load it.
        ParityError: its numbers are not those of the card.
    """

    def __init__(self, data: bytes, card: FusedCard, origin: str, threads: int = 0) -> None:
        self.card = card
        self._graph = open_graph(data, INPUTS, OUTPUTS, card.opset, origin, card.runtime, threads)
        if card.self_test:
            _self_test(self, origin)

    @classmethod
    def load(cls, path: Path, threads: int = 0) -> FusedEngine:
        """The engine of a file with a card beside it. Raises EngineError where they do not belong together, and as above."""
        return cls(*read_fused(path), str(path), threads)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, z: Tensor, schedule: Tensor) -> Stepped:
        """One step.

        Args:
            x, z: (B, C, H, W) float32, B <= max_batch.  t, y: (B,) int64.  schedule: (B, 9) float32, see `schedule_rows`.
        """
        card, batch = self.card, len(x)
        assert x.shape[1:] == card.shape and x.shape == z.shape and x.dtype == z.dtype == schedule.dtype == torch.float32
        assert 1 <= batch <= card.max_batch, f"batch {batch}, at most {card.max_batch}"
        assert schedule.shape == (batch, len(TABLES))
        for value, limit in ((t, card.timesteps), (y, card.classes)):
            assert value.shape == (batch,) and value.dtype == torch.int64 and int(value.min()) >= 0 and int(value.max()) < limit
        return Stepped(*self._graph({"x": x, "t": t, "y": y, "z": z, "schedule": schedule}))

    def bind(self, schedule: Schedule, y: Tensor, eta: float = 0.0) -> GuidedStep:
        """The step as a sampler calls it, in the timesteps in which guidance acts.

        Args:
            y: (B,) int64 classes asked for.  eta: of ddim.
        """
        rows = schedule_rows(schedule, eta)

        def guided_step(x: Tensor, j: Tensor, z: Tensor) -> Stepped:
            return self(x, schedule.timesteps[j], y, z, rows[j])

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
    network: EngineFile, gradient: tuple[bytes, GradientCard], rules: Rules, reference: Reference, path: Path, runtime: Runtime = "onnx"
) -> FusedCard:
    """Write `path` and the card beside it, if and only if the runtime gives torch's steps.

    Args:
        network, gradient: exported files of one opset, shape and T.
        path: `<name>.onnx`.

    Raises:
        ParityError: a number disagrees; nothing is written.
        EngineError: the exporter or the runtime failed.
        StorageError: the file cannot be written.
    """
    data, card = fused_bytes(network, gradient, rules, reference, runtime)
    parity = fused_parity(FusedEngine(data, card, path.name), reference)
    refuse_disagreement(parity, path.name)
    card = card.model_copy(update=parity._asdict())
    store.write_bytes(path, data)
    store.write_text(path.with_suffix(".json"), card.model_dump_json(indent=1) + "\n")
    return card


def fused_bytes(
    network: EngineFile, gradient: tuple[bytes, GradientCard], rules: Rules, reference: Reference, runtime: Runtime = "onnx"
) -> tuple[bytes, FusedCard]:
    """The graph, and a card whose parity is not measured yet (not a number). Raises EngineError."""
    import onnx

    (guide_data, guide), unet = gradient, network.card
    assert (unet.shape, unet.timesteps, unet.opset) == (guide.shape, guide.timesteps, guide.opset), "two engines of one run"
    card = FusedCard(
        runtime=runtime,
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
        versions=package_versions(PACKAGES),
        step_error=float("nan"),
        trajectory_psnr_db=float("nan"),
        self_test=(),
        self_test_schedule=(),
    )
    x, _, y, z, rows = example(card, EXAMPLE_BATCH, 0, reference.schedule)
    inner = dict(zip(GRADIENT_OUTPUTS, (torch.zeros_like(x), torch.zeros(len(x), guide.classes)), strict=True))
    output = torch.zeros(len(x), unet.out_channels, *x.shape[2:])
    step = to_onnx(_Step(rules).eval(), {"x": x, "y": y, "z": z, "schedule": rows, OUTPUT: output} | inner, OUTPUTS, unet.opset)
    read = onnx.load_model_from_string
    model = merged({"network": read(network.data), "guide": read(guide_data), "step": step})
    provenance = {"weights_sha256": unet.weights_sha256, "guide_sha256": guide.weights_sha256, "rules": rules.model_dump_json()}
    data = serialized(model, provenance)
    first = example(card, min(SELF_TEST_BATCH, card.max_batch), 0, reference.schedule)
    values = _thinned_step(reference_step(reference, card, *first))
    tested = {"self_test": tuple(values.tolist()), "self_test_schedule": tuple(map(tuple, first[-1].tolist()))}
    return data, card.model_copy(update={"file_sha256": hashlib.sha256(data).hexdigest(), **tested})


def read_fused(path: Path) -> tuple[bytes, FusedCard]:
    """A file that is what its card says. Raises EngineError where one is missing or they do not belong together."""
    try:
        card = FusedCard.model_validate_json(path.with_suffix(".json").read_bytes())
        data = path.read_bytes()
    except ValidationError as error:
        reason = f"{len(error.errors())} wrong or missing values"
        raise EngineError(f"{path.with_suffix('.json')} is not the card of a fused step of this version: {reason}", REMEDY) from None
    except OSError as error:
        raise EngineError(f"cannot read {error.filename}: {error.strerror}", REMEDY) from None
    if hashlib.sha256(data).hexdigest() != card.file_sha256:
        raise EngineError(f"{path} is not the file that its card describes", REMEDY)
    return data, card


def fused_parity(engine: FusedEngine, reference: Reference) -> FusedParity:
    """One step at small, middle and large t for batches of 1, 2 and the largest, and a short trajectory; NaN anywhere gives NaN."""
    card, errors = engine.card, []
    for batch in sorted({1, min(2, card.max_batch), card.max_batch}):
        for first_t in (0, card.timesteps // 2, card.timesteps - 1):
            inputs = example(card, batch, first_t, reference.schedule)
            found, expected = engine(*inputs), reference_step(reference, card, *inputs)
            errors += [relative_error(f, e) for f, e in zip(found.x, expected.x, strict=True)]
            errors += [relative_error(found.guidance_to_noise, expected.guidance_to_noise), relative_error(found.scale, expected.scale)]
            errors += [float((found.log_prob - expected.log_prob).abs().max() / expected.log_prob.abs().max().clamp(min=1))]
    return FusedParity(float(torch.tensor(errors).max()), trajectory_psnr_db(engine, reference))


def trajectory_psnr_db(engine: FusedEngine, reference: Reference) -> float:
    """PSNR of the worst image after a short guided trajectory of the sampler from the same noise; the peak is 2."""
    short = respace(reference.schedule, min(TRAJECTORY_STEPS, len(reference.schedule)))
    card, rules = engine.card, engine.card.rules
    images = min(TRAJECTORY_IMAGES, card.max_batch)
    y = torch.arange(images) % card.classes
    keys = [image_key(0, 3, i) for i in range(images)]

    def drawn(guided_step: GuidedStep | None) -> Tensor:
        return sample(
            _bound(reference, card, y),
            short,
            lambda step: batch_noise(keys, step, card.shape),
            _guidance(rules, reference.log_probs, y),
            rules.sampler,
            step_unit=rules.step_unit,
            clip_denoised=rules.clip_denoised,
            guided_step=guided_step,
        )

    with torch.no_grad():
        found, expected = drawn(engine.bind(short, y)), drawn(None)
    error = (found - expected).double().square().flatten(1).mean(1)  # (B,)
    return float((10 * (4 / error.clamp(min=4e-20)).log10()).min())  # at most 200 dB


def refuse_disagreement(parity: FusedParity, name: str) -> None:
    """Raise ParityError, with the numbers, where a fused step lies outside the gate."""
    if not (parity.step_error <= MAX_STEP_ERROR and parity.trajectory_psnr_db >= MIN_PSNR_DB):  # also where one is not a number
        found = f"error {parity.step_error:.2g} of one step, {parity.trajectory_psnr_db:.1f} dB after {TRAJECTORY_STEPS}"
        allowed = f"at most {MAX_STEP_ERROR:g} and at least {MIN_PSNR_DB:g} dB allowed"
        raise ParityError(f"{name} disagrees with torch's guided step: {found}; {allowed}", "--engine torch; please report it")


def reference_step(reference: Reference, card: FusedCard, x: Tensor, t: Tensor, y: Tensor, z: Tensor, schedule: Tensor) -> Stepped:
    """What the graph should give: torch's network, autograd, and the same step."""
    with torch.no_grad():
        output = _bound(reference, card, y)(x, t).float()
        return Stepped(*_Step(card.rules)(x, y, z, schedule, output, *class_gradient(reference.log_probs, x, t, y)))


def example(card: FusedCard, batch: int, first_t: int, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A fixed input at timesteps spread from `first_t` on, of the training schedule, where a position is its timestep."""
    x, t, y, z = _inputs(card, batch, first_t)
    return x, t, y, z, schedule_rows(schedule)[t]


def _inputs(card: FusedCard, batch: int, first_t: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, z = (batch_noise([image_key(0, 2, i) for i in range(batch)], step, card.shape) for step in (0, 1))
    t = (first_t + torch.arange(batch) * max(1, card.timesteps // 7)) % card.timesteps
    return x, t, torch.arange(batch) % card.classes, z


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
        self, x: Tensor, y: Tensor, z: Tensor, schedule: Tensor, output: Tensor, gradient: Tensor, log_probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rules, channels = self.rules, x.shape[1]
        tables = Schedule(timesteps=y, **dict(zip(TABLES, schedule.unbind(1), strict=True)))  # a position an image
        j = torch.arange(x.shape[0])
        push = _guidance(rules, None, y, lambda *_: (gradient, log_probs))(x, j)
        assert push is not None
        if rules.sampler == "ddpm":
            x_next, guided, random = ddpm_step(tables, x, j, output, push.gradient, z, rules.step_unit, rules.clip_denoised)
        else:
            random = output[:, :channels]  # eps
            guided = -at_positions(tables.noise_variance, j).sqrt() * push.gradient
            x0 = clipped(predict_x0(tables, x, j, random + guided), rules.clip_denoised)
            x_next = ddim_step(tables, x, j, x0, z, eta=1.0)  # eta is in the schedule's rows
        return x_next, guidance_to_noise(guided, random), push.scale, push.log_prob


def _guidance(rules: Rules, log_probs: LogProbs | None, y: Tensor, gradient: ClassGradient | None = None) -> Any:
    return prototype_guidance(
        log_probs or _never,
        y,
        rules.guidance_scale,
        rules.guidance_scale_max,
        rules.scale_rule,
        rules.gradient_norm,
        rules.direction,
        gradient=gradient,
    )


def _never(_x: Tensor, _t: Tensor) -> Tensor:
    raise AssertionError("the gradient was given")


def _bound(reference: Reference, card: FusedCard, y: Tensor) -> Denoiser:
    return (lambda x, t: reference.denoise(x, t, y)) if card.labeled else (lambda x, t: reference.denoise(x, t))


def _self_test(engine: FusedEngine, origin: str) -> None:
    card = engine.card
    rows = torch.tensor(card.self_test_schedule, dtype=torch.float32)
    step = engine(*_inputs(card, len(rows), 0), rows)
    found, expected = _thinned_step(step), torch.tensor(card.self_test, dtype=torch.float32)
    error = relative_error(found, expected) if found.shape == expected.shape and bool(step.x.isfinite().all()) else float("inf")
    limit = SELF_TEST_MARGIN * MAX_STEP_ERROR
    if not error <= limit:  # also where it is not a number
        raise ParityError(f"{origin} disagrees with torch's guided step: relative error {error:.2g}, {limit:.2g} allowed", REMEDY)


def _thinned_step(step: Stepped) -> Tensor:
    return torch.cat([thinned(step.x), *step[1:]])
