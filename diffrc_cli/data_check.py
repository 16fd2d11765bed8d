"""`diffrc data check`: what is wrong with a data set, before any training."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffrc_cli import console
from diffrc_cli.options import DataOption, JsonOption, RecipeOption, SetOption
from diffrc_cli.recipe import resolve

if TYPE_CHECKING:
    from engines.checking.check import Checked

CLASSES_SHOWN, FOUND_SHOWN, FORMS_SHOWN = 30, 5, 5


class Removal(StrEnum):
    """What `--leave-out` may name; Typer takes no list of a Literal."""

    unreadable = "unreadable"
    leaks = "leaks"
    conflicts = "conflicts"
    repeats = "repeats"


HtmlOption = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write a page with pictures of what was found, too.", show_default=False)
]
StrictOption = Annotated[bool, typer.Option("--strict", help="Exit 3 for images that are there twice, leak, or are skipped as unreadable.")]
QuarantineOption = Annotated[
    Path | None,
    typer.Option(
        "--quarantine",
        metavar="FILE",
        help="Write a list of images to leave out, for data.quarantine; nothing is moved or removed.",
        show_default=False,
    ),
]
LeaveOutOption = Annotated[
    list[Removal] | None,
    typer.Option(
        "--leave-out",
        metavar="WHAT",
        help="unreadable, leaks (the training image of a pair), conflicts (both), repeats (all but the first) go to the list; repeatable. "
        "Default: unreadable and leaks.",
        show_default=False,
    ),
]
NearOption = Annotated[bool, typer.Option("--near/--no-near", help="Look for nearly equal images, or for equal files alone.")]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", metavar="N", min=1, help="Processes that decode. Default: one a core.", show_default=False)
]


def check(
    recipe: RecipeOption = None,
    data: DataOption = None,
    html: HtmlOption = None,
    quarantine: QuarantineOption = None,
    leave_out: LeaveOutOption = None,
    strict: StrictOption = False,
    near: NearOption = True,
    workers: WorkersOption = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Check a data set: unreadable images, copies, test images that leak into training, classes, sizes, the tail.

    Every image is decoded once. Exit 0 where training can begin, 3 where it would stop.

    Example: diffrc data check --recipe folder --data photos --html check.html
    """
    from engines.checking.check import check as look
    from engines.checking.scan import cores
    from engines.errors import DataError, UsageError

    if leave_out and quarantine is None:
        raise UsageError("--leave-out says what goes to a list, and no list was asked for", "--quarantine FILE --leave-out ...")
    _refuse_foreign(html, b"<!doctype html>")
    _refuse_foreign(quarantine, b'{\n "format": "diffrc-quarantine')
    settings = resolve(recipe, overrides)
    with console.progress() as report:
        found = look(settings, data, workers or cores(), near, report)
    if json:
        console.emit_json(found.to_json())
    else:
        _show(found)
    _write(found, html, quarantine, [what.value for what in leave_out or (Removal.unreadable, Removal.leaks)])
    if problems := found.problems(strict):
        more = f" (and {len(problems) - 1} more, above)" if len(problems) > 1 else ""
        raise DataError(problems[0][0] + more, problems[0][1])


def _refuse_foreign(path: Path | None, beginning: bytes) -> None:
    """Stop before the work where it would replace a file that no earlier check wrote."""
    from engines.errors import ConflictError

    if path is None or not path.exists():
        return
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(beginning)) == beginning:
                return
    raise ConflictError(f"{path} is there already, and no earlier check wrote it", "choose another name")


def _write(found: Checked, html: Path | None, quarantine: Path | None, leave_out: list[Any]) -> None:
    from engines import store

    if quarantine is not None:
        listed = found.quarantine(leave_out)
        store.write_json(quarantine, listed.to_json())
        console.note(f"{len(listed.left_out):,} images to leave out: {quarantine}; obeyed with --set data.quarantine={quarantine}")
    if html is not None:
        from engines.checking.page import render

        store.write_text(html, render(found))
        console.note(f"page: {html}")


