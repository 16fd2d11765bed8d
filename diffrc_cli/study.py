"""`diffrc study`: controls, ablations and the paper's tables as one command each, resumable and with the paper's figures beside ours."""

from __future__ import annotations

import difflib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffrc_cli import console, dry_run
from diffrc_cli.options import DataOption, DeviceOption, DryRunOption, JsonOption, RecipeOption, SetOption
from diffrc_cli.recipe import embedded, folder_of_recipes, resolve

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.resources.abc import Traversable

    import torch

    from engines.recipe import Recipe
    from engines.study.plan import Arm, Study

DEFAULT_NAME = "controls"


def _names(incomplete: str) -> list[str]:
    return [name for name in (*studies(), *embedded()) if name.startswith(incomplete)]


StudyArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[STUDY]",
        help="An embedded study (--list), a TOML file with arms, or a recipe, which gets the controls. Default: the controls.",
        show_default=False,
        autocompletion=_names,
    ),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Where to. Default: ./runs/study-NAME-RECIPE.", show_default=False)
]
SeedsOption = Annotated[
    int | None, typer.Option("--seeds", metavar="N", min=1, help="Of diffusion models, noise and recognizers.", show_default=False)
]
BudgetOption = Annotated[
    float | None,
    typer.Option(
        "--budget", metavar="HOURS", min=0.0, help="Begin nothing new after so long; the same command continues.", show_default=False
    ),
]
WorkersOption = Annotated[
    int, typer.Option("--workers", metavar="N", min=0, help="Diffusion models trained at a time; 0 = one a GPU, or one a processor.")
]
HeldOutOption = Annotated[
    bool, typer.Option("--held-out", help="Test on training images that the long tail leaves out, to choose settings without the test set.")
]
ListOption = Annotated[bool, typer.Option("--list", help="List the embedded studies.")]


