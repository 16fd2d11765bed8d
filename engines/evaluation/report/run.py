"""The report of a run: its head, and the order of its sections."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engines import store
from engines.data.longtail import LongTail
from engines.evaluation.charts import text
from engines.evaluation.report.gains import classes_section, gains_section
from engines.evaluation.report.making import cost_section, machine, reproduce_section, training_section
from engines.evaluation.report.page import duration, interval, masthead, page, signed, tile
from engines.evaluation.report.parts import (
    Parts,
    collect,
    comparison_of,
    first_method,
    mean_of,
    methods_of,
    stronger_control,
)
from engines.evaluation.report.tail import made_section, tail_section
from engines.evaluation.report.titles import title_of
from engines.evaluation.report.trust import guide_section, trust_section
from engines.recipe import Recipe
from engines.store import RunFolder

QUESTION = "Does synthesis help the tail?"
SECTIONS = (
    tail_section,
    made_section,
    gains_section,
    classes_section,
    trust_section,
    training_section,
    guide_section,
    cost_section,
    reproduce_section,
)
TILES = 6


def write_report(run: RunFolder, tail: LongTail | None = None, embedded: Recipe | None = None) -> Path:
    """Write the run's report and return its path. Parts that do not exist yet are left out.

    Args:
        tail: the data that the run was trained on, for real images beside generated ones.
        embedded: the embedded recipe of the run's name, for what the run's own changes in it.

    Raises: DataError for a damaged file, StorageError.
    """
    store.write_text(run.report, render(collect(run, tail, embedded)))
    return run.report


def render(parts: Parts) -> str:
    """The whole page. Every text that came from a user, a data set or a file is escaped."""
    footer = "Made by DiffRC. Generated images are synthetic; their files say so."
    return page(parts.name, _head(parts), (section(parts) for section in SECTIONS), footer)


def _head(parts: Parts) -> str:
    if not parts.table:
        return masthead(parts.name, QUESTION, "Not evaluated yet: <code>diffrc evaluate</code> answers it.")
    method = first_method(parts.table)
    first = comparison_of(parts.table, stronger_control(parts.table, method), method) or {}
    tiles = [shown for _, shown in zip(range(TILES), _tiles(parts), strict=False)]
    return masthead(parts.name, QUESTION, text(parts.table["verdict"]), str(first.get("outcome", "")), tiles)


def _tiles(parts: Parts) -> Iterator[str]:
    found = parts.table
    column = found["column"]
    first = first_method(found)
    others = [method for method in methods_of(found) if method != first]
    best = max(others, key=lambda m: mean_of(found, "real", m) or 0.0, default=None)
    for method in filter(None, (first, best)):  # of several, the one that real images alone do best with: the hardest to beat
        before, after = (mean_of(found, variant, method) for variant in ("real", "synthetic"))
        if before is not None and after is not None:
            figure = f"{before:.1f} \N{RIGHTWARDS ARROW} {after:.1f}"
            yield tile(f"{column.capitalize()}, {title_of(method)}", figure, "real, then with synthetic, %")
    if replay := comparison_of(found, "replay", first):
        words = f"points, 95 %: {interval(replay['interval'])}"
        yield tile("Against replay", signed(replay["interval"]["difference"]), words, replay["outcome"])
    copies: dict[str, Any] = (parts.copies.get("generated") or {}).get("pixel") or {}
    if copies.get("images"):
        usual = parts.copies["real"]["pixel"]
        yield tile("Copies, by pixels", f"{100 * copies['share']:.1f} %", f"of real images {100 * usual['share']:.1f} %")
    if found.get("purity"):
        purity = found["purity"]
        yield tile("Purity by an oracle", f"{purity['overall']:.1f} %", f"itself {purity['oracle_accuracy']:.1f} % right on the test set")
    if parts.cost:
        yield tile("Whole run", duration(sum(parts.cost.values())), machine(parts.environment))
    yield tile("Synthetic images", f"{sum(found['synthetic_counts']):,}", f"beside {sum(found['counts']):,} real ones")
