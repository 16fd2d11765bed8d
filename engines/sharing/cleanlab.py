"""What cleanlab's Datalab asks for: out-of-sample probabilities and features of every training image, real and synthetic.

Each recognizer is kept in `evaluation/judge/` of the run, so that the same command resumes, and more synthetic images cost no training.
"""

from __future__ import annotations

import io
import json
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engines.data.images import Indices
from engines.errors import UsageError
from engines.evaluation.cells import Cell, cell_digest, run_cells
from engines.evaluation.judge import JUDGE_METHOD, JUDGE_SEED, kept_recognizer, open_judge
from engines.evaluation.synthetic import all_pixels
from engines.progress import Report, silent
from engines.sharing.balanced import Balanced
from engines.store import Building
from engines.training.recognizer import TrainingImages, predict_probabilities, real_images

Floats = npt.NDArray[np.float32]

FOLDER = "cleanlab"
LOOKED_AT = 512  # images in memory at a time


class Opinions(NamedTuple):
    """What recognizers say of the training split, in its own order."""

    probabilities: Floats  # (N, K), rows add up to 1
    features: Floats  # (N, D)


def folds_of(labels: Indices, folds: int, seed: int = 0) -> Indices:
    """(N,) the fold of each image: classes are dealt out one after another, so that folds and their classes differ by one image at most.

    A class of fewer images than folds is missing in some folds, and one of a single image in the training of its own.
    """
    random = np.random.default_rng([seed, folds])
    order = np.concatenate([random.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)])
    found = np.empty(len(labels), dtype=np.int64)
    found[order] = np.arange(len(labels)) % folds
    return found


def ask(balanced: Balanced, folds: int, report: Report = silent) -> Opinions:
    """Cross-validate the run's judge, the recognizer of [recognizer] with balanced softmax; ask it of the synthetic images as well.

    Recognizer i of `folds` is trained on the real images outside fold i and judges those inside. Synthetic images are dealt out to the
    folds likewise, but trained on by none: each image is judged by one network, which has not seen it. The features are those of the
    judge itself, trained on all real images, since features of different networks cannot be compared.

    Args:
        folds: 2 at least.
        report: hears "recognizers" in hundredths of one, and "features" in images.

    Raises: UsageError for more folds than real images, Interrupted, NumericsError, DataError, StorageError.
    """
    train, longtail = balanced.train, balanced.longtail
    if not 2 <= folds <= len(longtail.train):
        raise UsageError(
            f"--folds {folds} cannot be: a fold holds a real image, and there are {len(longtail.train):,}", "--folds 5, say; at least 2"
        )
    section, classes = balanced.run.recipe.recognizer, len(balanced.names)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels, labels = all_pixels(longtail.train), longtail.train.labels
    fold = np.concatenate([folds_of(part, folds) for part in (train.labels[~train.synthetic], train.labels[train.synthetic])])
    evaluation = balanced.run.evaluation

    def outside(number: int) -> TrainingImages:
        rows = np.flatnonzero(fold[: len(labels)] != number)
        return real_images(pixels[rows], labels[rows])

    def cell(name: str, images: TrainingImages) -> Cell:
        def make(hear: Report) -> dict[str, Any]:
            return {"images": len(images), "recognizer": kept_recognizer(evaluation, images, classes, section, device, hear)[1]}

        digest = cell_digest(images, section, JUDGE_METHOD, JUDGE_SEED, np.zeros(0, np.uint8))
        return Cell(evaluation / "cells" / f"{name}.json", digest, make)

    cells = [cell(f"fold-{number}-of-{folds}", outside(number)) for number in range(folds)]
    cells.append(cell("all-folds", real_images(pixels, labels)))
    run_cells(cells, device, lambda _, done, total, figures: report("recognizers", done, total, figures))
    probabilities = np.zeros((len(train), classes), dtype=np.float32)
    for number in range(folds):
        model, _ = kept_recognizer(evaluation, outside(number), classes, section, device, report)
        rows = np.flatnonzero(fold == number)
        for part in _blocks(rows):
            probabilities[part] = predict_probabilities(model, balanced.pixels(train, part))
    judge = open_judge(balanced.run, longtail, report)
    features: list[Floats] = []
    for part in _blocks(np.arange(len(train), dtype=np.int64)):
        features.append(judge.look(balanced.pixels(train, part))[0].astype(np.float32))
        report("features", int(part[-1]) + 1, len(train), {})
    return Opinions(probabilities, np.concatenate(features))


def write(balanced: Balanced, order: Indices, opinions: Opinions, folds: int, building: Building) -> None:
    """`cleanlab/`: pred_probs.npy, features.npy, labels.npy, and ids.json, row by row in the order of the data set. No pickle in them."""
    train = balanced.train
    arrays: dict[str, npt.NDArray[Any]] = {
        "pred_probs": opinions.probabilities[order],
        "features": opinions.features[order],
        "labels": train.labels[order],
    }
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        building.write(f"{FOLDER}/{name}.npy", [buffer.getvalue()])
    document = {
        "ids": [train.id(int(row)) for row in order],
        "synthetic": train.synthetic[order].tolist(),
        "classes": list(balanced.names),
        "folds": folds,
        "recognizer": balanced.run.recipe.recognizer.architecture,
        "method": JUDGE_METHOD,
        "classes_of_one_real_image": np.flatnonzero(balanced.longtail.counts == 1).tolist(),  # their fold's recognizer did not know them
    }
    building.write(f"{FOLDER}/ids.json", [json.dumps(document, ensure_ascii=False).encode() + b"\n"])


def _blocks(rows: Indices) -> list[Indices]:
    return [rows[start : start + LOOKED_AT] for start in range(0, len(rows), LOOKED_AT)]
