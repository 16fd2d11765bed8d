"""Does it help? Accuracy by group over seeds, calibration, paired intervals, an oracle's purity, and the grid of controls.

Every trained recognizer is kept as one cell (see `cells`), so that the same command resumes. METHOD section 5.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engines import store
from engines.data.longtail import LongTail
from engines.errors import UsageError
from engines.evaluation.cells import CELL_VERSION, Cell, cell_digest, checkpoint_of, run_cells
from engines.evaluation.judge import JUDGE_METHOD, JUDGE_SEED, kept_recognizer, open_judge
from engines.evaluation.synthetic import ExtraImages, all_pixels, pixel_hashes, refuse_data_folder, refuse_test_images, replay
from engines.evaluation.trust import Trust, trust_images
from engines.networks import inception
from engines.progress import Report, silent
from engines.recipe import METHOD_TITLES, Method, RecognizerSection
from engines.store import RunFolder
from engines.synthesis.plan import require_current
from engines.synthesis.sheet import read_images
from engines.training.calibration import class_weights, reliability
from engines.training.recognizer import TrainingImages, predict, predict_probabilities, real_images, train_recognizer

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

GROUPS = ("many", "medium", "few")
COLUMNS = (*GROUPS, "all", "std")
Variant = Literal["real", "replay", "replay_as_synthetic", "synthetic"]
VARIANTS: tuple[Variant, ...] = ("real", "replay", "replay_as_synthetic", "synthetic")
TITLES: dict[str, str] = {
    "real": "real",
    "replay": "real + replay",
    "replay_as_synthetic": "real + replay, same weight",
    "synthetic": "real + synthetic",
    **dict(METHOD_TITLES.items()),  # by any name, as the others
}
RESAMPLES = 2000
CONFIDENCE_DIGITS = 4  # of a kept probability: it moves a calibration error by 0.005 points at most, but for images on the edge of a bin

# -------------------------------------------------------------------------------------------------------------- figures


def class_accuracy(predicted: Labels, labels: Labels, classes: int) -> Floats:
    """Top-1 of each class in percent: (N,), (N,) -> (K,); NaN for a class without test images."""
    right = np.bincount(labels[predicted == labels], minlength=classes)
    total = np.bincount(labels, minlength=classes)
    with np.errstate(invalid="ignore"):
        return np.asarray(100.0 * right / total)


def group_accuracy(per_class: Floats, groups: Sequence[str]) -> dict[str, float]:
    """Many, medium, few, all and std in percent, from the accuracy of each class (K,) and its group (K).

    A group's figure is the mean over its classes, which on a balanced test set is the share of right images; `all` is the
    mean over all classes. `std`, the imbalancedness, is the *population* standard deviation of the group figures: that
    is what the paper's tables print (66.5 / 39.0 / 8.6 gives 23.6). Groups without tested classes are left out.
    """
    member = np.array(groups)
    tested = ~np.isnan(per_class)
    figures = {g: float(per_class[(member == g) & tested].mean()) for g in GROUPS if ((member == g) & tested).any()}
    return figures | {"all": float(per_class[tested].mean()), "std": float(np.std(list(figures.values())))}


def calibration_error(predicted: Labels, confidence: Floats, labels: Labels) -> float:
    """Expected calibration error in points: by how much confidence misses accuracy, over 15 bins of equal width (Guo et al. 2017).

    Classes count alike, as in the accuracy beside it, which on a balanced test set is the plain error.

    Args:
        predicted: (N,) the likeliest classes.  confidence: (N,) their probabilities.  labels: (N,) the true ones.
    """
    return 100.0 * reliability(confidence, (predicted == labels).astype(np.float64), class_weights(labels)).ece


@dataclass(frozen=True)
class Summary:
    """A figure over seeds: mean, sample standard deviation (0 for one seed), number of seeds."""

    mean: float
    spread: float
    n: int


def summarize(values: Sequence[float]) -> Summary:
    """Mean and sample standard deviation of at least one value."""
    return Summary(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0, len(values))


@dataclass(frozen=True)
class Interval:
    """A difference in percentage points and its bootstrap 95 % interval."""

    difference: float
    low: float
    high: float

    @property
    def outcome(self) -> Literal["helps", "ties", "hurts"]:
        """Whether the interval leaves 0 out, and on which side."""
        return "helps" if self.low > 0 else "hurts" if self.high < 0 else "ties"


def paired_difference(a: npt.NDArray[Any], b: npt.NDArray[Any], labels: Labels, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Accuracy of `a` minus that of `b`, in points, with a 95 % interval over seeds and test images.

    Both were trained with the same seeds and tested on the same images, so the differences are taken pair by pair. The
    bootstrap draws seeds and, within each class, test images with replacement, independently of each other (percentiles
    2.5 and 97.5). With three seeds the seeds' share of the interval is a guess; more seeds make it an estimate.

    Args:
        a, b: (S, N) 1 where seed s is right on test image n, else 0.
        labels: (N,) classes of the test images that count; the difference is the mean over these classes.
    """
    random = np.random.default_rng(seed)
    difference = a.astype(np.float64) - b
    seeds = len(difference)
    seed_weights = random.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds  # (R, S)
    present = np.unique(labels)
    resampled = np.zeros(resamples)
    for label in present:
        of_class = difference[:, labels == label]  # (S, n)
        n = of_class.shape[1]
        image_weights = random.multinomial(n, np.full(n, 1 / n), resamples) / n  # (R, n)
        resampled += ((seed_weights @ of_class) * image_weights).sum(1) / len(present)
    observed = np.mean([difference[:, labels == label].mean() for label in present])
    # Rounded, since sums of the weights miss a 0 by some 1e-16, and an end at 0 does not leave 0 out.
    low, high = (round(100.0 * float(end), 9) for end in np.percentile(resampled, [2.5, 97.5]))
    return Interval(100.0 * float(observed), low, high)


