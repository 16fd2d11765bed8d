"""The options that several commands share, spelled once."""

from __future__ import annotations

import json
import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer


def _embedded_names(incomplete: str) -> list[str]:
    from diffrc_cli.recipe import embedded

    return [name for name in embedded() if name.startswith(incomplete)]


def _keys(incomplete: str) -> list[str]:
    from engines.recipe import Recipe

    table = Recipe(name="all").model_dump()
    sections = {name: section for name, section in table.items() if isinstance(section, dict)}
    keys = [name for name in table if name not in sections] + [f"{name}.{key}" for name, section in sections.items() for key in section]
    return [f"{key}=" for key in keys if key.startswith(incomplete)]


def _runs(incomplete: str) -> list[str]:
    return [path for path in sorted(str(file.parent) for file in RUNS.glob("*/recipe.toml")) if path.startswith(incomplete)]


def class_names(context: typer.Context, incomplete: str) -> list[str]:
    """Of the run that is named already, or of the latest one; blanks as underscores, which is the same name. A shell waits for it."""
    try:
        named = context.params.get("run") or RUNS / json.loads((RUNS / "latest.json").read_bytes())["run"]
        names = json.loads((Path(named) / "classes.json").read_bytes())["names"]
    except (OSError, ValueError, KeyError, TypeError):  # no run yet: nothing to offer
        return []
    words = ["_".join(str(name).split()) for name in names]
    fitting = (word for word in words if word.isprintable() and word.lower().startswith(incomplete.lower()))
    return [incomplete + word[len(incomplete) :] for word in fitting]  # in the case that was typed: a shell drops other ones


RUNS = Path("runs")  # engines.store.DEFAULT_ROOT, which brings torch with it
RECIPE_HELP = "An embedded recipe (diffrc recipe ls) or a TOML file. Default: ./diffrc.toml if there is one, else digits-lt."

RecipeArgument = Annotated[
    str | None, typer.Argument(metavar="[RECIPE]", help=RECIPE_HELP, show_default=False, autocompletion=_embedded_names)
]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", metavar="RECIPE", help=RECIPE_HELP, show_default=False, autocompletion=_embedded_names)
]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", metavar="PATH", help="The data set's folder or archive; wins over data.path of the recipe.", show_default=False),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one key of the recipe; repeatable. Example: --set source.lr=1e-4",
        show_default=False,
        autocompletion=_keys,
    ),
]
RunOption = Annotated[
    Path | None,
    typer.Option(
        "--run", metavar="DIR", help="The run folder. Default: the latest one in ./runs.", show_default=False, autocompletion=_runs
    ),
]
ClassOption = Annotated[
    list[str] | None,
    typer.Option(
        "--class",
        metavar="NAME",
        help="A class of the run, as you would type it; repeatable.",
        show_default=False,
        autocompletion=class_names,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One line of JSON on stdout instead of text.")]
PrecisionOption = Annotated[
    Literal["fp32", "bf16", "fp16"] | None,
    typer.Option("--precision", help="What the engine computes in, where it and the machine can.", show_default=False),
]
EngineDeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"] | None,
    typer.Option("--device", help="Where engines run; auto = a GPU where the engine can use one.", show_default=False),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done, what is there already, and what it would take; write nothing.")
]


class Log(StrEnum):
    """Where `--log` may show how training goes; Typer takes no list of a Literal."""

    tensorboard = "tensorboard"
    wandb = "wandb"


LogOption = Annotated[
    list[Log] | None,
    typer.Option(
        "--log",
        metavar="tensorboard|wandb",
        help="Show figures and sample grids there too, beside metrics.jsonl; repeatable.",
        show_default=False,
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
NewRunOption = Annotated[
    Path | None,
    typer.Option(
        "--run", metavar="DIR", help="The run folder to make or continue. Default: ./runs/NAME of the recipe.", show_default=False
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N; what is named must be there.")]


def of_run(path: Path) -> str:
    """What a `next:` line adds to a command, so that it takes this run: nothing where that is the latest one of ./runs."""
    from engines.store import DEFAULT_ROOT, read_json

    latest = DEFAULT_ROOT / "latest.json"
    if path.parent == DEFAULT_ROOT and latest.is_file() and read_json(latest) == {"run": path.name}:
        return ""
    return f" --run {shlex.quote(str(path))}"
