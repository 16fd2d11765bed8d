"""The sections on what it did: accuracy of every way of training, differences with their intervals, and class by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engines.evaluation import charts
from engines.evaluation.accuracy import COLUMNS
from engines.evaluation.charts import Part, text
from engines.evaluation.report.page import (
    DASH,
    ROWS_SHOWN,
    Section,
    block,
    entries,
    entry,
    folded,
    interval,
    legend,
    listed,
    note,
    plural,
    row,
    signed,
    table,
)
from engines.evaluation.report.parts import Parts, comparison_of, first_method, methods_of, row_of, stronger_control
from engines.evaluation.report.titles import heading_of, title_of

BLOCKS_SHOWN = 3  # ways of training whose every row is shown at once; of more, the rows are folded
CHANCE = "The bars are 95 % bootstrap intervals over seeds and test images, pair by pair."


def gains_section(parts: Parts) -> Section:
    """Accuracy by group, and what the synthetic images changed."""
    if not parts.table:
        return Section("gains", "What it did", "")
    return Section("gains", "What it did", f"{_words(parts.table)}{_tables(parts.table)}{_intervals(parts.table)}", "Accuracy")


def classes_section(parts: Parts) -> Section:
    """Accuracy of each class with and without synthetic images, by the first way of training."""
    content = _classes(parts) if parts.table else ""
    return Section("classes", "Class by class", content, "Classes")


def tested_words(found: Mapping[str, Any]) -> str:
    """How the figures of a table were measured."""
    seeds = "1 seed" if found["seeds"] == 1 else f"{found['seeds']} seeds, mean \N{PLUS-MINUS SIGN} sample deviation"
    return f"Top-1 in percent on {found['test_images']:,} test images that nothing was trained or chosen on; {seeds}."


# --------------------------------------------------------------------------------------------------------------- tables


def _words(found: Mapping[str, Any]) -> str:
    words = (
        f"{tested_words(found)} Std is the deviation between the groups: lower is fairer. Bold is the best of its block, tinted are rows "
        "with synthetic images."
        if len(methods_of(found)) <= BLOCKS_SHOWN
        else f"{tested_words(found)} Bold is the best of its column."
    )
    if twins := found.get("test_images_in_train", 0):
        words += f" The data set itself holds {plural(twins, 'test image')} that are training images too."
    return f"<p>{words}</p>"


def _tables(found: Mapping[str, Any]) -> str:
    columns = [c for c in COLUMNS if c in found["rows"][0]["figures"]]
    methods = methods_of(found)
    head = ("", *(c.capitalize() for c in columns))
    blocks = {method: _block(found, method, columns) for method in methods}
    if len(methods) <= BLOCKS_SHOWN:
        return table("Accuracy by group", head, "".join(blocks.values()))
    full = table("Accuracy by group, every way of training", head, "".join(blocks.values()))
    return f"{_short_table(found, methods, columns)}{folded('Every row, with the controls', full, 4 * len(methods))}"


def _block(found: Mapping[str, Any], method: str, columns: Sequence[str]) -> str:
    rows = [r for r in found["rows"] if r["method"] == method]
    best = {c: (min if c == "std" else max)(round(r["figures"][c]["mean"], 1) for r in rows) for c in columns}
    shown = "".join(
        row(
            text(title_of(r["variant"])),
            [figure_cell(r["figures"][c], best[c]) for c in columns],
            "ours" if r["variant"] == "synthetic" else "",
        )
        for r in rows
    )
    return block(heading_of(method), shown, len(columns) + 1)


def _short_table(found: Mapping[str, Any], methods: Sequence[str], columns: Sequence[str]) -> str:
    """A row for each way of training: real images alone, and with synthetic ones, of the two columns that matter most."""
    told = [c for c in (found["column"], "all") if c in columns]
    head = ["Trained with", *(f"{c.capitalize()}{words}" for c in told for words in (", real", ", + syn\N{SOFT HYPHEN}thetic"))]
    rows = ""
    pairs = {m: (row_of(found, "real", m), row_of(found, "synthetic", m)) for m in methods}
    best = {
        (c, i): max((round(pair[i]["figures"][c]["mean"], 1) for pair in pairs.values() if pair[i]), default=0.0)  # type: ignore[index]
        for c in told
        for i in (0, 1)
    }
    for method, pair in pairs.items():
        cells = [figure_cell(side["figures"][c], best[c, i]) if side else DASH for c in told for i, side in enumerate(pair)]
        rows += row(text(title_of(method)), cells)
    return table("Accuracy by way of training", head, rows)


def figure_cell(figure: Mapping[str, Any], best: float | None = None) -> str:
    """A mean with its spread; bold where it is the best. HTML."""
    mean = f"{figure['mean']:.1f}"
    mean = f"<b>{mean}</b>" if best is not None and round(figure["mean"], 1) == best else mean
    return mean + (f" <small>\N{PLUS-MINUS SIGN} {figure['spread']:.1f}</small>" if figure.get("n", 2) > 1 else "")


# ------------------------------------------------------------------------------------------------------------ intervals


def _intervals(found: Mapping[str, Any]) -> str:
    every = [c for c in found["comparisons"] if c["variant"] == "synthetic"]
    if not every:
        return ""
    methods = methods_of(found)
    first = [c for m in methods if (c := comparison_of(found, stronger_control(found, m), m))]
    few_words = (
        "Dots right of the line: synthesis is better. "
        f"{CHANCE} <i>Replay</i> duplicates real tail images as often as there are synthetic ones; <i>same weight</i> gives the "
        "duplicates the loss weight and prior of the synthetic images as well, so that only the images differ."
    )
    title = f"<h3>Real + synthetic, {text(found['column'])} classes, difference in points</h3>"
    if len(methods) <= BLOCKS_SHOWN:
        return f'{title}{interval_rows(every)}<p class="note">{few_words}</p>'
    rest = folded("Every control", interval_rows(every), len(every))
    words = "<p>Each against the stronger of its controls, real alone or replay.</p>"
    return f'{title}{words}{interval_rows(first)}{rest}<p class="note">{few_words}</p>'


def interval_rows(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """A dot with its interval for each comparison, in points, on one scale that shows 0."""
    reach = max(max(abs(c["interval"]["low"]), abs(c["interval"]["high"])) for c in comparisons) * 1.05 or 1.0
    bounds = (-reach, reach)
    return entries(
        "".join(interval_entry(_against(c), c["interval"], c["outcome"], bounds) for c in comparisons), charts.axis(bounds), "wide"
    )


def interval_entry(label: str, found: Mapping[str, Any], outcome: str, bounds: tuple[float, float]) -> str:
    """One of `interval_rows`."""
    figure = f'<b class="outcome {text(outcome)}">{signed(found["difference"])}</b> <small>[{interval(found)}]</small>'
    mark = charts.interval_mark(found["low"], found["difference"], found["high"], bounds, outcome, f"{label}: {outcome}")
    return entry(label, mark, figure)


def _against(comparison: Mapping[str, Any]) -> str:
    return f"against {title_of(comparison['against'])}, {title_of(comparison['method'])}"


# -------------------------------------------------------------------------------------------------------------- classes


def _classes(parts: Parts) -> str:
    found = parts.table
    method = first_method(found)
    pair = [row_of(found, variant, method) for variant in ("real", "synthetic")]
    if not (pair[0] and pair[1]):
        return ""
    before, after = pair[0]["per_class"], pair[1]["per_class"]
    tested = [k for k in range(len(found["names"])) if before[k] is not None and after[k] is not None]
    if not tested:
        return ""
    order = sorted(tested, key=lambda k: (-found["counts"][k], k))
    words = f"Accuracy in percent with {text(title_of(method))}, mean over seeds: hollow on real images alone, filled with synthetic ones."
    chart = ""
    if len(order) > ROWS_SHOWN:
        chart = "<h3>Gain of every class in points, the largest class first</h3>" + charts.gains(
            [Part(after[k] - before[k], found["groups"][k], _gain_words(found["names"][k], before[k], after[k])) for k in order],
            describe="Gain of each class in percentage points, the largest class first",
        )
        chart += legend([(group, "", group) for group in dict.fromkeys(found["groups"][k] for k in order)])
        chart += f"<h3>The {ROWS_SHOWN // 2} largest gains and the {ROWS_SHOWN // 2} largest losses</h3>"
        order = sorted(tested, key=lambda k: before[k] - after[k])
    shown = order if len(order) <= ROWS_SHOWN else [*order[: ROWS_SHOWN // 2], -1, *order[-ROWS_SHOWN // 2 :]]
    intervals = _class_intervals(found, method)
    low = min(min(before[k], after[k]) for k in tested)
    bounds = (max(0.0, 10 * ((low - 5) // 10)), 100.0)
    rows = "".join(
        f'<div class="gap">{len(order) - ROWS_SHOWN:,} more classes between</div>'
        if k < 0
        else _class_entry(found, k, before[k], after[k], bounds, intervals.get(k))
        for k in shown
    )
    if intervals:
        words += (
            " The faint band is the 95 % interval of the gain, over seeds and this class's test images. Of twenty classes that "
            "nothing has changed one lies outside it by chance."
        )
    return f"<p>{words}</p>{chart}{entries(rows, charts.axis(bounds))}{_class_table(found)}"


def _class_entry(
    found: Mapping[str, Any], k: int, before: float, after: float, bounds: tuple[float, float], gain: Mapping[str, Any] | None
) -> str:
    name, group = found["names"][k], found["groups"][k]
    band = (before + gain["low"], before + gain["high"]) if gain else None
    told = f'<span class="spare"> [{interval(gain)}]</span>' if gain else ""
    words = _gain_words(name, before, after) + (f", 95 % interval {interval(gain)}" if gain else "")
    mark = charts.dumbbell(before, after, bounds, group, band, words)
    return entry(name, mark, f"{after:.0f} <small>{signed(after - before)}{told}</small>", group)


def _class_intervals(found: Mapping[str, Any], method: str) -> dict[int, Mapping[str, Any]]:
    """By class id, the interval of synthetic minus real; {} where the table has none."""
    comparison = comparison_of(found, "real", method) or {}
    per_class = comparison.get("per_class") or ()
    return {k: entry for k, entry in enumerate(per_class) if entry}


def _class_table(found: Mapping[str, Any]) -> str:
    """Accuracy of each class by every way of training, with and without synthetic images."""
    methods = [m for m in methods_of(found) if row_of(found, "real", m) and row_of(found, "synthetic", m)]
    head = ["Class", "Group", "Real", "Synthetic", *(heading_of(m) for m in methods)]
    sides = {m: [(row_of(found, variant, m) or {})["per_class"] for variant in ("real", "synthetic")] for m in methods}
    rows = []
    for k, name in enumerate(found["names"]):
        cells = [text(found["groups"][k]), f"{found['counts'][k]:,}", f"{found['synthetic_counts'][k]:,}"]
        for m in methods:
            before, after = (side[k] for side in sides[m])
            there = before is not None and after is not None
            cells.append(f"{before:.0f} \N{RIGHTWARDS ARROW} {after:.0f} <small>{signed(after - before)}</small>" if there else DASH)
        rows.append(row(f"<bdi>{text(name)}</bdi>", cells))
    shown = table("Accuracy of each class", head, listed(rows, "evaluation/accuracy.json"))
    told = note("Real images alone \N{RIGHTWARDS ARROW} with synthetic ones, in percent, mean over seeds.")
    return folded("Accuracy of each class, by every way of training", shown + told, len(rows))


def _gain_words(name: str, before: float, after: float) -> str:
    return f"{name}: {before:.0f} to {after:.0f} %, {signed(after - before)} points"
