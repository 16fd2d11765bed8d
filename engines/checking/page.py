"""The page of a check: one file with everything inside, the style and the pieces of the report of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from engines.checking.check import MEANINGS, RELATIONS, Checked, Relation
from engines.data.decode import Frame
from engines.data.images import Indices
from engines.evaluation.charts import text
from engines.evaluation.report.page import (
    DASH,
    Section,
    folded,
    gallery_frame,
    listed,
    masthead,
    note,
    page,
    pairs_strip,
    plural,
    row,
    strip,
    table,
    tile,
)
from engines.evaluation.report.tiles import LARGEST_PX, PairTiles, Tile, encoded

PAIRS_SHOWN = 24  # with pictures, of a relation; the nearest first
PAIRS_LISTED = 500  # by name
CUT_SHOWN = 24
TITLES: dict[Relation, str] = {"leak": "Leaks into the test set", "conflict": "One image, two classes", "repeat": "Copies within a class"}
WORDS: dict[Relation, str] = {
    "leak": "A recognizer that trained on one of these has seen the answer to the other; its accuracy is too good.",
    "conflict": "Nothing here says which label is right. It takes a person.",
    "repeat": "A class looks larger than it is, and what is held out of it may be no test. Series of one scene count as well.",
}


def render(found: Checked) -> str:
    """The whole page. Every text that came from a user, a data set or a file is escaped.

    Raises: DataError where an image to be shown has gone bad since it was looked at.
    """
    footer = "Made by DiffRC. Images are shown reduced; no file was changed."
    sections = [
        Section("faults", "Classes and settings", _faults(found), "Faults"),
        Section("unreadable", "Images that cannot be read", _unreadable(found), "Unreadable"),
        *(Section(relation, TITLES[relation], _pairs(found, relation), f"{relation.capitalize()}s") for relation in RELATIONS),
        Section("cut", "Files that end early", _cut(found), "Cut"),
        Section("classes", "Classes", _classes(found)),
        Section("sizes", "Sizes and formats", _shapes(found)),
    ]
    return page(f"{found.recipe.name}: data check", _head(found), sections, footer)


def _head(found: Checked) -> str:
    problems = found.problems()
    worrying = bool(found.scan.bad) or bool(len(found.pairs)) or any(f.level == "warning" for f in found.faults)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        verdict, outcome = f"Training would stop: {problems[0][0]}{more}", "hurts"
    elif worrying:
        verdict, outcome = "Training can begin, but look at what was found first.", "ties"
    else:
        verdict, outcome = "Nothing was found that is wrong.", "helps"
    return masthead(found.recipe.name, "What is wrong with these images?", text(verdict), outcome, list(_tiles(found)))


def _tiles(found: Checked) -> Iterator[str]:
    train, test = (int((side & ~found.left_out).sum()) for side in (~found.for_test, found.for_test))
    held = "held out of them" if found.census.held_out else "of their own"
    yield tile("Images", f"{found.looked_at:,}", f"{train:,} for training, {test:,} for testing, {held}")
    bad = len(found.scan.bad)
    yield tile("Cannot be read", f"{bad:,}", f"on_bad_image = {found.recipe.data.on_bad_image}", "hurts" if bad else "")
    leaks = found.count("leak")
    yield tile("Leaks", f"{leaks:,}", f"pairs, in them {plural(len(found.leaking()[1]), 'test image')}", "hurts" if leaks else "")
    yield tile("In two classes", f"{found.count('conflict'):,}", "pairs", "hurts" if found.count("conflict") else "")
    yield tile("Copies", f"{found.count('repeat'):,}", "pairs within a class")
    yield tile("Left out beforehand", f"{int(found.left_out.sum()):,}", "by data.quarantine")


def _faults(found: Checked) -> str:
    rows = [row(text(fault.level), [f'{text(fault.problem)}; <span class="note">{text(fault.remedy)}</span>']) for fault in found.faults]
    return table("Faults of classes and settings", ("", "what, and what to do"), listed(rows, "--json"), "keys") if rows else ""


def _unreadable(found: Checked) -> str:
    if not found.scan.bad:
        return ""
    rows = [
        row(
            f"<bdi>{text(found.names[i])}</bdi><small>{text(_place(found, i))}</small>",
            [text(bad.kind), text(_reason(found, i))],
        )
        for i, bad in sorted(found.scan.bad.items())
    ]
    words = note(
        "diffrc data check --quarantine FILE writes a list of them that data.quarantine obeys; data.on_bad_image=skip leaves out all."
    )
    return words + table("Images that cannot be read", ("image", "kind", "reason"), listed(rows, "--json"), "keys")


def _pairs(found: Checked, relation: Relation) -> str:
    count = found.count(relation)
    if not count:
        return ""
    pairs = list(found.told(PAIRS_LISTED, relation))
    shown = pairs[:PAIRS_SHOWN]
    members = np.array(sorted({i for pair, *_ in shown for i in pair}), dtype=np.int64)
    side = _side(found)
    images = dict(zip(members.tolist(), _thumbnails(found, members, side), strict=True))
    strips = pairs_strip(
        f"the nearest {len(shown):,}" if count > len(shown) else "all of them",
        f"pairs of images, {MEANINGS[relation]}",
        [PairTiles(Tile(images[a], _caption(found, a, b, exact, distance)), Tile(images[b])) for (a, b), _, exact, distance in shown],
    )
    rows = [
        row(f"<bdi>{text(found.names[a])}</bdi>", [f"<bdi>{text(found.names[b])}</bdi>", "same file" if exact else f"{distance:.2f}"])
        for (a, b), _, exact, distance in pairs
    ]
    near = f" Nearly equal is what is at most {found.pairs.limit:.2f} apart, as a share of the contrast at 32 px, and agrees in detail"
    usual = f"; the nearest of two different images are usually {found.pairs.usual:.2f} apart here." if found.pairs.usual else "."
    told = f"{plural(count, 'pair')}, {MEANINGS[relation]}. {WORDS[relation]}"
    more = f" {count - len(rows):,} more are counted, not listed." if count > len(rows) else ""
    names = table("Pairs by name", ("image", "image", "apart"), listed(rows, "--json"), "keys")
    summary = f"Names of {plural(len(rows), 'pair')}.{more}"
    return f"<p>{text(told)}</p>{note((near + usual).strip())}{gallery_frame(strips, side)}{folded(summary, names, len(rows))}"


def _caption(found: Checked, first: int, second: int, exact: bool, distance: float) -> str:
    places = [_place(found, i) for i in (first, second)]
    return f"{places[0]} = {places[1]}; {'same file' if exact else f'{distance:.2f} apart'}"


def _reason(found: Checked, index: int) -> str:
    """Why an image cannot be read, without its name."""
    return found.scan.bad[index].reason.replace(found.album.origin(index), "").replace(" : ", ": ").strip()


def _place(found: Checked, index: int) -> str:
    split = "test" if found.for_test[index] else "train"
    return f"{found.classes[int(found.labels[index])].name}, {split}"


def _cut(found: Checked) -> str:
    if not found.scan.cut:
        return ""
    cut = sorted(found.scan.cut)
    shown = np.array(cut[:CUT_SHOWN], dtype=np.int64)
    side = _side(found)
    pictures = strip("still whole", "images of files that end early", [Tile(image) for image in _thumbnails(found, shown, side)])
    rows = [row(f"<bdi>{text(found.names[i])}</bdi>", [text(_place(found, i))]) for i in cut]
    words = "They decode to their last pixel, so they are used; but the end mark of their format is lost, and more may be, unseen."
    names = folded(
        f"Names of {plural(len(rows), 'file')}", table("Files that end early", ("image", "place"), listed(rows, "--json"), "keys")
    )
    return f"<p>{words}</p>{gallery_frame(pictures, side)}{names}"


def _classes(found: Checked) -> str:
    rows = [
        row(
            f"{_dot(c.group)}<bdi>{text(c.name)}</bdi>",
            [f"{c.train:,}", f"{c.bad:,}", DASH if c.kept is None else f"{c.kept:,}", text(c.group or DASH), f"{c.test:,}"],
        )
        for c in found.classes
    ]
    words = f"Kept is what the recipe's profile ({found.recipe.data.profile}) leaves for training; by it a class is many, medium or few."
    return note(words) + table("Classes", ("class", "train", "unreadable", "kept", "group", "test"), listed(rows, "--json"))


def _dot(group: str) -> str:
    return f'<i class="dot {text(group)}"></i>' if group else ""


def _shapes(found: Checked) -> str:
    sizes, forms = found.sizes(), found.forms()
    by_size = [row(f"{w:,} \N{MULTIPLICATION SIGN} {h:,} px", [f"{n:,}"]) for (w, h), n in sizes.most_common(200)]
    by_form = [row(text(f"{form} {mode}"), [f"{n:,}"]) for (form, mode), n in forms.most_common()]
    side = found.recipe.data.image_size_px
    small = f" {plural(found.smaller(), 'image is', 'images are')} smaller on a side and will be enlarged." if found.smaller() else ""
    words = f"Every image becomes its largest centered square at {side} px.{small}"
    more = f" {len(sizes) - len(by_size):,} rarer sizes are left out." if len(sizes) > len(by_size) else ""
    tables = table("Formats", ("format and mode", "images"), "".join(by_form), "narrow")
    all_sizes = table("Sizes", ("size", "images"), "".join(by_size), "narrow")
    return note(words + more) + tables + (all_sizes if len(by_size) <= 12 else folded(f"{len(sizes):,} sizes", all_sizes, len(by_size)))


def _side(found: Checked) -> int:
    """Side in px of the pictures: the usual shorter side of the images, up to what a page shows."""
    sizes = found.scan.sizes.min(axis=1)
    return int(np.clip(np.median(sizes[sizes > 0]), 1, LARGEST_PX)) if (sizes > 0).any() else LARGEST_PX


def _thumbnails(found: Checked, indices: Indices, side_px: int) -> Sequence[str]:
    return [encoded(pixels) for pixels in found.album.pixels(indices, Frame(side_px, 3))]
