"""`diffrc run`: the whole job, from a data set to a report that says whether synthesis helped."""

from __future__ import annotations

from contextlib import closing

from diffrc_cli import console
from diffrc_cli.options import DataOption, DeviceOption, DryRunOption, JsonOption, LogOption, NewRunOption, RecipeArgument, SetOption
from diffrc_cli.train import estimating, recipe_of_run, show_forecast

WARNINGS_SHOWN = 5  # of copies and classes that fell short; the report has them all


def run(
    recipe: RecipeArgument = None,
    data: DataOption = None,
    run: NewRunOption = None,
    overrides: SetOption = None,
    device: DeviceOption = "auto",
    log: LogOption = None,
    plan: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Train, export, fill the tail, evaluate, report: everything in one command; after a kill the same command continues.

    Example: diffrc run digits-lt
    """
    from diffrc_cli.evaluate import show, show_trust
    from diffrc_cli.report import write
    from engines import store
    from engines.backends import choice
    from engines.backends.device import choose_device
    from engines.backends.export import builds_of_recipe, export_run
    from engines.data.longtail import prepare
    from engines.evaluation.accuracy import evaluate_run, verdict
    from engines.synthesis.synthesize import fill_run
    from engines.training.sinks import open_sinks, require_packages
    from engines.training.stages import train_run

    everywhere = ["synth.device=cpu"] if device == "cpu" else []  # a GPU is the engines' too only where their runtime can use it
    settings, path = recipe_of_run(recipe, data, run, [*(overrides or ()), *everywhere])
    where = choose_device(device)
    for build in builds_of_recipe(settings):
        choice.require(build)
        choice.device_of(build, settings.synth.device)
    require_packages(log or ())
    tail = prepare(settings.data, None)
    if not len(tail.test):
        raise _no_test_images(settings.data.source)
    if plan:
        show_forecast(settings, path, tail, where, json, whole=True)
        return
    with console.progress() as report:
        for images in (tail.pool, tail.train, tail.test):  # a damaged image is met before a folder is made, not hours later
            images.preload(report)
        with store.locked(path):
            folder = store.create_run(path, settings)
            with closing(open_sinks(log or (), path, settings.model_dump(mode="json"), console.note)) as sinks:
                train_run(folder, tail, where, estimating(report), console.note, sinks=sinks)
            export_run(folder, (settings.synth.model,), report)
            made = fill_run(folder, tail, report, console.note)
            found = evaluate_run(folder, tail, report)
            page = write(folder, tail)
    if json:
        console.emit_json({"run": str(path), "synthesized": made, "evaluation": found.to_json(), "report": str(page)})
        return
    show(found.table)
    show_trust(found.trust)
    for line in made["warnings"][:WARNINGS_SHOWN]:
        console.note(f"warning: {line}")
    console.prose(verdict(found.table))
    console.say(f"report: {page}")


def _no_test_images(source: str) -> Exception:
    from engines.errors import DataError

    return DataError(
        f"the {source} data has no test images, so nothing can be proved on it",
        "keep some a class: --set data.test_per_class=10, or add a test folder; diffrc train and synth need none",
    )
