"""The page of a study: the paper's table beside ours, differences from the controls, curves, panels, likeness, cost, how to repeat it."""

from __future__ import annotations

import base64
import binascii
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from engines.evaluation import charts
from engines.evaluation.accuracy import COLUMNS
from engines.evaluation.charts import Measured, Part, text
from engines.evaluation.report.gains import CHANCE, figure_cell, interval_entry
from engines.evaluation.report.making import STYLES, fact_list, recipe_text
from engines.evaluation.report.page import (
    DASH,
    Section,
    block,
    duration,
    entries,
    entry,
    folded,
    interval,
    legend,
    listed,
    masthead,
    note,
    page,
    picture,
    plural,
    row,
    signed,
    significant,
    table,
    tile,
)
from engines.evaluation.report.titles import heading_of, title_of
from engines.evaluation.report.trust import fidelity

Document = Mapping[str, Any]
DIFFERENCES_SHOWN = 20  # of a method, against one arm; of more, the rest is folded
SHEETS_SHOWN = 12
WORDS = {
    "test": "test images that nothing was trained or chosen on",
    "held-out": "training images that were held out to choose settings on",
}


def render_study(document: Document) -> str:
    """The whole page of a study.json; any field may be missing, and every text in it is escaped.

    Args:
        document: plain JSON values. Of `arms`: name, title, changes, images, seconds of one seed by stage, the paper's figures by
            column, `rows` (a method, its figures by column, and its differences `against` other arms), `fidelity` as trust.json, and
            `sheet_png` in base64.
    """
    title = str(document.get("title") or document.get("name") or "Study")
    sections = (
        Section("results", "Results", _results(document)),
        Section("differences", "What makes the difference", _differences(document), "Differences"),
        Section("curves", "Curves", _curves(document)),
        Section("panels", "The images", _panels(document), "Images"),
        Section("fidelity", "Like real images?", _fidelity(document), "Likeness"),
        Section("cost", "What it cost", _cost(document), "Cost"),
        Section("reproduce", "How to reproduce it", _reproduce(document), "Reproduce"),
    )
    footer = "Made by DiffRC. Generated images are synthetic; their files say so."
    return page(title, masthead(str(document.get("name") or "study"), title, _told(document), "", list(_tiles(document))), sections, footer)


def _told(document: Document) -> str:
    """What was done, in a sentence, as HTML."""
    arms, seeds = _arms(document), document.get("seeds")
    words = plural(len(arms), "arm") + (f" of the recipe {document['recipe']}" if document.get("recipe") else "")
    words += f", {plural(seeds, 'seed')} each" if isinstance(seeds, int) else ""
    tested = document.get("test") or document.get("split")
    words += f", judged on {WORDS[tested]}" if tested in WORDS else ""
    return text(words) + "."


def _tiles(document: Document) -> Iterator[str]:
    """The best arm with synthetic images, by the first way of training on the classes that the study is about, and what it gains."""
    column, methods = str(document.get("column") or ""), _methods(document)
    rows = [pair for pair in (_rows(document, methods[0]) if methods else []) if column in (pair[1].get("figures") or {})]
    rows = [(arm, found) for arm, found in rows if arm.get("kind", "synthetic") == "synthetic"] or rows
    if rows:
        arm, found = max(rows, key=lambda pair: float(pair[1]["figures"][column]["mean"]))
        figure = found["figures"][column]
        title = f"Best synthesis on {column}, {title_of(methods[0])}"
        yield tile(title, f"{figure['mean']:.1f} %", f"{_title(arm)}, \N{PLUS-MINUS SIGN} {figure['spread']:.1f}")
        against = found.get("against") or {}
        for other in _in_order(document, against)[:2]:
            d = against[other]
            title, words = f"It against {_titles(document).get(other, other)}", f"points, 95 %: {interval(d)}"
            yield tile(title, signed(d["difference"]), words, str(d.get("outcome", "")))