def class_differences(
    a: npt.NDArray[Any], b: npt.NDArray[Any], labels: Labels, classes: int, resamples: int = RESAMPLES
) -> tuple[Interval | None, ...]:
    """`paired_difference` of each class: (S, N), (S, N), (N,) -> (K,); None for a class without test images.

    One class has few test images: of K classes that nothing has changed K / 20 lie outside their interval by chance.
    """
    members = [labels == k for k in range(classes)]
    return tuple(paired_difference(a[:, m], b[:, m], labels[m], resamples) if m.any() else None for m in members)


# ---------------------------------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Row:
    """One way of training: its figures and the mean accuracy of each class."""

    variant: Variant
    method: Method
    figures: dict[str, Summary]  # by `COLUMNS`, empty groups left out, in percent; and "ece", the calibration error in points
    per_class: tuple[float | None, ...]  # (K,) percent; None where the test set has no image


@dataclass(frozen=True)
class Comparison:
    """One way of training against another on the rarest group, seed by seed and image by image."""

    method: Method
    variant: Variant
    against: Variant
    interval: Interval
    per_class: tuple[Interval | None, ...] = ()  # (K,) None where the test set has no image; empty but against "real"


@dataclass(frozen=True)
class Purity:
    """What an oracle, trained on the whole training split, says of the synthetic images. It reports and never chooses."""

    overall: float  # percent of the synthetic images that it assigns to the class they were made for
    per_class: tuple[float | None, ...]  # (K,); None where nothing was made
    oracle_accuracy: float  # percent, on the test set: how far to trust it
    oracle_images: int


