"""A study from its arms to its document: images lane by lane, recognizers seed by seed, and what was found as plain JSON values."""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engines import recipe as recipes
from engines import store
from engines.backends.device import processors
from engines.data.longtail import LongTail, prepare
from engines.evaluation.judge import open_judge
from engines.evaluation.report import render_study
from engines.evaluation.synthetic import ExtraImages
from engines.evaluation.trust import judge_images
from engines.progress import Report, silent
from engines.recipe import Recipe
from engines.store import RunFolder
from engines.study import lanes
from engines.study.grid import Key, Labels, column_of, filled, images_tested, methods_of, rows_of, train_grid
from engines.study.plan import Arm, Study
from engines.study.processes import Slot, Task, run_tasks, slots
from engines.training import reuse

VERSION = 1
DOCUMENT = "study.json"
CELLS = "cells"  # folder of kept recognizers
PAGE = "index.html"


def run_study(
    study: Study,
    arms: Sequence[Arm],
    out: Path,
    device: torch.device,
    workers: int = 0,
    budget_hours: float = math.inf,
    report: Report = silent,
    tell: Callable[[str], None] = lambda _: None,
    command: str = "",
) -> dict[str, Any]:
    """Train, synthesize and judge every arm with every seed, and keep the document in `out/study.json`.

    Whatever is finished in `out` already and was made with the same settings is used as it is, be it by another arm or study.

    Args:
        arms: of `resolve_arms`.
        device: of the diffusion models and recognizers.
        workers: lanes at a time; 0 = one a GPU, or one a processor.
        budget_hours: no lane and no seed's recognizers are begun after so many hours.
        report: hears "study" and "evaluate".
        tell: hears where the budget ends it early.
        command: what a person types to get this, for the document.

    Returns: the document; see `document`.
    Raises: DataError, Interrupted (the same command continues), and what training, export and synthesis raise.
    """
    started = time.monotonic()
    data = prepare_arms(arms)
    places = slots(torch.cuda.device_count() if device.type == "cuda" else 0, workers or _most_workers(device))
    predicted: dict[Key, Labels] = {}

    def within_budget() -> bool:
        return (time.monotonic() - started) / 3600 <= budget_hours

    with store.locked(out):
        together = waves(study, arms, data, len(places)) if budget_hours < math.inf else [list(range(study.seeds))]
        for i, seeds in enumerate(together):
            hear = _part(report, i, len(together))
            if within_budget():
                make_images(arms, data, seeds, out, places, hear, within_budget)
            finished = [seed for seed in seeds if not missing(arms, data, [seed], out)]
            predicted |= train_grid(study, arms, finished, data, images_in(out, data), out / CELLS, device, hear)
        done = sorted({key.seed for key in predicted})
        if len(done) < study.seeds:
            tell(f"the budget of {budget_hours:g} hours was enough for {len(done)} of {study.seeds} seeds; the same command continues")
        likeness = judge_arms(study, arms, done, data, out, report)
        found = document(study, arms, data, predicted, likeness, out)
        found |= {"seconds": round(time.monotonic() - started, 1), "command": command}
        store.write_json(out / DOCUMENT, found)
        store.write_text(out / PAGE, render_study(found))
    return found


def prepare_arms(arms: Sequence[Arm]) -> dict[str, LongTail]:
    """The data of each arm; arms of equal [data] share it."""
    known: dict[str, LongTail] = {}
    for arm in arms:
        key = recipes.digest(arm.recipe.data)
        known.setdefault(key, prepare(arm.recipe.data, None))
    return {arm.name: known[recipes.digest(arm.recipe.data)] for arm in arms}


