"""The recognizers of a study: every arm with every method and seed, tested on the same images, compared pair by pair."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engines.data.images import ImageSet
from engines.data.longtail import GROUPS, LongTail
from engines.errors import DataError
from engines.evaluation.accuracy import COLUMNS, class_accuracy, group_accuracy, paired_difference, summarize
from engines.evaluation.cells import Cell, cell_digest, checkpoint_of, run_cells
from engines.evaluation.synthetic import ExtraImages, all_pixels, refuse_test_images, replay
from engines.progress import Report
from engines.recipe import Method
from engines.study.plan import Arm, Study
from engines.synthesis.plan import fill_counts
from engines.training.recognizer import TrainingImages, predict, real_images, train_recognizer

Labels = npt.NDArray[np.int64]
ImagesOf = Callable[[Arm, int], ExtraImages]
"""The synthetic images of an arm and a seed."""


@dataclass(frozen=True)
class Key:
    """One recognizer of the grid."""

    arm: str
    method: Method
    seed: int


def images_tested(study: Study, data: LongTail) -> ImageSet:
    """What the recognizers are tested on. Raises DataError where the long tail leaves nothing out to choose on."""
    if study.split == "test":
        return data.test
    if data.left_out is None:
        raise DataError("no training image is left out of this long tail, so there is none to choose settings on", 'split = "test"')
    return data.left_out


def train_grid(
    study: Study,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    data: Mapping[str, LongTail],
    images_of: ImagesOf,
    cells: Path,
    device: torch.device,
    report: Report,
) -> dict[Key, Labels]:
    """What each recognizer predicts for the tested images, (N,) labels by key; those that are kept in `cells` are read from there.

    Args:
        data: by arm.
        images_of: asked for arms with synthetic images alone.

    Raises: DataError for synthetic images that are tested ones; Interrupted, NumericsError, StorageError as `run_cells`.
    """

    @functools.lru_cache(maxsize=2 * len(arms))
    def images(name: str, seed: int) -> TrainingImages:
        arm = by_name[name]
        train = data[name].train
        real = real_images(all_pixels(train), train.labels)
        if arm.images == "real":
            return real
        weight = arm.recipe.recognizer.synthetic_weight
        if arm.images == "synthetic":
            extra = images_of(arm, seed)
            refuse_test_images(extra, images_tested(study, data[name]))
            return real.add(extra.pixels, extra.labels, weight)
        extra = replay(train, filled(arm, data[name]), seed)
        duplicates = arm.images == "replay"
        return real.add(extra.pixels, extra.labels, 1.0 if duplicates else weight, is_extra=not duplicates)

    def cell(key: Key) -> Cell:
        section = by_name[key.arm].recipe.recognizer
        tested = all_pixels(images_tested(study, data[key.arm]))
        classes = len(data[key.arm].names)
        digest = cell_digest(images(key.arm, key.seed), section, key.method, key.seed, tested)
        path = cells / f"{digest[:24]}.json"

        def train(hear: Report) -> dict[str, Any]:
            checkpoint = checkpoint_of(path, digest)
            model = train_recognizer(images(key.arm, key.seed), classes, section, key.method, key.seed, device, hear, checkpoint)
            return {"arm": key.arm, "method": key.method, "seed": key.seed, "predicted": predict(model, tested).tolist()}

        return Cell(path, digest, train)

    by_name = {arm.name: arm for arm in arms}
    keys = [Key(arm.name, method, seed) for seed in seeds for arm in arms for method in methods_of(study, arm)]
    results = run_cells([cell(key) for key in keys], device, report)
    return {key: np.array(result["predicted"], dtype=np.int64) for key, result in zip(keys, results, strict=True)}


def methods_of(study: Study, arm: Arm) -> tuple[Method, ...]:
    """The ways of training a recognizer that a study compares, or else those of its recipe."""
    return study.methods or arm.recipe.recognizer.methods


def filled(arm: Arm, data: LongTail) -> Labels:
    """(K,) images that a fill adds to each class of an arm."""
    return fill_counts(arm.recipe, data.counts, data.groups)


def rows_of(
    study: Study, arms: Sequence[Arm], data: Mapping[str, LongTail], predicted: Mapping[Key, Labels]
) -> dict[str, list[dict[str, Any]]]:
    """By arm a row a method, as plain JSON values: figures by column with their spread, and paired differences to `study.against`.

    Arms are compared on the seeds that both have, on the rarest group that is tested, and only on the same tested images.
    """

    def row(arm: Arm, method: Method) -> dict[str, Any]:
        labels, groups = images_tested(study, data[arm.name]).labels, data[arm.name].groups
        found = {key.seed: p for key, p in predicted.items() if (key.arm, key.method) == (arm.name, method)}
        by_seed = [group_accuracy(class_accuracy(p, labels, len(groups)), groups) for p in found.values()]
        figures = {c: asdict(summarize([f[c] for f in by_seed])) for c in COLUMNS if by_seed and c in by_seed[0]}
        return {
            "method": method,
            "figures": figures,
            "against": {name: d for name in study.against if (d := difference(arm, method, name))},
        }

    def difference(arm: Arm, method: Method, name: str) -> dict[str, Any] | None:
        seeds = [k.seed for k in predicted if (k.arm, k.method) == (arm.name, method) and Key(name, method, k.seed) in predicted]
        same = name in by_name and data[name].kept_sha256 == data[arm.name].kept_sha256
        if name == arm.name or not seeds or not same:
            return None
        labels, groups = images_tested(study, data[arm.name]).labels, data[arm.name]
        of_column = np.isin(labels, groups.classes_of(column_of(study, groups)))
        ours, theirs = (np.stack([predicted[Key(a, method, s)] == labels for s in seeds])[:, of_column] for a in (arm.name, name))
        interval = paired_difference(ours, theirs, labels[of_column])
        return {**asdict(interval), "outcome": interval.outcome, "seeds": len(seeds)}

    by_name = {arm.name: arm for arm in arms}
    return {arm.name: [row(arm, method) for method in methods_of(study, arm)] for arm in arms}


def column_of(study: Study, data: LongTail) -> str:
    """The rarest group that is tested: what the comparisons are about."""
    tested = {data.groups[label] for label in np.unique(images_tested(study, data).labels)}
    return next(group for group in reversed(GROUPS) if group in tested)
