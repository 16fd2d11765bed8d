"""Which way a guided step goes: in one graph, or the network with torch's guide. The graph is exported, kept, timed and chosen here."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from engines.backends import choice
from engines.backends.base import EngineFile, read_engine, weights_sha256
from engines.backends.choice import Build
from engines.backends.device import one_thread_each, processors
from engines.backends.fused import (
    FusedCard,
    FusedEngine,
    Reference,
    Rules,
    example,
    fused_bytes,
    held,
    read_fused,
    reference_step,
    rules_of,
)
from engines.backends.gate import seconds_in_turn
from engines.backends.gradient import GradientCard, export_gradient, read_gradient
from engines.backends.graphs import Card, Runtime, write_graph
from engines.backends.keys import EXPORTERS, RUNTIMES, differences, versions_now, wanted
from engines.backends.onnx_file import MAX_FILE_BYTES
from engines.diffusion.schedule import make_schedule
from engines.errors import EngineError
from engines.networks.guide import Guide
from engines.networks.unet import UNet
from engines.recipe import ExportSection, Recipe

TIMED_TURNS = 25  # or as many as TIMED_SECONDS allow, but
LEAST_TIMED_TURNS = 3
TIMED_SECONDS = 6.0
FASTER = 0.9  # of the time of network and torch's guide, which is the reference: one graph is taken where it surely takes less
WITHOUT = "--set synth.fused=false does without"


class GuidedBuild(NamedTuple):
    """A runtime and precision that gradients and guided steps are made for."""

    runtime: Runtime
    precision: Literal["fp32", "bf16"]


BUILDS = (GuidedBuild("onnx", "fp32"), GuidedBuild("openvino", "fp32"), GuidedBuild("openvino", "bf16"))


def guided_path(network: Path, rules: Rules) -> Path:
    """Where the guided steps of an exported network lie."""
    return network.with_name(f"{network.stem}.guided-{rules.sampler}.onnx")


def gradient_path(network: Path) -> Path:
    """Where the guide's gradient lies, which all networks of a run share."""
    return network.with_name("guide.onnx")


# ------------------------------------------------------------------------------------------------------------ export


def is_wanted(recipe: Recipe, build: Build) -> bool:
    """Whether whole guided steps are made for a build: not where the recipe wants none, or its steps are not made of one evaluation
    and one gradient, or the runtime is not one of `BUILDS`."""
    return recipe.synth.fused and rules_of(recipe.synth) is not None and _guided(build) is not None


def export_guided(network: Path, unet: UNet, guide: Guide, recipe: Recipe, build: Build) -> FusedCard:
    """Export the guide's gradient and the whole guided step for a build that the network was just exported for; what still fits is kept.

    Args:
        network: the exported network's file.
        unet, guide: in evaluation mode, float32, on the CPU.
        recipe, build: of which `is_wanted` holds.

    Returns: the step's card.

    Raises:
        ParityError: a number disagrees with torch; nothing of what disagrees is written.
        NumericsError: the guide gives values that are not finite.
        EngineError: the exporter or the runtime failed.
        StorageError: a file cannot be written.
    """
    rules, guided = rules_of(recipe.synth), _guided(build)
    assert rules is not None and guided is not None, "ask `is_wanted`"
    path, guide_sha256 = guided_path(network, rules), weights_sha256(guide)
    file = read_engine(network, *build)
    settings = recipe.export.model_copy(update={"opset": file.card.opset})

    of = {
        "weights_sha256": file.card.weights_sha256,
        "guide_sha256": guide_sha256,
        "rules": rules,
        "recipe_sha256": file.card.recipe_sha256,
    }
    batch, read = recipe.synth.batch_size, partial(read_fused, path)
    kept = _current(read, guided, of | {"measured_batch": batch})
    if kept:
        return kept
    try:
        gradient = _gradient(gradient_path(network), guide, recipe, settings, file.card.recipe_sha256, guided)
        if len(file.data) + len(gradient[0]) > MAX_FILE_BYTES:
            raise EngineError(f"network and guide take more than one ONNX file can hold: {path.name} is not made", WITHOUT)
        schedule = make_schedule(recipe.diffusion.noise_schedule, recipe.diffusion.steps)
        reference = Reference(unet, guide.log_probs, schedule)
        made = _made(read, of)
        data, card = fused_bytes(file, gradient, rules, reference, settings, made)
        card = held(data, card, reference, path.name, settings, batch)
        card = timed(data, card, file, reference, batch)
    except EngineError as error:
        raise EngineError(error.problem, WITHOUT) from error
    write_graph(path, data, card)
    return card


def _guided(build: Build) -> GuidedBuild | None:
    return next((guided for guided in BUILDS if tuple(guided) == tuple(build)), None)


def _gradient(
    path: Path, guide: Guide, recipe: Recipe, settings: ExportSection, recipe_sha256: str, build: GuidedBuild
) -> tuple[bytes, GradientCard]:
    """The guide's exported gradient: the one that is there, or a new one."""
    of = {"weights_sha256": weights_sha256(guide), "recipe_sha256": recipe_sha256, "opset": settings.opset}
    read = partial(read_gradient, path)
    if not _current(read, build, of):
        data = _made(read, of)
        export_gradient(guide, recipe.diffusion.steps, path, settings, *build, recipe_sha256, recipe.synth.batch_size, data)
    return read_gradient(path, *build)