def _show(found: Checked) -> None:
    from engines.checking.check import MEANINGS, RELATIONS

    train, test = (int((side & ~found.left_out).sum()) for side in (~found.for_test, found.for_test))
    held = " (held out of the training images)" if found.census.held_out and test else ""
    console.prose(f"{found.recipe.name}: {train:,} training images in {len(found.classes)} classes, {test:,} test images{held}")
    if out := int(found.left_out.sum()):
        console.prose(f"left out beforehand by {found.recipe.data.quarantine}: {out:,}")
    console.say()
    _show_classes(found)
    console.prose(_shapes(found))
    for fault in found.faults:
        console.prose(f"{fault.level}: {fault.problem}; {fault.remedy}")
    if bad := sorted(found.scan.bad.items()):
        _show_list(f"cannot be read: {len(bad):,} (data.on_bad_image = {found.recipe.data.on_bad_image})", [b.reason for _, b in bad])
    if cut := sorted(found.scan.cut):
        _show_list(f"decode, but end early: {len(cut):,} (used as they are)", [found.names[i] for i in cut])
    for relation in RELATIONS:
        if pairs := found.count(relation):
            note = ""
            if relation == "leak":
                trained, tested = found.leaking()
                note = f" ({len(trained):,} and {len(tested):,} images)"
            lines = [
                f"{'same file' if exact else f'near {distance:.2f}'}: {found.names[a]} = {found.names[b]}"
                for (a, b), _, exact, distance in found.told(FOUND_SHOWN, relation)
            ]
            many = f"{relation}s: {pairs:,} pairs" if pairs > 1 else f"{relation}: 1 pair"
            _show_list(f"{many} of images, {MEANINGS[relation]}{note}", lines, pairs)
    if not (bad or len(found.pairs) or found.faults):
        console.say("nothing found that is wrong")
    if found.pairs.left_out:
        console.prose(f"note: {found.pairs.left_out:,} candidate pairs whose hashes are less alike were not compared")
    console.prose(f"{found.looked_at:,} images in {found.seconds:.1f} s ({found.looked_at / max(found.seconds, 1e-9):,.0f} images/s)")


def _show_classes(found: Checked) -> None:
    rows: list[tuple[object, ...]] = [
        (c.name, c.train, c.bad, "-" if c.kept is None else c.kept, c.group or "-", c.test) for c in found.classes
    ]
    if len(rows) > CLASSES_SHOWN:
        half = CLASSES_SHOWN // 2
        rows = [*rows[:half], (f"... {len(rows) - 2 * half:,} more", "-", "-", "-", "-", "-"), *rows[-half:]]
    console.table("", ("class", "train", "bad", "kept", "group", "test"), rows)
    groups = [(group, [c for c in found.classes if c.group == group]) for group in ("many", "medium", "few")]
    told = ", ".join(f"{group} {len(part)} ({sum(c.kept or 0 for c in part):,} images)" for group, part in groups if part)
    if told:
        console.prose(f"classes by group: {told}")


def _shapes(found: Checked) -> str:
    """Sizes, formats and modes in a sentence each."""
    sizes, forms = found.sizes(), found.forms()
    shown = ", ".join(f"{w}x{h} ({n:,})" for (w, h), n in sizes.most_common(FORMS_SHOWN))
    more = f", and {len(sizes) - FORMS_SHOWN:,} more" if len(sizes) > FORMS_SHOWN else ""
    side = found.recipe.data.image_size_px
    small = f"; {found.smaller():,} are smaller and will be enlarged" if found.smaller() else ""
    kinds = ", ".join(f"{form} {mode} ({n:,})" for (form, mode), n in forms.most_common(FORMS_SHOWN)) or "none"
    return f"sizes: {shown or 'none'}{more} -> {side} px{small}. formats: {kinds}"


def _show_list(title: str, lines: list[str], total: int | None = None) -> None:
    console.prose(title)
    for line in lines[:FOUND_SHOWN]:
        console.say(f"  {line}")
    if (rest := (total or len(lines)) - len(lines[:FOUND_SHOWN])) > 0:
        console.say(f"  ... {rest:,} more; --html FILE shows them with pictures, --json lists them")
