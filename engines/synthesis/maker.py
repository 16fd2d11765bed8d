"""What turns the names of images into pixels: a run's networks and the sampler, one full batch at a time.

Pixels are fixed by the plan and the image's name: the noise is drawn from them, and so is the row in the compute batch, since
kernels may round differently from row to row.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engines.backends import choice, guided
from engines.backends.base import Engine, EngineCard, EngineFile, Precision, package_versions, weights_sha256
from engines.backends.choice import Build
from engines.backends.device import CPU, OutOfMemory, choose_device, exact_float32, gpu_failures, processors
from engines.backends.export import export_command, onnx_path
from engines.backends.fused import FusedEngine
from engines.backends.keys import RUNTIMES, check_card
from engines.backends.torch_engine import TorchEngine, held_engine
from engines.data.batches import to_pixels, to_tensor
from engines.data.decode import Pixels
from engines.data.longtail import LongTail
from engines.diffusion.guidance import ClassGradient, class_gradient, classifier_free, prototype_guidance
from engines.diffusion.noise import batch_noise, image_key
from engines.diffusion.sampler import Denoiser, GuidedStep, StepLog, sample
from engines.diffusion.schedule import Schedule, at_timesteps, make_schedule, q_sample
from engines.errors import first_line
from engines.networks.guide import Guide
from engines.networks.unet import UNet
from engines.recipe import Recipe
from engines.store import RunFolder
from engines.synthesis import select
from engines.synthesis.plan import ImageId, MadeWith, Model, Plan, make_plan
from engines.synthesis.real_start import RealStarts, real_starts, require_same
from engines.synthesis.stopwatch import Stopwatch
from engines.training import reuse

NOTHING_YET = MadeWith()
MOST_NOISE_THREADS = 8  # one draws a batch of 256 at 32 px in 9 ms


class Drawn(NamedTuple):
    """One image of a batch."""

    image: ImageId
    pixels: Pixels | None  # (H, W, C) uint8; None where a value is not finite
    seen: tuple[Tensor, Tensor] | None  # by the guide, where there is a selection: feature (D,) and log p~(k | x_0) (K,)


class GivenUp(Exception):
    """A batch that was told to stop between two steps."""


@dataclass(frozen=True)
class Maker:
    """What turns the name of an image into pixels."""

    recipe: Recipe
    plan: Plan
    model: Model
    engine: Engine
    guide: Guide | None
    device: torch.device = CPU  # where x, the schedule and the guide are
    fused: FusedEngine | None = None  # makes guided steps whole, in place of the engine and torch's guide
    starts: RealStarts | None = None  # None = noise alone

    @property
    def parallel(self) -> int:
        """Batches that had best run side by side: one a processor on a CPU, one on a GPU, which a batch fills by itself."""
        return 1 if self.device.type == "cuda" else processors()

    def check_classes(self, wanted: Iterable[int]) -> None:
        """Hold the engine to the class table."""
        rows = self.engine.card.classes
        assert rows in (0, len(self.plan.names) + 1), "the label embedding has a row for each class and the null label"
        assert all(0 <= k < len(self.plan.names) for k in wanted)

    def draw(self, images: Sequence[ImageId], log: Callable[[StepLog], None], networks: Stopwatch | None = None) -> list[Drawn]:
        """Sample a batch of images whose rows differ; free rows are filled with copies, so that the batch is always full.

        Args:
            log: called after each step; may raise to give the batch up.
            networks: times the engine and the guide.

        Raises: OutOfMemory, EngineError where the GPU fails.
        """
        timed = (networks or Stopwatch()).timed
        synth, batch_size = self.recipe.synth, self.recipe.synth.batch_size
        at = {image.row(batch_size): image for image in images}
        assert len(at) == len(images), "two images in one row"
        spare = itertools.cycle(images)
        rows = [at.get(row) or next(spare) for row in range(batch_size)]
        y = torch.tensor([image.class_id for image in rows], device=self.device)
        keys = [image_key(synth.seed, image.class_id, image.index) for image in rows]

        def drawn() -> Tensor:
            return sample(
                timed(denoiser(self.engine, y, synth.classifier_free_scale)),
                self.schedule,
                lambda step: self._noise(keys, step) if step else self._beginning(rows, keys),
                self._guidance(y, timed),
                synth.sampler,
                synth.eta,
                synth.step_unit,
                synth.clip_denoised,
                log,
                self._guided_step(y, timed),
                interval=synth.guidance_interval,
                plain=timed(denoiser(self.engine, y)),
            )  # (B, C, H, W)

        with torch.no_grad(), exact_float32(self.device):
            x = _tried_again(drawn)
        finite = timed(lambda: torch.isfinite(x).flatten(1).all(1).tolist())()  # on a GPU this waits for all steps
        pixels = to_pixels(torch.where(torch.isfinite(x), x, 0.0))
        seen = None
        if select.is_on(self.recipe.select):
            assert self.guide is not None, "a selection looks with the guide"
            seen = timed(select.look)(self.guide, to_tensor(pixels))  # as written: the figures can be found again from the file
        return [
            Drawn(image, pixels[row] if finite[row] else None, seen and (seen.features[row], seen.log_probs[row]))
            for row, image in sorted(at.items())
        ]

    @cached_property
    def schedule(self) -> Schedule:
        """The timesteps that the sampler visits; as many evaluations of the network (twice as many with classifier-free guidance)."""
        diffusion = self.recipe.diffusion
        return at_timesteps(make_schedule(diffusion.noise_schedule, diffusion.steps), self.recipe.sampling_timesteps()).to(self.device)

    def start_of(self, image: ImageId) -> int | None:
        """The training image from which one begins, by its place among them; None = noise alone."""
        key = image_key(self.recipe.synth.seed, image.class_id, image.index)
        return self.starts.of(image.class_id, key) if self.starts else None

    def _beginning(self, images: Sequence[ImageId], keys: Sequence[int]) -> Tensor:
        """x at the first step, (B, C, H, W): noise, or real images noised to the last timestep of the schedule."""
        noise = self._noise(keys, 0)
        if self.starts is None:
            return noise
        x0 = self.starts.tensor([self.starts.of(image.class_id, key) for image, key in zip(images, keys, strict=True)])
        j = torch.full((len(images),), len(self.schedule) - 1, device=self.device)
        return q_sample(self.schedule, x0.to(self.device), j, noise)

    def _noise(self, keys: Sequence[int], step: int) -> Tensor:
        """Drawn on the CPU whatever the device: a seed means the same image everywhere."""
        shape = self.engine.card.shape
        if self.device == CPU:
            return batch_noise(keys, step, shape)
        # Drawn by several threads, while the GPU is at the steps before: one would take longer than they do.
        return batch_noise(keys, step, shape, self._noise_threads.map).pin_memory().to(self.device, non_blocking=True)

    @cached_property
    def _noise_threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(min(MOST_NOISE_THREADS, processors()), "noise")

    def _guidance(self, y: Tensor, timed: Callable[[ClassGradient], ClassGradient]) -> Any:
        synth, guide = self.recipe.synth, self.guide
        if guide is None or not synth.guidance_scale:
            return None
        return prototype_guidance(
            guide.log_probs,
            y,
            synth.guidance_scale,
            synth.guidance_scale_max,
            synth.scale_rule,
            synth.gradient_norm,
            synth.direction,
            timed(lambda x, t, y: class_gradient(guide.log_probs, x, t, y)),
        )

    def _guided_step(self, y: Tensor, timed: Callable[[GuidedStep], GuidedStep]) -> GuidedStep | None:
        synth = self.recipe.synth
        if self.fused is None:
            return None
        return timed(self.fused.bind(self.schedule, y, synth.eta, synth.guidance_scale, synth.guidance_scale_max))


def open_maker(
    run: RunFolder,
    model: Model,
    made_with: MadeWith = NOTHING_YET,
    tell: Callable[[str], None] = lambda _: None,
    data: LongTail | None = None,
) -> Maker:
    """The networks of a run, ready to draw.

    Args:
        made_with: what made the images that are to be continued, if any; it makes the others too where it can.
        tell: hears which engine was chosen and why, where there was a choice; and which way guided steps are made.
        data: what the run was trained on; needed where images begin from real ones.

    Raises UsageError where a stage is not trained or no real image fits, ConflictError for other data than the run's, EngineError for
    an engine that is missing, stale or cannot run here.
    """
    from engines.training.stages import load_guide, load_unet  # reads checkpoints, and brings the training with it

    recipe = run.recipe
    starts = _starts(run, data)
    unet = load_unet(run, model)
    engine, device = _engine(run, model, unet, made_with, tell)
    guide = load_guide(run) if recipe.synth.guidance_scale or select.is_on(recipe.select) else None
    compiled = isinstance(engine, TorchEngine) and engine.compiled
    packages = ("diffrc", "numpy", "pillow", "torch", *RUNTIMES.get(engine.card.kind, ()))
    guide_sha256 = weights_sha256(guide) if guide else ""
    versions = package_versions(packages)
    fused = _fused_step(run, model, engine, device, guide_sha256, made_with, tell) if guide else None
    if isinstance(engine, _WhenAsked) and not (fused and _guides_every_step(recipe)):
        engine = engine.loaded()
    guided_sha256 = fused.card.file_sha256 if fused else ""
    plan = make_plan(recipe, run.classes(), model, engine.card, guide_sha256, versions, guided_sha256, device.type, compiled)
    plan = replace(plan, stages={stage: reuse.mark(run.path, stage) for stage in (model, *(("guide",) if guide else ()))})
    guide = guide.eval().requires_grad_(False).to(device) if guide else None
    return Maker(recipe, plan, model, engine, guide, device, fused, starts)


def _starts(run: RunFolder, data: LongTail | None) -> RealStarts | None:
    if run.recipe.synth.start == "noise":
        return None
    assert data is not None, "images that begin from real ones need them"
    require_same(run, data)
    return real_starts(run.recipe, data)


def _fused_step(
    run: RunFolder,
    model: Model,
    engine: Engine,
    device: torch.device,
    guide_sha256: str,
    made_with: MadeWith,
    tell: Callable[[str], None],
) -> FusedEngine | None:
    """What makes whole guided steps for the engine that runs, or None where the network and torch's guide make them."""
    card, path = engine.card, onnx_path(run, model)
    if device != CPU or card.kind == "torch":
        return None
    build, command = Build(card.kind, card.precision), export_command(run, model)
    way = guided.choose(path, build, run.recipe, card.weights_sha256, guide_sha256, made_with.guided_sha256, command)
    if way.why:
        tell(f"guided step: {way.why}")
    return FusedEngine(*way.file, f"the guided step of {path} on {build}", 1, run.recipe.synth.batch_size) if way.file else None


