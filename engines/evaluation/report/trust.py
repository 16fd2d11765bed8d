"""The sections on whether to trust it: copies, likeness to real images, and whether recognizers and guide are as sure as they should be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engines.evaluation import charts
from engines.evaluation.charts import Series, text
from engines.evaluation.report.gains import figure_cell
from engines.evaluation.report.page import (
    DASH,
    Section,
    curve_legend,
    folded,
    gallery_frame,
    listed,
    note,
    pairs_strip,
    picture,
    plural,
    row,
    significant,
    table,
)
from engines.evaluation.report.parts import Parts, methods_of
from engines.evaluation.report.titles import title_of
from engines.training.calibration_picture import diagram_levels

WARNINGS_SHOWN = 10


def trust_section(parts: Parts) -> Section:
    """Copies, fidelity, and the calibration of the recognizers."""
    content = _copies(parts) + fidelity(parts.trust) + _recognizers(parts.table)
    return Section("trust", "Can it be trusted?", content, "Trust")


def guide_section(parts: Parts) -> Section:
    """Where the guide sees, and whether it is as sure as it should be."""
    return Section("guide", "Where the guide sees", _guide(parts), "Guide")


# -------------------------------------------------------------------------------------------------------------- copies


def _copies(parts: Parts) -> str:
    found = parts.copies
    if not found:
        return ""
    spaces = list(found["generated"])
    told = [
        f"{_percent(found['generated'][space])} of the generated images are copies by their {space}s, "
        f"{_percent(found['real'][space])} of real images"
        for space in spaces
    ]
    words = (
        f"A copy is at most {found['copy_ratio']:.2g} times as far from its nearest training image as from the second nearest. "
        f"Real images, left out one by one, show what is usual for this data. {'; '.join(told)}."
    )
    shown = _closest(parts)
    if not shown and parts.pairs:
        shown = picture(parts.pairs, "Generated images, each beside its nearest training image")
    worst = sorted(found["classes"], key=lambda r: -max((r[space]["share"] for space in spaces if space in r), default=0.0))
    rows = [
        row(
            f"<bdi>{text(r['class'])}</bdi>",
            [f"{r['pixel']['images']:,}"]
            + [cell for space in spaces for cell in ((_copies_cell(r[space]), _percent(r[space]["real"])) if space in r else (DASH, DASH))],
        )
        for r in worst
    ]
    heads = [head for space in spaces for head in (f"Copies by {space}s", "of real ones")]
    warnings = "".join(f"<li>{text(line)}</li>" for line in found["warnings"][:WARNINGS_SHOWN])
    left_out = len(found["warnings"]) - WARNINGS_SHOWN
    warnings += f"<li>and {left_out:,} more in <code>synth/copies.json</code></li>" if left_out > 0 else ""
    warned = f'<ul class="warnings">{warnings}</ul>' if warnings else ""
    listing = table("Copies in each class", ("Class", "Generated", *heads), listed(rows, "synth/copies.json"))
    return f"<h3>New images, or copies?</h3><p>{text(words)}</p>{warned}{shown}{folded('Copies in each class', listing, len(rows))}"


def _closest(parts: Parts) -> str:
    """Generated images beside their nearest real ones, the classes with the closest first."""
    if not parts.closest:
        return ""
    rows = ""
    for found in parts.closest:
        strips = "".join(
            pairs_strip(f"by {space}s", f"Generated images of {found.name} beside their nearest real ones by {space}s, ratios", pairs)
            for space, pairs in found.pairs.items()
        )
        rows += gallery_frame(f'<h4><bdi>{text(found.name)}</bdi></h4><div class="twin">{strips}</div>', found.side_px)
    words = (
        "The closest pairs of a class: generated left, its nearest real image right; under them the ratio of its distance to that of the "
        "second nearest. Framed: a copy."
    )
    left_out = f" {plural(parts.closest_left_out, 'class', 'classes')} with less close ones left out." if parts.closest_left_out else ""
    return f"<p>{words}{left_out}</p>{rows}"


def _copies_cell(found: Mapping[str, Any]) -> str:
    share = _percent(found)
    return f"<b>{share}</b>" if found["warns"] else share


def _percent(found: Mapping[str, Any]) -> str:
    return f"{100 * found['share']:.1f} %" if found["images"] else DASH


# ------------------------------------------------------------------------------------------------------------ fidelity


def fidelity(trust: Mapping[str, Any]) -> str:
    """How like real images the generated ones are: a row for each measure, what a perfect generator would score, and the classes.

    Args:
        trust: a document as evaluation/trust.json holds it; any of it may be missing.
    """
    rows = "".join(filter(None, (_measure(trust, key) for key in _MEASURES)))
    if not rows:
        return ""
    extractor = trust.get("extractor") or {}
    counted = f"{trust['images']:,} generated images" if isinstance(trust.get("images"), int) else "Generated images"
    against = f"{trust['reference']:,} real ones" if isinstance(trust.get("reference"), int) else "real ones"
    against += {"test": " of the test set", "train": " of the training set"}.get(str(trust.get("reference_set")), "")
    seen = f", seen by {text(extractor['name'])}" if extractor.get("name") else ""
    words = f"{counted} against {against}{seen}."
    if extractor and not extractor.get("is_fid"):
        words += " Numbers of these features are comparable among themselves alone: the distance is not an FID."
    shown = table("Likeness to real images", ("", "Value, 95 % interval", "Real images"), rows, "measures")
    return f"<h3>Like real images?</h3><p>{words}</p>{shown}{_fidelity_classes(trust)}"


_MEASURES: Mapping[str, tuple[str, str]] = {  # title, what it says
    "frechet": ("Frechet distance", "of means and spreads; lower is better, and what as many real images would score is the floor"),
    "kid": ("KID", "kernel distance; 0 where both are of one kind, lower is better"),
    "precision": ("Precision", "share of generated images that lie among real ones"),
    "recall": ("Recall", "share of real images that lie among generated ones"),
    "density": ("Density", "how thickly real images surround generated ones"),
    "coverage": ("Coverage", "share of real images with a generated one close by"),
    "diversity": ("Diversity", "mean distance within a class, beside that of real images"),
    "hit_rate": ("Hit rate", "share that a recognizer of real images takes for the class they were made for"),
    "real_or_synthetic": ("Seen to be made", "how often a linear classifier tells generated from real images; 50 % is chance"),
}


def _measure(trust: Mapping[str, Any], key: str) -> str:
    found = trust.get(key)
    if found is None:
        return ""
    value = found if isinstance(found, Mapping) else {"value": found}
    middle = value.get("value", value.get("accuracy"))
    if not isinstance(middle, int | float):
        return ""
    title, words = _MEASURES[key]
    if key == "frechet" and (trust.get("extractor") or {}).get("is_fid"):
        title = "FID"
    in_percent = key in ("hit_rate", "real_or_synthetic")
    ends = [float(end) for end in (value.get("low"), value.get("high")) if isinstance(end, int | float)]
    spread = f" <small>{' to '.join(_figure(end, in_percent) for end in ends)}</small>" if len(ends) == 2 else ""
    return row(f"{text(title)} <small>{text(words)}</small>", [f"<b>{_figure(middle, in_percent)}</b>{spread}", _of_real(trust, key)])


def _of_real(trust: Mapping[str, Any], key: str) -> str:
    """What real images would score; HTML."""
    frechet, neighbors = trust.get("frechet"), trust.get("neighbors") or {}
    if key == "frechet" and isinstance(frechet, Mapping) and isinstance(frechet.get("floor"), int | float):
        spread = frechet.get("floor_spread")
        return significant(frechet["floor"]) + (f" <small>\N{PLUS-MINUS SIGN} {significant(spread, 2)}</small>" if spread else "")
    if key == "hit_rate" and isinstance(trust.get("hit_rate_real"), int | float):
        return _figure(trust["hit_rate_real"], True)
    if key == "coverage" and isinstance(neighbors.get("coverage"), int):
        return significant(1 - 2.0 ** -neighbors["coverage"], 2)  # of equal sets of one distribution
    return {"kid": "0", "density": "1", "diversity": "1", "real_or_synthetic": "50 %"}.get(key, DASH)


def _figure(value: float, in_percent: bool) -> str:
    return f"{value:.1f} %" if in_percent else significant(value)


def _fidelity_classes(trust: Mapping[str, Any]) -> str:
    classes = trust.get("per_class") or ()
    keys = [key for key in ("hit_rate", "diversity", "coverage", "copies") if any(c.get(key) is not None for c in classes)]
    if not keys:
        return ""

    def cell(value: float | None, key: str) -> str:
        return DASH if value is None else f"{value:,}" if key == "copies" else _figure(value, key == "hit_rate")

    order = sorted(classes, key=lambda c: (c.get(keys[0]) is None, c.get(keys[0]) or 0.0))
    rows = [
        row(f"<bdi>{text(c.get('name', c.get('class_id', '')))}</bdi>", [f"{c.get('images', 0):,}", *(cell(c.get(k), k) for k in keys)])
        for c in order
    ]
    heads = ("Class", "Images", *(_MEASURES[key][0] if key in _MEASURES else "Copies" for key in keys))
    shown = table("Likeness of each class", heads, listed(rows, "evaluation/trust.json"))
    return folded("Likeness of each class", shown, len(rows))


# --------------------------------------------------------------------------------------------------------- calibration


def _recognizers(found: Mapping[str, Any]) -> str:
    """Expected calibration error of each recognizer, and diagrams where the table holds their bins."""
    rows = [r for r in found.get("rows", ()) if calibration_of(r)]
    if not rows:
        return ""
    variants = [v for v in ("real", "synthetic") if any(r["variant"] == v for r in rows)]
    body = ""
    for method in methods_of({"rows": rows}):
        of_method = {r["variant"]: calibration_of(r) for r in rows if r["method"] == method}
        body += row(text(title_of(method)), [figure_cell(of_method[v]) if v in of_method else DASH for v in variants])
    words = (
        "Expected calibration error: how far the recognizers' confidence is from how often they are right, in points; 0 is as sure as "
        "it should be."
    )
    head = ("ECE, points", *(title_of(variant) for variant in variants))
    shown = table("Calibration error of the recognizers", head, body, "narrow")
    chosen = [r for r in rows if r["variant"] in ("real", "synthetic") and r.get("bins")][:4]
    figures = ""
    for r in chosen:
        title = f"{title_of(r['variant'])}, {title_of(r['method'])}"
        figures += f"<figure>{charts.reliability(r['bins'], f'Reliability of {title}')}<figcaption>{text(title)}</figcaption></figure>"
    diagrams = f'<div class="diagrams">{figures}</div>{note(_DIAGRAM)}' if figures else ""
    return f"<h3>As sure as they should be?</h3><p>{words}</p>{diagrams}{shown}"


_DIAGRAM = "Accuracy (up) against confidence (right): on the line a network is as often right as it says, below it is too sure."


def calibration_of(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row's expected calibration error in points; {} where it was not measured."""
    figure = found.get("ece") or found.get("figures", {}).get("ece")
    return {"mean": figure, "spread": 0.0, "n": 1} if isinstance(figure, int | float) else figure or {}