def _in_order(document: Document, names: Iterable[str]) -> list[str]:
    """Names of arms that others are compared with, in the study's order."""
    order = [str(name) for name in document.get("against") or ()]
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def _arms(document: Document) -> Sequence[Document]:
    return document.get("arms") or ()


def _titles(document: Document) -> dict[str, str]:
    return {str(arm.get("name", "")): _title(arm) for arm in _arms(document)}


def _title(arm: Document) -> str:
    return str(arm.get("title") or arm.get("name") or "arm")


def _methods(document: Document) -> list[str]:
    found = [str(r["method"]) for arm in _arms(document) for r in arm.get("rows") or () if r.get("method")]
    return list(dict.fromkeys([*(m for m in document.get("methods") or () if m in found), *found]))


def _rows(document: Document, method: str) -> list[tuple[Document, Document]]:
    """(arm, its row) of a method, in the order of the arms."""
    return [(arm, r) for arm in _arms(document) for r in arm.get("rows") or () if r.get("method") == method]


# ------------------------------------------------------------------------------------------------------------- results


def _results(document: Document) -> str:
    methods = _methods(document)
    if not methods:
        return '<p class="none">Nothing is finished yet.</p>'
    figures = [r.get("figures") or {} for method in methods for _, r in _rows(document, method)]
    columns = [c for c in COLUMNS if any(c in f for f in figures)]
    papers = [c for c in columns if any(c in (arm.get("paper") or {}) for arm in _arms(document))]
    head = ["", *(name for c in columns for name in ((c.capitalize(), "paper") if c in papers else (c.capitalize(),)))]
    body = "".join(_block(document, method, columns, papers, first=method == methods[0]) for method in methods)
    words = "Top-1 in percent, mean \N{PLUS-MINUS SIGN} sample deviation over seeds. "
    words += "Std is the deviation between the groups: lower is fairer. Bold is the best of its block."
    if papers:
        words += " The paper's figures stand beside ours, under <i>paper</i>: its data set and its length of training are not always ours."
    notes = "".join(f"<li>{text(line)}</li>" for line in document.get("notes") or ())
    shown = table("Accuracy of every arm", head, body, "papers" if papers else "")
    return f"<p>{words}</p>{shown}" + (f'<ul class="notes">{notes}</ul>' if notes else "")


def _block(document: Document, method: str, columns: Sequence[str], papers: Sequence[str], first: bool) -> str:
    """The arms of a method; the paper has one recognizer, so its figures stand in the first block alone."""
    rows = _rows(document, method)
    best = {
        c: (min if c == "std" else max)(round(r["figures"][c]["mean"], 1) for _, r in rows if c in (r.get("figures") or {}))
        for c in columns
        if any(c in (r.get("figures") or {}) for _, r in rows)
    }
    shown = ""
    for arm, found in rows:
        cells = []
        for c in columns:
            figure = (found.get("figures") or {}).get(c)
            cells.append(figure_cell(figure, best[c]) if figure else DASH)
            if c in papers:
                paper = (arm.get("paper") or {}).get(c) if first else None
                cells.append(f"<i>{paper:.1f}</i>" if isinstance(paper, int | float) else "")
        images = arm.get("images")
        told = f" <small>{plural(images, 'image')}</small>" if isinstance(images, int) and first else ""
        shown += row(f"{text(_title(arm))}{told}", cells)
    return block(heading_of(method), shown, 1 + len(columns) + len(papers))


# --------------------------------------------------------------------------------------------------------- differences


