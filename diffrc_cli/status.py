"""`diffrc status`: what a run has got, stage by stage, what is next, who is at work in it, and what it takes on the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffrc_cli import console
from diffrc_cli.options import JsonOption, RunOption

if TYPE_CHECKING:
    from engines.health.status import Images, Status

SHOWN = 12  # classes; --json has all of them


def status(run: RunOption = None, json: JsonOption = False) -> None:
    """Say what a run has got and which command comes next. Quick: reads no weights and no images, and writes nothing.

    Example: diffrc status
    """
    from engines.health.status import look

    found = look(run)
    if json:
        console.emit_json(found.to_json())
        return
    data = f": {found.classes} classes, {found.train_images:,} training images" if found.classes else ": nothing trained yet"
    console.prose(f"{found.path} ({found.recipe}){data}")
    rows = [(stage.name, f"{stage.step or 0:,}", f"{stage.steps:,}", stage.state) for stage in found.stages]
    console.table("", ("stage", "step", "of", "state"), rows)
    for stage in found.stages:
        if stage.changes:
            console.prose(f"{stage.name}: {'; '.join(stage.changes[:3])}")
    _engines(found)
    for part in found.images:
        _images(part, found)
    if not found.images:
        console.say("images: none yet")
    console.say(f"evaluation: {_evaluation(found)}")
    console.say(f"report: {found.path / 'report' / 'index.html'}" if found.report else "report: none yet")
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in list(found.disk_bytes.items())[:4])
    console.prose(f"disk: {_bytes(sum(found.disk_bytes.values()))} ({parts}); {_bytes(found.free_bytes)} free")
    for lock in found.locks:
        console.prose(f"in use: {found.path / lock.folder} by {lock.told}")
    console.say(f"next: {found.next_command}" if found.next_command else f"next: nothing, {found.why}")
    if found.next_command:
        console.prose(f"      {found.why}")


def _engines(found: Status) -> None:
    if not found.engines:
        console.say("engines: none yet")
    for engine in found.engines:
        console.prose(f"engine {engine.name}: {'fits' if engine.fits else f'stale: {engine.reason}'}")


def _images(part: Images, found: Status) -> None:
    from engines.data.names import shorten

    short = [row for row in part.classes if row.synthetic < row.asked]
    stale = f"; made by another {' and '.join(part.stale)} than the run holds now" if part.stale else ""
    ended = "" if part.ended else "; the last job did not end"
    full = len(part.classes) - len(short)
    console.prose(
        f"images in {part.folder.relative_to(found.path)}: {part.there:,} of {part.asked:,} asked for, "
        f"{full} of {len(part.classes)} classes complete{ended}{stale}"
    )
    shown = (short or list(part.classes))[:SHOWN]
    if shown:
        rows = [(shorten(row.name), row.group, row.real, row.synthetic, row.asked) for row in shown]
        console.table("", ("class", "group", "real", "synthetic", "asked"), rows)
    if len(short or part.classes) > SHOWN:
        console.say(f"and {len(short or part.classes) - SHOWN} more classes; --json lists all of them")


def _evaluation(found: Status) -> str:
    if not found.evaluated:
        return "none yet"
    return "done" if found.evaluated_images else "done, of other images than lie there now"


def _bytes(size: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size} bytes"
