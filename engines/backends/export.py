"""Torch -> ONNX, fail-closed: an engine gets its name only after it agreed with torch."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines import recipe as recipes
from engines.backends.base import (
    Engine,
    EngineCard,
    EngineFile,
    example_input,
    package_versions,
    read_engine,
    relative_error,
    self_test_batch,
    thinned,
    weights_sha256,
    write_engine,
)
from engines.backends.ort_engine import OUTPUT, OrtEngine, input_names
from engines.backends.torch_engine import TorchEngine
from engines.diffusion.noise import batch_noise, image_key
from engines.diffusion.sampler import sample
from engines.diffusion.schedule import Schedule, make_schedule, respace
from engines.errors import EngineError, NumericsError, ParityError
from engines.networks.unet import UNet, parameter_count
from engines.progress import Report, silent
from engines.recipe import ExportSection, Recipe
from engines.store import RunFolder

Model = Literal["target", "source"]
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")
EXAMPLE_BATCH = 7  # equal to no other size in the network, or the exporter ties the two together
MAX_FILE_BYTES = 2**31 - 1  # of one protobuf message
TRAJECTORY_STEPS = 10
TRAJECTORY_IMAGES = 4
MAX_PSNR_DB = 200.0  # what equal images are given


def export_run(run: RunFolder, models: tuple[Model, ...] = (), report: Report = silent) -> list[EngineCard]:
    """Export trained networks of a run to `engines/onnx/<model>.onnx`; one that is exported already and still fits is kept.

    Args:
        models: which; default `synth.model`.

    Raises:
        UsageError: a stage is not trained.
        ParityError, NumericsError, EngineError, StorageError: see `export_onnx`.
    """
    from engines.training.stages import load_unet  # reads checkpoints, and brings the training with it

    recipe, cards = run.recipe, []
    models = models or (recipe.synth.model,)
    for done, model in enumerate(models):
        report("export", done, len(models), {})
        unet = load_unet(run, model)
        path = onnx_path(run, model)
        card = _current(path, unet, recipe)
        if card is None:
            started = time.perf_counter()
            schedule = make_schedule(recipe.diffusion.noise_schedule, recipe.diffusion.steps)
            card = export_onnx(unet, schedule, path, recipe.export, export_digest(recipe))
            run.add_cost(f"export.{model}", time.perf_counter() - started)
        cards.append(card)
    report("export", len(models), len(models), {})
    return cards


def onnx_path(run: RunFolder, model: Model) -> Path:
    """Where a run's exported network lies."""
    return run.engines / "onnx" / f"{model}.onnx"


def export_digest(recipe: Recipe) -> str:
    """sha256 of the sections that shape a network and its export."""
    sections = {name: getattr(recipe, name).model_dump(mode="json") for name in ("unet", "diffusion", "export")}
    return recipes.digest(sections)


def export_onnx(unet: UNet, schedule: Schedule, path: Path, settings: ExportSection, recipe_sha256: str = "") -> EngineCard:
    """Write `path` and the card beside it, if and only if ONNX Runtime gives torch's numbers.

    The time embedding becomes a float32 table (T, 4 width) that the graph gathers from: runtimes that compute in lower
    precision would spoil its sines. The batch is the only dynamic size.

    Args:
        unet: in evaluation mode, float32, on the CPU.
        schedule: the training process; its length is T.
        path: `<name>.onnx`.
        recipe_sha256: goes into the card.

    Raises:
        ParityError: a number disagrees; nothing is written.
        NumericsError: the network itself gives values that are not finite.
        EngineError: the exporter or the runtime failed, or the network is larger than a file of one piece can be.
        StorageError: the file cannot be written.
    """
    reference = TorchEngine(unet, len(schedule), settings.max_batch)
    card = reference.card.model_copy(update={"kind": "onnx", "opset": settings.opset, "tolerance": settings.one_step_tolerance})
    values = thinned(reference(*example_input(card, self_test_batch(card), 0)))
    if not bool(torch.isfinite(values).all()):
        raise NumericsError("the trained network gives values that are not finite", "train again with a smaller lr")
    data = onnx_bytes(unet, card, recipe_sha256)
    card = card.model_copy(
        update={
            "recipe_sha256": recipe_sha256,
            "file_sha256": hashlib.sha256(data).hexdigest(),
            "versions": package_versions(PACKAGES),
            "self_test": tuple(values.tolist()),
        }
    )
    engine = OrtEngine(EngineFile(data, card), path.name)
    error = one_step_error(engine, reference)
    if not error <= settings.one_step_tolerance:  # also where it is not a number
        found = f"relative error {error:.2g} of one evaluation"
        raise _disagreement(path, found, f"{settings.one_step_tolerance:.2g}", "export.one_step_tolerance")
    psnr = trajectory_psnr_db(engine, reference, schedule)
    if not psnr >= settings.trajectory_psnr_db:
        found = f"{psnr:.1f} dB after {TRAJECTORY_STEPS} steps of DDIM"
        raise _disagreement(path, found, f"at least {settings.trajectory_psnr_db:.1f} dB", "export.trajectory_psnr_db")
    card = card.model_copy(update={"one_step_error": error, "trajectory_psnr_db": psnr})
    write_engine(path, data, card)
    return card


