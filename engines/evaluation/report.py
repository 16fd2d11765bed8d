"""The report of a run: one HTML file with everything inside (style, charts, pictures), no script and no network."""

from __future__ import annotations

import base64
import html
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from engines import recipe as recipes
from engines import store
from engines.evaluation import charts
from engines.evaluation.accuracy import COLUMNS, TITLES
from engines.evaluation.charts import Part, Series
from engines.store import RunFolder
from engines.training.calibration_picture import diagram_levels

STAGES = ("source", "target", "guide")
STAGE_WORDS = {
    "source": "Source model: diffusion (Eq. 5)",
    "target": "Target model: adapted to the tail (Eq. 10)",
    "guide": "Guide: prototypes on noised images (Eq. 12)",
}
CURVES = {"loss": "loss", "l_base": "L_base", "l_pair": "L_pair", "l_pc": "L_PC"}  # L_vlb, a sum over T, would dwarf them
DROPPED = {"distance": "too far", "confidence": "unsure", "both": "too far and unsure"}
ROWS_SHOWN = 30  # classes listed one by one; of more, the first and last of them
GROUPS = ("many", "medium", "few")


@dataclass(frozen=True)
class Parts:
    """What a report is made of; everything but the name may be missing, and the report then says what to run."""

    name: str
    recipe_toml: str = ""
    classes: Mapping[str, Any] = field(default_factory=dict)  # names, counts, groups
    table: Mapping[str, Any] = field(default_factory=dict)  # evaluation/accuracy.json
    metrics: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)  # lines by stage
    guide: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # {"train": {"t": [...], "accuracy": [...]}}
    made: Mapping[int, tuple[int, int]] = field(default_factory=dict)  # by class: images made, images kept
    dropped: Mapping[int, Mapping[str, int]] = field(default_factory=dict)  # by class: images that the selection dropped, by reason
    sheets: Sequence[tuple[str, bytes]] = ()  # caption, PNG
    copies: Mapping[str, Any] = field(default_factory=dict)  # synth/copies.json
    pairs: bytes = b""  # PNG of generated images beside their nearest real ones
    cost: Mapping[str, float] = field(default_factory=dict)  # seconds by stage
    environment: Mapping[str, Any] = field(default_factory=dict)


def write_report(run: RunFolder) -> Path:
    """Write the run's report and return its path. Parts that do not exist yet are left out. Raises DataError, StorageError."""
    store.write_text(run.report, render(collect(run)))
    return run.report


def collect(run: RunFolder) -> Parts:
    """Read what the run folder holds so far. Raises DataError for a damaged file."""

    def document(path: Path) -> dict[str, Any]:
        return dict(store.read_json(path)) if path.exists() else {}

    guide = document(run.stage("guide") / "accuracy.json")
    made: dict[int, tuple[int, int]] = {}
    dropped: dict[int, Counter[str]] = {}
    pairs = run.synth / "copies.png"
    for line in store.read_json_lines(run.synth / "manifest.jsonl"):
        count, kept = made.get(line["class_id"], (0, 0))
        made[line["class_id"]] = (count + 1, kept + bool(line.get("kept", True)))
        if line.get("dropped"):
            dropped.setdefault(line["class_id"], Counter())[line["dropped"]] += 1
    return Parts(
        name=run.recipe.name,
        recipe_toml=recipes.to_toml(run.recipe),
        classes=document(run.path / "classes.json"),
        table=document(run.evaluation / "accuracy.json"),
        metrics={stage: store.read_json_lines(run.stage(stage) / "metrics.jsonl") for stage in STAGES},
        guide={"": guide} if "t" in guide else guide,
        made=made,
        dropped=dropped,
        sheets=[
            (path.stem.replace("_", " ").replace("-", " "), path.read_bytes()) for path in sorted(run.synth.glob("*.png")) if path != pairs
        ],
        copies=document(run.synth / "copies.json"),
        pairs=pairs.read_bytes() if pairs.exists() else b"",
        cost=document(run.path / "cost.json"),
        environment=document(run.path / "environment.json"),
    )


