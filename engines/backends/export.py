"""Torch -> ONNX -> engine, fail-closed: an engine gets its card, without which it is not loaded, only after it agreed with torch."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines import recipe as recipes
from engines import store
from engines.backends import choice, gate
from engines.backends.base import (
    Engine,
    EngineCard,
    EngineFile,
    example_input,
    package_versions,
    read_engine,
    self_test_batch,
    thinned,
    weights_sha256,
    write_engine,
)
from engines.backends.choice import BUILDS, Build
from engines.backends.gate import Labeler
from engines.backends.onnx_file import serialized, to_onnx
from engines.backends.ort_engine import OUTPUT, input_names
from engines.backends.torch_engine import TorchEngine
from engines.diffusion.schedule import Schedule, make_schedule
from engines.errors import DataError, EngineError, NumericsError, ParityError, UsageError
from engines.networks.resnet import ARCHITECTURES
from engines.networks.unet import UNet, parameter_count
from engines.progress import Report, silent
from engines.recipe import ExportSection, Recipe
from engines.store import RunFolder

Model = Literal["target", "source"]
EXPORTERS = ("torch", "onnx", "onnxscript")
RUNTIMES = {"onnx": ("onnxruntime", "onnxruntime-gpu"), "openvino": ("openvino",)}  # packages, by kind of engine
EXAMPLE_BATCH = 7  # equal to no other size in the network, or the exporter ties the two together
MAX_FILE_BYTES = 2**31 - 1  # of one protobuf message


def export_run(run: RunFolder, models: tuple[Model, ...] = (), report: Report = silent, builds: Sequence[Build] = ()) -> list[EngineCard]:
    """Export trained networks of a run to `engines/onnx/<model>.onnx`; an engine that is exported already and still fits is kept.

    Args:
        models: which; default `synth.model`.
        builds: for which runtimes and precisions, each with a card of its own; default `builds_of_recipe`.

    Returns: a card for each build of each model.

    Raises:
        UsageError: a stage is not trained.
        ParityError, NumericsError, EngineError, StorageError: see `export_onnx`; what was published before stays.
    """
    from engines.training.stages import load_unet  # reads checkpoints, and brings the training with it

    recipe = run.recipe
    cards: list[EngineCard] = []
    models, builds = models or (recipe.synth.model,), builds or builds_of_recipe(recipe)
    labeler: Callable[[], Labeler | None] = functools.cache(lambda: labeler_of(run))
    for model in models:
        unet, path = load_unet(run, model), onnx_path(run, model)
        for build in builds:
            report("export", len(cards), len(models) * len(builds), {})
            card = _current(path, unet, recipe, build)
            if card is None:
                started = time.perf_counter()
                schedule = make_schedule(recipe.diffusion.noise_schedule, recipe.diffusion.steps)
                data = _exported(path, unet, recipe)
                digest = export_digest(recipe)
                card = export_onnx(unet, schedule, path, recipe.export, digest, build, recipe.synth.batch_size, data, labeler())
                run.add_cost(f"export.{model}", time.perf_counter() - started)
            cards.append(card)
    report("export", len(cards), len(cards), {})
    return cards


def builds_of_recipe(recipe: Recipe) -> tuple[Build, ...]:
    """What [synth] needs: its engine in its precision, or in float32 where it names none; ONNX Runtime for "auto" and beside torch."""
    engine, precision = recipe.synth.engine, recipe.synth.precision
    if engine == "torch" or (engine == "auto" and precision == "auto"):
        return (Build("onnx", "fp32"),)
    return choice.builds_of(engine, precision)[:1]


def onnx_path(run: RunFolder, model: Model) -> Path:
    """Where a run's exported network lies."""
    return run.engines / "onnx" / f"{model}.onnx"


def labeler_of(run: RunFolder) -> Labeler | None:
    """What says which class an image of a run is of: a recognizer that the run keeps, else its guide; None where neither is trained.

    Any classifier that knows the classes shows whether an engine changes what an image is of, whatever it was trained for.
    """
    from engines.training.stages import load_guide

    recipe, classes = run.recipe, len(run.classes()["names"])
    for path in sorted((run.evaluation / "judge").glob("*.safetensors")):
        recognizer = ARCHITECTURES[recipe.recognizer.architecture](recipe.data.image_channels, classes, None)
        with contextlib.suppress(DataError, RuntimeError):  # damaged, or of another architecture: the guide is there
            recognizer.load_state_dict(store.read_tensors(path))
            return gate.recognizer_labeler(recognizer.eval())
    try:
        return gate.guide_labeler(load_guide(run).eval())
    except UsageError:
        return None


def export_digest(recipe: Recipe) -> str:
    """sha256 of the sections that shape a network and its export."""
    sections = {name: getattr(recipe, name).model_dump(mode="json") for name in ("unet", "diffusion", "export")}
    return recipes.digest(sections)


