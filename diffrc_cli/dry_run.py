"""What the dry runs of the long commands share: the last line of what a command would take, and the same as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffrc_cli import console

if TYPE_CHECKING:
    from engines.evaluation.forecast import EvaluationForecast
    from engines.synthesis.forecast import PartForecast


class Totals(NamedTuple):
    """What a command would take."""

    seconds_left: float
    disk_bytes: int
    memory_bytes: int
    device: str
    folder: Path  # that it would write to; it need not exist

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, the free disk too."""
        from engines.store import free_bytes

        return {**self._asdict(), "folder": str(self.folder), "free_bytes": free_bytes(self.folder)}

    def show(self) -> None:
        """Print them, and warn where the disk is too small."""
        from engines.store import free_bytes

        free = free_bytes(self.folder)
        memory = f" with {console.size(self.memory_bytes)} of memory" if self.memory_bytes else ""
        disk = f"{console.size(self.disk_bytes)} of disk, {console.size(free)} are free"
        console.prose(f"in all: about {console.duration(self.seconds_left)} on this {self.device}{memory}; {disk}")
        if free < self.disk_bytes:
            console.note(f"warning: {self.folder} needs more than is free")
        console.note("nothing was written; the same command without --dry-run does it")


def synthesis(parts: list[PartForecast], folder: Path) -> Totals:
    """The totals of images to be made."""
    seconds, disk = sum(part.seconds_left for part in parts), sum(part.disk_bytes for part in parts)
    return Totals(seconds, disk, max((part.memory_bytes for part in parts), default=0), parts[0].device, folder)


def synthesis_json(part: PartForecast) -> dict[str, Any]:
    """What one network would make, as plain JSON values."""
    return {
        "model": part.model,
        "folder": str(part.folder),
        "engine": part.engine,
        "classes": [{"class": c.name, "asked": c.asked, "there": c.there, "missing": c.missing} for c in part.classes],
        "missing": part.missing,
        "kept_aside": part.aside,
        "batches": part.batches,
        "side_by_side": part.parallel,
        "seconds_per_batch": part.seconds_per_batch,
        "seconds_left": part.seconds_left,
        "disk_bytes": part.disk_bytes,
        "memory_bytes": part.memory_bytes,
    }


def evaluation(found: EvaluationForecast, folder: Path) -> Totals:
    """The totals of recognizers to be trained."""
    return Totals(found.seconds_left, found.disk_bytes, found.memory_bytes, found.device, folder)


def evaluation_sentence(found: EvaluationForecast) -> str:
    """Which recognizers there are, and at what pace the others would be trained."""
    left = found.recognizers - found.kept
    words = f"{found.recognizers} recognizers, {found.kept} of them trained and kept already"
    if not left:
        return words
    side = f", {found.parallel} side by side" if found.parallel > 1 else ""
    return f"{words}; the others take {found.steps:,} steps of {1000 * found.seconds_per_step:.3g} ms each{side}"


def evaluation_json(found: EvaluationForecast) -> dict[str, Any]:
    """The same as plain JSON values."""
    pace = {"steps_left": found.steps, "seconds_per_step": found.seconds_per_step, "side_by_side": found.parallel}
    return {"recognizers": found.recognizers, "kept": found.kept, **pace, "seconds_left": found.seconds_left}
