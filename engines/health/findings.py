"""What a check found: how grave it is, what it is, and the one thing to do about it."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

Severity = Literal["ok", "note", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)  # from the least to the gravest


class Finding(NamedTuple):
    """One line of a diagnosis. A remedy belongs to all but "ok".

    Severities: "ok" runs; "note" is not here, or odd, and nothing needs it; "warning" runs worse than it could, or will fail later;
    "error" keeps `diffrc` from its work here.
    """

    check: str  # what was looked at: "torch", "disk", ...
    severity: Severity
    text: str
    remedy: str = ""


def worst(findings: list[Finding]) -> Severity:
    """The gravest severity, "ok" of none."""
    return max((found.severity for found in findings), key=SEVERITIES.index, default="ok")


def from_json(value: Any) -> Finding:
    """A finding that another process sent. Raises ValueError for anything else."""
    if not (isinstance(value, list) and len(value) == 4 and all(isinstance(part, str) for part in value) and value[1] in SEVERITIES):
        raise ValueError(f"no finding: {value!r}")
    return Finding(value[0], value[1], value[2], value[3])
