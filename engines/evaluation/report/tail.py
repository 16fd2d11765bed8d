"""The sections on what went in and what was made: the long tail before and after, yields, and images of the classes."""

from __future__ import annotations

from engines.evaluation import charts
from engines.evaluation.charts import Part, text
from engines.evaluation.report.page import (
    DASH,
    ROWS_SHOWN,
    Section,
    entries,
    entry,
    folded,
    gallery_frame,
    legend,
    listed,
    note,
    picture,
    plural,
    row,
    strip,
    table,
)
from engines.evaluation.report.parts import Parts
from engines.evaluation.report.tiles import Gallery, Tile

DROPPED = {"distance": "too far", "confidence": "unsure", "both": "too far and unsure", "novelty": "outside the novelty band"}
DROPPED_STYLES = {"distance": "c3", "confidence": "c1", "both": "c4", "novelty": "c5"}
YIELDS_SHOWN = 12  # classes
GROUPS = ("many", "medium", "few")


def tail_section(parts: Parts) -> Section:
    """How many images each class had, and how many it has."""
    if not parts.classes:
        return Section("tail", "The long tail", '<p class="none">Not trained yet: <code>diffrc train</code>.</p>')
    names, counts, groups = (parts.classes[key] for key in ("names", "counts", "groups"))
    added = [parts.made.get(k, (0, 0))[1] for k in range(len(names))]
    order = sorted(range(len(names)), key=lambda k: (-counts[k], k))
    stacks = {
        k: [
            Part(counts[k], groups[k], f"{names[k]}: {plural(counts[k], 'real image')}"),
            Part(added[k], f"{groups[k]} added", f"{names[k]}: {plural(added[k], 'synthetic image')}"),
        ]
        for k in order
    }
    words = (
        f"{sum(counts):,} real images of {plural(len(names), 'class', 'classes')}, {max(counts):,} in the largest and {min(counts):,} in "
        f"the smallest, {max(counts) / max(1, min(counts)):.3g} to 1"
    )
    if any(added):
        filled = [counts[k] + added[k] for k in order]
        words += f"; {sum(added):,} synthetic ones make it {max(filled) / max(1, min(filled)):.3g} to 1"
    shown = legend(
        [(g, "", f"{g}: {plural(sum(group == g for group in groups), 'class', 'classes')}") for g in GROUPS if g in groups]
        + ([("neutral", "added", "synthetic, paler")] if any(added) else [])
    )
    if len(order) > ROWS_SHOWN:
        chart = charts.columns([stacks[k] for k in order], describe="Images of each class, the largest class first")
    else:
        largest = max(counts[k] + added[k] for k in order)
        figures = {k: f"{counts[k]:,}" + (f" <small>+{added[k]:,}</small>" if added[k] else "") for k in order}
        chart = entries("".join(entry(names[k], charts.stacked_bar(stacks[k], largest), figures[k]) for k in order))
    return Section("tail", "The long tail, before and after", f"<p>{words}.</p>{shown}{chart}", "The tail")


def made_section(parts: Parts) -> Section:
    """What was generated, what of it was dropped and why, and images of some classes."""
    images = _galleries(parts) or _sheets(parts)
    if parts.unread:
        left_out = f"{plural(parts.unread, 'image')} could not be read and {'is' if parts.unread == 1 else 'are'} left out"
        images += note(f"{left_out}: damaged, or of another version.")
    return Section("made", "What was made", (_yields(parts) + images) if parts.made or images else "", "Images")


# -------------------------------------------------------------------------------------------------------------- yields


def _yields(parts: Parts) -> str:
    if not parts.made:
        return ""
    made, kept = (sum(pair[i] for pair in parts.made.values()) for i in (0, 1))
    words = f"{plural(made, 'image')} for {plural(len(parts.made), 'class', 'classes')}"
    reasons = {reason: sum(found.get(reason, 0) for found in parts.dropped.values()) for reason in DROPPED}
    if kept == made:
        return f"<p>{words}; nothing was dropped.</p>{_yield_table(parts)}"
    words += f"; the selection kept {kept:,} of them, {_percent(kept, made)}, and dropped "
    words += ", ".join(f"{count:,} as {DROPPED[reason]}" for reason, count in reasons.items() if count) or f"{made - kept:,}"
    shown = [("c2", "", "kept"), *((DROPPED_STYLES[reason], "", DROPPED[reason]) for reason, count in reasons.items() if count)]
    worst = sorted(parts.made, key=lambda k: (parts.made[k][1] / parts.made[k][0], k))
    rows = "".join(_yield_entry(parts, k) for k in worst[:YIELDS_SHOWN])
    left_out = len(worst) - YIELDS_SHOWN
    more = note(f"The {YIELDS_SHOWN} classes with the smallest yields; {left_out:,} more in the table.") if left_out > 0 else ""
    words += ". <i>Too far</i> is outside the band of the class's real images, <i>unsure</i> is what the guide does not take for the class."
    return f"<p>{words}</p>{legend(shown)}{entries(rows)}{more}{_yield_table(parts)}"


