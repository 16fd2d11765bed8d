"""Who judges generated images: a network that turns them into features and labels, by default the run's own recognizer.

The guide would be at hand too, but images were made along its gradient: what it says of them is no evidence. The recognizer has seen
the real training images alone, and has no part in the making. Features may come from an Inception file instead, which was trained on
other images altogether; the labels are the recognizer's even then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engines import store
from engines.data.decode import Pixels
from engines.data.longtail import LongTail
from engines.evaluation.cells import cell_digest, checkpoint_of
from engines.evaluation.synthetic import all_pixels
from engines.networks import inception
from engines.networks.resnet import ARCHITECTURES, Recognizer
from engines.progress import Report, silent
from engines.recipe import Method, RecognizerSection
from engines.store import RunFolder
from engines.training.recognizer import TrainingImages, features, predict, real_images, train_recognizer

JUDGE_METHOD: Method = "balanced_softmax"  # cross-entropy takes rare classes for common ones, and would count good images as misses
JUDGE_SEED = 0


@dataclass(frozen=True)
class Judge:
    """A network that looks at images; `digest` names it, so that what it said can be kept."""

    name: str  # of what the features come from
    digest: str
    look: Callable[[Pixels], tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]
    """(N, H, W, C) uint8 -> features (N, D) float64 before the last linear layer, and labels (N,) int64"""
    is_fid: bool = False  # whether a Frechet distance in these features is FID

    @property
    def distance(self) -> str:
        """What a Frechet distance in these features must be called."""
        return "FID" if self.is_fid else f"Frechet distance in the features of {self.name}"


def open_judge(run: RunFolder, longtail: LongTail, report: Report = silent, extractor: Path | None = None) -> Judge:
    """The run's recognizer of [recognizer], trained once on the real training images with balanced softmax, kept in `evaluation/judge/`.

    Args:
        report: hears "recognizer" where it must be trained; may raise to stop.
        extractor: a file of `diffrc import inception`, whose features count instead of the recognizer's.

    Raises NumericsError, StorageError, DataError for a damaged file.
    """
    section, classes = run.recipe.recognizer, len(longtail.names)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, card = inception.load(extractor, device) if extractor else (None, None)  # a wrong file is told before any work
    real = real_images(all_pixels(longtail.train), longtail.train.labels)
    model, digest = kept_recognizer(run.evaluation, real, classes, section, device, report)
    if network is None or card is None:
        name = f"{section.architecture}, {JUDGE_METHOD.replace('_', ' ')}"
        return Judge(name, digest, lambda pixels: (features(model, pixels).astype(np.float64), predict(model, pixels)))

    def look(pixels: Pixels) -> tuple[Any, Any]:
        return inception.features(network, pixels).astype(np.float64), predict(model, pixels)

    both = hashlib.sha256(f"{digest} {card.sha256}".encode()).hexdigest()
    return Judge(card.name, both, look, card.is_fid)


def kept_recognizer(
    folder: Path, real: TrainingImages, classes: int, section: RecognizerSection, device: torch.device, report: Report = silent
) -> tuple[Recognizer, str]:
    """The recognizer that judges, from `folder/judge/` or trained and put there, in evaluation mode; and its digest.

    Raises NumericsError, StorageError, DataError for a damaged file, and what `report` does.
    """
    digest = cell_digest(real, section, JUDGE_METHOD, JUDGE_SEED, np.zeros(0, np.uint8))
    path = folder / "judge" / f"{digest[:16]}.safetensors"
    if not path.exists():
        checkpoint = checkpoint_of(folder / "judge" / "judge.json", digest)
        model = train_recognizer(real, classes, section, JUDGE_METHOD, JUDGE_SEED, device, report, checkpoint)
        store.write_tensors(path, model.state_dict(), {"digest": digest})
        checkpoint.unlink(missing_ok=True)
        return model, digest
    model = ARCHITECTURES[section.architecture](real.pixels.shape[1], classes, None)
    model.load_state_dict(store.read_tensors(path))
    model.eval().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, digest