def _guides_every_step(recipe: Recipe) -> bool:
    first, last = recipe.synth.guidance_interval
    return first == 0 and last >= recipe.diffusion.steps - 1


class _WhenAsked:
    """An engine that is loaded at its first evaluation: where whole steps come from one graph, there may be none."""

    def __init__(self, card: EngineCard, load: Callable[[], Engine]) -> None:
        self._card, self._load, self._turn = card, load, threading.Lock()
        self._engine: Engine | None = None

    @property
    def card(self) -> EngineCard:
        """What it is."""
        return self._card

    def loaded(self) -> Engine:
        """The engine itself. Raises as `choice.load` does."""
        with self._turn:
            self._engine = self._engine or self._load()
            return self._engine

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """See `Engine.__call__`."""
        return self.loaded()(x, t, y)


def _engine(run: RunFolder, model: Model, unet: UNet, made_with: MadeWith, tell: Callable[[str], None]) -> tuple[Engine, torch.device]:
    """An engine and where it runs."""
    recipe, synth = run.recipe, run.recipe.synth
    device = made_with.device if synth.device == "auto" and made_with.device else synth.device
    if synth.engine == "torch":
        place = choose_device(device)
        return _torch_engine(run.recipe, unet.to(place), tell), place
    path, command, weights = onnx_path(run, model), export_command(run, model), weights_sha256(unet)

    def check(file: EngineFile) -> None:
        check_card(file.card, recipe, weights, path, command)

    chosen = choice.choose(path, choice.builds_of(synth.engine, synth.precision), check, made_with.build, command, device)
    if chosen.why:
        tell(f"engine: {chosen.build} ({chosen.why})")
    origin = f"{path} on {chosen.build}"
    load = partial(choice.load, chosen.file, origin, threads=1, batch=synth.batch_size, device=chosen.device)
    return _WhenAsked(chosen.file.card, load), chosen.device