Read = Callable[[Runtime, Literal["fp32", "bf16"]], tuple[bytes, Card]]


def _current(read: Read[Card], build: GuidedBuild, of: Mapping[str, Any]) -> Card | None:
    """The card of a file that was made of these weights by this recipe and these packages, or None.

    Args:
        of: what the card must say, packages apart.
    """
    try:
        _, card = read(*build)
    except EngineError:  # missing, damaged or older: made anew
        return None
    return None if differences(card, {**of, "versions": versions_now((*EXPORTERS, *RUNTIMES[build.runtime]))}) else card


def _made(read: Read[Card], of: Mapping[str, Any]) -> bytes:
    """The file, where a card for any runtime says that it was made of these weights by this recipe and exporter; else empty."""
    asked = {**of, "versions": versions_now(EXPORTERS)}
    for build in BUILDS:
        with contextlib.suppress(EngineError):
            data, card = read(*build)
            if not differences(card, asked):
                return data
    return b""


def timed(data: bytes, card: FusedCard, network: EngineFile, reference: Reference, batch: int) -> FusedCard:
    """The card with the speed of a step in one graph, and of one as the network on the same runtime with torch's guide."""
    fused = FusedEngine(data, card, "the guided step", threads=1, batch=batch)
    engine = choice.load(network, "the network", threads=1, batch=batch)
    apart = reference._replace(denoise=engine)
    inputs = example(card, batch, card.timesteps // 2, reference.schedule)
    ms, apart_ms = ms_side_by_side((lambda: fused(*inputs), lambda: reference_step(apart, card, *inputs)), batch)
    return card.model_copy(update={"measured_batch": batch, "ms_per_image": ms, "apart_ms_per_image": apart_ms})


def ms_side_by_side(ways: Sequence[Callable[[], object]], batch: int) -> list[float]:
    """Milliseconds of a step divided by its images, as `synth` runs them: a batch a processor, each on one thread, side by side."""
    workers = processors()
    together = threading.Barrier(workers)  # each thread has one batch

    def one(way: Callable[[], object]) -> None:
        together.wait()
        way()

    with one_thread_each(), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        jobs = [lambda way=way: list(pool.map(one, [way] * workers)) for way in ways]
        return [1000 * seconds / (batch * workers) for seconds in seconds_in_turn(jobs, TIMED_TURNS, LEAST_TIMED_TURNS, TIMED_SECONDS)]


# ------------------------------------------------------------------------------------------------------------ choice


def published(network: Path, recipe: Recipe, build: Build) -> FusedCard | None:
    """The card of the guided step that lies there for a network and build, or None. Raises EngineError where it is damaged."""
    rules, guided = rules_of(recipe.synth), _guided(build)
    if rules is None or guided is None or not recipe.synth.fused or not guided_path(network, rules).is_file():
        return None
    _, card = read_fused(guided_path(network, rules), *guided)
    return card


class Way(NamedTuple):
    """How guided steps are made, and why."""

    file: tuple[bytes, FusedCard] | None  # None: the network and torch's guide
    why: str  # "" where nothing was to be chosen


def choose(
    network: Path, engine: Build, recipe: Recipe, weights: str, guide: str, made_with: str | None = None, command: str = "diffrc export"
) -> Way:
    """A step in one graph, where one is published for the engine that runs, fits and was clearly the faster way when it was exported.

    Args:
        network: the exported network's file.
        weights, guide: sha256 of the weights of both.
        made_with: sha256 of the file that made the images that are to be continued; "" where they were made without one; None
            where there are none. They are continued as they were begun.
        command: what exports the network.
    """
    rules, build = rules_of(recipe.synth), _guided(engine)
    if rules is None or build is None or not is_wanted(recipe, engine):
        return Way(None, "")
    path = guided_path(network, rules)
    if not path.is_file():
        return Way(None, f"torch's guide; {path.name}, a whole step in one graph, is not exported: {command}")
    try:
        data, card = read_fused(path, *build)
    except EngineError as error:
        return Way(None, f"torch's guide; not in one graph: {error.problem}")
    fitting = {**wanted(recipe, card, card.runtime, weights_sha256=weights, guide_sha256=guide), "rules": rules}
    if found := differences(card, fitting):
        return Way(None, f"torch's guide; {path.name} does not fit ({'; '.join(map(str, found))}): {command}")
    if made_with is not None and made_with in ("", card.file_sha256):
        way = "one graph" if made_with else "torch's guide"
        return Way((data, card) if made_with else None, f"{way} (the images there were made with it)")
    whole, apart = f"{card.ms_per_image:.3g}", f"{card.apart_ms_per_image:.3g}"
    if card.ms_per_image > FASTER * card.apart_ms_per_image:
        return Way(None, f"torch's guide, {apart} ms an image against {whole} in one graph")
    return Way((data, card), f"one graph, {whole} ms an image against {apart} with torch's guide")