def _differences(document: Document) -> str:
    titles = _titles(document)
    controls = [str(name) for name in document.get("against") or ()]
    found = [
        (method, arm, other, difference)
        for method in _methods(document)
        for arm, r in _rows(document, method)
        for other, difference in (r.get("against") or {}).items()
        if difference and arm.get("name") not in controls[: controls.index(other) if other in controls else 0]  # not both ways
    ]
    if not found:
        return ""
    reach = max(max(abs(d["low"]), abs(d["high"])) for *_, d in found) * 1.05 or 1.0
    bounds = (-reach, reach)
    content = ""
    for method in _methods(document):
        of_method = [(arm, other, d) for m, arm, other, d in found if m == method]
        content += f"<h3>{text(heading_of(method))}</h3>" if of_method else ""
        for other in _in_order(document, dict.fromkeys(other for _, other, _ in of_method)):
            shown = [interval_entry(_title(arm), d, str(d.get("outcome", "")), bounds) for arm, against, d in of_method if against == other]
            content += f"<h4>Against {text(titles.get(other, other))}</h4>"
            content += entries("".join(shown[:DIFFERENCES_SHOWN]), charts.axis(bounds), "wide")
            if rest := shown[DIFFERENCES_SHOWN:]:
                content += folded(f"{len(rest):,} more", entries("".join(rest), charts.axis(bounds), "wide"), len(rest))
    column = document.get("column")
    where = f" on the {text(column)} classes" if column else ""
    words = f"Difference in points{where}: right of the line the arm is better than the one it is compared with. {CHANCE}"
    return f"<p>{words}</p>{content}"


# -------------------------------------------------------------------------------------------------------------- curves


def _curves(document: Document) -> str:
    figures = ""
    for curve in document.get("curves") or ():
        points = sorted((p for p in curve.get("points") or () if p.get("mean") is not None), key=lambda p: float(p["x"]))
        paper = sorted((p for p in curve.get("points") or () if p.get("paper") is not None), key=lambda p: float(p["x"]))
        series = [Measured("ours", "c0", [(float(p["x"]), float(p["mean"]), float(p.get("spread") or 0.0)) for p in points])]
        if paper:
            series.append(Measured("the paper's", "c5", [(float(p["x"]), float(p["paper"]), 0.0) for p in paper]))
        title, label = str(curve.get("title", "")), str(curve.get("x_label", ""))
        chart = charts.error_curve(series, label, describe=f"{title} over {label}")
        shown = legend([(s.style, "", s.name) for s in series if s.points])
        rows = [_point_row(p) for p in sorted(curve.get("points") or (), key=lambda p: float(p["x"]))]
        values = table(title or label, (label, "Ours", "Paper"), listed(rows, "study.json"), "narrow")
        figures += f"<figure><h3>{text(title)}</h3>{shown}{chart}{folded('Values', values, len(rows))}</figure>"
    words = "Dots are means over seeds, bars one sample deviation either way."
    return f'<p>{words}</p><div class="charts curves">{figures}</div>' if figures else ""


def _point_row(point: Document) -> str:
    mean, paper = point.get("mean"), point.get("paper")
    ours = DASH if mean is None else figure_cell({"mean": float(mean), "spread": float(point.get("spread") or 0.0)})
    return row(significant(float(point["x"]), 4), [ours, DASH if paper is None else f"{float(paper):.1f}"])


# ------------------------------------------------------------------------------------------------- panels and likeness


def _panels(document: Document) -> str:
    """An original image of the tail beside generated ones, an arm after another, as in the paper's Fig. 2."""
    arms = [arm for arm in _arms(document) if arm.get("sheet_png")]
    shown = "".join(
        picture(_bytes(arm["sheet_png"]), f"{_title(arm)}: original images left, generated ones right", _title(arm))
        for arm in arms[:SHEETS_SHOWN]
    )
    more = note(f"{len(arms) - SHEETS_SHOWN} more arms are left out.") if len(arms) > SHEETS_SHOWN else ""
    return f"<p>Original images of the tail left, generated ones right.</p>{shown}{more}" if shown else ""


def _bytes(encoded: object) -> bytes:
    """What base64 text holds; nothing where it is none."""
    try:
        return base64.b64decode(str(encoded), validate=True)
    except (ValueError, binascii.Error):
        return b""