@dataclass(frozen=True)
class Table:
    """The answer, ready for JSON, the terminal and the report."""

    names: tuple[str, ...]
    groups: tuple[str, ...]
    counts: tuple[int, ...]
    synthetic_counts: tuple[int, ...]
    test_images: int
    test_images_in_train: int  # pixel by pixel; duplicates that the data set itself holds
    seeds: int
    column: str  # the rarest group that is there: what the comparisons are about
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    purity: Purity | None

    @property
    def methods(self) -> tuple[Method, ...]:
        """The ways of training that were compared, in their order."""
        return tuple(dict.fromkeys(row.method for row in self.rows))

    def row(self, variant: Variant, method: Method) -> Row:
        return next(row for row in self.rows if (row.variant, row.method) == (variant, method))

    def comparison(self, against: Variant, method: Method) -> Comparison:
        """Real + synthetic against a control."""
        return next(c for c in self.comparisons if (c.against, c.method) == (against, method))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with the outcomes and the verdict spelled out."""
        table: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        for entry, comparison in zip(table["comparisons"], self.comparisons, strict=True):
            entry["outcome"] = comparison.interval.outcome
        return {"version": CELL_VERSION, "verdict": verdict(self), **table}


def verdict(table: Table) -> str:
    """One sentence: does it help against the stronger control, and what is left of it beside the strongest other method?

    The first half is about cross-entropy, or where it was not trained about the first method; the second about that method, of the
    others, which is best on real images alone, and missing where there is no other.
    """
    first: Method = "cross_entropy" if "cross_entropy" in table.methods else table.methods[0]
    controls: list[Variant] = ["real", "replay"]
    stronger = max(controls, key=lambda variant: table.row(variant, first).figures[table.column].mean)
    words = {"helps": "Synthesis helps", "ties": "A tie within the uncertainty", "hurts": "Synthesis hurts"}
    plain = table.comparison(stronger, first).interval
    against = "replay" if stronger == "replay" else f"plain {_title(first)}" if first == "cross_entropy" else f"{_title(first)} alone"
    seeds = "1 seed" if table.seeds == 1 else f"{table.seeds} seeds"
    sentence = (
        f"{words[plain.outcome]}: on the {table.column} classes real + synthetic is {_points(plain)} against {against}, "
        f"the stronger control of {_title(first)}"
    )
    if others := [method for method in table.methods if method != first]:
        second = max(others, key=lambda method: table.row("real", method).figures[table.column].mean)
        beside = table.comparison("real", second).interval
        sentence += f", and with {_title(second)} it {beside.outcome}, {_points(beside)} against {_title(second)} alone"
    return f"{sentence} ({seeds}, 95 % intervals)."


def _title(method: Method) -> str:
    return TITLES.get(method, method.replace("_", " "))


def _points(interval: Interval) -> str:
    return f"{interval.difference:+.1f} points [{interval.low:+.1f}, {interval.high:+.1f}]".replace("-", "\N{MINUS SIGN}")


# ----------------------------------------------------------------------------------------------------------------- grid


def evaluate(longtail: LongTail, synthetic: ExtraImages, section: RecognizerSection, folder: Path, report: Report = silent) -> Table:
    """Train and test {real, real + replay, real + synthetic} x the section's methods x seeds.

    `replay` duplicates real images of a class as often as there are synthetic ones, at weight 1, as oversampling does;
    `replay_as_synthetic` puts the same duplicates exactly where the synthetic images would be (loss weight, no prior, last
    phase on real images), so that only the images differ. Each recognizer runs on one thread, as many at a time as there
    are processors: small networks gain little from threads, and the figures do not depend on how many there are.

    Args:
        longtail: train and test; the pool goes to the oracle alone.
        synthetic: at least one image, none of them in the test set.
        folder: cells are kept in `folder/cells`; a cell is trained anew when anything it depends on has changed. The recognizer
            that judges images (see `judge`) is one of them, and is kept in `folder/judge`.
        report: hears "evaluate" in hundredths of a recognizer.

    Raises: DataError for synthetic images that are test images, Interrupted by a signal, NumericsError, StorageError.
    """
    assert len(synthetic), "nothing was synthesized"
    refuse_test_images(synthetic, longtail.test)
    classes, methods, device = len(longtail.names), section.methods, training_device()
    test_pixels, test_labels = all_pixels(longtail.test), longtail.test.labels
    grid = cells_of(longtail, synthetic, section, folder, device)
    *results, oracle_result = run_cells(list(grid.values()), device, report)
    found = dict(zip(grid, (_Prediction.of(result) for result in results), strict=False))  # the oracle is the last

    tested = {longtail.groups[label] for label in np.unique(test_labels)}
    column = next(g for g in reversed(GROUPS) if g in tested)
    correct = {
        (variant, method): np.stack([found[Key(variant, method, seed)].classes == test_labels for seed in range(section.seeds)])
        for variant in VARIANTS
        for method in methods
    }

    def compare(method: Method, against: Variant) -> Comparison:
        pair = correct["synthetic", method], correct[against, method]
        of_column = np.isin(test_labels, longtail.classes_of(column))
        interval = paired_difference(pair[0][:, of_column], pair[1][:, of_column], test_labels[of_column])
        gains = class_differences(*pair, test_labels, classes) if against == "real" else ()
        return Comparison(method, "synthetic", against, interval, gains)

    return Table(
        names=longtail.names,
        groups=tuple(longtail.groups),
        counts=tuple(longtail.counts.tolist()),
        synthetic_counts=tuple(synthetic.counts(classes).tolist()),
        test_images=len(test_labels),
        test_images_in_train=len(pixel_hashes(all_pixels(longtail.train)) & pixel_hashes(test_pixels)),
        seeds=section.seeds,
        column=column,
        rows=tuple(
            _row(variant, method, [found[Key(variant, method, seed)] for seed in range(section.seeds)], test_labels, longtail.groups)
            for method in methods
            for variant in VARIANTS
        ),
        comparisons=tuple(compare(method, against) for method in methods for against in VARIANTS if against != "synthetic"),
        purity=_purity(oracle_result, synthetic.labels, classes, len(longtail.pool)),
    )


class Key(NamedTuple):
    """One recognizer of the grid."""

    variant: Variant | Literal["oracle"]
    method: Method
    seed: int


def cells_of(longtail: LongTail, synthetic: ExtraImages, section: RecognizerSection, folder: Path, device: torch.device) -> dict[Key, Cell]:
    """Every recognizer that `evaluate` needs, the oracle last; nothing is trained yet. The arguments are those of `evaluate`."""
    classes, test_pixels = len(longtail.names), all_pixels(longtail.test)
    real = real_images(all_pixels(longtail.train), longtail.train.labels)

    def images_of(variant: Variant, seed: int) -> TrainingImages:
        if variant == "real":
            return real
        if variant == "synthetic":
            return real.add(synthetic.pixels, synthetic.labels, section.synthetic_weight)
        extra = replay(longtail.train, synthetic.counts(classes), seed)
        if variant == "replay":
            return real.add(extra.pixels, extra.labels, is_extra=False)
        return real.add(extra.pixels, extra.labels, section.synthetic_weight)

    def cell(variant: Variant, method: Method, seed: int) -> Cell:
        path = folder / "cells" / f"{variant}.{method}.{seed}.json"
        digest = cell_digest(images_of(variant, seed), section, method, seed, test_pixels)

        def train(hear: Report) -> dict[str, Any]:
            if (variant, method, seed) == ("real", JUDGE_METHOD, JUDGE_SEED):
                model, _ = kept_recognizer(folder, real, classes, section, device, hear)
            else:
                checkpoint = checkpoint_of(path, digest)
                model = train_recognizer(images_of(variant, seed), classes, section, method, seed, device, hear, checkpoint)
            probabilities = predict_probabilities(model, test_pixels)  # (N, K)
            confidence = probabilities.max(1).astype(np.float64)
            return {"predicted": probabilities.argmax(1).tolist(), "confidence": np.round(confidence, CONFIDENCE_DIGITS).tolist()}

        return Cell(path, digest, train)

    grid = {
        Key(variant, method, seed): cell(variant, method, seed)
        for seed in range(section.seeds)
        for method in section.methods
        for variant in VARIANTS
    }
    return grid | {Key("oracle", "cross_entropy", 0): _oracle_cell(longtail, synthetic, section, folder, device)}


class Evaluation(NamedTuple):
    """What `evaluate_run` finds: whether the images help, and whether they are to be trusted."""

    table: Table
    trust: Trust

    def to_json(self) -> dict[str, Any]:
        """The table's values, with "trust" beside them."""
        return self.table.to_json() | {"trust": self.trust.to_json()}


