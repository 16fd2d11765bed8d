"""Can these images be trusted? Their likeness to real images that nobody trained on, in numbers, and whether one sees that they were made.

The reference is the test set's images of the classes that were made: of the training set a rare class has five, and images near those
may be copies. Nothing is chosen by these numbers, so the test set stays what it was. Where the test set lacks a class the training
set's images stand in for all. Every class counts alike, on either side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from engines import store
from engines.data.images import ImageSet
from engines.data.longtail import LongTail
from engines.evaluation.coverage import COVERAGE_NEIGHBORS, PRECISION_NEIGHBORS, support
from engines.evaluation.fidelity import (
    RESAMPLES,
    SPLITS,
    bootstrap,
    class_distances,
    class_weights,
    fit,
    floor_distance,
    frechet_distance,
    hit_rate,
    intra_class_diversity,
)
from engines.evaluation.judge import Judge, open_judge
from engines.evaluation.kernel_distance import NORMAL_95, kernel_distance
from engines.evaluation.shortcut import Shortcut, real_or_generated
from engines.evaluation.synthetic import ExtraImages
from engines.progress import Report, silent
from engines.store import RunFolder
from engines.synthesis.copies import COPIES_FILE
from engines.synthesis.sheet import read_images

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

FILE = "trust.json"
MOST_IMAGES = 10_000  # of either side, as many of each class: beyond, the numbers change by less than their intervals
WIDE = 256  # dimensions from which a Frechet distance takes seconds; then fewer are drawn again
WIDE_RESAMPLES, WIDE_SPLITS = 20, 5


@dataclass(frozen=True)
class Spread:
    """A figure and its 95 % interval over other images of as many."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Frechet(Spread):
    """A Frechet distance beside what as many unseen real images would score, with that one's standard deviation over splits."""

    floor: float
    floor_spread: float


@dataclass(frozen=True)
class ClassTrust:
    """The figures of one class; None where it has too few images of either kind."""

    class_id: int
    name: str
    images: int
    hit_rate: float  # percent
    diversity: float | None  # 1 = that of real images
    coverage: float | None  # share of its real images, 0..1
    copies: int | None  # of training images, by pixels; None where that was not looked at


