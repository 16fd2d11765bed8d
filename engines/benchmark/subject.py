"""The network that a benchmark measures: of a run, or a recipe's with fixed random weights; as files that several processes read."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines import recipe as recipes
from engines import store
from engines.backends import choice
from engines.backends.base import (
    Engine,
    EngineCard,
    EngineFile,
    engine_path,
    example_input,
    self_test_batch,
    thinned,
    weights_sha256,
    write_engine,
)
from engines.backends.choice import Build
from engines.backends.export import file_opset, onnx_bytes, onnx_path
from engines.backends.gate import limits_of
from engines.backends.torch_engine import TorchEngine
from engines.diffusion.schedule import Schedule, make_schedule
from engines.errors import EngineError, NumericsError, ParityError, UsageError
from engines.networks.guide import Guide
from engines.networks.unet import UNet
from engines.recipe import Recipe
from engines.store import RunFolder

TABLE, PLACES, NETWORK, STEP = "subject.json", "engines.json", "network.onnx", "step.onnx"
CLASSES = 10  # of a network that no data was seen for: labels and prototypes cost next to nothing
GAIN = 0.5  # of the weights that a network starts with at zero: outputs of about 0.3 (root mean square)

_COMMON = """
[data]
image_size_px = 32
[guide]
channel_mult = [1, 2]
attention_resolutions = []
embedding_dim = 64
"""
NETWORKS = {  # 6.08 and 38.3 million parameters, 2.54 and 12.5 GFLOP an image; the guide 1.39 million
    "small": """name = "small"
[unet]
model_channels = 64
channel_mult = [1, 1.5, 2]
attention_resolutions = [16, 8]
num_head_channels = 32
resblock_updown = false
"""
    + _COMMON,
    "cifar": """name = "cifar"
[unet]
model_channels = 128
channel_mult = [1, 2, 2, 2]
attention_resolutions = [16]
resblock_updown = false
"""
    + _COMMON,
}


@dataclass(frozen=True)
class Subject:
    """A network with its guide and its recipe; both in evaluation mode, in float32, on the CPU."""

    name: str
    weights: str  # in words: trained, or random
    recipe: Recipe
    unet: UNet
    guide: Guide | None
    published: Path | None = None  # the run's exported network, whether it is there or not


def of_run(run: RunFolder) -> Subject:
    """The network that a run synthesizes with. Raises UsageError where it is not trained."""
    from engines.training.stages import load_guide, load_unet  # reads checkpoints, and brings the training with it

    model, guide = run.recipe.synth.model, None
    with contextlib.suppress(UsageError):  # the guide is not trained: nothing guided can be measured, all else can
        guide = load_guide(run).requires_grad_(False)
    return Subject(run.recipe.name, f"trained, {model}", run.recipe, load_unet(run, model), guide, onnx_path(run, model))


def of_recipe(recipe: Recipe) -> Subject:
    """A recipe's network and guide with weights that are random and always the same."""
    from engines.training.stages import new_guide, new_unet

    unet, guide = new_unet(recipe, CLASSES), new_guide(recipe, np.ones(CLASSES, dtype=np.int64))
    generator = torch.Generator().manual_seed(recipe.seed)
    for network in (unet, guide):
        _fill(network, generator)
        network.eval().requires_grad_(False)
    guide.prototypes.copy_(F.normalize(torch.randn(guide.prototypes.shape, generator=generator), dim=-1))
    return Subject(recipe.name, f"random, seed {recipe.seed}", recipe, unet, guide)


def _fill(network: nn.Module, generator: torch.Generator) -> None:
    """Give values to weights that start at zero: blocks that add nothing would be measured rightly, but their errors would not show."""
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1 and not bool(weight.any()):
                scale = GAIN / weight[0].numel() ** 0.5
                weight.copy_(scale * torch.randn(weight.shape, generator=generator))


# ---------------------------------------------------------------------------------------------------------------- files


