"""Torch -> ONNX -> engine, fail-closed: an engine gets its card, without which it is not loaded, only after it agreed with torch."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines import store
from engines.backends import choice, gate, guided, trt_engine
from engines.backends.base import (
    Engine,
    EngineCard,
    EngineFile,
    engine_path,
    example_input,
    package_versions,
    read_engine,
    self_test_batch,
    thinned,
    weights_sha256,
    write_engine,
)
from engines.backends.cast import BF16_OPSET, cast_unet, rounded_unet, widened
from engines.backends.choice import BUILDS, Build
from engines.backends.device import CPU, device_name, gpu_failures
from engines.backends.gate import Labeler
from engines.backends.keys import EXPORTERS, RUNTIMES, differences, export_digest, versions_now, wanted
from engines.backends.onnx_file import MAX_FILE_BYTES, serialized, to_onnx, to_opset
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
PLAIN_OPSET = 20  # the last at which torch writes group norms as operators that every runtime gets right
EXAMPLE_BATCH = 7  # equal to no other size in the network, or the exporter ties the two together


def export_run(run: RunFolder, models: tuple[Model, ...] = (), report: Report = silent, builds: Sequence[Build] = ()) -> list[EngineCard]:
    """Export trained networks of a run to `engines/onnx/<model>.onnx` and what `engine_path` names beside it; an engine that is
    exported already and still fits is kept.

    Args:
        models: which; default `synth.model`.
        builds: for which runtimes and precisions, each with a card of its own; default `builds_of_recipe`.

    Returns: a card for each build of each model.

    Raises:
        UsageError: a stage is not trained.
        ConflictError: another process exports this run.
        ParityError, NumericsError, EngineError, StorageError: see `export_onnx` and `export_plan`; what was published before stays.
    """
    from engines.training.stages import load_unet  # reads checkpoints, and brings the training with it

    networks = {model: load_unet(run, model) for model in models or (run.recipe.synth.model,)}  # an untrained one, before a folder is made
    with store.locked(run.engines):
        return _export(run, networks, report, builds or builds_of_recipe(run.recipe))


def _export(run: RunFolder, networks: Mapping[Model, UNet], report: Report, builds: Sequence[Build]) -> list[EngineCard]:
    recipe = run.recipe
    cards: list[EngineCard] = []
    labeler: Callable[[], Labeler | None] = functools.cache(lambda: labeler_of(run))
    for model, unet in networks.items():
        path = onnx_path(run, model)
        for build in builds:
            report("export", len(cards), len(networks) * len(builds), {})
            choice.require(build, file_opset(recipe.export, build))
            for needed in (choice.source_of(build), build):  # what a plan is built from passes its own gate first
                if needed is None:
                    continue
                device = choice.device_of(needed, recipe.synth.device if needed == build else "auto")
                card = current_card(path, unet, recipe, needed, device)
                if card is None:
                    started = time.perf_counter()
                    with gpu_failures():
                        card = _exported(run, unet, path, needed, labeler(), device)
                    run.add_cost(f"export.{model}", time.perf_counter() - started)
            assert card
            cards.append(card)
            _guided_step(run, unet, path, build)
    report("export", len(cards), len(cards), {})
    return cards


def _guided_step(run: RunFolder, unet: UNet, network: Path, build: Build) -> None:
    """The guide's gradient and the whole guided step for a build of a network, where the recipe has a use for them; see `guided`."""
    from engines.training.stages import load_guide

    if not guided.is_wanted(run.recipe, build) or choice.device_of(build, run.recipe.synth.device).type != "cpu":
        return
    try:
        guide = load_guide(run).eval().requires_grad_(False)
    except UsageError:  # not trained: unguided images need none
        return
    started = time.perf_counter()
    guided.export_guided(network, unet, guide, run.recipe, build)
    run.add_cost("export.guided", time.perf_counter() - started)


def builds_of_recipe(recipe: Recipe) -> tuple[Build, ...]:
    """What [synth] needs: its engine in its precision, or in float32 where it names none; ONNX Runtime for "auto" and beside torch."""
    engine, precision = recipe.synth.engine, recipe.synth.precision
    if engine == "torch" or (engine == "auto" and precision == "auto"):
        return (Build("onnx", "fp32"),)
    return choice.builds_of(engine, precision)[:1]


def onnx_path(run: RunFolder, model: Model) -> Path:
    """Where a run's exported network lies, in float32; `engine_path` says where its other engines are."""
    return run.engines / "onnx" / f"{model}.onnx"