def study(
    study: StudyArgument = None,
    recipe: RecipeOption = None,
    data: DataOption = None,
    out: OutOption = None,
    seeds: SeedsOption = None,
    budget: BudgetOption = None,
    workers: WorkersOption = 0,
    held_out: HeldOutOption = False,
    device: DeviceOption = "auto",
    overrides: SetOption = None,
    list_studies: ListOption = False,
    plan: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Run a grid of settings with several seeds and compare them: the controls, the paper's tables and figure, or a file of your own.

    Example: diffrc study table3 --recipe digits-lt
    """
    if list_studies:
        _list(json)
        return
    from engines.backends.device import choose_device
    from engines.errors import UsageError
    from engines.store import DEFAULT_ROOT
    from engines.study.plan import resolve_arms
    from engines.study.run import PAGE, run_study

    found, base = _find(study)
    if base and recipe:
        raise UsageError(
            f"{base} and --recipe {recipe} are two recipes", f"diffrc study {base}, or diffrc study controls --recipe {recipe}"
        )
    changed = {"seeds": seeds} if seeds else {}
    found = found.model_copy(update=changed | ({"split": "held-out"} if held_out else {}))
    arms = resolve_arms(found, lambda name, items: _with_data(resolve(name, items), data), recipe or base, overrides or ())
    folder = out or DEFAULT_ROOT / f"study-{found.name}-{arms[0].recipe.name}{'-held-out' if found.split == 'held-out' else ''}"
    where = choose_device(device)
    if plan:
        _plan(found, arms, folder, where, json)
        return
    with console.progress() as report:
        hours = float("inf") if budget is None else budget
        document = run_study(found, arms, folder, where, workers, hours, report, console.note, _command())
    page = folder / PAGE
    if json:
        console.emit_json({"study": document, "report": str(page)})
        return
    show(document)
    console.say(f"report: {page}")


def studies() -> dict[str, Traversable]:
    """The studies that come with DiffRC, by name."""
    files = (folder_of_recipes() / "studies").iterdir()
    return {file.name.removesuffix(".toml"): file for file in sorted(files, key=lambda f: f.name) if file.name.endswith(".toml")}


def show(document: dict[str, Any]) -> None:
    """Print a table a method: an arm a row, with the paper's figures where it prints any; then the paired differences."""
    from engines.evaluation.accuracy import TITLES

    tested = "test images" if document["test"] == "test" else "held-out training images"
    seeds = "1 seed" if document["seeds"] == 1 else f"{document['seeds']} seeds, mean ± sample deviation"
    arms: Sequence[dict[str, Any]] = document["arms"]
    for method in document["methods"]:
        rows = [(arm, row) for arm in arms for row in arm["rows"] if row["method"] == method and row["figures"]]
        if not rows:
            continue
        columns = list(rows[0][1]["figures"])
        printed = [(arm["title"], *(_figure(row["figures"].get(c)) for c in columns)) for arm, row in rows]
        console.table(f"{TITLES[method].capitalize()}: top-1 % on {tested} ({seeds})", ("arm", *columns), printed)
        if any(arm["paper"] for arm, _ in rows):
            paper = [(arm["title"], *(_printed(arm["paper"], c) for c in columns)) for arm, _ in rows]
            console.table("What the paper prints, on its own data and networks", ("arm", *columns), paper)
        compared = [
            (arm["title"], name, f"{d['difference']:+.1f}", f"{d['low']:+.1f} to {d['high']:+.1f}", d["outcome"])
            for arm, row in rows
            for name, d in row["against"].items()
            if arm["name"] not in document["against"]  # what controls are to each other stands in the document
        ]
        if compared:
            title = f"{document['column'].capitalize()} classes, points, 95 % interval"
            console.table(title, ("arm", "against", "points", "95 %", "it"), compared)


def _figure(figure: dict[str, float] | None) -> str:
    if figure is None:
        return ""
    return f"{figure['mean']:.1f}±{figure['spread']:.1f}" if figure["n"] > 1 else f"{figure['mean']:.1f}"


def _printed(paper: dict[str, float] | None, column: str) -> str:
    return f"{paper[column]:.1f}" if paper and column in paper else ""


def _find(name: str | None) -> tuple[Study, str | None]:
    """A study, and the recipe that was named in its place: a recipe gets the controls. Raises UsageError."""
    from engines.errors import UsageError
    from engines.study.plan import is_study, load, read

    known = studies()
    controls = load(known[DEFAULT_NAME].read_text(encoding="utf-8"), DEFAULT_NAME)
    if name is None:
        return controls, None
    if name in known:
        return load(known[name].read_text(encoding="utf-8"), name), None
    if name in embedded():
        return controls, name
    path = Path(name)
    if path.is_file():
        return (read(path), None) if is_study(path) else (controls, name)
    near = difflib.get_close_matches(name.lower(), (*known, *embedded()), n=3) or list(known)
    raise UsageError(f"there is no study or recipe named {name!r}", f"{', '.join(near)}      (all of them: diffrc study --list)")


def _with_data(recipe: Recipe, data: Path | None) -> Recipe:
    """`--data DIR` of several data sets holds each in a folder named as its source: DIR/cifar10, DIR/cifar100."""
    if data is None:
        return recipe
    own = data / recipe.data.source
    path = str((own if own.is_dir() else data).absolute())
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": path})})


def _command() -> str:
    """What was typed, as it can be typed again."""
    return shlex.join(["diffrc", *sys.argv[1:]])


def _list(json: bool) -> None:
    from engines.study.plan import load

    found = [load(file.read_text(encoding="utf-8"), name) for name, file in studies().items()]
    if json:
        console.emit_json([{"name": s.name, "title": s.title, "recipe": s.recipe, "arms": len(s.rows()), "seeds": s.seeds} for s in found])
        return
    console.table("", ("study", "what it asks", "arms", "seeds"), [(s.name, s.title, len(s.rows()), s.seeds) for s in found])
    console.prose("One of your own: diffrc study FILE.toml. A recipe's controls: diffrc study RECIPE.")


def _plan(study: Study, arms: Sequence[Arm], folder: Path, device: torch.device, json: bool) -> None:
    from engines.study.forecast import forecast
    from engines.study.run import plan, prepare_arms

    found, left = plan(study, arms, folder), forecast(study, arms, prepare_arms(arms), folder, device)
    totals = dry_run.Totals(left.seconds_left, left.disk_bytes, left.memory_bytes, left.device, folder)
    if json:
        apart = {"operations_left": left.operations, "images_seconds": left.images_seconds, "recognizers_seconds": left.recognizers_seconds}
        console.emit_json(found | apart | totals.to_json())
        return
    rows = [(a["title"], a["recipe"], a["images"] or "none", _keys(len(a["changes"]))) for a in found["arms"]]
    console.table(f"{study.title} {study.seeds} seeds", ("arm", "recipe", "images", "changes"), rows)
    console.prose(
        f"{found['sources']} source and {found['targets']} target models, {found['images']:,} images in {found['parts']} sets, "
        f"{found['recognizers']} recognizers; in {folder} {found['ready']} of the sets are ready. "
        "--json names the keys that an arm changes."
    )
    totals.show()


def _keys(count: int) -> str:
    return "1 key" if count == 1 else f"{count} keys" if count else "none"