def render(parts: Parts) -> str:
    """The whole page. Every text that came from a user, a data set or a file is escaped."""
    sections = (_tail, _accuracy, _classes, _sheets, _copies, _training, _guide, _cost, _reproduce)
    style = resources.files("engines.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    body = "\n".join(text for text in (section(parts) for section in sections) if text)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f"<title>{_text(parts.name)} \N{MIDDLE DOT} DiffRC</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"{_head(parts)}\n{body}\n{_foot(parts)}\n</main>\n</body>\n</html>\n"
    )


# ------------------------------------------------------------------------------------------------------------- sections


def _head(parts: Parts) -> str:
    title = "Does synthesis help the tail?"
    brand = f'<p class="brand"><b>DiffRC</b> \N{MIDDLE DOT} {_text(parts.name)}</p>'
    if not parts.table:
        return f'<header>{brand}<h1>{title}</h1><p class="verdict">Not evaluated yet: <code>diffrc evaluate</code> answers it.</p></header>'
    first = _comparison(parts.table, _stronger_control(parts.table), "cross_entropy")
    return (
        f'<header>{brand}<h1>{title}</h1><p class="verdict {first["outcome"]}">{_text(parts.table["verdict"])}</p>'
        f'<ul class="tiles">{"".join(_tiles(parts))}</ul></header>'
    )


def _tiles(parts: Parts) -> Iterable[str]:
    table = parts.table
    column = table["column"]
    for loss in ("cross_entropy", "balanced_softmax"):
        before, after = (_row(table, variant, loss)["figures"][column]["mean"] for variant in ("real", "synthetic"))
        yield _tile(
            f"{column.capitalize()}, {TITLES[loss]}", f"{before:.1f} \N{RIGHTWARDS ARROW} {after:.1f}", "real, then with synthetic, %"
        )
    replay = _comparison(table, "replay", "cross_entropy")
    yield _tile(
        "Against replay", _signed(replay["interval"]["difference"]), f"points, 95 %: {_range(replay['interval'])}", replay["outcome"]
    )
    if table.get("purity"):
        purity = table["purity"]
        yield _tile("Purity by an oracle", f"{purity['overall']:.1f} %", f"itself {purity['oracle_accuracy']:.1f} % right on the test set")
    yield _tile("Synthetic images", f"{sum(table['synthetic_counts']):,}", f"beside {sum(table['counts']):,} real ones")
    if parts.cost:
        yield _tile("Whole run", _duration(sum(parts.cost.values())), _machine(parts.environment))


def _tail(parts: Parts) -> str:
    if not parts.classes:
        return _section("The long tail", '<p class="none">Not trained yet: <code>diffrc train</code>.</p>')
    names, counts, groups = (parts.classes[key] for key in ("names", "counts", "groups"))
    added = [parts.made.get(k, (0, 0))[1] for k in range(len(names))]
    order = sorted(range(len(names)), key=lambda k: (-counts[k], k))
    stacks = {
        k: [
            Part(counts[k], groups[k], f"{names[k]}: {counts[k]:,} real images"),
            Part(added[k], f"{groups[k]} added", f"{names[k]}: {added[k]:,} synthetic images"),
        ]
        for k in order
    }
    words = (
        f"{sum(counts):,} real images of {len(names)} classes, {max(counts):,} in the largest and {min(counts):,} in the smallest, "
        f"{max(counts) / max(1, min(counts)):.3g} to 1"
    )
    if any(added):
        filled = [counts[k] + added[k] for k in order]
        words += f"; {sum(added):,} synthetic ones make it {max(filled) / max(1, min(filled)):.3g} to 1"
    legend = _legend(
        [(group, "", f"{group}: {sum(g == group for g in groups)} classes") for group in GROUPS if group in groups]
        + ([("neutral", "added", "synthetic, paler")] if any(added) else [])
    )
    if len(order) > ROWS_SHOWN:
        return _section("The long tail, before and after", f"<p>{words}.</p>{legend}{charts.columns([stacks[k] for k in order])}")
    largest = max(counts[k] + added[k] for k in order)
    rows = "".join(
        _entry(names[k], charts.stacked_bar(stacks[k], largest), f"{counts[k]:,}" + (f" <small>+{added[k]:,}</small>" if added[k] else ""))
        for k in order
    )
    return _section("The long tail, before and after", f'<p>{words}.</p>{legend}<div class="rows">{rows}</div>')


