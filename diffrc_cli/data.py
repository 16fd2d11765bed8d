"""`diffrc data show | classes | check | export`: the long tail that a recipe cuts out of a data set, and what is shared of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from diffrc_cli import console, data_check, data_export
from diffrc_cli.options import DataOption, JsonOption, RecipeOption, RunOption, SetOption
from diffrc_cli.recipe import resolve

if TYPE_CHECKING:
    from engines.data.longtail import LongTail

COUNTS_SHOWN = 100  # of more classes only the first and last counts are printed
SIZES_SHOWN = 5

app = typer.Typer(
    no_args_is_help=True,
    help="Data: what a recipe makes of a data set, and the balanced one for other tools.\n\nExample: diffrc data show --data DIR",
)


@app.command()
def show(recipe: RecipeOption = None, data: DataOption = None, overrides: SetOption = None, json: JsonOption = False) -> None:
    """Show the long tail: images a class, groups, image sizes, and the hash of the images that are kept.

    Example: diffrc data show --recipe cifar10-lt-100 --data DIR
    """
    from engines.data.longtail import prepare

    settings = resolve(recipe, overrides)
    tail = prepare(settings.data, data, for_training=False)
    sizes = {f"{width}x{height}": count for (width, height), count in tail.train.sizes.most_common()}
    if json:
        console.emit_json({"recipe": settings.name, **tail.summary(), "sizes": sizes})
        return
    console.prose(f"{settings.name}: {len(tail.train):,} training images in {len(tail.names)} classes, {len(tail.test):,} test images")
    console.prose(f"images a class: {_counts(tail.counts.tolist())}, imbalance {tail.imbalance:.4g}")
    if skipped := tail.pool.skipped + tail.test.skipped:
        console.say(f"left out as unreadable: {skipped:,}")
    if quarantined := len(tail.pool.left_out) + len(tail.test.left_out):
        console.say(f"left out by {settings.data.quarantine}: {quarantined:,}")
    console.say()
    rows = [console.Bar(name, int(n), group) for name, n, group in zip(tail.names, tail.counts, tail.groups, strict=True)]
    console.bars("", rows)
    console.say()
    console.table("", ("group", "classes", "images", "share"), _group_rows(tail))
    console.prose(f"image sizes: {_sizes(sizes, len(tail.train))} -> {settings.data.image_size_px} px")
    console.say(f"kept images: sha256 {tail.kept_sha256}")
    _warn(tail)


@app.command()
def classes(
    recipe: RecipeOption = None, data: DataOption = None, run: RunOption = None, overrides: SetOption = None, json: JsonOption = False
) -> None:
    """List the classes: id, name, training images, group. Of a run, or of what a recipe makes of a data set.

    Without options those of the latest run, or of the default recipe if there is no run yet.

    Example: diffrc data classes --json
    """
    table = _table_of_run(run) if not (recipe or data or overrides) or run else None
    if table is None:
        from engines.data.longtail import prepare

        table = prepare(resolve(recipe, overrides).data, data, for_training=False).table()
    rows = list(zip(range(len(table["names"])), table["names"], table["counts"], table["groups"], strict=True))
    if json:
        console.emit_json([{"id": k, "name": name, "images": count, "group": group} for k, name, count, group in rows])
        return
    console.table("", ("id", "class", "images", "group"), rows)


app.command("check")(data_check.check)
app.command("export")(data_export.export)


def _table_of_run(path: Any) -> dict[str, Any] | None:
    """The stored class table of a run; None where no run was named and there is none with a table."""
    from engines import store

    if path is None and not (store.DEFAULT_ROOT / "latest.json").exists():
        return None
    found = store.open_run(path)
    if path is None and not (found.path / "classes.json").exists():
        return None
    console.note(f"run: {found.path}")
    return found.classes()


def _counts(counts: list[int]) -> str:
    if len(counts) <= COUNTS_SHOWN:
        return str(counts)
    ends = [", ".join(map(str, part)) for part in (counts[:10], counts[-10:])]
    return f"[{ends[0]}, ... {len(counts) - 20} more ..., {ends[1]}]"


def _group_rows(tail: LongTail) -> list[tuple[str, int, int, str]]:
    sizes = tail.summary()["group_sizes"]
    return [(group, part["classes"], part["images"], f"{part['images'] / len(tail.train):.1%}") for group, part in sizes.items()]


def _sizes(sizes: dict[str, int], images: int) -> str:
    counted = sum(sizes.values())
    listed = ", ".join(f"{size} ({count:,})" for size, count in list(sizes.items())[:SIZES_SHOWN])
    more = f", and {len(sizes) - SIZES_SHOWN} more" if len(sizes) > SIZES_SHOWN else ""
    return listed + more + (f" of {counted:,} images looked at" if counted < images else "")


def _warn(tail: LongTail) -> None:
    """Say what training would refuse."""
    from engines.data.longtail import check_groups
    from engines.errors import DataError

    try:
        check_groups(tail.groups, tail.counts)
    except DataError as error:
        console.note(f"note: {error.problem}; training needs both. {error.remedy}")
