"""`diffrc evaluate`: does synthesis help? Recognizers on real images, on duplicates and on synthetic ones, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffrc_cli import console, dry_run
from diffrc_cli.options import DataOption, DryRunOption, JsonOption, RunOption, SetOption, of_run

if TYPE_CHECKING:
    from engines.evaluation.accuracy import Row, Table
    from engines.evaluation.trust import Spread, Trust
    from engines.store import RunFolder

SeedsOption = Annotated[
    int | None, typer.Option("--seeds", metavar="N", min=1, help="Recognizers of each kind. Default: recognizer.seeds of the recipe.")
]
SHORT_TITLES = {"real": "real", "replay": "+ replay", "replay_as_synthetic": "same weight", "synthetic": "+ synthetic"}
FeaturesOption = Annotated[
    Path | None,
    typer.Option(
        "--features",
        metavar="FILE",
        help="A file of diffrc import inception: whose features images are compared in. Default: the run's own recognizer's.",
        show_default=False,
    ),
]


def evaluate(
    run: RunOption = None,
    data: DataOption = None,
    seeds: SeedsOption = None,
    features: FeaturesOption = None,
    overrides: SetOption = None,
    plan: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Train recognizers on real images, real + replay and real + synthetic, and compare them. The same command continues.

    Example: diffrc evaluate --seeds 5
    """
    from engines import store
    from engines.data.longtail import prepare
    from engines.evaluation.accuracy import evaluate_run, verdict

    changes = [*(overrides or ()), *([f"recognizer.seeds={seeds}"] if seeds else ()), *([_data_path(data)] if data else ())]
    opened = store.open_run(run, tuple(changes))
    opened.classes()  # trained at all? says so before any image is read
    if plan:
        _forecast(opened, json)
        return
    with store.locked(opened.path):
        folder = store.create_run(opened.path, opened.recipe)  # the stored recipe is the one that the figures belong to
        with console.progress() as report:
            found = evaluate_run(folder, prepare(folder.recipe.data, None), report, features)
    if json:
        console.emit_json(found.to_json())
        return
    show(found.table)
    show_trust(found.trust)
    console.prose(verdict(found.table))
    console.say(f"kept in: {folder.evaluation / 'accuracy.json'}")
    console.say(f"next: diffrc report{of_run(folder.path)}")


def _forecast(run: RunFolder, json: bool) -> None:
    """What would be trained and what it would take."""
    from engines.data.longtail import prepare
    from engines.evaluation.forecast import forecast

    found = forecast(run, prepare(run.recipe.data, None))
    totals = dry_run.evaluation(found, run.evaluation)
    if json:
        console.emit_json({"run": run.path, **dry_run.evaluation_json(found), **totals.to_json()})
        return
    console.prose(dry_run.evaluation_sentence(found))
    totals.show()


def show(table: Table) -> None:
    """Print the figures, the paired differences and the purity."""
    from engines.evaluation.accuracy import TITLES

    columns = [column for column in table.rows[0].figures if column != "ece"]
    seeds = "1 seed" if table.seeds == 1 else f"{table.seeds} seeds, mean ± sample deviation"
    for method in table.methods:  # a table each: both side by side are too wide for 80 columns
        rows = [(TITLES[row.variant], *_figures(row, columns)) for row in table.rows if row.method == method]
        console.table(
            f"{TITLES[method].capitalize()}: top-1 % on {table.test_images:,} test images ({seeds})", ("trained on", *columns), rows
        )
    kinds = {row.variant: SHORT_TITLES[row.variant] for row in table.rows}
    errors = [(TITLES[method], *(_figures(table.row(kind, method), ["ece"])[0] for kind in kinds)) for method in table.methods]
    console.table("Expected calibration error, points", ("method", *kinds.values()), errors)
    intervals = [(c, c.interval) for c in table.comparisons]
    console.table(
        f"Real + synthetic minus a control, {table.column} classes, points, 95 % interval",
        ("control", "method", "points", "95 %", "it"),
        [(TITLES[c.against], TITLES[c.method], f"{i.difference:+.1f}", f"{i.low:+.1f} to {i.high:+.1f}", i.outcome) for c, i in intervals],
    )
    if table.purity:
        trust = f"itself {table.purity.oracle_accuracy:.1f} % right on the test set"
        console.prose(f"purity: an oracle ({trust}) takes {table.purity.overall:.1f} % of the synthetic images for their class")


def show_trust(trust: Trust) -> None:
    """Print how like real images the synthetic ones are."""
    title, reference = "FID" if trust.judge.is_fid else "Frechet distance", trust.frechet
    floor = f"{reference.floor:.3g}±{reference.floor_spread:.1g}" if reference else "-"
    told = trust.hit_rate_real
    rows = [
        (title, *_spread(trust.frechet, 3), floor),
        ("kernel distance (KID)", *_spread(trust.kid, 2), "0"),
        *((name, _share(getattr(trust, name)), "-", "-") for name in ("precision", "recall", "density", "coverage")),
        ("diversity in a class", _share(trust.diversity), "-", "1"),
        ("taken for their class, %", f"{trust.hit_rate:.1f}", "-", "-" if told is None else f"{told:.1f}"),
        ("told from real ones, %", *_spread(trust.real_or_synthetic, 3), "50"),
    ]
    console.table("Can these images be trusted?", ("synthetic images", "value", "95 %", "real ones"), rows)
    kind = "test" if trust.reference_set == "test" else "training"  # where the test set has too few
    named = "" if trust.judge.is_fid else "; no FID, comparable with itself alone"
    console.prose(
        f"{trust.images:,} synthetic images beside {trust.reference:,} {kind} images of their classes, "
        f"in the features of {trust.judge.name}{named}"
    )


def _spread(found: Spread | None, digits: int) -> tuple[str, str]:
    return ("-", "-") if found is None else (f"{found.value:.{digits}g}", f"{found.low:.{digits}g} to {found.high:.{digits}g}")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _figures(row: Row, columns: list[str]) -> list[str]:
    return [f"{f.mean:.1f}±{f.spread:.1f}" if f.n > 1 else f"{f.mean:.1f}" for f in (row.figures[c] for c in columns)]


def _data_path(path: Path) -> str:
    from json import dumps

    return f"data.path={dumps(str(path.absolute()))}"