def _accuracy(parts: Parts) -> str:
    table = parts.table
    if not table:
        return ""
    columns = [c for c in COLUMNS if c in table["rows"][0]["figures"]]
    body = ""
    for loss in dict.fromkeys(row["loss"] for row in table["rows"]):
        rows = [row for row in table["rows"] if row["loss"] == loss]
        best = {c: (min if c == "std" else max)(round(r["figures"][c]["mean"], 1) for r in rows) for c in columns}
        body += f'<tr class="block"><th colspan="{len(columns) + 1}">{_text(TITLES[loss].capitalize())}</th></tr>'
        for row in rows:
            cells = "".join(_accuracy_cell(row["figures"][c], best[c]) for c in columns)
            ours = ' class="ours"' if row["variant"] == "synthetic" else ""
            body += f"<tr{ours}><th>{_text(TITLES[row['variant']])}</th>{cells}</tr>"
    seeds = "1 seed" if table["seeds"] == 1 else f"{table['seeds']} seeds, mean \N{PLUS-MINUS SIGN} sample deviation"
    twins = table.get("test_images_in_train", 0)
    words = (
        f"Top-1 in percent on {table['test_images']:,} test images that nothing was trained or chosen on; {seeds}. "
        "Std is the deviation between the groups: lower is fairer. Bold is the best of its block."
    )
    if twins:
        words += f" The data set itself holds {twins:,} test images that are training images too."
    return _section("Accuracy", f"<p>{words}</p>{_table(('', *(c.capitalize() for c in columns)), body)}{_intervals(table)}")


def _intervals(table: Mapping[str, Any]) -> str:
    entries = table["comparisons"]
    reach = max(max(abs(c["interval"]["low"]), abs(c["interval"]["high"])) for c in entries) * 1.05 or 1.0
    bounds = (-reach, reach)
    rows = "".join(
        _entry(
            f"against {TITLES[c['against']]}, {TITLES[c['loss']]}",
            charts.interval_mark(c["interval"]["low"], c["interval"]["difference"], c["interval"]["high"], bounds, c["outcome"]),
            f'<span class="outcome {c["outcome"]}">{_signed(c["interval"]["difference"])}</span> <small>[{_range(c["interval"])}]</small>',
        )
        for c in entries
    )
    return (
        f"<h3>Real + synthetic, {_text(table['column'])} classes, difference in points</h3>"
        f'<div class="rows wide">{rows}<span></span><div class="mark">{charts.axis(bounds)}</div><span></span></div>'
        '<p class="note">Dots right of the line: synthesis is better. The bars are 95 % bootstrap intervals over seeds and test images, '
        "pair by pair. <i>Replay</i> duplicates real tail images as often as there are synthetic ones; <i>same weight</i> gives the "
        "duplicates the loss weight and prior of the synthetic images as well, so that only the images differ.</p>"
    )


