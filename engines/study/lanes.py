"""What an arm with synthetic images needs: a lane's run folder, where its networks are trained and its images made and found again.

A lane is one source model: arms of equal seed, data, U-Net, diffusion and [source] share its folder, one after another. What an
arm does not change is used as it is, what it changes is kept aside and comes back (`engines.training.reuse`, `plan.make_room`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engines import recipe as recipes
from engines import store
from engines.backends.export import export_run
from engines.data.longtail import LongTail, prepare
from engines.errors import DataError
from engines.evaluation.synthetic import ExtraImages
from engines.progress import Report
from engines.recipe import Recipe
from engines.synthesis.plan import PLAN_FILE, fill_classes, fill_counts
from engines.synthesis.sheet import read_images
from engines.synthesis.synthesize import fill_run
from engines.training import reuse
from engines.training.cost import cost_of
from engines.training.stages import train_run

RECORDS = "arms"  # in a lane's folder: what each arm made, by `images_digest`
_STAGES = ("train.source", "train.target", "train.guide", "export", "synth")


@dataclass(frozen=True)
class Made:
    """The images of one arm and seed.

    Attributes:
        plan: of the images, which finds their folder wherever it was moved to.
        counts: how many of each class, the first ones in their order; a folder may hold more.
        seconds: what each step took when it was taken; what an earlier arm had done counts there.
    """

    plan: str
    counts: tuple[int, ...]
    seconds: dict[str, float]
    dropped: int
    sheet: str


def lane_of(recipe: Recipe, kept_sha256: str) -> str:
    """The name of the folder in which a seeded recipe is trained."""
    return f"seed{recipe.seed}-{recipes.digest(reuse.made_of(recipe, 'source', kept_sha256))[:8]}"


def images_digest(recipe: Recipe) -> str:
    """What an arm's images depend on, but for the data: recipes that differ in [recognizer] alone make the same ones."""
    table = recipe.model_dump(mode="json", exclude={"name": True, "recognizer": True, "data": {"path", "on_bad_image", "quarantine"}})
    return recipes.digest(table)[:16]  # where the data lie does not count: which images they are is in the lane's name


def made(lane: Path, recipe: Recipe) -> Made | None:
    """What an arm has made in its lane, None where it is not finished or its images are gone."""
    record = lane / RECORDS / f"{images_digest(recipe)}.json"
    if not record.exists():
        return None
    table = store.read_json(record)
    found = Made(table["plan"], tuple(table["counts"]), table["seconds"], table["dropped"], table["sheet"])
    return found if _folder_of(lane, found.plan) else None


def images_of(lane: Path, arm: Made) -> ExtraImages:
    """The images of an arm, by class and index. Raises DataError where they are damaged or gone."""
    folder = _folder_of(lane, arm.plan)
    if folder is None:
        raise DataError(f"the images of plan {arm.plan[:8]} are gone from {lane}", "the same command makes them again")
    pixels, labels = read_images(folder)
    first = [np.flatnonzero(labels == k)[:count] for k, count in enumerate(arm.counts)]
    chosen = np.concatenate(first)
    return ExtraImages(pixels[chosen], labels[chosen])


def sheet_of(lane: Path, arm: Made) -> bytes:
    """The contact sheet of an arm, real images of each class beside generated ones, as PNG; empty where there is none."""
    folder = _folder_of(lane, arm.plan)
    path = folder / arm.sheet if folder and arm.sheet else None
    return path.read_bytes() if path and path.exists() else b""


def make_lane(lane: Path, arms: Sequence[Recipe], device: str, report: Report) -> None:
    """Train, export and synthesize what the arms of a lane need, in this process; the same call goes on where it was.

    Args:
        arms: seeded recipes of one `lane_of`.
        report: hears "share" in thousandths of the lane's operations; see `Share`.

    Raises: what `train_run`, `export_run` and `fill_run` raise; ConflictError where another process is at work in the lane.
    """
    data = prepare(arms[0].data, None)
    share = Share(arms, data, report)
    with store.locked(lane):
        for recipe in arms:
            if made(lane, recipe) is None:
                _make(lane, recipe, data, torch.device(device), share.of(recipe))
        report("share", 1, 1, {})


def parts_of(recipe: Recipe, data: LongTail) -> dict[str, tuple[str, float]]:
    """What an arm takes: by what is reported, the digest of all it depends on (equal ones are made once), and its operations.

    The export is left out: it takes about as long whatever the network.
    """
    cost = cost_of(recipe)
    images = int(fill_counts(recipe, data.counts, data.groups).sum())
    stages = {"source": cost.source, "target": cost.target, "guide": cost.guide}
    made = {stage: recipes.digest(reuse.made_of(recipe, stage, data.kept_sha256)) for stage in stages}
    return {stage: (made[stage], stages[stage]) for stage in stages} | {"synth": (images_digest(recipe), images * cost.image)}


def operations(arms: Iterable[Recipe], data: LongTail) -> float:
    """Of all that arms take; what several of them share counts once."""
    return sum(dict(part for recipe in arms for part in parts_of(recipe, data).values()).values())


class Share:
    """How far a lane is: its parts by what they cost, so that the time left follows from the time spent."""

    def __init__(self, arms: Sequence[Recipe], data: LongTail, report: Report) -> None:
        self._data, self._report = data, report
        self._cost = dict(part for recipe in arms for part in parts_of(recipe, data).values())
        self._done = dict.fromkeys(self._cost, 0.0)

    def of(self, recipe: Recipe) -> Report:
        """What hears the work of one arm."""
        parts = parts_of(recipe, self._data)

        def hear(what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
            if what in parts:
                names = list(parts)
                for part, cost in map(parts.__getitem__, names[: names.index(what)]):  # what is complete already is not reported
                    self._done[part] = cost
                part, cost = parts[what]
                self._done[part] = cost * done / max(total, 1)
                self._report("share", round(1000 * sum(self._done.values()) / sum(self._cost.values())), 1000, {})

        return hear


def _make(lane: Path, recipe: Recipe, data: LongTail, device: torch.device, report: Report) -> None:
    run = store.create_run(lane, recipe)
    before = _cost(run)
    train_run(run, data, device, report)
    if recipe.synth.engine != "torch":
        export_run(run, (recipe.synth.model,), report)
    summary = fill_run(run, data, report)
    wanted = fill_classes(run)
    after = _cost(run)
    spent = {name: round(after.get(name, 0.0) - before.get(name, 0.0), 2) for name in _STAGES}
    store.write_json(
        lane / RECORDS / f"{images_digest(recipe)}.json",
        {
            "plan": summary["plans"][0],
            "counts": [wanted.get(k, 0) for k in range(len(data.counts))],
            "seconds": spent | {"synth": round(summary["seconds"], 2)},
            "dropped": sum(c["rejected"] for c in summary["classes"]),
            "sheet": Path(summary["sheets"][0]).name if summary["sheets"] else "",
        },
    )


def _cost(run: store.RunFolder) -> dict[str, float]:
    """Seconds so far, the exports of all models in one."""
    table = run.cost()
    exports = sum(seconds for name, seconds in table.items() if name.startswith("export"))
    return {**table, "export": exports}


def _folder_of(lane: Path, plan: str) -> Path | None:
    """Where the images of a plan are now: in the run's own folder, or kept aside."""
    for place in (lane / "synth", *sorted((lane / store.STALE).glob("synth-*"))):
        if (place / PLAN_FILE).exists() and store.read_json(place / PLAN_FILE)["plan"] == plan:
            return place
    return None
