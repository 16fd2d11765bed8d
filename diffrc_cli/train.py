"""`diffrc train`: source, target and guide of a recipe, into a run folder; the same command resumes."""

from __future__ import annotations

import shlex
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from diffrc_cli import console, dry_run
from diffrc_cli.options import DataOption, DeviceOption, DryRunOption, JsonOption, LogOption, NewRunOption, RecipeArgument, SetOption
from diffrc_cli.recipe import resolve

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from engines.data.longtail import LongTail
    from engines.evaluation.forecast import EvaluationForecast
    from engines.progress import Report
    from engines.recipe import Recipe
    from engines.store import RunFolder
    from engines.synthesis.forecast import PartForecast

MEASURED_STEPS = 10  # before a rate is believed: the first ones are slower
LONG_SECONDS = 60.0  # a shorter stage needs no estimate


def train(
    recipe: RecipeArgument = None,
    data: DataOption = None,
    run: NewRunOption = None,
    overrides: SetOption = None,
    device: DeviceOption = "auto",
    log: LogOption = None,
    plan: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Train the source model on the head, adapt it to the tail, and train the guide. The same command continues.

    Example: diffrc train cifar10-lt-100 --data DIR
    On two GPUs: torchrun --nproc-per-node 2 -m -- diffrc_cli train cifar10-lt-100 --data DIR
    """
    from engines import store
    from engines.backends.device import choose_device
    from engines.data.longtail import prepare
    from engines.errors import UsageError
    from engines.progress import silent
    from engines.training import calibration
    from engines.training.distributed import joined
    from engines.training.sinks import open_sinks, require_packages
    from engines.training.stages import train_run

    with joined() as world:  # first of all: whatever fails from here on is told by one process
        settings, path = recipe_of_run(recipe, data, run, overrides)
        world = world.on(choose_device(device))
        world.require_fits(settings)
        require_packages(log or ())
        tail = prepare(settings.data, None)
        if plan:
            if world.size > 1:
                raise UsageError("--dry-run measures one process", "the same command without torchrun")
            show_forecast(settings, path, tail, world.device, json)
            return
        with console.progress() if world.first else nullcontext(silent) as report:
            tail.train.preload(report)  # a damaged image is met before a folder is made
            world.wait()  # until all have read what the first one is about to write
            if not world.first:
                train_run(store.RunFolder(path, settings), tail, world.device, world=world)
                return
            with store.locked(path):
                folder = store.create_run(path, settings)
                with closing(open_sinks(log or (), path, settings.model_dump(mode="json"), console.note)) as sinks:
                    trained = train_run(folder, tail, world.device, estimating(report), console.note, sinks, world)
    if json:
        console.emit_json({"run": str(path), "trained_steps": trained})
        return
    for stage, steps in trained.items():
        console.say(f"{stage}: {f'trained {steps:,} steps' if steps else 'complete already'}")
    guide = store.read_json(folder.stage("guide") / calibration.TABLE)
    console.table("The guide by noise level, %", calibration.COLUMNS, calibration.rows(guide))
    console.prose(calibration.advice(guide, settings.synth.guidance_interval))
    if "tensorboard" in (log or ()):
        console.say(f"figures: tensorboard --logdir {shlex.quote(str(path / 'tensorboard'))}")
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
                left, rate = console.duration(figures["seconds_left"]), images_rate(figures["images_per_second"])
                console.note(f"{what}: {total:,} steps, about {left} at {rate} images/s")
        report(what, done, total, figures)

    return hear


def show_forecast(recipe: Recipe, path: Path, tail: LongTail, device: torch.device, json: bool, whole: bool = False) -> None:
    """Measure what training would do and take, and print it as a table or as JSON.

    Args:
        whole: also what filling the tail and evaluating would take after that.
    """
    from engines.training.forecast import forecast

    with console.progress() as report:
        found = forecast(path, recipe, tail, device, report)
        complete = all(stage.status.complete for stage in found.stages)
        after = _forecast_afterwards(recipe, path, tail, device, complete, report) if whole else None
    stages = found.stages
    if json:
        rows = [
            {
                "stage": s.status.name,
                "state": s.status.state,
                "changes": s.status.changes,
                "steps": s.status.steps,
                "steps_left": s.steps_left,
                "images_per_second": s.images_per_second,
                "seconds_left": s.seconds_left,
                "parameters": s.parameters,
                "disk_bytes": s.disk_bytes,
                "memory_bytes": s.memory_bytes,
            }
            for s in stages
        ]
        totals = {"seconds_left": found.seconds_left, "disk_bytes": found.disk_bytes, "free_bytes": found.free_bytes}
        then = {"synthesis": list(map(dry_run.synthesis_json, after[0])), "evaluation": dry_run.evaluation_json(after[1])} if after else {}
        console.emit_json({"run": str(path), "device": device.type, "stages": rows, **totals, **then})
        return
    for sentence in filter(None, (s.status.sentence(path) for s in stages)):
        console.prose(sentence)
    columns = ("stage", "state", "steps left", "images/s", "takes", "parameters", "disk")
    console.table(
        "",
        columns,
        [
            (
                s.status.name,
                s.status.state,
                f"{s.steps_left:,}",
                None if s.images_per_second is None else images_rate(s.images_per_second),
                console.duration(s.seconds_left) if s.steps_left else None,
                f"{s.parameters / 1e6:.3g} M",
                console.size(s.disk_bytes) if s.disk_bytes else None,
            )
            for s in stages
        ],
    )
    memory = max((s.memory_bytes or 0 for s in stages), default=0)
    disk = f"{console.size(found.disk_bytes)} of disk, {console.size(found.free_bytes)} are free"
    console.prose(f"in all: {console.duration(found.seconds_left)} on this {device.type}; {disk}")
    if memory:
        console.say(f"memory: {console.size(memory)} while the steps were measured")
    if after:
        parts, evaluated = after
        made = sum(part.missing for part in parts)
        seconds, disk = sum(part.seconds_left for part in parts), console.size(sum(part.disk_bytes for part in parts))
        console.say(f"then: {made:,} images by {parts[0].engine}, about {console.duration(seconds)}, {disk}")
        left = evaluated.recognizers - evaluated.kept
        console.say(f"then: {left:,} recognizers, {evaluated.steps:,} steps, about {console.duration(evaluated.seconds_left)}")
    console.note("nothing was written; the same command without --dry-run does it")


def _forecast_afterwards(
    recipe: Recipe, path: Path, tail: LongTail, device: torch.device, complete: bool, report: Report
) -> tuple[list[PartForecast], EvaluationForecast]:
    """Synthesis and evaluation: of the run's own networks and images where they are there, else by what untrained ones take."""
    from engines.errors import EngineError, UsageError
    from engines.evaluation import forecast as evaluation
    from engines.store import RunFolder
    from engines.synthesis import forecast as synthesis
    from engines.synthesis.plan import fill_classes

    run, parts = RunFolder(path, recipe), list[synthesis.PartForecast]()
    if complete:
        try:
            parts = synthesis.forecast(run, fill_classes(run), report=report, make_room=True, data=tail)
        except (UsageError, EngineError) as failure:  # not exported yet, most likely
            console.note(f"images are estimated with PyTorch: {failure.problem}")
    parts = parts or [synthesis.forecast_untrained(recipe, tail, device, run.synth)]
    made = complete and not any(part.missing or part.aside for part in parts)
    return parts, evaluation.forecast(run, tail) if made else evaluation.forecast_unmade(recipe, tail)


def images_rate(rate: float) -> str:
    """130.44 -> "130", 9.284 -> "9.28"."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _with_data_path(recipe: Recipe, path: str) -> Recipe:
    from engines.recipe import validate

    if path == recipe.data.path:
        return recipe
    table = recipe.model_dump(mode="json")
    return validate({**table, "data": {**table["data"], "path": path}})


def _run_option(run: RunFolder) -> str:
    from engines.store import DEFAULT_ROOT

    return "" if run.path.parent == DEFAULT_ROOT else f" --run {run.path}"