def _guide(parts: Parts) -> str:
    series = [
        Series(
            f"on {name} images" if name else "accuracy", f"c{i}", [(t, 100 * a) for t, a in zip(curve["t"], curve["accuracy"], strict=True)]
        )
        for i, (name, curve) in enumerate(parts.guide.items())
    ]
    if not series:
        return ""
    classes = len(parts.classes.get("names", ())) or None
    chart = charts.line_chart(
        series,
        "timestep t",
        bounds=(0, 100),
        level=100 / classes if classes else None,
        unit="%",
        describe="Accuracy of the guide over noise levels",
    )
    words = "How often the guide names the right class of a noised image, by timestep: it can only guide where it sees. Dashed: guessing."
    judged = "test" if "test" in parts.guide else next(iter(parts.guide))
    judge, style = parts.guide[judged], f"c{list(parts.guide).index(judged)}"
    if "ece" not in judge:  # a run from before calibration was measured
        return f"<p>{words}</p>{curve_legend(series)}{chart}"
    figures = f"<figure><h3>How often it is right</h3>{curve_legend(series)}{chart}</figure>{_sureness(judge, judged, style)}"
    return f'<p>{words}</p><div class="charts">{figures}</div>{_reliability(judge, judged)}'


def _sureness(judge: Mapping[str, Any], images: str, style: str) -> str:
    """Confidence beside accuracy over t: where they part, the guide's gradient says more than it knows."""
    curves = ((f"accuracy on {images} images", style, "accuracy"), ("confidence", "c3", "confidence"), ("calibration error", "c5", "ece"))
    series = [Series(name, color, [(t, 100 * v) for t, v in zip(judge["t"], judge[key], strict=True)]) for name, color, key in curves]
    chart = charts.line_chart(
        series, "timestep t", bounds=(0, 100), unit="%", describe="Confidence and calibration error of the guide over noise levels"
    )
    return f"<figure><h3>How sure it is</h3>{curve_legend(series)}{chart}</figure>"


