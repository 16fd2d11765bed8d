"""`diffrc train`: source, target and guide of a recipe, into a run folder; the same command resumes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffrc_cli import console
from diffrc_cli.options import DataOption, DeviceOption, JsonOption, NewRunOption, RecipeArgument, SetOption
from diffrc_cli.recipe import resolve

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engines.progress import Report
    from engines.recipe import Recipe
    from engines.store import RunFolder

MEASURED_STEPS = 10  # before a rate is believed: the first ones are slower
LONG_SECONDS = 60.0  # a shorter stage needs no estimate


def train(
    recipe: RecipeArgument = None,
    data: DataOption = None,
    run: NewRunOption = None,
    overrides: SetOption = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Train the source model on the head, adapt it to the tail, and train the guide. The same command continues.

    Example: diffrc train cifar10-lt-100 --data DIR
    """
    from engines import store
    from engines.data.longtail import prepare
    from engines.training.stages import choose_device, train_run

    settings, path = recipe_of_run(recipe, data, run, overrides)
    where = choose_device(device)
    tail = prepare(settings.data, None)
    with console.progress() as report:
        tail.train.preload(report)  # a damaged image is met before a folder is made
        with store.locked(path):
            folder = store.create_run(path, settings)
            trained = train_run(folder, tail, where, estimating(report), console.note)
    if json:
        console.emit_json({"run": str(path), "trained_steps": trained})
        return
    for stage, steps in trained.items():
        console.say(f"{stage}: {f'trained {steps:,} steps' if steps else 'complete already'}")
    console.say(f"run: {path}")
    console.say(f"next: diffrc export{_run_option(folder)}")


def recipe_of_run(recipe: str | None, data: Path | None, run: Path | None, overrides: list[str] | None) -> tuple[Recipe, Path]:
    """The resolved recipe and the run folder of a command that trains.

    Without a recipe, an existing run's own recipe counts; without a run, ./runs/<name of the recipe>; without a data set's path,
    the one that the run was trained from. Raises UsageError from `resolve`, ConflictError where the folder holds a run on other
    data or other things.
    """
    from engines.store import DEFAULT_ROOT, stored_recipe

    stored = run / "recipe.toml" if run else None
    settings = resolve(str(stored) if recipe is None and stored and stored.exists() else recipe, overrides)
    settings = _with_data_path(settings, str(data.absolute()) if data else settings.data.path)
    path = run or DEFAULT_ROOT / settings.name
    before = stored_recipe(path, settings)  # refused before any image is read, and before a lock file lies there
    return _with_data_path(settings, settings.data.path or (before.data.path if before else "")), path


def estimating(report: Report) -> Report:
    """The report, and once a stage the time that the rest of it takes, as soon as its first steps have been measured."""
    first: dict[str, int] = {}
    told = set()

    def hear(what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        measured = done - first.setdefault(what, done) >= MEASURED_STEPS and "seconds_left" in figures
        if measured and what not in told:
            told.add(what)
            if figures["seconds_left"] >= LONG_SECONDS:
                rate = figures["images_per_second"]
                images = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
                console.note(f"{what}: {total:,} steps, about {console.duration(figures['seconds_left'])} at {images} images/s")
        report(what, done, total, figures)

    return hear


def _with_data_path(recipe: Recipe, path: str) -> Recipe:
    from engines.recipe import validate

    if path == recipe.data.path:
        return recipe
    table = recipe.model_dump(mode="json")
    return validate({**table, "data": {**table["data"], "path": path}})


def _run_option(run: RunFolder) -> str:
    from engines.store import DEFAULT_ROOT

    return "" if run.path.parent == DEFAULT_ROOT else f" --run {run.path}"