@dataclass(frozen=True)
class Trust:
    """What `trust.json` holds. A measure is None where there are too few images for it."""

    judge: Judge
    images: int  # that were judged
    reference: int  # real images that they were compared with
    reference_set: Literal["test", "train"]
    classes: int  # that were compared: at least two images of either kind
    frechet: Frechet | None
    kid: Spread | None
    precision: float | None  # shares 0..1; `density` may exceed 1
    recall: float | None
    density: float | None
    coverage: float | None
    diversity: float | None  # 1 = that of the reference
    hit_rate: float  # percent
    hit_rate_real: float | None  # of the reference
    real_or_synthetic: Spread | None  # percent, how often a linear classifier of the features tells which; 50 = not visible
    per_class: tuple[ClassTrust, ...]

    @property
    def distance(self) -> str:
        """What `frechet` must be called."""
        return self.judge.distance

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the neighbors that the shares were taken with beside them."""
        extractor = {"name": self.judge.name, "digest": self.judge.digest, "is_fid": self.judge.is_fid}
        figures = {name: _plain(value) for name, value in vars(self).items() if name != "judge"}
        neighbors = {"precision": PRECISION_NEIGHBORS, "recall": PRECISION_NEIGHBORS, "density": COVERAGE_NEIGHBORS}
        return {"extractor": extractor, **figures, "neighbors": {**neighbors, "coverage": COVERAGE_NEIGHBORS}}


def trust_run(run: RunFolder, longtail: LongTail, report: Report = silent, extractor: Path | None = None) -> Trust:
    """Judge the images in a run's `synth` folder, and keep what is found in `evaluation/trust.json`.

    Args:
        longtail: the data set that the run was trained on.
        report: hears "recognizer" where the judge must be trained.
        extractor: see `open_judge`.

    Raises: DataError, NumericsError, StorageError as `open_judge` and `read_images`.
    """
    return trust_images(run, longtail, ExtraImages(*read_images(run.synth)), open_judge(run, longtail, report, extractor))


def trust_images(run: RunFolder, longtail: LongTail, synthetic: ExtraImages, judge: Judge) -> Trust:
    """`trust_run` of images that are read already, with a judge that is open."""
    copies = run.synth / COPIES_FILE
    found = judge_images(judge, longtail, synthetic, store.read_json(copies) if copies.exists() else {})
    store.write_json(run.evaluation / FILE, found.to_json())
    return found


def judge_images(judge: Judge, longtail: LongTail, synthetic: ExtraImages, copies: Mapping[str, Any] | None = None) -> Trust:
    """All figures of at least one synthetic image.

    Args:
        copies: `synth/copies.json`, whose counts are taken over.
    """
    chosen = _evenly(synthetic.labels, MOST_IMAGES)
    labels = synthetic.labels[chosen]
    features, predicted = judge.look(synthetic.pixels[chosen])
    made = np.unique(labels)
    tested = np.bincount(longtail.test.labels, minlength=len(longtail.names))
    reference_set: Literal["test", "train"] = "test" if (tested[made] >= 2).all() else "train"
    images, real_labels = _reference(longtail.test if reference_set == "test" else longtail.train, made)
    real, real_predicted = judge.look(images)

    together = np.intersect1d(_of_two(labels), _of_two(real_labels))
    generated, compared = np.isin(labels, together), np.isin(real_labels, together)
    figures: dict[str, Any] = dict.fromkeys(("frechet", "kid", "precision", "recall", "density", "coverage", "diversity"))
    per_class: dict[str, dict[int, float]] = {"diversity": {}, "coverage": {}}
    if len(together):
        sides = features[generated], real[compared], labels[generated], real_labels[compared]
        figures["frechet"] = _frechet(*sides)
        kid = kernel_distance(*sides)
        figures["kid"] = Spread(kid.value, kid.low, kid.high)
        varied, usual = class_distances(sides[0], sides[2]), class_distances(sides[1], sides[3])
        several = {k: distance for k, distance in varied.items() if usual[k] > 0}
        figures["diversity"] = intra_class_diversity(several, usual) if several else None
        per_class["diversity"] = {k: distance / usual[k] for k, distance in several.items()}
        if len(sides[0]) > PRECISION_NEIGHBORS and len(sides[1]) > COVERAGE_NEIGHBORS:
            shares, per_class["coverage"] = _shares(*sides)
            figures |= shares
    told = real_or_generated(real, features, real_labels, labels) if reference_set == "test" else None  # those the extractor learned
    return Trust(
        judge=judge,
        images=len(labels),
        reference=len(real_labels),
        reference_set=reference_set,
        classes=len(together),
        **figures,
        hit_rate=hit_rate(predicted, labels),
        hit_rate_real=hit_rate(real_predicted, real_labels) if len(real_labels) else None,
        real_or_synthetic=_percent(told) if told else None,
        per_class=tuple(
            ClassTrust(
                class_id=int(k),
                name=longtail.names[k],
                images=int((synthetic.labels == k).sum()),
                hit_rate=hit_rate(predicted[labels == k], labels[labels == k]),
                diversity=per_class["diversity"].get(int(k)),
                coverage=per_class["coverage"].get(int(k)),
                copies=_copies(copies or {}, longtail.names[k]),
            )
            for k in made
        ),
    )


def _frechet(generated: Floats, real: Floats, labels: Labels, real_labels: Labels) -> Frechet:
    weights, wide = class_weights(labels), generated.shape[1] > WIDE
    reference = fit(real, class_weights(real_labels))

    def distance(chosen: Labels) -> list[float]:
        return [frechet_distance(fit(generated[chosen], weights[chosen]), reference)]

    (value,) = distance(np.arange(len(labels)))
    drawn = bootstrap(distance, labels, WIDE_RESAMPLES if wide else RESAMPLES)  # (R, 1): the same number of each class, the same weights
    as_many = round(weights.sum() ** 2 / np.square(weights).sum())  # images that count alike and are worth these
    floor = floor_distance(real, real_labels, as_many, splits=WIDE_SPLITS if wide else SPLITS)
    around = _around(value, float(drawn.std(ddof=1)))
    return Frechet(value, max(around.low, 0.0), around.high, *floor)


def _shares(generated: Floats, real: Floats, labels: Labels, real_labels: Labels) -> tuple[dict[str, float], dict[int, float]]:
    """Precision, recall, density, coverage, the mean over the classes; and the coverage of each class."""
    found = support(generated, real)
    weights, real_weights = (w / w.sum() for w in (class_weights(labels), class_weights(real_labels)))
    shares = {"precision": weights @ found.precise, "recall": real_weights @ found.recalled}
    shares |= {"density": weights @ found.dense, "coverage": real_weights @ found.covered}
    shares = {name: float(share) for name, share in shares.items()}
    return shares, {int(k): float(found.covered[real_labels == k].mean()) for k in np.unique(real_labels)}


def _reference(images: ImageSet, classes: Labels) -> tuple[npt.NDArray[np.uint8], Labels]:
    """Pixels and labels of the images of these classes, at most MOST_IMAGES."""
    members = np.flatnonzero(np.isin(images.labels, classes))
    members = members[_evenly(images.labels[members], MOST_IMAGES)]
    return images.pixels(members), images.labels[members]


def _evenly(labels: Labels, most: int) -> Labels:
    """Places of at most so many images, in order: of each class the same number where it has them, drawn at random."""
    if len(labels) <= most:
        return np.arange(len(labels))
    random, classes = np.random.default_rng(0), np.unique(labels)
    each = max(2, most // len(classes))
    return np.sort(np.concatenate([random.permutation(np.flatnonzero(labels == k))[:each] for k in classes]))


def _of_two(labels: Labels) -> Labels:
    """Classes of at least two images."""
    classes, counts = np.unique(labels, return_counts=True)
    return np.asarray(classes[counts >= 2])


def _around(value: float, error: float) -> Spread:
    return Spread(value, value - NORMAL_95 * error, value + NORMAL_95 * error)


def _percent(told: Shortcut) -> Spread:
    around = _around(told.accuracy, told.error)
    return Spread(told.accuracy, max(around.low, 0.0), min(around.high, 100.0))


def _copies(found: Mapping[str, Any], name: str) -> int | None:
    """Copies of a class by pixels, of `synth/copies.json`."""
    classes: Sequence[Mapping[str, Any]] = found.get("classes", ())
    return next((int(c["pixel"]["copies"]) for c in classes if c["class"] == name), None)


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        return asdict(value)
    return [asdict(entry) for entry in value] if isinstance(value, tuple) else value
