"""`diffrc report`: the report of a run, written anew from what its folder holds."""

from __future__ import annotations

from diffrc_cli import console
from diffrc_cli.options import JsonOption, RunOption


def report(run: RunOption = None, json: JsonOption = False) -> None:
    """Write report/index.html of a run: one file, no network, to look at in a browser.

    Example: diffrc report
    """
    from engines import store
    from engines.evaluation.report import write_report

    found = store.open_run(run)
    with store.locked(found.path):
        path = write_report(found)
    if json:
        console.emit_json({"report": str(path)})
        return
    console.say(f"report: {path}")
