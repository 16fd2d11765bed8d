"""What cleanlab's Datalab asks for: out-of-sample probabilities and features of every training image, real and synthetic.

Each recognizer is kept as a cell of the run (see `engines.evaluation.cells`), so that the same command resumes.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engines import store
from engines.data.images import Indices
from engines.errors import UsageError
from engines.evaluation.cells import Cell, cell_digest, run_cells
from engines.evaluation.judge import open_judge
from engines.evaluation.synthetic import all_pixels
from engines.progress import Report, silent
from engines.sharing.balanced import Balanced
from engines.store import Building
from engines.training.recognizer import predict_probabilities, real_images, train_recognizer

Floats = npt.NDArray[np.float32]

FOLDER = "cleanlab"
LOOKED_AT = 512  # images in memory at a time
_SEED = 0


class Opinions(NamedTuple):
    """What recognizers say of the training split, in its own order."""

    probabilities: Floats  # (N, K), rows add up to 1
    features: Floats  # (N, D)


def folds_of(labels: Indices, folds: int, seed: int = _SEED) -> Indices:
    """(N,) the fold of each image: classes are dealt out one after another, so that folds and their classes differ by one image at most.

    A class of fewer images than folds is missing in some folds, and one of a single image in the training of its own.
    """
    random = np.random.default_rng([seed, folds])
    order = np.concatenate([random.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)])
    found = np.empty(len(labels), dtype=np.int64)
    found[order] = np.arange(len(labels)) % folds
    return found


def ask(balanced: Balanced, folds: int, report: Report = silent) -> Opinions:
    """Cross-validate the recognizer of [recognizer], balanced softmax, over the real images; ask it of the synthetic ones as well.

    Recognizer i of `folds` is trained on the real images outside fold i and judges those inside. Synthetic images are dealt out to the
    folds likewise, but trained on by none: each image is judged by one network, which has not seen it. The features are those of the
    run's judge, trained on all real images, since features of different networks cannot be compared.

    Args:
        folds: 2 at least.
        report: hears "folds" in hundredths of a recognizer, "recognizer" where the judge must be trained, and "features".

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
    asked_of = np.frombuffer(json.dumps([balanced.plan["plan"], *(k.tolist() for k in balanced.kept)]).encode(), np.uint8)
    folder = balanced.run.evaluation / "cells"

    def cell(number: int) -> tuple[Cell, Path]:
        inside = fold[: len(labels)] == number
        images = real_images(pixels[~inside], labels[~inside])
        asked = np.concatenate([asked_of, pixels[inside].ravel()])
        digest = cell_digest(images, section, "balanced_softmax", _SEED, asked)
        name = f"fold-{number}-of-{folds}"
        said = folder / f"{name}-{digest[:16]}.safetensors"  # named by what it depends on, since two files are not committed as one

        def make(hear: Report) -> dict[str, Any]:
            model = train_recognizer(images, classes, section, "balanced_softmax", _SEED, device, hear)
            rows = np.flatnonzero(fold == number)
            parts = [predict_probabilities(model, balanced.pixels(train, part)) for part in _blocks(rows)]
            store.write_tensors(said, {"probabilities": torch.from_numpy(np.concatenate(parts))}, {"digest": digest})
            return {"file": said.name, "images": len(rows)}

        return Cell(folder / f"{name}.json", digest, make), said

    cells, files = zip(*(cell(number) for number in range(folds)), strict=True)
    run_cells(cells, device, lambda _, done, total, figures: report("folds", done, total, figures))
    probabilities = np.zeros((len(train), classes), dtype=np.float32)
    for number, file in enumerate(files):
        probabilities[fold == number] = store.read_tensors(file)["probabilities"].numpy()
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
        "method": "balanced_softmax",
        "classes_of_one_real_image": np.flatnonzero(balanced.longtail.counts == 1).tolist(),  # their fold's recognizer did not know them
    }
    building.write(f"{FOLDER}/ids.json", [json.dumps(document, ensure_ascii=False).encode() + b"\n"])


def _blocks(rows: Indices) -> list[Indices]:
    return [rows[start : start + LOOKED_AT] for start in range(0, len(rows), LOOKED_AT)]