def _yield_entry(parts: Parts, class_id: int) -> str:
    made, kept = parts.made[class_id]
    name, found = _name(parts, class_id), parts.dropped.get(class_id, {})
    bars = [Part(kept, "c2", f"{name}: {kept:,} kept")]
    bars += [
        Part(found.get(reason, 0), DROPPED_STYLES[reason], f"{name}: {found.get(reason, 0):,} {DROPPED[reason]}") for reason in DROPPED
    ]
    return entry(name, charts.stacked_bar(bars, made), f"{_percent(kept, made)} <small>of {made:,}</small>")


def _yield_table(parts: Parts) -> str:
    purity = (parts.table.get("purity") or {}).get("per_class") or []
    counts = parts.classes.get("counts", [])
    rows = []
    for k in sorted(parts.made):
        made, kept = parts.made[k]
        why = ", ".join(f"{n:,} {DROPPED.get(reason, reason)}" for reason, n in sorted(parts.dropped.get(k, {}).items()))
        pure = purity[k] if k < len(purity) else None
        cells = [f"{counts[k]:,}" if k < len(counts) else DASH, f"{made:,}", f"{kept:,}"]
        cells += [f"{_percent(kept, made)}" + (f" <small>{text(why)}</small>" if why else ""), DASH if pure is None else f"{pure:.1f} %"]
        rows.append(row(f"<bdi>{text(_name(parts, k))}</bdi>", cells))
    words = "Yield: the share of the made images that the selection kept."
    if purity:
        words += (
            " Purity: the share that an oracle, trained on the whole training split, takes for the class. The oracle reports; it "
            "chooses nothing."
        )
        if parts.table["purity"]["oracle_images"] <= sum(parts.table["counts"]):
            words += " This data set has no images beyond the long tail, so the oracle saw no more than the recognizers."
    shown = table(
        "Yield and purity of each class", ("Class", "Real", "Made", "Kept", "Yield", "Purity"), listed(rows, "synth/manifest.jsonl")
    )
    return folded("Counts, yield and purity of each class", shown + note(words), len(rows))


# -------------------------------------------------------------------------------------------------------------- images


def _galleries(parts: Parts) -> str:
    if not parts.classes or not parts.galleries or (parts.sheets and not any(g.originals for g in parts.galleries)):
        return ""  # a sheet has the originals beside them
    words = "The first images of each class, none of them chosen."
    if parts.galleries_left_out:
        words = (
            f"{len(parts.galleries)} of {len(parts.galleries) + parts.galleries_left_out:,} classes, evenly spaced from the largest to the "
            f"smallest, and the first images of each: none of them is chosen. {parts.galleries_left_out:,} classes are left out."
        )
    return f"<h3>Some of the images</h3><p>{words}</p>{''.join(_gallery(parts, gallery) for gallery in parts.galleries)}"


def _gallery(parts: Parts, gallery: Gallery) -> str:
    k, name = gallery.class_id, _name(parts, gallery.class_id)
    group = parts.classes["groups"][k]
    made, kept = parts.made.get(k, (0, 0))
    told = f"{group}: {parts.classes['counts'][k]:,} real, {kept:,} synthetic" + (f" of {made:,} made" if made > kept else "")
    shown = strip("original", f"Original images of {name}", gallery.originals)
    shown += strip("generated", f"Generated images of {name}", gallery.generated)
    dropped = [Tile(tile.source, {**DROPPED, "both": "both", "novelty": "novelty"}.get(tile.words, tile.words)) for tile in gallery.dropped]
    shown += strip("dropped", f"Generated images of {name} that were dropped", dropped)
    title = f'<h4><i class="dot {text(group)}"></i><bdi>{text(name)}</bdi> <small>{text(told)}</small></h4>'
    return gallery_frame(title + shown, gallery.side_px)


def _sheets(parts: Parts) -> str:
    shown = "".join(
        picture(png, f"{caption}: original images left, generated ones right", caption if len(parts.sheets) > 1 else "")
        for caption, png in parts.sheets
    )
    return f"<p>Original images left, generated ones right.</p>{shown}" if shown else ""


def _name(parts: Parts, class_id: int) -> str:
    names = parts.classes.get("names", ())
    return str(names[class_id]) if class_id < len(names) else f"class {class_id}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else DASH