def write(folder: Path, subject: Subject, max_batch: int) -> None:
    """Everything that a measuring process needs, engines apart. Raises StorageError."""
    rows = len(subject.guide.prototypes) if subject.guide else max(CLASSES, subject.unet.classes - 1)
    classes = subject.unet.classes - 1 if subject.unet.classes else rows
    store.write_text(folder / "recipe.toml", recipes.to_toml(subject.recipe))
    table = {"classes": classes, "guide": subject.guide is not None, "timesteps": subject.recipe.diffusion.steps, "max_batch": max_batch}
    store.write_json(folder / TABLE, table)
    store.write_tensors(folder / "unet.safetensors", subject.unet.state_dict())
    if subject.guide:
        store.write_tensors(folder / "guide.safetensors", subject.guide.state_dict())


def read_table(folder: Path) -> dict[str, Any]:
    """classes: K; guide: whether there is one; timesteps: T; max_batch."""
    found: dict[str, Any] = store.read_json(folder / TABLE)
    return found


def read_recipe(folder: Path) -> Recipe:
    """The recipe."""
    return recipes.read(folder / "recipe.toml")


def read_unet(folder: Path) -> UNet:
    """The network, in evaluation mode."""
    from engines.training.diffusion import build_unet

    unet = build_unet(read_recipe(folder), read_table(folder)["classes"])
    unet.load_state_dict(store.read_tensors(folder / "unet.safetensors"))
    return unet.eval().requires_grad_(requires_grad=False)


def read_guide(folder: Path) -> Guide | None:
    """The guide, in evaluation mode, where there is one."""
    from engines.training.guide import build_guide

    table = read_table(folder)
    if not table["guide"]:
        return None
    guide = build_guide(read_recipe(folder), np.ones(table["classes"], dtype=np.int64))
    guide.load_state_dict(store.read_tensors(folder / "guide.safetensors"))
    return guide.eval().requires_grad_(requires_grad=False)


def schedule_of(recipe: Recipe) -> Schedule:
    """Of training."""
    return make_schedule(recipe.diffusion.noise_schedule, recipe.diffusion.steps)


# -------------------------------------------------------------------------------------------------------------- engines


def provide_engines(folder: Path, subject: Subject, builds: Sequence[Build], max_batch: int) -> dict[Build, str]:
    """Engines of a network: those that its run published, else made here; ONNX files that builds share are made once.

    What is made here was held to no gate but the self-test at every load; `one_step_error` is measured with the speed.

    Returns: the builds that cannot be had, and why.
    """
    refused: dict[Build, str] = {}
    places: dict[str, str] = {}
    sha256, own = weights_sha256(subject.unet), folder / NETWORK
    for build in builds:
        try:
            choice.require(build)
            if subject.published and _is_published(subject.published, build, sha256, max_batch):
                places[str(build)] = str(subject.published.absolute())
                continue
            if choice.source_of(build):
                raise EngineError("built for a run alone", "diffrc export --engine tensorrt")
            path = engine_path(own, *build)
            card = card_of(subject, build, max_batch)
            data = path.read_bytes() if path.is_file() else onnx_bytes(subject.unet, card)
            write_engine(path, data, card.model_copy(update={"file_sha256": hashlib.sha256(data).hexdigest()}))
            places[str(build)] = str(own)
        except EngineError as error:
            refused[build] = error.problem
    store.write_json(folder / PLACES, places)
    return refused


