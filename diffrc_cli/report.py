"""`diffrc report`: the report of a run, written anew from what its folder holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffrc_cli import console
from diffrc_cli.options import JsonOption, RunOption

if TYPE_CHECKING:
    from pathlib import Path

    from engines.data.longtail import LongTail
    from engines.store import RunFolder


def report(run: RunOption = None, json: JsonOption = False) -> None:
    """Write report/index.html of a run: one file, no network, to look at in a browser.

    Where the data that the run was trained on can be read, real images stand beside the generated ones.

    Example: diffrc report
    """
    from engines import store

    found = store.open_run(run)
    with store.locked(found.path):
        path = write(found, _data_of(found))
    if json:
        console.emit_json({"report": str(path)})
        return
    console.say(f"report: {path}")


def write(run: RunFolder, tail: LongTail | None) -> Path:
    """The report of a run, with what its recipe changes in the embedded one of its name. Raises DataError, StorageError."""
    from diffrc_cli.recipe import embedded, resolve
    from engines.evaluation.report import write_report

    return write_report(run, tail, resolve(run.recipe.name) if run.recipe.name in embedded() else None)


def _data_of(run: RunFolder) -> LongTail | None:
    """The run's data; None, and a line that says why, where it cannot be read or is not what the run was trained on."""
    from engines import store
    from engines.data.longtail import prepare
    from engines.errors import DiffRCError

    classes = run.path / "classes.json"
    if not classes.exists():
        return None
    try:
        tail = prepare(run.recipe.data, None, for_training=False)
    except DiffRCError as error:
        console.note(f"no real images in the report: {error.problem}")
        return None
    if tail.table() != store.read_json(classes):
        console.note("no real images in the report: the data has changed since the run was trained")
        return None
    return tail