def evaluate_run(run: RunFolder, longtail: LongTail, report: Report = silent, extractor: Path | None = None) -> Evaluation:
    """`evaluate` and judge the images in a run's `synth` folder; kept in `accuracy.json` and `trust.json` of `evaluation/`.

    Args:
        longtail: the data set that the run was trained on.
        extractor: a file of `diffrc import inception`, in whose features the images are judged; None = the run's recognizer.

    Raises:
        UsageError: nothing was synthesized yet, or the images lie inside the data set.
        ConflictError: the run was trained on other data, or the images were made by other networks than it holds now.
        DataError, Interrupted, NumericsError, StorageError: as `evaluate`, `read_images` and `open_judge`.
    """
    require_images(run, longtail)
    if extractor:
        inception.load(extractor)  # a wrong file is told before any work
    started = time.perf_counter()
    try:
        synthetic = ExtraImages(*read_images(run.synth))
        table = evaluate(longtail, synthetic, run.recipe.recognizer, run.evaluation, report)
        store.write_json(run.evaluation / "accuracy.json", table.to_json())
        return Evaluation(table, trust_images(run, longtail, synthetic, open_judge(run, longtail, report, extractor)))
    finally:
        run.add_cost("evaluate", time.perf_counter() - started)


def require_images(run: RunFolder, longtail: LongTail) -> None:
    """Refuse a run without synthetic images, or with images that are not its own. Raises UsageError, ConflictError, DataError."""
    if not (run.synth / "plan.json").exists():
        raise UsageError(f"{run.path} has no synthesized images yet", "diffrc synth --fill")
    run.keep_classes(longtail.table())
    require_current(run)
    refuse_data_folder(run.synth, Path(run.recipe.data.path) if run.recipe.data.path else None)


