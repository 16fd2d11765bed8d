"""Where figures and sample grids go beside metrics.jsonl, if wanted: TensorBoard, Weights & Biases.

Their packages are imported when a sink is opened. metrics.jsonl is the record; a sink that fails is dropped and said so once.
"""

from __future__ import annotations

import importlib
import io
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from engines import store
from engines.errors import EngineError, UsageError

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
FOLDER = "tensorboard"  # of a run
PROJECT = "diffrc"  # on Weights & Biases


class Sink(Protocol):
    """Something that shows how training goes."""

    def write(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        """Figures after `step` steps of a stage."""
        ...

    def image(self, stage: str, step: int, png: bytes) -> None:
        """A sample grid."""
        ...

    def close(self) -> None: ...


class Sinks:
    """All sinks of a run as one that never fails.

    Args:
        sinks: by name.
        tell: hears the one sentence of a sink that failed.
    """

    def __init__(self, sinks: Mapping[str, Sink] | None = None, tell: Callable[[str], object] = lambda _: None) -> None:
        self._sinks = dict(sinks or {})
        self._tell = tell

    def write(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        self._each(lambda sink: sink.write(stage, step, figures))

    def image(self, stage: str, step: int, png: bytes) -> None:
        self._each(lambda sink: sink.image(stage, step, png))

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def _each(self, call: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                call(sink)
            except Exception as failure:  # of any kind: a lost connection must not end a week of training
                del self._sinks[name]
                self._tell(f"{name} failed and is left out from here ({str(failure) or type(failure).__name__}); metrics.jsonl goes on")


def open_sinks(names: Sequence[str], run: Path, config: Mapping[str, Any], tell: Callable[[str], object]) -> Sinks:
    """The sinks of that name for a run folder.

    Args:
        config: the recipe, shown beside the figures where a sink can.

    Raises:
        UsageError: for an unknown name.
        EngineError: where a package is missing, or a service cannot be reached.
    """
    require_packages(names)
    return Sinks({name: TensorBoard(run / FOLDER) if name == "tensorboard" else WeightsAndBiases(run, config) for name in names}, tell)


def require_packages(names: Sequence[str]) -> None:
    """Raise UsageError for an unknown sink, EngineError for one whose package is not installed."""
    for name in names:
        if name not in PACKAGES:
            raise UsageError(f"there is no sink named {name!r}", f"--log {' or --log '.join(PACKAGES)}")
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError:
            raise EngineError(f"--log {name} needs the package {name}, which is not installed", "pip install 'diffrc[logging]'") from None


class TensorBoard:
    """Event files, a folder a stage: `tensorboard --logdir RUN/tensorboard` shows the stages as runs beside each other."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make, self._folder = SummaryWriter, folder
        self._writers: dict[str, Any] = {}

    def write(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer(stage, step).add_scalar(name, value, step)

    def image(self, stage: str, step: int, png: bytes) -> None:
        self._writer(stage, step).add_image("samples", pixels(png), step, dataformats="HWC")

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _writer(self, stage: str, step: int) -> Any:
        """Of a stage; what an earlier process wrote of this step and later ones is trained again, and forgotten."""
        if stage not in self._writers:
            self._writers[stage] = self._make(str(self._folder / stage), purge_step=step)
        return self._writers[stage]


class WeightsAndBiases:
    """A run of that service with the run folder's name; `wandb.json` there tells which one, so that it goes on from any machine.

    WANDB_MODE=offline keeps it on the disk.
    """

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        note = run / "wandb.json"  # a name would not do: a folder made anew would go on with the curves of the one before
        if not note.exists():
            store.write_json(note, {"id": secrets.token_hex(8)})
        own = str(store.read_json(note)["id"])
        try:
            self._run = wandb.init(project=PROJECT, id=own, name=run.absolute().name, resume="allow", dir=str(run), config=dict(config))
        except Exception as failure:  # no account, no network: the package has an error class for each
            raise EngineError(f"wandb cannot start: {failure}", "wandb login, or WANDB_MODE=offline, or leave --log wandb out") from failure
        self._stages: set[str] = set()

    def write(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        self._log(stage, step, figures)

    def image(self, stage: str, step: int, png: bytes) -> None:
        self._log(stage, step, {"samples": self._wandb.Image(pixels(png))})

    def close(self) -> None:
        self._run.finish()

    def _log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        if stage not in self._stages:  # each stage counts its own steps, and has to say so
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/step", hidden=True)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in values.items()}})


def pixels(png: bytes) -> npt.NDArray[np.uint8]:
    """(H, W, 3) of a PNG."""
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))