def _fidelity(document: Document) -> str:
    """One row an arm, and every measure of each folded."""
    arms = [arm for arm in _arms(document) if arm.get("fidelity")]
    if not arms:
        return ""
    is_fid = all((arm["fidelity"].get("extractor") or {}).get("is_fid") for arm in arms)
    head = ["", "FID" if is_fid else "Frechet", "floor", "KID", "Recall", "Coverage", "Diversity", "Hit rate"]
    rows = "".join(row(text(_title(arm)), _fidelity_cells(arm["fidelity"])) for arm in arms)
    every = "".join(folded(_title(arm), fidelity(arm["fidelity"]).replace("<h3>Like real images?</h3>", "", 1), 20) for arm in arms)
    words = "The floor is what as many real images would score. Lower is better of Frechet and KID, else higher."
    return f"<p>{words}</p>{table('Likeness to real images by arm', head, rows)}{every}"


def _fidelity_cells(trust: Document) -> list[str]:
    def value(key: str) -> float | None:
        found = trust.get(key)
        found = found.get("value") if isinstance(found, Mapping) else found
        return float(found) if isinstance(found, int | float) else None

    def cell(found: float | None) -> str:
        return DASH if found is None else significant(found)

    frechet = trust.get("frechet")
    floor = frechet.get("floor") if isinstance(frechet, Mapping) else None
    others = [cell(value(key)) for key in ("kid", "recall", "coverage", "diversity")]
    hits = value("hit_rate")
    return [cell(value("frechet")), cell(floor), *others, DASH if hits is None else f"{hits:.1f} %"]


# --------------------------------------------------------------------------------------------------- cost, how to repeat


def _cost(document: Document) -> str:
    """A bar for each arm: what one seed of it took, by stage. What arms share is in the bar of the first."""
    arms = [arm for arm in _arms(document) if arm.get("seconds")]
    if not arms:
        return ""
    totals = [sum(map(float, arm["seconds"].values())) for arm in arms]
    stages = list(dict.fromkeys(stage for arm in arms for stage in arm["seconds"]))
    styles = {stage: f"c{i % STYLES}" for i, stage in enumerate(stages)}
    bars, rows = "", []
    for arm, total in zip(arms, totals, strict=True):
        seconds = {stage: float(arm["seconds"].get(stage, 0.0)) for stage in stages}
        parts = [Part(spent, styles[stage], f"{_title(arm)}, {stage}: {duration(spent)}") for stage, spent in seconds.items()]
        bars += entry(_title(arm), charts.stacked_bar(parts, max(totals)), duration(total))
        rows.append(row(text(_title(arm)), [*(duration(s) if s else DASH for s in seconds.values()), f"<b>{duration(total)}</b>"]))
    where = f" on {text(document['hardware'])}" if document.get("hardware") else ""
    shown = legend([(style, "", stage) for stage, style in styles.items()])
    by_stage = folded("Time by stage", table("Time of each arm by stage", ("", *stages, "total"), listed(rows, "study.json")), len(rows))
    words = (
        f"Wall-clock time of one seed{where}: {duration(sum(totals))} for all arms. What an earlier arm had made already, the source model "
        "for one, took a later one no time."
    )
    return f"<p>{words}</p>{shown}{entries(bars, style='wide')}{by_stage}"


def _reproduce(document: Document) -> str:
    command = document.get("command") or (f"diffrc study {shlex.quote(str(document['name']))}" if document.get("name") else "")
    content = f"<pre>{text(command)}</pre>" if command else ""
    changed = [
        row(text(_title(arm)), ["<br>".join(f"<code>{text(change)}</code>" for change in arm["changes"])])
        for arm in _arms(document)
        if arm.get("changes")
    ]
    if changed:
        shown = table("What each arm changes in the recipe", ("Arm", "Changes in the recipe"), listed(changed, "study.json"), "keys")
        content += f"<h3>What each arm changes</h3>{shown}"
    content += recipe_text(str(document.get("recipe_toml") or ""))
    facts = {"hardware": document["hardware"]} if document.get("hardware") else {}
    return content + fact_list("Versions and machine", {**facts, **(document.get("versions") or {})})
