"""`diffrc train`: source, target and guide of a recipe, into a run folder; the same command resumes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffrc_cli import console
from diffrc_cli.options import DataOption, DeviceOption, JsonOption, NewRunOption, RecipeArgument, SetOption
from diffrc_cli.recipe import resolve

if TYPE_CHECKING:
    from engines.recipe import Recipe
    from engines.store import RunFolder


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
            trained = train_run(folder, tail, where, report)
    if json:
        console.emit_json({"run": str(path), "trained_steps": trained})
        return
    for stage, steps in trained.items():
        console.say(f"{stage}: {f'trained {steps:,} steps' if steps else 'complete already'}")
    console.say(f"run: {path}")
    console.say(f"next: diffrc export{_run_option(folder)}")


def recipe_of_run(recipe: str | None, data: Path | None, run: Path | None, overrides: list[str] | None) -> tuple[Recipe, Path]:
    """The resolved recipe and the run folder of a command that trains.

    Without a recipe, an existing run's own recipe counts; without a run, ./runs/<name of the recipe>.
    Raises UsageError from `resolve`, ConflictError where the folder holds another run or other things.
    """
    from engines.recipe import validate
    from engines.store import DEFAULT_ROOT, stored_recipe

    stored = run / "recipe.toml" if run else None
    settings = resolve(str(stored) if recipe is None and stored and stored.exists() else recipe, overrides)
    if data:
        table = settings.model_dump(mode="json")
        settings = validate({**table, "data": {**table["data"], "path": str(data.absolute())}})
    path = run or DEFAULT_ROOT / settings.name
    stored_recipe(path, settings)  # refused before any image is read, and before a lock file lies there
    return settings, path


def _run_option(run: RunFolder) -> str:
    from engines.store import DEFAULT_ROOT

    return "" if run.path.parent == DEFAULT_ROOT else f" --run {run.path}"