def waves(study: Study, arms: Sequence[Arm], data: Mapping[str, LongTail], places: int) -> list[list[int]]:
    """Seeds that are worked on together under a budget: as many as keep all places busy, so that what it is enough for is whole seeds."""
    lanes_a_seed = max(1, len({lanes.lane_of(arm.seeded(0), data[arm.name].kept_sha256) for arm in _making(arms)}))
    together = max(1, places // lanes_a_seed)
    return [list(range(first, min(first + together, study.seeds))) for first in range(0, study.seeds, together)]


def plan(study: Study, arms: Sequence[Arm], out: Path) -> dict[str, Any]:
    """What a study trains and makes, and how much of it is there, as plain JSON values. Writes nothing."""
    data = prepare_arms(arms)
    seeds = range(study.seeds)
    todo = missing(arms, data, seeds, out)
    making = {lanes.images_digest(arm.seeded(seed)): arm for seed in seeds for arm in _making(arms)}
    images = {arm.name: int(filled(arm, data[arm.name]).sum()) if arm.images != "real" else 0 for arm in arms}
    stages = {
        stage: {
            recipes.digest(reuse.made_of(arm.seeded(seed), stage, data[arm.name].kept_sha256)) for seed in seeds for arm in _making(arms)
        }
        for stage in ("source", "target")
    }
    return {
        "name": study.name,
        "seeds": study.seeds,
        "sources": len(stages["source"]),
        "targets": len(stages["target"]),
        "images": sum(images[arm.name] for arm in making.values()),
        "recognizers": study.seeds * sum(len(methods_of(study, arm)) for arm in arms),
        "parts": len(making),
        "ready": len(making) - sum(len(found) for found in todo.values()),
        "arms": [
            {"name": a.name, "title": a.title, "recipe": a.recipe.name, "images": images[a.name], "changes": list(a.changes)} for a in arms
        ],
    }


def missing(arms: Sequence[Arm], data: Mapping[str, LongTail], seeds: Sequence[int], out: Path) -> dict[Path, list[Recipe]]:
    """The seeded recipes whose images are still to be made, by lane."""
    todo: dict[Path, list[Recipe]] = {}
    for seed in seeds:
        for arm in _making(arms):
            recipe = arm.seeded(seed)
            lane = _lane(out, recipe, data[arm.name])
            known = {lanes.images_digest(other) for other in todo.get(lane, ())}
            if lanes.made(lane, recipe) is None and lanes.images_digest(recipe) not in known:
                todo.setdefault(lane, []).append(recipe)
    return todo


def make_images(
    arms: Sequence[Arm],
    data: Mapping[str, LongTail],
    seeds: Sequence[int],
    out: Path,
    places: Sequence[Slot],
    report: Report,
    start_another: Callable[[], bool],
) -> None:
    """Make what the arms lack, a process a lane."""
    device = "cuda" if places[0].gpu is not None else "cpu"
    todo = missing(arms, data, seeds, out)
    read = {recipes.digest(arm.recipe.data): data[arm.name] for arm in arms}
    work = {lane: lanes.operations(recipes_, read[recipes.digest(recipes_[0].data)]) for lane, recipes_ in todo.items()}
    tasks = [Task(lane.name, lanes.__name__, "make_lane", (lane, recipes_, device), work[lane]) for lane, recipes_ in todo.items()]
    run_tasks(tasks, places, report, start_another)


def images_in(out: Path, data: Mapping[str, LongTail]) -> Callable[[Arm, int], ExtraImages]:
    """How the grid finds the images of an arm and seed."""

    def images(arm: Arm, seed: int) -> ExtraImages:
        recipe = arm.seeded(seed)
        lane = _lane(out, recipe, data[arm.name])
        found = lanes.made(lane, recipe)
        assert found is not None, "the grid is trained after its images"
        return lanes.images_of(lane, found)

    return images


def judge_arms(
    study: Study, arms: Sequence[Arm], seeds: Sequence[int], data: Mapping[str, LongTail], out: Path, report: Report
) -> dict[str, dict[str, Any]]:
    """What `trust` says of the first seed's images, by arm, as plain JSON values; of the tested images as the reference."""
    found: dict[str, dict[str, Any]] = {}
    for arm in _making(arms) if seeds else ():
        tail = replace(data[arm.name], test=images_tested(study, data[arm.name]))
        judge = open_judge(RunFolder(out, arm.recipe), tail, report)
        found[arm.name] = judge_images(judge, tail, images_in(out, data)(arm, seeds[0])).to_json()
    return found


def document(
    study: Study,
    arms: Sequence[Arm],
    data: Mapping[str, LongTail],
    predicted: Mapping[Key, Labels],
    likeness: Mapping[str, Mapping[str, Any]],
    out: Path,
) -> dict[str, Any]:
    """What a study found, as plain JSON values: its arms with figures, spread, paired differences and the paper's own figures.

    {"version", "title", "recipe", "recipe_toml", "split", "seeds", "column", "methods", "hardware", "versions", "notes",
     "arms": [{"name", "title", "images", "changes", "added", "paper", "seconds", "rows": [...], "fidelity", "sheet_png"}],
     "curves": [{"title", "x_label", "points": [{"x", "mean", "spread", "n"}]}]}
    """
    seeds = sorted({key.seed for key in predicted})
    rows = rows_of(study, arms, data, predicted) if predicted else {arm.name: [] for arm in arms}
    environment = store.environment()
    return {
        "version": VERSION,
        "name": study.name,
        "title": study.title,
        "recipe": arms[0].recipe.name,
        "recipe_toml": recipes.to_toml(arms[0].recipe),
        "test": study.split,
        "seeds": len(seeds),
        "column": column_of(study, data[arms[0].name]),
        "methods": list(methods_of(study, arms[0])),
        "against": list(study.against),
        "hardware": f"{processors()} processors ({environment['machine']}), {environment['device']}",
        "versions": environment["packages"],
        "arms": [_arm(arm, rows[arm.name], seeds, data[arm.name], out) | {"fidelity": likeness.get(arm.name)} for arm in arms],
        "curves": [_curve(sweep.title, sweep.name, sweep.values, rows) for sweep in study.sweeps] if predicted else [],
    }


def _arm(arm: Arm, rows: list[dict[str, Any]], seeds: Sequence[int], data: LongTail, out: Path) -> dict[str, Any]:
    found = []
    for seed in seeds if arm.images == "synthetic" else ():
        lane = _lane(out, arm.seeded(seed), data)
        if images := lanes.made(lane, arm.seeded(seed)):
            found.append((lane, images))
    sheet = lanes.sheet_of(*found[0]) if found else b""
    return {
        "name": arm.name,
        "title": arm.title,
        "kind": arm.images,
        "changes": list(arm.changes),
        "images": sum(found[0][1].counts) if found else None,
        "dropped": [images.dropped for _, images in found],
        "seconds": {key: round(sum(i.seconds[key] for _, i in found) / len(found), 2) for key in found[0][1].seconds} if found else {},
        "paper": arm.paper or None,
        "rows": rows,
        "sheet_png": base64.b64encode(sheet).decode() if sheet else None,
    }


def _curve(title: str, name: str, values: Sequence[float], rows: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Accuracy of all classes, by the first method, against the value of a key."""
    points = [{"x": value, **rows[f"{name}-{value:g}"][0]["figures"]["all"]} for value in values]
    return {"title": f"Accuracy against {title}", "x_label": title, "points": points}


def _part(report: Report, wave: int, of: int) -> Report:
    return lambda what, done, total, figures: report(what, wave * total + done, of * total, figures)


def _making(arms: Sequence[Arm]) -> list[Arm]:
    return [arm for arm in arms if arm.images == "synthetic"]


def _lane(out: Path, recipe: Recipe, data: LongTail) -> Path:
    return out / "lanes" / lanes.lane_of(recipe, data.kept_sha256)


def _most_workers(device: torch.device) -> int:
    return torch.cuda.device_count() if device.type == "cuda" else processors()
