"""Few steps or many? Images of the tail classes by every sampler and number of steps, and how true, pure, varied and dear they are.

A cell is one sampler with one number of steps and one guidance scale. All cells draw the same images, (class, index, seed), so they
start from the same noise. Images and figures are kept in `bench/quality/` of the run: the same command continues, and one that asks
for more makes only what is missing. Images are judged as the sampler gives them, without the selection of [select].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engines import recipe as recipes
from engines import store
from engines.backends.device import processors
from engines.benchmark.quality_picture import quality_png
from engines.data.decode import Pixels
from engines.data.longtail import LongTail
from engines.data.names import find_class, shorten
from engines.errors import UsageError
from engines.evaluation.cells import Cell
from engines.evaluation.fidelity import (
    Gaussian,
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
from engines.interrupt import StopRequest, catch_signals
from engines.progress import Report, silent
from engines.recipe import Recipe
from engines.store import RunFolder
from engines.synthesis.forecast import PartForecast, forecast_part
from engines.synthesis.maker import Maker, open_maker
from engines.synthesis.plan import by_model
from engines.synthesis.sheet import read_images
from engines.synthesis.synthesize import make_folder
from engines.training import reuse

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

VERSION = 1  # raise it when a change of the code changes what a cell would hold
TIMING_FILE = "timing.json"
MEASURES = ("frechet", "frechet_train", "hit_rate", "diversity")
LOSSES: dict[str, Callable[[Floats], Floats]] = {  # a measure as a loss
    "frechet": lambda distance: distance,
    "hit_rate": lambda percent: -percent,
    "diversity": lambda ratio: -np.minimum(ratio, 1.0),  # as varied as real images is enough: beyond lies what is no image
}
MEASURED_SECONDS = 6.0  # at most, of a forecast
TOLD_APART = 2.0  # standard deviations of a difference

# ---------------------------------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Setting:
    """What distinguishes a cell: `synth.sampler`, `synth.steps` and `synth.guidance_scale`; a scale of None is the recipe's."""

    sampler: str
    steps: int | str
    scale: float | None = None

    def overrides(self) -> tuple[str, ...]:
        """As for `--set`; the selection is off."""
        scale = () if self.scale is None else (f"synth.guidance_scale={self.scale}",)
        steps = f'"{self.steps}"' if isinstance(self.steps, str) else self.steps
        every_image = ("select.distance_band=0", "select.novelty_band=[0,0]", "select.confidence=0")
        return (f"synth.sampler={self.sampler}", f"synth.steps={steps}", *scale, *every_image)


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard deviation over images drawn again (`bootstrap`), or over splits."""

    value: float
    spread: float


@dataclass(frozen=True)
class Row:
    """The figures of one cell."""

    sampler: str
    steps: int | str
    scale: float  # s_0
    evaluations: int  # of the network, an image
    images: int
    not_finite: int
    engine: str
    seconds_per_image: float | None  # wall time of a job of so many images, files included; None where they were made untimed
    frechet: Estimate  # to the held-out test images
    frechet_train: Estimate  # to the training images
    hit_rate: Estimate  # percent
    diversity: Estimate  # 1 = that of the test images
    loss: Mapping[str, Estimate]  # of each of LOSSES against the cell of least Frechet distance, image by image; above 0 = worse
    folder: str


@dataclass(frozen=True)
class Real:
    """What real images score in the same measures: the frame of the figures."""

    test_images: int
    train_images: int
    frechet: Estimate  # test images against each other, scaled to as many as a cell has: what a perfect generator would get
    frechet_train: float  # training images against test images
    hit_rate: float  # percent, of the test images
    diversity_train: float | None  # of the training images; None where no class has two


@dataclass(frozen=True)
class Quality:
    """The outcome, ready for JSON, the terminal and the chart."""

    classes: tuple[str, ...]
    images: int  # a cell
    judge: str
    distance: str  # what the Frechet distance must be called: "FID" in the published features of Inception alone
    real: Real
    rows: tuple[Row, ...]
    scales: bool  # the cells differ in their guidance scale too
    chart: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"advice": advice(self)}


def advice(quality: Quality) -> str:
    """The cheapest cell that cannot be told from the best one, which is that of the least Frechet distance, and what it saves."""
    best = min(quality.rows, key=lambda row: row.frechet.value)
    alike = [row for row in quality.rows if all(loss.value <= TOLD_APART * loss.spread for loss in row.loss.values())]
    choice = min(alike, key=lambda row: (row.evaluations, row.frechet.value))
    if choice is best:
        return f"Best is {_figures(best, quality)}. None that is cheaper comes as near as {quality.images:,} images a cell can tell."
    return (
        f"Take {_figures(choice, quality)}. The best, {_figures(best, quality)}, takes {_times(best, choice)}; "
        f"{quality.images:,} images a cell do not tell the two apart; more of them may."
    )


def _figures(row: Row, quality: Quality) -> str:
    scale = f", s = {row.scale:g}" if quality.scales else ""
    figures = f"Frechet distance {_plain(row.frechet, 3)}, hit rate {_plain(row.hit_rate, 3)} %, diversity {_plain(row.diversity, 2)}"
    return f"{row.sampler} at {row.steps} steps{scale} ({figures})"


def _times(dear: Row, cheap: Row) -> str:
    more = dear.evaluations / cheap.evaluations
    told = f"{more:.3g} times the evaluations"
    if dear.seconds_per_image and cheap.seconds_per_image:
        told += f" and {dear.seconds_per_image / cheap.seconds_per_image:.2g} times the seconds"
    return told


def _plain(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}g} ± {estimate.spread:.1g}"


# ----------------------------------------------------------------------------------------------------------------- work


def settings_of(samplers: Sequence[str], steps: Sequence[int | str], scales: Sequence[float] = ()) -> list[Setting]:
    """Every sampler with every number of steps and every guidance scale (none given: the recipe's), the cheap ones first."""
    return [Setting(sampler, count, scale) for scale in (scales or (None,)) for count, sampler in product(steps, samplers)]


def tail_classes(run: RunFolder, typed: Sequence[str] = ()) -> list[int]:
    """The classes that a person named, or every medium and few one, by class id. Raises UsageError for a name that is none."""
    table = run.classes()
    if typed:
        return sorted({find_class(name, table["names"]) for name in typed})
    return [k for k, group in enumerate(table["groups"]) if group != "many"]


def bench_quality(
    run: RunFolder,
    longtail: LongTail,
    settings: Sequence[Setting],
    classes: Sequence[int],
    images: int,
    workers: int = 0,
    report: Report = silent,
    tell: Callable[[str], None] = lambda _: None,
    extractor: Path | None = None,
) -> Quality:
    """Make and judge the images of every cell; keep the table in `bench/quality/quality.json` and the chart beside it.

    Args:
        run: trained and, unless `synth.engine` is "torch", exported.
        longtail: the data set that the run was trained on.
        settings: at least one; see `settings_of`.
        classes: see `tail_classes`.
        images: of a cell, in all; rounded up to as many of each class.
        workers: batches that run side by side; 0 = one a processor.
        report: hears "recognizer" once, then each cell by its name.
        tell: hears which engine was chosen and why.
        extractor: a file of `diffrc import inception`, in whose features images are compared; None = the run's recognizer.

    Raises:
        UsageError: too few images a class, made or real, to measure variety; a setting that is none; a stage that is not trained.
        ConflictError: the run was trained on other data, or another process is at the same work.
        EngineError, NumericsError, Interrupted, DataError, StorageError: as `synthesize` does.
    """
    every, each = _checked(run, longtail, settings, classes, images)
    folder, told = folder_of(run), set[str]()

    def tell_once(words: str) -> None:
        if words not in told:
            tell(words)
        told.add(words)

    with store.locked(folder), catch_signals() as stop:
        judge = open_judge(run, longtail, _stopping(report, stop), extractor)
        reference = _Reference.of(judge, longtail, classes)
        results: list[Mapping[str, Any]] = []
        for setting, recipe in zip(settings, every, strict=True):
            if stop.requested:
                raise stop.error(f"{len(results)} of {len(every)} cells are measured and kept in {folder}")
            wanted = dict.fromkeys(classes, each)
            cell = _cell(folder, RunFolder(run.path, recipe), longtail, judge, reference, wanted, workers or processors(), stop, tell_once)
            result = cell.stored()
            if result is None:
                result = {"digest": cell.digest, **cell.make(_named_report(setting, report))}
                store.write_json(cell.path, result)
            results.append(result)
        best = min(results, key=lambda result: float(result["frechet"]))
        rows = [_row(setting, recipe, result, best) for setting, recipe, result in zip(settings, every, results, strict=True)]
        quality = Quality(
            classes=tuple(longtail.names[k] for k in classes),
            images=each * len(classes),
            judge=judge.name,
            distance=judge.distance,
            real=reference.scores(each * len(classes)),
            rows=tuple(rows),
            scales=len({row.scale for row in rows}) > 1,
            chart=str(folder / "quality.png"),
        )
        store.write_json(folder / "quality.json", quality.to_json())
        store.write_bytes(folder / "quality.png", quality_png(quality.to_json()))
    return quality


def forecast_quality(
    run: RunFolder, longtail: LongTail, settings: Sequence[Setting], classes: Sequence[int], images: int, report: Report = silent
) -> list[tuple[Setting, PartForecast]]:
    """The images that each cell lacks, and what they take; judging them is not counted. Raises as `bench_quality` before any work."""
    every, each = _checked(run, longtail, settings, classes, images)
    found, wanted = [], dict.fromkeys(classes, each)
    for done, (setting, recipe) in enumerate(zip(settings, every, strict=True)):
        report("measure", done, len(every), {})
        maker = open_maker(RunFolder(run.path, recipe), recipe.synth.model, data=longtail)
        place = _place(folder_of(run), maker)
        found.append((setting, forecast_part(maker, place, place, wanted, most_seconds=MEASURED_SECONDS / len(every))))
    report("measure", len(every), len(every), {})
    return found


def folder_of(run: RunFolder) -> Path:
    """Where a run's images and figures are kept."""
    return run.path / "bench" / "quality"


def _checked(
    run: RunFolder, longtail: LongTail, settings: Sequence[Setting], classes: Sequence[int], images: int
) -> tuple[list[Recipe], int]:
    """The recipe of each cell, and images of each class: all mistakes before any work."""
    run.keep_classes(longtail.table())
    every = [_recipe(run, setting) for setting in settings]
    by_model(run, dict.fromkeys(classes, 1), source_ready=False)
    each = -(-images // len(classes))
    if each < 2:
        raise UsageError(f"{images} images are fewer than two for each of {len(classes)} classes", f"--n {2 * len(classes)} or more")
    _require_real(longtail, classes)
    return every, each


@dataclass(frozen=True)
class _Reference:
    """The real images of the classes as the judge sees them. Each class counts alike in the Gaussians, as it does among the generated."""

    test: Floats  # (M, D)
    test_labels: Labels
    test_predicted: Labels
    train: Floats
    train_labels: Labels
    digest: str  # of the images

    @classmethod
    def of(cls, judge: Judge, longtail: LongTail, classes: Sequence[int]) -> _Reference:
        digest = hashlib.sha256()
        seen = []
        for images in (longtail.test, longtail.train):
            chosen = np.flatnonzero(np.isin(images.labels, classes))
            pixels, labels = images.pixels(chosen), images.labels[chosen]
            digest.update(pixels.tobytes() + labels.tobytes())
            seen.append((*judge.look(pixels), labels))
        (test, predicted, test_labels), (train, _, train_labels) = seen
        return cls(test, test_labels, predicted, train, train_labels, digest.hexdigest())

    def gaussians(self) -> tuple[Gaussian, Gaussian]:
        """Of the test images and of the training images."""
        return fit(self.test, class_weights(self.test_labels)), fit(self.train, class_weights(self.train_labels))

    def scores(self, images: int) -> Real:
        test, train = self.gaussians()
        varied = class_distances(self.train, self.train_labels)
        return Real(
            test_images=len(self.test),
            train_images=len(self.train),
            frechet=Estimate(*floor_distance(self.test, self.test_labels, images)),
            frechet_train=frechet_distance(train, test),
            hit_rate=hit_rate(self.test_predicted, self.test_labels),
            diversity_train=intra_class_diversity(varied, class_distances(self.test, self.test_labels)) if varied else None,
        )


def _require_real(longtail: LongTail, classes: Sequence[int]) -> None:
    counts = np.bincount(longtail.test.labels, minlength=len(longtail.names))
    if poor := [k for k in classes if counts[k] < 2]:
        name, more = shorten(longtail.names[poor[0]]), f" and {len(poor) - 1} more" if len(poor) > 1 else ""
        raise UsageError(
            f"the test set holds fewer than two images of {name!r}{more}: nothing unseen to compare with",
            "--class names classes that it holds; data.test_per_class holds images out of a set without a test split",
        )


def _recipe(run: RunFolder, setting: Setting) -> Recipe:
    return recipes.load(recipes.to_toml(run.recipe), setting.overrides(), origin=f"{setting.sampler} at {setting.steps} steps")


def _cell(
    folder: Path,
    run: RunFolder,
    longtail: LongTail,
    judge: Judge,
    reference: _Reference,
    wanted: Mapping[int, int],
    workers: int,
    stop: StopRequest,
    tell: Callable[[str], None],
) -> Cell:
    """One cell. Its images lie in a folder named after their plan, so that other networks or engines get another."""
    synth, name = run.recipe.synth, _name(run.recipe)

    def make(hear: Report) -> dict[str, Any]:
        maker = open_maker(run, synth.model, tell=tell, data=longtail)
        place = _place(folder, maker)
        found = make_folder(place, maker, wanted, workers=workers, report=hear, stop=stop)
        timing = _timing(place, found.seconds, found.made)
        pixels, labels = _first_of_each(*read_images(place), wanted)
        return {
            "evaluations": evaluations(run.recipe),
            "images": len(labels),
            "not_finite": found.not_finite,
            "engine": f"{found.engine} {found.precision}",
            "seconds_per_image": timing,
            "folder": place.name,
            **measure(judge, reference, pixels, labels),
        }

    exported = sorted((path.relative_to(run.engines).as_posix(), path.read_bytes()) for path in run.engines.rglob("*.json"))
    identity = {
        "version": VERSION,
        "synth": synth.model_dump(mode="json", exclude={"fill_to", "max_bad"}),
        "stages": [reuse.mark(run.path, stage) for stage in (synth.model, "guide")],
        "engines": hashlib.sha256(repr(exported).encode()).hexdigest(),
        "wanted": sorted(wanted.items()),
        "judge": judge.digest,
        "real": reference.digest,
    }
    digest = recipes.digest(identity)
    return Cell(folder / "cells" / f"{name}-{digest[:12]}.json", digest, make)


def _name(recipe: Recipe) -> str:
    synth = recipe.synth
    return f"{synth.sampler}-{synth.steps}-s{synth.guidance_scale:g}".replace(",", "+")


def _place(folder: Path, maker: Maker) -> Path:
    return folder / "images" / f"{_name(maker.recipe)}-{maker.plan.id[:12]}"


def measure(judge: Judge, reference: _Reference, pixels: Pixels, labels: Labels) -> dict[str, Any]:
    """The figures of generated images, (N, H, W, C) uint8 and the classes that were asked, (N,), and over their bootstrap."""
    features, predicted = judge.look(pixels)
    (test, train), real = reference.gaussians(), class_distances(reference.test, reference.test_labels)

    def figures(chosen: Labels) -> list[float]:
        seen, asked = features[chosen], labels[chosen]
        gaussian = fit(seen)
        diversity = intra_class_diversity(class_distances(seen, asked), real)
        return [frechet_distance(gaussian, test), frechet_distance(gaussian, train), hit_rate(predicted[chosen], asked), diversity]

    drawn = bootstrap(figures, labels)  # (R, 4)
    return {
        **dict(zip(MEASURES, figures(np.arange(len(labels))), strict=True)),
        "bootstrap": {measure: np.round(column, 6).tolist() for measure, column in zip(MEASURES, drawn.T, strict=True)},
    }


def evaluations(recipe: Recipe) -> int:
    """Of the network for one image: one a step, two where classifier-free guidance acts."""
    visited = recipe.sampling_timesteps()
    first, last = recipe.synth.guidance_interval
    twice = sum(first <= t <= last for t in visited) if recipe.synth.classifier_free_scale else 0
    return len(visited) + twice


def _first_of_each(pixels: Pixels, labels: Labels, wanted: Mapping[int, int]) -> tuple[Pixels, Labels]:
    """As many of each class as wanted, the first by index: an earlier call may have made more."""
    chosen = np.concatenate([np.flatnonzero(labels == k)[:n] for k, n in wanted.items()])
    return pixels[chosen], labels[chosen]


def _timing(folder: Path, seconds: float, made: int) -> float | None:
    """Seconds an image over all jobs that ended in this folder, this one included; a job that was killed is not counted."""
    path = folder / TIMING_FILE
    total = store.read_json(path) if path.exists() else {"seconds": 0.0, "made": 0}
    if made:
        total = {"seconds": total["seconds"] + seconds, "made": total["made"] + made}
        store.write_json(path, total)
    return total["seconds"] / total["made"] if total["made"] else None


def _row(setting: Setting, recipe: Recipe, result: Mapping[str, Any], best: Mapping[str, Any]) -> Row:
    measures = {m: Estimate(result[m], float(np.std(result["bootstrap"][m], ddof=1))) for m in MEASURES}
    return Row(
        sampler=setting.sampler,
        steps=setting.steps,
        scale=recipe.synth.guidance_scale,
        evaluations=result["evaluations"],
        images=result["images"],
        not_finite=result["not_finite"],
        engine=result["engine"],
        seconds_per_image=result["seconds_per_image"],
        frechet=measures["frechet"],
        frechet_train=measures["frechet_train"],
        hit_rate=measures["hit_rate"],
        diversity=measures["diversity"],
        loss={m: _loss(m, result, best) for m in LOSSES},
        folder=result["folder"],
    )


def _loss(measure: str, result: Mapping[str, Any], best: Mapping[str, Any]) -> Estimate:
    """How much worse a cell is than the best one. The bootstrap drew the same images of both, which share their noise: pairs."""
    loss = LOSSES[measure]
    drawn, of_best = (loss(np.array(cell["bootstrap"][measure])) for cell in (result, best))  # (R,)
    gap = loss(np.array(result[measure])) - loss(np.array(best[measure]))
    return Estimate(float(gap), float((drawn - of_best).std(ddof=1)))


def _named_report(setting: Setting, report: Report) -> Report:
    """The progress of a cell under its own name, for all cells make images."""
    name = f"{setting.sampler} {setting.steps}" + ("" if setting.scale is None else f" s={setting.scale:g}")
    return lambda _, done, total, figures: report(name, done, total, figures)


def _stopping(report: Report, stop: StopRequest) -> Report:
    """A report that ends the training of the recognizer at a signal: it is short, and its weights are kept only when it is done."""

    def hear(what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        report(what, done, total, figures)
        if stop.requested and done < total:
            raise stop.error("the recognizer was not trained to the end, and starts again")

    return hear