def export_onnx(
    unet: UNet,
    schedule: Schedule,
    path: Path,
    settings: ExportSection,
    recipe_sha256: str = "",
    build: Build = BUILDS[0],
    batch: int = 0,
    data: bytes = b"",
    labeler: Labeler | None = None,
) -> EngineCard:
    """Write `path` and the card of one engine that runs it, if and only if that engine gives torch's numbers.

    The time embedding becomes a float32 table (T, 4 width) that the graph gathers from: runtimes that compute in lower
    precision would spoil its sines. The batch is the only dynamic size.

    Args:
        unet: in evaluation mode, float32, on the CPU.
        schedule: the training process; its length is T.
        path: `<name>.onnx`, which all builds share.
        recipe_sha256: goes into the card.
        build: the runtime and its precision.
        batch: the batch size of synthesis, at which its speed is measured; 0 = the largest.
        data: the ONNX file where it was made before, for another build; empty = made now.
        labeler: says which class an image is of; see `labeler_of`.

    Raises:
        ParityError: a number disagrees, in the build's precision or before that in float32; nothing is written, what was measured is told.
        NumericsError: the network itself gives values that are not finite.
        EngineError: the exporter or the runtime failed or is not here, or the network is larger than a file of one piece can be.
        StorageError: the file cannot be written.
    """
    choice.require(build)
    reference, limits = TorchEngine(unet, len(schedule), settings.max_batch), gate.limits_of(settings, build.precision)
    card = reference.card.model_copy(
        update={
            "kind": build.kind,
            "precision": build.precision,
            "opset": settings.opset,
            "tolerance": limits.one_step_tolerance,
            "recipe_sha256": recipe_sha256,
            "versions": package_versions((*EXPORTERS, *RUNTIMES[build.kind])),
        }
    )
    values = thinned(reference(*example_input(card, self_test_batch(card), 0)))
    if not bool(torch.isfinite(values).all()):
        raise NumericsError("the trained network gives values that are not finite", "train again with a smaller lr")
    data = data or onnx_bytes(unet, card, recipe_sha256)
    card = card.model_copy(update={"file_sha256": hashlib.sha256(data).hexdigest(), "self_test": tuple(values.tolist())})
    batch = batch or card.max_batch
    if build.precision != "fp32":
        _require_twin(EngineFile(data, card), path, settings, reference, batch)
    engine = choice.load(EngineFile(data, card), f"{path.name} on {build}", batch=batch)
    parity = gate.hold(engine, reference, schedule, limits, batch, f"{path.name} on {build}", labeler)
    card = card.model_copy(update=parity._asdict())
    write_engine(path, data, card)
    return card


def _require_twin(file: EngineFile, path: Path, settings: ExportSection, reference: Engine, batch: int) -> None:
    """Hold the same file on the same runtime to float32's limit first.

    In a lower precision, rounding hides what is small: on a trained network a t off by one is within bf16's limit.
    """
    limit, origin = settings.one_step_tolerance, f"{path.name} on {file.card.kind} fp32"
    card = file.card.model_copy(update={"precision": "fp32", "tolerance": limit})
    error = gate.one_step_error(choice.load(EngineFile(file.data, card), origin, batch=batch), reference, batch)
    if not error <= limit:
        raise ParityError(
            f"{origin} disagrees with torch: relative error {error:.2g} of one evaluation, {limit:.2g} allowed; "
            f"so it is not tried in {file.card.precision}; nothing was written",
            "report it, or loosen export.one_step_tolerance",
        )


def onnx_bytes(unet: UNet, card: EngineCard, recipe_sha256: str = "") -> bytes:
    """The network as one self-contained ONNX file with its provenance as metadata. Raises EngineError."""
    size = 4 * (parameter_count(unet) + card.timesteps * 4 * unet.architecture.model_channels)
    if size > MAX_FILE_BYTES:
        raise EngineError(f"the network takes {size / 2**30:.1f} GiB; one ONNX file holds less than 2 GiB", "diffrc synth --engine torch")
    example = zip(input_names(card), example_input(card, EXAMPLE_BATCH, 0), strict=False)  # no y where the network takes none
    inputs = {name: value for name, value in example if value is not None}
    model = to_onnx(_Graph(unet, card.timesteps), inputs, [OUTPUT], card.opset)
    provenance = {"recipe_sha256": recipe_sha256, "weights_sha256": card.weights_sha256, "timesteps": str(card.timesteps)}
    return serialized(model, provenance)


class _Graph(nn.Module):
    """What is exported: (x, t, y) -> output, the time embedding looked up."""

    table: Tensor

    def __init__(self, unet: UNet, timesteps: int) -> None:
        super().__init__()
        self.unet = unet
        with torch.no_grad():
            self.register_buffer("table", unet.embed_time(torch.arange(timesteps)))  # (T, 4 width)
        self.eval()

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.unet.denoise(x, F.embedding(t, self.table), y)


def _current(path: Path, unet: UNet, recipe: Recipe, build: Build) -> EngineCard | None:
    """The card of an engine that was made from these weights by this recipe and these packages, or None."""
    try:
        card = read_engine(path, *build).card
    except EngineError:  # missing, damaged or older: made anew
        return None
    wanted = package_versions((*EXPORTERS, *RUNTIMES[build.kind])), recipe.synth.batch_size
    return card if _fits(card, unet, recipe) and (card.versions, card.measured_batch) == wanted else None


def _exported(path: Path, unet: UNet, recipe: Recipe) -> bytes:
    """The ONNX file where a card of any build says that it was made from these weights by this recipe and exporter; else empty."""
    versions = package_versions(EXPORTERS)
    for build in BUILDS:
        with contextlib.suppress(EngineError):
            file = read_engine(path, *build)
            if _fits(file.card, unet, recipe) and versions == {name: file.card.versions.get(name) for name in versions}:
                return file.data
    return b""


def _fits(card: EngineCard, unet: UNet, recipe: Recipe) -> bool:
    return (card.weights_sha256, card.recipe_sha256) == (weights_sha256(unet), export_digest(recipe))