def _reliability(judge: Mapping[str, Any], images: str) -> str:
    """Diagrams at a few noise levels, and every level in a table."""
    diagrams, rows = "", []
    for i in diagram_levels(judge["t"]):
        describe = f"Reliability of the guide at t = {judge['t'][i]}"
        words = f"t = {judge['t'][i]}, ECE {100 * judge['ece'][i]:.1f} %"
        diagrams += f"<figure>{charts.reliability(judge['bins'][i], describe)}<figcaption>{words}</figcaption></figure>"
    for t, *shares, nll in zip(judge["t"], judge["accuracy"], judge["confidence"], judge["ece"], judge["nll"], strict=True):
        rows.append(row(str(t), [*(f"{100 * share:.1f} %" for share in shares), f"{nll:.2f}"]))
    words = (
        f"{_DIAGRAM} Of {judge['images']:,} {images} images; a dot's area is its share of them. The calibration error is the mean "
        "distance from the line (ECE, 15 bins, every class weighs alike); of so few images some points of it are chance."
    )
    head = ("t", "Accuracy", "Confidence", "ECE", "NLL, nats")
    every = folded("Every noise level", table("The guide at every noise level", head, listed(rows, "guide/accuracy.json")), len(rows))
    return f'<h3>As sure as it should be?</h3><div class="diagrams">{diagrams}</div>{note(words)}{every}'
