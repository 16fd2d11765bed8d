"""How a long job says where it stands: one callable, so that engines never print. And what its process holds."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path

STATUS = Path("/proc/self/status")

Report = Callable[[str, int, int, Mapping[str, float]], None]
"""(what, done, total, figures): `what` is a short name ("source", "synth"), `figures` are the latest values to show, by name."""


def silent(what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
    """The report that says nothing."""


def peak_memory_bytes() -> int:
    """The most memory that this process has held at once so far (resident); 0 where the system does not say.

    Not `getrusage`: its figure starts at what the process that started this one held, since exec keeps it.
    """
    if STATUS.is_file() and (match := re.search(r"^VmHWM:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"), re.MULTILINE)):
        return int(match[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if platform.system() == "Darwin" else used * 1024