def onnx_bytes(unet: UNet, card: EngineCard, recipe_sha256: str = "") -> bytes:
    """The network as one self-contained ONNX file with its provenance as metadata. Raises EngineError."""
    size = 4 * (parameter_count(unet) + card.timesteps * 4 * unet.architecture.model_channels)
    if size > MAX_FILE_BYTES:
        raise EngineError(f"the network takes {size / 2**30:.1f} GiB; one ONNX file holds less than 2 GiB", "diffrc synth --engine torch")
    inputs = example_input(card, EXAMPLE_BATCH, 0)[: len(input_names(card))]
    batch = torch.export.Dim("batch")
    with _quiet():
        try:
            program = torch.onnx.export(
                _Graph(unet, card.timesteps),
                inputs,
                dynamo=True,
                opset_version=card.opset,
                input_names=input_names(card),
                output_names=[OUTPUT],
                dynamic_shapes=tuple({0: batch} for _ in inputs),
                verbose=False,
            )
            assert program is not None
            model = program.model_proto
        except Exception as error:  # the exporter wraps whatever failed in classes of its own
            raise EngineError(f"torch cannot export this network: {_first_line(error)}", "--debug shows where; please report it") from error
    _strip(model)
    properties = {"recipe_sha256": recipe_sha256, "weights_sha256": card.weights_sha256, "timesteps": str(card.timesteps)}
    for key, value in properties.items():
        model.metadata_props.add(key=f"diffrc.{key}", value=value)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def one_step_error(engine: Engine, reference: Engine) -> float:
    """The largest relative L2 error of an image, over small, middle and large t and batches of 1, 2 and the largest."""
    card, worst = engine.card, 0.0
    for batch in sorted({1, min(2, card.max_batch), card.max_batch}):
        for first_t in (0, card.timesteps // 2, card.timesteps - 1):
            x, t, y = example_input(card, batch, first_t)
            for found, expected in zip(engine(x, t, y), reference(x, t, y), strict=True):
                error = relative_error(found, expected)
                worst = error if not error <= worst else worst  # keeps a NaN
                if worst != worst:
                    return worst
    return worst


def trajectory_psnr_db(engine: Engine, reference: Engine, schedule: Schedule) -> float:
    """PSNR of the worst image after a short DDIM from the same noise; images are in [-1, 1], so the peak is 2."""
    short = respace(schedule, min(TRAJECTORY_STEPS, len(schedule)))
    noise = batch_noise([image_key(0, 1, i) for i in range(min(TRAJECTORY_IMAGES, engine.card.max_batch))], 0, engine.card.shape)
    _, _, y = example_input(engine.card, len(noise), 0)

    def images(runner: Engine) -> Tensor:
        return sample(lambda x, t: runner(x, t, y), short, lambda step: noise.clone(), sampler="ddim")

    error = (images(engine) - images(reference)).square().flatten(1).mean(1)  # (B,)
    worst = float((10 * (4 / error.clamp(min=1e-30)).log10()).min())
    return min(worst, MAX_PSNR_DB)


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


def _current(path: Path, unet: UNet, recipe: Recipe) -> EngineCard | None:
    """The card of an engine that was made from these weights by this recipe and these packages, or None."""
    try:
        card = read_engine(path).card
    except EngineError:  # missing, damaged or older: made anew
        return None
    wanted = (weights_sha256(unet), export_digest(recipe), package_versions(PACKAGES))
    return card if (card.weights_sha256, card.recipe_sha256, card.versions) == wanted else None


def _strip(model: Any) -> None:
    """Take out what the exporter notes about the machine it ran on: stack traces with paths, in nodes and values."""
    model.doc_string = ""
    del model.metadata_props[:]
    graph = model.graph
    graph.doc_string = ""
    del graph.value_info[:]
    del graph.metadata_props[:]
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's chatter and advice to developers from the user's terminal; its errors are raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _disagreement(path: Path, found: str, allowed: str, key: str) -> ParityError:
    return ParityError(f"{path.name} disagrees with torch: {found}, {allowed} allowed; nothing was written", f"report it, or loosen {key}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