def export_command(run: RunFolder, model: Model) -> str:
    """What a person types to export a run's network, for messages."""
    return "diffrc export" + (" --model source" if model == "source" else "") + f" --run {run.path}"


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
    device: torch.device = CPU,
) -> EngineCard:
    """Write `path` and the card of one engine that runs it, if and only if that engine gives torch's numbers.

    The time embedding becomes a float32 table (T, 4 width) that the graph gathers from: runtimes that compute in lower
    precision would spoil its sines. The batch is the only dynamic size.

    In half precision the file is `cast_unet`'s, for runtimes that take precision from the graph, unless it is for OpenVINO. One in
    bf16 has a card "onnx bf16", without a speed: ONNX Runtime cannot run it on a CPU. Its graph is held to float32's limit, and its
    rounding is torch's own.

    Args:
        unet: in evaluation mode, float32, on the CPU.
        schedule: the training process; its length is T.
        path: `<name>.onnx`, of the file in float32; see `engine_path`.
        recipe_sha256: goes into the card.
        build: the runtime and its precision; for TensorRT see `export_plan`.
        batch: the batch size of synthesis, at which its speed is measured; 0 = the largest.
        data: the ONNX file where it was made before, for another build; empty = made now.
        labeler: says which class an image is of; see `labeler_of`.
        device: where it is held to torch and measured, torch being there as well; see `choice.device_of`.

    Raises:
        ParityError: a number disagrees, in the build's precision or before that in float32; nothing is written, what was measured is told.
        NumericsError: the network itself gives values that are not finite.
        EngineError: the exporter or the runtime failed or is not here, or the network is larger than a file of one piece can be.
        StorageError: the file cannot be written.
    """
    opset, path = file_opset(settings, build), engine_path(path, *build)
    choice.require(build, opset)
    there, on_gpu = _moved(unet, device), device.type == "cuda"
    reference, limits = TorchEngine(there, len(schedule), settings.max_batch), gate.limits_of(settings, build.precision, on_gpu)
    card = reference.card.model_copy(
        update={
            "kind": build.kind,
            "precision": build.precision,
            "device": device_name(device),
            "opset": opset,
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
    file, batch, name = EngineFile(data, card), batch or card.max_batch, f"{path.name} on {build}"
    if build.precision != "fp32":
        _require_twin(file, there, path, settings, reference, batch)
    if build in BUILDS:
        parity = gate.hold(choice.load(file, name, batch=batch, device=device), reference, schedule, limits, batch, name, labeler)
    else:
        cast = TorchEngine(cast_unet(there, build.precision), len(schedule), settings.max_batch)
        name = f"{path.name}, cast in torch,"
        parity = gate.hold(cast, reference, schedule, limits, batch, name, labeler)._replace(ms_per_image=0.0)
    card = card.model_copy(update=parity._asdict())
    write_engine(path, data, card)
    return card


def export_plan(
    unet: UNet, schedule: Schedule, path: Path, settings: ExportSection, build: Build, labeler: Labeler | None = None
) -> EngineCard:
    """Build TensorRT's plan for this machine's GPU from an ONNX file that passed its gate, and publish it if it gives torch's numbers.

    Args:
        path: `<name>.onnx`, of the file in float32; see `engine_path`.
        build: of TensorRT.  The others are as in `export_onnx`.

    Raises:
        EngineError: there is no such ONNX file, TensorRT or GPU here, or the builder failed.
        ParityError: a number disagrees; nothing is written.
        StorageError: the files cannot be written.
    """
    source = choice.source_of(build)
    assert source is not None
    onnx, plan = read_engine(engine_path(path, *source), *source), engine_path(path, *build)
    there = _moved(unet, torch.device("cuda") if torch.cuda.is_available() else CPU)  # a CPU would take most of the gate's time
    reference, limits = TorchEngine(there, len(schedule), settings.max_batch), gate.limits_of(settings, build.precision, on_gpu=True)
    batches = trt_engine.batches_of(onnx.card)

    def passed(card: EngineCard, engine: Engine) -> EngineCard:
        parity = gate.hold(engine, reference, schedule, limits, batches.usual, f"{plan.name} on {build}", labeler)
        return card.model_copy(update=parity._asdict())

    return trt_engine.make_plan(onnx, plan, batches, passed, limits.one_step_tolerance).engine


def file_opset(settings: ExportSection, build: Build) -> int:
    """The opset of the ONNX file of a build: the recipe's, or the first that knows convolutions in bf16 where it holds any."""
    in_bf16 = build.precision == "bf16" and build.kind != "openvino"
    return max(settings.opset, BF16_OPSET) if in_bf16 else settings.opset


def _require_twin(file: EngineFile, unet: UNet, path: Path, settings: ExportSection, reference: Engine, batch: int) -> None:
    """Hold the same graph on the same runtime to float32's limit first.

    In a lower precision, rounding hides what is small: on a trained network a t off by one is within bf16's limit. A file that was
    cast is widened for it, and compared with torch in float32 with weights that are rounded as its own.
    """
    device, kind, precision = next(unet.parameters()).device, file.card.kind, file.card.precision
    limits = gate.limits_of(settings, "fp32", device.type == "cuda")
    limit = limits.one_step_tolerance
    origin, data = f"{path.name} on {kind} fp32", file.data
    if kind == "onnx":
        data = widened(data)
        reference = TorchEngine(rounded_unet(unet, precision), file.card.timesteps, settings.max_batch)
    values = thinned(reference(*example_input(file.card, self_test_batch(file.card), 0)))
    card = file.card.model_copy(update={"precision": "fp32", "tolerance": limit, "self_test": tuple(values.tolist())})
    card = card.model_copy(update={"file_sha256": hashlib.sha256(data).hexdigest()})
    error = gate.one_step_error(choice.load(EngineFile(data, card), origin, batch=batch, device=device), reference, batch)
    if not error <= limit:
        raise ParityError(
            f"{origin} disagrees with torch: relative error {error:.2g} of one evaluation, {limit:.2g} allowed; "
            f"so it is not tried in {precision}; nothing was written",
            f"report it, or loosen export.{limits.keys[0]}",
        )


def onnx_bytes(unet: UNet, card: EngineCard, recipe_sha256: str = "") -> bytes:
    """The network as one self-contained ONNX file with its provenance as metadata, cast where the card says. Raises EngineError."""
    size = 4 * (parameter_count(unet) + card.timesteps * 4 * unet.architecture.model_channels)
    if size > MAX_FILE_BYTES:
        raise EngineError(f"the network takes {size / 2**30:.1f} GiB; one ONNX file holds less than 2 GiB", "diffrc synth --engine torch")
    example = zip(input_names(card), example_input(card, EXAMPLE_BATCH, 0), strict=False)  # no y where the network takes none
    inputs = {name: value for name, value in example if value is not None}
    precision = "fp32" if card.kind == "openvino" else card.precision
    graph = _Graph(unet, card.timesteps, cast_unet(unet, precision))
    if precision == "bf16" and card.opset == BF16_OPSET:
        model = to_opset(to_onnx(graph, inputs, [OUTPUT], PLAIN_OPSET), card.opset)
    else:
        model = to_onnx(graph, inputs, [OUTPUT], card.opset)
    provenance = {"recipe_sha256": recipe_sha256, "weights_sha256": card.weights_sha256, "timesteps": str(card.timesteps)}
    return serialized(model, provenance)


class _Graph(nn.Module):
    """What is exported: (x, t, y) -> output, the time embedding looked up, the rest computed by `cast`."""

    table: Tensor

    def __init__(self, unet: UNet, timesteps: int, cast: UNet) -> None:
        super().__init__()
        self.unet = cast
        with torch.no_grad():
            self.register_buffer("table", unet.embed_time(torch.arange(timesteps)))  # (T, 4 width)
        self.eval()

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.unet.denoise(x, F.embedding(t, self.table), y)


def _moved(unet: UNet, device: torch.device) -> UNet:
    """The network on a device; where it is exported from, it stays."""
    return unet if device == CPU else copy.deepcopy(unet).to(device)


def current_card(path: Path, unet: UNet, recipe: Recipe, build: Build, device: torch.device) -> EngineCard | None:
    """The card of an engine that was made from these weights by this recipe and these packages, and measured here, or None."""
    try:
        card = choice.read(path, build).card
    except EngineError:  # missing, damaged, older or of another machine: made anew
        return None
    if choice.source_of(build):  # read against the card of its ONNX file, all of whose facts are checked
        return card
    asked = wanted(recipe, card, build.kind, weights_sha256=weights_sha256(unet))
    asked |= {"recipe_sha256": export_digest(recipe), "measured_batch": recipe.synth.batch_size}  # the batch that was typed now, too
    asked |= {"device": device_name(device)}
    return None if differences(card, asked) else card


def _exported(run: RunFolder, unet: UNet, path: Path, build: Build, labeler: Labeler | None, device: torch.device) -> EngineCard:
    recipe = run.recipe
    schedule = make_schedule(recipe.diffusion.noise_schedule, recipe.diffusion.steps)
    if build.kind == "tensorrt":
        return export_plan(unet, schedule, path, recipe.export, build, labeler)
    data, batch = _made_before(path, unet, recipe, build), recipe.synth.batch_size
    return export_onnx(unet, schedule, path, recipe.export, export_digest(recipe), build, batch, data, labeler, device)


def _made_before(path: Path, unet: UNet, recipe: Recipe, build: Build) -> bytes:
    """A build's ONNX file where the card of any says that it was made from these weights by this recipe and exporter; else empty."""
    asked, file = _made_of(unet, recipe), engine_path(path, *build)
    for other in dict.fromkeys((build, *BUILDS)):
        if engine_path(path, *other) == file:
            with contextlib.suppress(EngineError):
                found = read_engine(file, *other)
                if not differences(found.card, asked):
                    return found.data
    return b""


def _made_of(unet: UNet, recipe: Recipe) -> dict[str, object]:
    """What the card of an ONNX file must say, whatever runs it, for the file to be taken again."""
    weights = weights_sha256(unet)
    return {"weights_sha256": weights, "recipe_sha256": export_digest(recipe), "versions": versions_now(EXPORTERS)}