def class_purity(longtail: LongTail, synthetic: ExtraImages, section: RecognizerSection, folder: Path, report: Report = silent) -> Purity:
    """The share of synthetic images of class k that an oracle, trained on `longtail.pool`, takes for class k."""
    device = training_device()
    [result] = run_cells([_oracle_cell(longtail, synthetic, section, folder, device)], device, report)
    return _purity(result, synthetic.labels, len(longtail.names), len(longtail.pool))


def _oracle_cell(longtail: LongTail, synthetic: ExtraImages, section: RecognizerSection, folder: Path, device: torch.device) -> Cell:
    images = real_images(all_pixels(longtail.pool), longtail.pool.labels)
    test_pixels = all_pixels(longtail.test)
    asked = np.concatenate([synthetic.pixels.reshape(-1), test_pixels.reshape(-1)])
    path = folder / "cells" / "oracle.json"
    digest = cell_digest(images, section, "cross_entropy", 0, asked)

    def train(hear: Report) -> dict[str, Any]:
        model = train_recognizer(images, len(longtail.names), section, "cross_entropy", 0, device, hear, checkpoint_of(path, digest))
        right = predict(model, test_pixels) == longtail.test.labels
        return {"accuracy": 100.0 * float(right.mean()), "predicted": predict(model, synthetic.pixels).tolist()}

    return Cell(path, digest, train)


def _purity(result: Mapping[str, Any], labels: Labels, classes: int, oracle_images: int) -> Purity:
    predicted = np.array(result["predicted"], dtype=np.int64)
    per_class = class_accuracy(predicted, labels, classes)
    return Purity(100.0 * float((predicted == labels).mean()), _nullable(per_class), float(result["accuracy"]), oracle_images)


class _Prediction(NamedTuple):
    """What a recognizer says of the test images."""

    classes: Labels  # (N,)
    confidence: Floats  # (N,) of these classes

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> _Prediction:
        return cls(np.array(result["predicted"], dtype=np.int64), np.array(result["confidence"], dtype=np.float64))


def _row(variant: Variant, method: Method, found: Sequence[_Prediction], labels: Labels, groups: Sequence[str]) -> Row:
    per_class = np.stack([class_accuracy(p.classes, labels, len(groups)) for p in found])  # (S, K)
    by_seed = [group_accuracy(accuracy, groups) for accuracy in per_class]
    figures = {column: summarize([seed[column] for seed in by_seed]) for column in COLUMNS if column in by_seed[0]}
    figures["ece"] = summarize([calibration_error(p.classes, p.confidence, labels) for p in found])
    return Row(variant, method, figures, _nullable(per_class.mean(0)))


def _nullable(values: Floats) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(v) else float(v) for v in values)


def training_device() -> torch.device:
    """Where recognizers are trained: a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
