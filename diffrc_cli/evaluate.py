"""`diffrc evaluate`: does synthesis help? Recognizers on real images, on duplicates and on synthetic ones, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffrc_cli import console
from diffrc_cli.options import DataOption, JsonOption, RunOption, SetOption

if TYPE_CHECKING:
    from engines.evaluation.accuracy import Row, Table

SeedsOption = Annotated[
    int | None, typer.Option("--seeds", metavar="N", min=1, help="Recognizers of each kind. Default: recognizer.seeds of the recipe.")
]


def evaluate(
    run: RunOption = None,
    data: DataOption = None,
    seeds: SeedsOption = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Train recognizers on real images, real + replay and real + synthetic, and compare them. The same command continues.

    Example: diffrc evaluate --seeds 5
    """
    from engines import store
    from engines.data.longtail import prepare
    from engines.evaluation.accuracy import evaluate_run, verdict

    changes = [*(overrides or ()), *([f"recognizer.seeds={seeds}"] if seeds else ()), *([_data_path(data)] if data else ())]
    found = store.open_run(run, tuple(changes))
    found.classes()  # trained at all? says so before any image is read
    with store.locked(found.path):
        folder = store.create_run(found.path, found.recipe)  # the stored recipe is the one that the figures belong to
        with console.progress() as report:
            table = evaluate_run(folder, prepare(folder.recipe.data, None), report)
    if json:
        console.emit_json(table.to_json())
        return
    show(table)
    console.prose(verdict(table))
    console.say(f"kept in: {folder.evaluation / 'accuracy.json'}")


def show(table: Table) -> None:
    """Print the figures, the paired differences and the purity."""
    from engines.evaluation.accuracy import TITLES

    columns = list(table.rows[0].figures)
    seeds = "1 seed" if table.seeds == 1 else f"{table.seeds} seeds, mean ± sample deviation"
    for loss in dict.fromkeys(row.loss for row in table.rows):  # a table each: both side by side are too wide for 80 columns
        rows = [(TITLES[row.variant], *_figures(row, columns)) for row in table.rows if row.loss == loss]
        console.table(
            f"{TITLES[loss].capitalize()}: top-1 % on {table.test_images:,} test images ({seeds})", ("trained on", *columns), rows
        )
    intervals = [(c, c.interval) for c in table.comparisons]
    console.table(
        f"Real + synthetic minus a control, {table.column} classes, points, 95 % interval",
        ("control", "loss", "points", "95 %", "it"),
        [(TITLES[c.against], TITLES[c.loss], f"{i.difference:+.1f}", f"{i.low:+.1f} to {i.high:+.1f}", i.outcome) for c, i in intervals],
    )
    if table.purity:
        trust = f"itself {table.purity.oracle_accuracy:.1f} % right on the test set"
        console.prose(f"purity: an oracle ({trust}) takes {table.purity.overall:.1f} % of the synthetic images for their class")


def _figures(row: Row, columns: list[str]) -> list[str]:
    return [f"{f.mean:.1f}±{f.spread:.1f}" if f.n > 1 else f"{f.mean:.1f}" for f in (row.figures[c] for c in columns)]


def _data_path(path: Path) -> str:
    from json import dumps

    return f"data.path={dumps(str(path.absolute()))}"