def _torch_engine(recipe: Recipe, unet: UNet, tell: Callable[[str], None]) -> TorchEngine:
    """The reference, or what [synth] asks for in its place, which is held to the reference first: it has no card of an export."""
    synth, steps = recipe.synth, recipe.diffusion.steps
    precision: Precision = "fp32" if synth.precision == "auto" else synth.precision
    if precision == "fp32" and not synth.compile:
        return TorchEngine(unet, steps, synth.batch_size)
    name = f"torch {precision}" + (", compiled" if synth.compile else "")
    if synth.compile:
        tell(f"engine: {name}: compiling it takes minutes")
    with gpu_failures():
        engine = held_engine(unet, steps, synth.batch_size, recipe.export, precision, synth.compile)
    card = engine.card
    tell(f"engine: {name}: one evaluation within {card.one_step_error:.1e} of eager float32 (allowed {card.tolerance:.0e})")
    return engine


def _tried_again(drawn: Callable[[], Tensor]) -> Tensor:
    """A batch, once more where the GPU's memory was short: often it was another's, and is free again.

    Whole, not in halves: kernels are chosen by the size of a batch and round by the row in it, so halves would make other images
    than the plan's. Raises OutOfMemory where memory is short again, EngineError where the GPU fails.
    """
    with gpu_failures():
        try:
            return drawn()
        except (OutOfMemory, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        try:
            return drawn()
        except (OutOfMemory, torch.OutOfMemoryError) as error:
            raise OutOfMemory(
                f"the GPU has too little memory for a batch, twice: {first_line(error)}",
                "free it, then the same command continues; or --set synth.batch_size=N with a smaller N and another --out DIR",
            ) from error


def denoiser(engine: Engine, y: Tensor, classifier_free_scale: float = 0.0) -> Denoiser:
    """An engine with its labels bound, as a sampler calls it; a conditional one with classifier-free guidance where the scale is not 0."""
    card = engine.card
    if not card.classes:
        return lambda x, t: engine(x, t)
    null = torch.full_like(y, card.classes - 1)
    return classifier_free(lambda x, t: engine(x, t, y), lambda x, t: engine(x, t, null), classifier_free_scale, card.image_channels)