def provide_steps(folder: Path, subject: Subject, builds: Sequence[Build], max_batch: int) -> dict[Build, str]:
    """Whole guided steps in one graph of the engines that `provide_engines` found or made; as there, without a gate of their own.

    Returns: the builds that cannot be had, and why.
    """
    from engines.backends import fused
    from engines.backends import gradient as gradients
    from engines.backends.graphs import write_graph

    assert subject.guide is not None
    settings = subject.recipe.export.model_copy(update={"max_batch": max_batch})
    rules, steps = fused.rules_of(subject.recipe.synth), subject.recipe.diffusion.steps
    reference = fused.Reference(subject.unet, subject.guide.log_probs, schedule_of(subject.recipe))
    refused: dict[Build, str] = {}
    gradient = data = b""
    for build in builds:
        try:
            network = read_place(folder, build)
            if rules is None:
                raise EngineError("these steps are not of one evaluation and one gradient", "--set synth.classifier_free_scale=0")
            if build.kind not in ("onnx", "openvino") or build.precision == "fp16":
                raise EngineError("no guided step in one graph is made for it", "onnx and openvino have them")
            gradient, card = gradients.gradient_bytes(subject.guide, steps, settings, build.kind, build.precision, data=gradient)
            data, made = fused.fused_bytes(network, (gradient, card), rules, reference, settings, data)
            unmeasured = {"step_error": 0.0, "figure_error": 0.0, "trajectory_psnr_db": 0.0}
            made = made.model_copy(update=unmeasured)
            if build.precision != "fp32":  # whose rounding would hide a wrong step: the same file passes float32's self-test first
                exact = {"precision": "fp32", "tolerance": gradients.limits_of(settings, "fp32").step_error}
                fused.FusedEngine(data, made.model_copy(update=exact), f"the step in one graph on {build.kind} fp32", batch=max_batch)
            write_graph(folder / STEP, data, made)
        except (EngineError, ParityError, NumericsError) as error:
            refused[build] = error.problem
    return refused


def read_place(folder: Path, build: Build) -> EngineFile:
    """An engine that `provide_engines` found or made."""
    return choice.read(Path(store.read_json(folder / PLACES)[str(build)]), build)


def card_of(subject: Subject, build: Build, max_batch: int) -> EngineCard:
    """The card of an engine that is about to be made for a measurement; its parity is not measured yet and stands at 0."""
    steps, settings = subject.recipe.diffusion.steps, subject.recipe.export
    reference = TorchEngine(subject.unet, steps, max_batch)
    values = thinned(reference(*example_input(reference.card, self_test_batch(reference.card), 0)))
    return reference.card.model_copy(
        update={
            "kind": build.kind,
            "precision": build.precision,
            "opset": file_opset(settings, build),
            "tolerance": limits_of(settings, build.precision).one_step_tolerance,
            "self_test": tuple(values.tolist()),
        }
    )


def _is_published(network: Path, build: Build, sha256: str, max_batch: int) -> bool:
    """Whether a run published an engine of these weights for batches of that size."""
    try:
        card = choice.read(network, build).card
    except EngineError:  # not exported, damaged or older: made here
        return False
    return card.weights_sha256 == sha256 and card.max_batch >= max_batch


# ------------------------------------------------------------------------------------------------------------ reference


def write_reference(path: Path, subject: Subject, max_batch: int) -> None:
    """What torch gives in float32 for each input that the gate asks an engine for. Raises StorageError."""
    engine = TorchEngine(subject.unet, subject.recipe.diffusion.steps, max_batch)
    outputs = {}
    for size in sorted({1, min(2, max_batch), max_batch}):
        for first_t in (0, engine.card.timesteps // 2, engine.card.timesteps - 1):
            x, t, y = example_input(engine.card, size, first_t)
            outputs[_key(x, t)] = engine(x, t, y)
    store.write_tensors(path, outputs)


class Recorded:
    """An `Engine` that only knows what was written: a reference that costs neither time nor memory beside the engine that is measured."""

    def __init__(self, path: Path, card: EngineCard) -> None:
        self.card = card
        self._outputs = store.read_tensors(path)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """See `Engine.__call__`; an assertion fails where the input is not one of the gate's."""
        found = self._outputs.get(_key(x, t))
        assert found is not None, f"no reference for {_key(x, t)}"
        return found.to(x.device)


class Capped:
    """An `Engine` that is asked for no batch above the measured ones, whatever it was exported for."""

    def __init__(self, engine: Engine, max_batch: int) -> None:
        self.card = engine.card.model_copy(update={"max_batch": max_batch})
        self._engine = engine

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """See `Engine.__call__`."""
        return self._engine(x, t, y)


def _key(x: Tensor, t: Tensor) -> str:
    return f"{len(x)}/{int(t[0])}"
