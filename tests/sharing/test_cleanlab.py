"""What cleanlab asks for: probabilities of networks that had not seen the image, row by row in the order of the data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import store
from engines.data.longtail import prepare
from engines.errors import UsageError
from engines.evaluation import judge
from engines.sharing import cleanlab
from engines.sharing.balanced import open_balanced
from engines.training import recognizer


def test_folds_differ_by_one_image_at_most_and_so_does_each_class_in_them() -> None:
    labels = np.repeat([0, 1, 2, 3], [23, 7, 5, 1])
    fold = cleanlab.folds_of(labels, 5)
    assert np.ptp(np.bincount(fold, minlength=5)) <= 1
    for label in range(4):
        assert np.ptp(np.bincount(fold[labels == label], minlength=5)) <= 1
    assert np.array_equal(fold, cleanlab.folds_of(labels, 5))


def test_each_image_is_judged_once_by_a_network_that_was_not_trained_on_it(made_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = store.open_run(made_copy)
    balanced = open_balanced(run, prepare(run.recipe.data, None))
    trained: dict[int, set[bytes]] = {}
    models: list[object] = []
    judged: list[bytes] = []

    def keep(folder: Path, images: recognizer.TrainingImages, *rest: Any) -> tuple[recognizer.Recognizer, str]:
        model, digest = judge.kept_recognizer(folder, images, *rest)
        trained[id(model)] = {image.tobytes() for image in images.pixels.permute(0, 2, 3, 1).contiguous().numpy()}
        models.append(model)  # no other object has its id
        return model, digest

    def predict(model: recognizer.Recognizer, pixels: np.ndarray) -> np.ndarray:
        seen = {image.tobytes() for image in pixels}
        judged.extend(image.tobytes() for image in pixels)
        assert not seen & trained[id(model)]
        return recognizer.predict_probabilities(model, pixels)

    monkeypatch.setattr(cleanlab, "kept_recognizer", keep)
    monkeypatch.setattr(cleanlab, "predict_probabilities", predict)
    said = cleanlab.ask(balanced, 2)
    rows = np.arange(len(balanced.train))
    assert sorted(judged) == sorted(image.tobytes() for image in balanced.pixels(balanced.train, rows))
    assert said.probabilities.shape == (len(rows), 10)
    assert np.allclose(said.probabilities.sum(1), 1, atol=1e-5)
    assert len(said.features) == len(rows)

    monkeypatch.setattr(judge, "train_recognizer", None)  # the same question again is answered by what was kept
    again = cleanlab.ask(balanced, 2)
    assert np.array_equal(said.probabilities, again.probabilities)

    order = balanced.train.shuffled(3)
    with store.building(made_copy.parent / "out", 0) as building:
        cleanlab.write(balanced, order, said, 2, building)
    folder = made_copy.parent / "out" / "cleanlab"
    told = json.loads((folder / "ids.json").read_text(encoding="utf-8"))
    assert told["ids"] == [sample.id for sample in balanced.samples(balanced.train, order)]
    assert told["classes"] == list(balanced.names)
    assert np.array_equal(np.load(folder / "pred_probs.npy", allow_pickle=False), said.probabilities[order])
    assert np.array_equal(np.load(folder / "features.npy", allow_pickle=False), said.features[order])
    assert np.array_equal(np.load(folder / "labels.npy", allow_pickle=False), balanced.train.labels[order])


def test_more_folds_than_images_are_refused(made_copy: Path) -> None:
    run = store.open_run(made_copy)
    balanced = open_balanced(run, prepare(run.recipe.data, None))
    with pytest.raises(UsageError, match="there are 102"):
        cleanlab.ask(balanced, 103)
