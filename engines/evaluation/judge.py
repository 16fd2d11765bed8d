"""Who judges generated images: a network that turns them into features and labels, by default the run's own recognizer.

The guide would be at hand too, but images were made along its gradient: what it says of them is no evidence. The recognizer has seen
the real training images alone, and has no part in the making.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engines import store
from engines.data.decode import Pixels
from engines.data.longtail import LongTail
from engines.evaluation.cells import cell_digest
from engines.evaluation.synthetic import all_pixels
from engines.networks.resnet import ARCHITECTURES
from engines.progress import Report, silent
from engines.store import RunFolder
from engines.training.recognizer import Loss, features, predict, real_images, train_recognizer

_LOSS: Loss = "balanced_softmax"  # cross-entropy takes rare classes for common ones, and would count good images of them as misses
_SEED = 0


@dataclass(frozen=True)
class Judge:
    """A network that looks at images; `digest` names it, so that what it said can be kept."""

    name: str
    digest: str
    look: Callable[[Pixels], tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]
    """(N, H, W, C) uint8 -> features (N, D) float64 before the last linear layer, and labels (N,) int64"""


def open_judge(run: RunFolder, longtail: LongTail, report: Report = silent) -> Judge:
    """The run's recognizer of [recognizer], trained once on the real training images with balanced softmax, kept in `evaluation/judge/`.

    Args:
        report: hears "recognizer" where it must be trained; may raise to stop.

    Raises NumericsError, StorageError, DataError for a damaged file.
    """
    section, classes = run.recipe.recognizer, len(longtail.names)
    real = real_images(all_pixels(longtail.train), longtail.train.labels)
    digest = cell_digest(real, section, _LOSS, _SEED, np.zeros(0, np.uint8))
    path = run.evaluation / "judge" / f"{digest[:16]}.safetensors"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if path.exists():
        model = ARCHITECTURES[section.architecture](real.pixels.shape[1], classes, None)
        model.load_state_dict(store.read_tensors(path))
        model.eval().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    else:
        model = train_recognizer(real, classes, section, _LOSS, _SEED, device, report)
        store.write_tensors(path, model.state_dict(), {"digest": digest})

    def look(pixels: Pixels) -> tuple[Any, Any]:
        return features(model, pixels).astype(np.float64), predict(model, pixels)

    return Judge(f"{section.architecture}, {_LOSS.replace('_', ' ')}", digest, look)
