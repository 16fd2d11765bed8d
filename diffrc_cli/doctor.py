"""`diffrc doctor`: what runs on this machine, why the rest does not, and what to do about it."""

from __future__ import annotations

from typing import Annotated

import typer

from diffrc_cli import console
from diffrc_cli.options import JsonOption
from engines.errors import EngineError

WIDEST = 7  # characters of a severity: what was found begins below each other

TimeoutOption = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0.1, help="A library that does not answer by then, nor computes, hangs.")
]


def doctor(timeout: TimeoutOption = 20.0, json: JsonOption = False) -> None:
    """Really start every runtime and device with a model of one node, look at versions, disk and the latest run; one remedy a finding.

    The exit code is 4 where something keeps diffrc from its work here ("error"), else 0.

    Example: diffrc doctor
    """
    from engines.health.doctor import diagnose

    found = diagnose(seconds=timeout)
    if json:
        console.emit_json(found.to_json())
    else:
        for finding in found.findings:
            console.prose(f"{finding.severity:<{WIDEST}} {finding.check}: {finding.text}")
            if finding.severity != "ok":
                console.prose(f"{'':<{WIDEST}} try: {finding.remedy}")
        versions = ", ".join(f"{name} {version}" for name, version in found.versions.items() if version and version != "none")
        console.prose(f"versions: {versions}")
        console.say(f"looked for {found.seconds:.1f} s")
    errors = [finding for finding in found.findings if finding.severity == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise EngineError(f"{errors[0].check}: {errors[0].text}{more}", errors[0].remedy)