def _classes(parts: Parts) -> str:
    table = parts.table
    if not table:
        return ""
    before, after = (_row(table, variant, "cross_entropy")["per_class"] for variant in ("real", "synthetic"))
    tested = [k for k in range(len(table["names"])) if before[k] is not None]
    order = sorted(tested, key=lambda k: (-table["counts"][k], k))
    if len(order) > ROWS_SHOWN:  # the largest gains, a gap, the largest losses
        order = sorted(tested, key=lambda k: before[k] - after[k])
    shown = order if len(order) <= ROWS_SHOWN else [*order[: ROWS_SHOWN // 2], -1, *order[-ROWS_SHOWN // 2 :]]
    low = min(min(before[k], after[k]) for k in tested)
    bounds = (max(0.0, 10 * ((low - 5) // 10)), 100.0)
    rows = "".join(
        f'<span class="gap">{len(order) - ROWS_SHOWN} more classes between</span>'
        if k < 0
        else _entry(
            table["names"][k],
            charts.dumbbell(before[k], after[k], bounds, table["groups"][k]),
            f"{after[k]:.0f} <small>{_signed(after[k] - before[k])}</small>",
            table["groups"][k],
        )
        for k in shown
    )
    return _section(
        "Class by class",
        "<p>Accuracy in percent with cross-entropy, mean over seeds: hollow on real images alone, filled with synthetic ones.</p>"
        f'<div class="rows">{rows}<span></span><div class="mark">{charts.axis(bounds)}</div><span></span></div>{_class_table(parts)}',
    )


def _class_table(parts: Parts) -> str:
    table = parts.table
    purity = (table.get("purity") or {}).get("per_class") or [None] * len(table["names"])
    rows = ""
    for k, name in enumerate(table["names"]):
        made, kept = parts.made.get(k, (0, 0))
        share = f"{100 * kept / made:.0f} %" if made else "\N{EN DASH}"
        why = ", ".join(f"{n:,} {DROPPED.get(reason, reason)}" for reason, n in sorted(parts.dropped.get(k, {}).items()))
        share += f" <small>{_text(why)}</small>" if why else ""
        pure = "\N{EN DASH}" if purity[k] is None else f"{purity[k]:.1f} %"
        rows += (
            f"<tr><th>{_text(name)}</th><td>{_text(table['groups'][k])}</td><td>{table['counts'][k]:,}</td>"
            f"<td>{table['synthetic_counts'][k]:,}</td><td>{share}</td><td>{pure}</td></tr>"
        )
    note = (
        "Yield: the share of the made images that the selection kept. Purity: the share that an oracle, trained on the whole training "
        "split, takes for the class. The oracle reports; it chooses nothing."
    )
    if table.get("purity") and table["purity"]["oracle_images"] <= sum(table["counts"]):
        note += " This data set has no images beyond the long tail, so the oracle saw no more than the recognizers."
    table_html = _table(("Class", "Group", "Real", "Synthetic", "Yield", "Purity"), rows)
    return f'<details><summary>Counts, yield and purity of each class</summary>{table_html}<p class="note">{note}</p></details>'


def _sheets(parts: Parts) -> str:
    if not parts.sheets:
        return ""
    figures = ""
    for caption, png in parts.sheets:
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        words = f"{_text(caption)}: original images left, generated ones right"
        image = f'<img alt="{words}" src="{source}">'
        below = f"<figcaption>{_text(caption)}</figcaption>" if len(parts.sheets) > 1 else ""
        figures += f'<figure><div class="sheet" style="--w:{_png_width(png)}px">{image}</div>{below}</figure>'
    return _section("The images", f"<p>Original images left, generated ones right.</p>{figures}")


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
    worst = sorted(found["classes"], key=lambda row: -max(row[space]["share"] for space in spaces if space in row))[:ROWS_SHOWN]
    rows = "".join(
        f"<tr><th>{_text(row['class'])}</th><td>{row['pixel']['images']:,}</td>"
        + "".join(
            f"<td>{_copies_cell(row[space])}</td><td>{_percent(row[space]['real'])}</td>" if space in row else "<td></td>" * 2
            for space in spaces
        )
        + "</tr>"
        for row in worst
    )
    heads = [head for space in spaces for head in (f"Copies by {space}s", "of real ones")]
    warnings = "".join(f'<p class="note">{_text(line)}</p>' for line in found["warnings"][:ROWS_SHOWN])
    picture = ""
    if parts.pairs:
        source = f"data:image/png;base64,{base64.b64encode(parts.pairs).decode()}"
        image = f'<img alt="Generated images, each beside its nearest training image" src="{source}">'
        picture = f'<figure><div class="sheet" style="--w:{_png_width(parts.pairs)}px">{image}</div></figure>'
    listed = f"<details><summary>Copies in each class</summary>{_table(('Class', 'Generated', *heads), rows)}</details>"
    return _section("New images, or copies?", f"<p>{_text(words)}</p>{warnings}{picture}{listed}")


def _copies_cell(found: Mapping[str, Any]) -> str:
    share = _percent(found)
    return f"<b>{share}</b>" if found["warns"] else share


def _percent(found: Mapping[str, Any]) -> str:
    return f"{100 * found['share']:.1f} %" if found["images"] else "\N{EN DASH}"


def _training(parts: Parts) -> str:
    figures = ""
    for number, stage in enumerate(STAGES):
        lines = parts.metrics.get(stage) or ()
        series = [
            Series(CURVES[key], f"c{(number + i) % 6}", points, smooth=True)
            for i, key in enumerate(CURVES)
            if len(points := [(line["step"], line[key]) for line in lines if line.get(key) is not None]) > 1
        ]
        if len(series) == 2 and series[0].points == series[1].points:  # the loss is its only term
            series = series[1:]
        if series:
            chart = charts.line_chart(series, "step", describe=f"Loss of the {stage} stage over its steps")
            figures += f"<figure><h3>{_text(STAGE_WORDS[stage])}</h3>{_curve_legend(series)}{chart}</figure>"
    return _section("Training", f'<div class="charts">{figures}</div>') if figures else ""


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
        return _section("Where the guide sees", f"<p>{words}</p>{_curve_legend(series)}{chart}")
    figures = f"<figure><h3>How often it is right</h3>{_curve_legend(series)}{chart}</figure>{_sureness(judge, judged, style)}"
    return _section("Where the guide sees", f'<p>{words}</p><div class="charts">{figures}</div>{_reliability(judge, judged)}')


def _sureness(judge: Mapping[str, Any], images: str, style: str) -> str:
    """Confidence beside accuracy over t: where they part, the guide's gradient says more than it knows."""
    curves = ((f"accuracy on {images} images", style, "accuracy"), ("confidence", "c3", "confidence"), ("calibration error", "c5", "ece"))
    series = [Series(name, color, [(t, 100 * v) for t, v in zip(judge["t"], judge[key], strict=True)]) for name, color, key in curves]
    chart = charts.line_chart(
        series, "timestep t", bounds=(0, 100), unit="%", describe="Confidence and calibration error of the guide over noise levels"
    )
    return f"<figure><h3>How sure it is</h3>{_curve_legend(series)}{chart}</figure>"


def _reliability(judge: Mapping[str, Any], images: str) -> str:
    """Diagrams at a few noise levels, and every level in a table."""
    diagrams, rows = "", ""
    for i in diagram_levels(judge["t"]):
        describe = f"Reliability of the guide at t = {judge['t'][i]}"
        words = f"t = {judge['t'][i]}, ECE {100 * judge['ece'][i]:.1f} %"
        diagrams += f"<figure>{charts.reliability(judge['bins'][i], describe)}<figcaption>{words}</figcaption></figure>"
    for t, *shares, nll in zip(judge["t"], judge["accuracy"], judge["confidence"], judge["ece"], judge["nll"], strict=True):
        rows += f"<tr><th>{t}</th>{''.join(f'<td>{100 * share:.1f} %</td>' for share in shares)}<td>{nll:.2f}</td></tr>"
    note = (
        f"Accuracy (up) against confidence (right) of {judge['images']:,} {_text(images)} images: on the line the guide is as often "
        "right as it says, below it is too sure. A dot's area is its share of the images. The calibration error is the mean "
        "distance from the line (ECE, 15 bins, every class weighs alike); of so few images some points of it are chance."
    )
    table = _table(("t", "Accuracy", "Confidence", "ECE", "NLL, nats"), rows)
    return (
        f'<h3>As sure as it should be?</h3><div class="diagrams">{diagrams}</div><p class="note">{note}</p>'
        f"<details><summary>Every noise level</summary>{table}</details>"
    )


def _cost(parts: Parts) -> str:
    if not parts.cost:
        return ""
    total = sum(parts.cost.values())
    styles = {what: f"c{i % 6}" for i, what in enumerate(parts.cost)}
    bar = charts.stacked_bar([Part(s, styles[what], f"{what}: {_duration(s)}") for what, s in parts.cost.items()], total, height_px=22)
    rows = ""
    for what, spent in parts.cost.items():
        label = f'<i class="dot {styles[what]}"></i>{_text(what)}'
        rows += f"<tr><th>{label}</th><td>{_duration(spent)}</td><td>{100 * spent / max(total, 1e-9):.0f} %</td></tr>"
    rows += f"<tr><th><b>total</b></th><td><b>{_duration(total)}</b></td><td></td></tr>"
    where = _text(_machine(parts.environment) or "this machine")
    return _section("What it cost", f"<p>Wall-clock time by stage, on {where}.</p>{bar}{_table((), rows)}")


def _reproduce(parts: Parts) -> str:
    packages = parts.environment.get("packages") or {}
    facts = {key: parts.environment[key] for key in ("python", "platform", "device", "cpus", "torch_threads") if key in parts.environment}
    listed = "\n".join(f"{key:<16} {value}" for key, value in {**facts, **packages}.items())
    text = f"<p>The recipe below holds every number, the seeds too. Save it as <code>{_text(parts.name)}.toml</code>:</p>"
    text += f"<pre>diffrc run {_text(parts.name)}.toml</pre>"
    if parts.recipe_toml:
        text += f"<details><summary>The recipe</summary><pre>{_text(parts.recipe_toml)}</pre></details>"
    if listed:
        text += f"<details><summary>Versions and machine</summary><pre>{_text(listed)}</pre></details>"
    return _section("How to reproduce it", text)


def _foot(parts: Parts) -> str:
    return "<footer>Made by DiffRC. Generated images are synthetic; their files say so.</footer>"


# --------------------------------------------------------------------------------------------------------------- pieces


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>"


def _tile(label: str, figure: str, note: str, outcome: str = "") -> str:
    style = f' class="{_text(outcome)}"' if outcome else ""
    return f'<li class="tile"><span>{_text(label)}</span><b{style}>{_text(figure)}</b><span>{_text(note)}</span></li>'


def _entry(label: str, mark: str, figure: str, group: str = "") -> str:
    """A row of a chart: label | mark | figure; `mark` and `figure` are HTML already."""
    dot = f'<i class="dot {_text(group)}"></i>' if group else ""
    name = f'<span class="label" title="{_text(label)}">{dot}{_text(label)}</span>'
    return f'{name}<div class="mark">{mark}</div><span class="figure">{figure}</span>'


def _table(head: Sequence[str], rows: str) -> str:
    """A table in a frame that scrolls where the screen is narrow; `rows` is HTML already."""
    cells = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    return f'<div class="scroll"><table>{f"<thead><tr>{cells}</tr></thead>" if head else ""}<tbody>{rows}</tbody></table></div>'


def _legend(entries: Sequence[tuple[str, str, str]]) -> str:
    items = "".join(f'<li class="{_text(extra)}"><i class="{_text(style)}"></i>{_text(words)}</li>' for style, extra, words in entries)
    return f'<ul class="legend">{items}</ul>'


def _curve_legend(series: Sequence[Series]) -> str:
    items = "".join(f'<li><i class="stroke {_text(s.style)}"></i>{_text(s.name)}</li>' for s in series)
    return f'<ul class="legend">{items}</ul>'


def _accuracy_cell(figure: Mapping[str, float], best: float) -> str:
    mean = f"{figure['mean']:.1f}"
    mean = f"<b>{mean}</b>" if round(figure["mean"], 1) == best else mean
    return f"<td>{mean}" + (f" <small>\N{PLUS-MINUS SIGN} {figure['spread']:.1f}</small>" if figure["n"] > 1 else "") + "</td>"


def _row(table: Mapping[str, Any], variant: str, loss: str) -> Mapping[str, Any]:
    return next(row for row in table["rows"] if (row["variant"], row["loss"]) == (variant, loss))


def _comparison(table: Mapping[str, Any], against: str, loss: str) -> Mapping[str, Any]:
    return next(c for c in table["comparisons"] if (c["against"], c["loss"]) == (against, loss))


def _stronger_control(table: Mapping[str, Any]) -> str:
    return max(("real", "replay"), key=lambda v: _row(table, v, "cross_entropy")["figures"][table["column"]]["mean"])


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def _range(interval: Mapping[str, float]) -> str:
    return f"{_signed(interval['low'])} to {_signed(interval['high'])}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60) if seconds >= 3600 else int(seconds // 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if seconds >= 3600 else f"{minutes} min {seconds % 60:02.0f} s"


def _machine(environment: Mapping[str, Any]) -> str:
    """The processor in words, or "" where it is not known."""
    device, cpus = environment.get("device"), environment.get("cpus")
    return f"{cpus} CPU cores" if device == "cpu" and cpus else str(device or "")


def _png_width(png: bytes) -> int:
    """Width in px from a PNG's header."""
    return int(struct.unpack(">I", png[16:20])[0]) if len(png) > 24 else 0


def _text(value: str) -> str:
    return html.escape(str(value), quote=True)
