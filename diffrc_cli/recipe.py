"""`diffrc recipe ls | show | cp | validate | diff | cost`, and how every command finds its recipe."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffrc_cli import console
from diffrc_cli.options import ForceOption, JsonOption, SetOption
from engines.errors import UsageError

if TYPE_CHECKING:
    from engines.recipe import Recipe

DEFAULT_NAME = "digits-lt"
LOCAL_FILE = Path("diffrc.toml")
HEADER_KEYS = ("Command", "Cost", "Measured")  # what the first lines of every embedded recipe say, each as `# Key: text`

app = typer.Typer(
    no_args_is_help=True,
    help="Recipes: every number of a run, in one TOML file.\n\nExample: diffrc recipe ls",
)


def _names(incomplete: str) -> list[str]:
    return [name for name in embedded() if name.startswith(incomplete)]


NameOrFile = Annotated[
    str, typer.Argument(metavar="RECIPE", help="An embedded recipe or a TOML file.", show_default=False, autocompletion=_names)
]


@app.command("ls")
def list_recipes(json: JsonOption = False) -> None:
    """List the embedded recipes.

    Example: diffrc recipe ls
    """
    rows = []
    for name, text in ((name, file.read_text(encoding="utf-8")) for name, file in embedded().items()):
        recipe, header = resolve(name), header_of(text)
        rows.append(
            {
                "name": name,
                "data": recipe.data.source,
                "size_px": recipe.data.image_size_px,
                "default": name == DEFAULT_NAME,
                **{key.lower(): header.get(key, "") for key in HEADER_KEYS},
            }
        )
    if json:
        console.emit_json(rows)
        return
    console.table("", ("recipe", "px", "cost"), [(row["name"], row["size_px"], row["cost"]) for row in rows])
    console.prose(f"The default is {DEFAULT_NAME}. Every key of one: diffrc recipe show NAME. One of your own: diffrc recipe cp NAME FILE.")


@app.command()
def show(name: NameOrFile, overrides: SetOption = None, json: JsonOption = False) -> None:
    """Print a recipe with every key and its value.

    Example: diffrc recipe show digits-lt --set synth.steps=50
    """
    from engines.recipe import to_toml

    recipe = resolve(name, overrides)
    if json:
        console.emit_json(recipe.model_dump(mode="json"))
        return
    for line in to_toml(recipe).splitlines():
        console.say(line)


@app.command("cp")
def copy(
    name: NameOrFile,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to; in a folder it keeps its name.", show_default=False)],
    force: ForceOption = False,
) -> None:
    """Copy a recipe, comments and all, to start your own. A file that exists is kept (exit 2) unless --force.

    Example: diffrc recipe cp digits-lt diffrc.toml
    """
    from engines import store

    source = _find(name)
    resolve(name)  # a copy of something broken helps nobody
    target = file / f"{source.name.removesuffix('.toml')}.toml" if file.is_dir() else file
    if target.exists() and not force:
        raise UsageError(f"{target} exists already", f"diffrc recipe cp {name} {target} --force replaces it; or name another file")
    store.write_text(target, source.read_text(encoding="utf-8"))
    console.say(f"wrote {target}")


@app.command()
def validate(name: NameOrFile, overrides: SetOption = None, json: JsonOption = False) -> None:
    """Check a recipe; all its mistakes are told at once (exit 2).

    Example: diffrc recipe validate diffrc.toml
    """
    from engines.recipe import digest

    recipe = resolve(name, overrides)
    if json:
        console.emit_json({"recipe": name, "valid": True, "name": recipe.name, "sha256": digest(recipe)})
        return
    console.say(f"{name}: valid, named {recipe.name}, sha256 {digest(recipe)[:16]}")


@app.command()
def diff(a: NameOrFile, b: NameOrFile, json: JsonOption = False) -> None:
    """Show the keys in which two recipes differ. Either may be the recipe.toml of a run.

    Example: diffrc recipe diff cifar10-lt-100 cifar100-lt-100
    """
    from engines.recipe import differences

    found = differences(resolve(a), resolve(b))
    if json:
        console.emit_json([{"key": key, "a": left, "b": right} for key, left, right in found])
    elif found:
        console.table("", ("key", a, b), [(key, _value(left), _value(right)) for key, left, right in found])
    else:
        console.say("no differences")


@app.command()
def cost(
    name: NameOrFile,
    overrides: SetOption = None,
    tflops: Annotated[float, typer.Option("--tflops", metavar="N", min=0.001, help="Peak of your device, dense bfloat16.")] = 312.0,
    json: JsonOption = False,
) -> None:
    """Estimate what a recipe costs: operations, counted; hours, for a device of that peak. Trains nothing.

    Example: diffrc recipe cost cifar10-lt-100 --tflops 989
    """
    from engines.training.cost import SHARE_OF_PEAK, cost_of, hours

    counted = cost_of(resolve(name, overrides))
    parts = {"source": counted.source, "target": counted.target, "guide": counted.guide, "1,000 images": 1000 * counted.image}
    if json:
        stages = {part: {"operations": operations, "hours": hours(operations, tflops * 1e12)} for part, operations in parts.items()}
        console.emit_json({"recipe": name, "tflops": tflops, "share_of_peak": SHARE_OF_PEAK, "parts": stages})
        return
    rows = [
        (part, f"{operations:.2g}", *(console.duration(3600 * h) for h in hours(operations, tflops * 1e12)))
        for part, operations in parts.items()
    ]
    console.table("", ("part", "operations", "takes from", "to"), rows)
    low, high = SHARE_OF_PEAK
    device = " (NVIDIA A100, dense bfloat16)" if tflops == 312 else ""
    console.prose(
        f"Estimated for a device of {tflops:g} TFLOP/s{device} that reaches {low:.0%} to {high:.0%} of them, the share of its own peak "
        "that a CPU was measured to reach: to choose by, not to publish."
    )


def folder_of_recipes() -> Traversable:
    """Where they lie: the wheel's `diffrc_cli/recipes`, or the checkout's `recipes`."""
    folder: Traversable = resources.files("diffrc_cli") / "recipes"
    return folder if folder.is_dir() else Path(__file__).parent.parent / "recipes"


def embedded() -> dict[str, Traversable]:
    """The recipes that come with DiffRC, by name, the default first."""
    files = {file.name.removesuffix(".toml"): file for file in folder_of_recipes().iterdir() if file.name.endswith(".toml")}
    return {name: files[name] for name in sorted(files, key=_order)}


def resolve(name_or_file: str | None, overrides: Sequence[str] | None = None) -> Recipe:
    """The recipe a command works with.

    Args:
        name_or_file: an embedded name or a TOML file. None: ./diffrc.toml if there is one, else the default; stderr says which.
        overrides: items of `--set`.

    Raises:
        UsageError: no such recipe (the nearest names are told), or mistakes in it.
    """
    from engines.recipe import load, read

    if name_or_file is None:
        name_or_file = str(LOCAL_FILE) if LOCAL_FILE.exists() else DEFAULT_NAME
        console.note(f"recipe: {name_or_file}" + ("" if LOCAL_FILE.exists() else f" (embedded; a ./{LOCAL_FILE} would be taken instead)"))
    source = _find(name_or_file)
    if isinstance(source, Path) and name_or_file not in embedded():
        return read(source, tuple(overrides or ()))
    return load(source.read_text(encoding="utf-8"), tuple(overrides or ()), origin=name_or_file)


def header_of(text: str) -> dict[str, str]:
    """The `# Key: text` lines at the top of a recipe: its command, its cost, what was measured."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    pairs = (line[1:].strip().partition(": ") for line in lines)
    return {key: value.strip() for key, colon, value in pairs if colon and key in HEADER_KEYS}


def _order(name: str) -> tuple[bool, list[str | int]]:
    """The default first, then by name, with numbers by value."""
    return name != DEFAULT_NAME, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _find(name_or_file: str) -> Traversable:
    names = embedded()
    if name_or_file in names:
        return names[name_or_file]
    path = Path(name_or_file)
    if path.exists() and not path.is_dir():  # a pipe is as good as a file
        return path
    if path.suffix == ".toml" or len(path.parts) > 1:
        raise UsageError(f"there is no recipe file {name_or_file}", "diffrc recipe ls lists the embedded ones")
    near = difflib.get_close_matches(name_or_file.lower(), names, n=3) or sorted(names)
    raise UsageError(f"there is no recipe named {name_or_file!r}", f"{', '.join(near)}      (all of them: diffrc recipe ls)")


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
