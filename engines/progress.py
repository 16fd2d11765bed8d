"""How a long job says where it stands: one callable, so that engines never print."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Report = Callable[[str, int, int, Mapping[str, float]], None]
"""(what, done, total, figures): `what` is a short name ("source", "synth"), `figures` are the latest values to show, by name."""


def silent(what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
    """The report that says nothing."""
