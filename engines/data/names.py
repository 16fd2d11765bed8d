"""Class names: found as people type them, and made into folder names that no name can break out of."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence

from engines.errors import UsageError

MAX_SLUG = 64
MAX_SHOWN = 60


def find_class(typed: str, names: Sequence[str]) -> int:
    """The label of the class a person means: case, spaces, hyphens and underscores are one.

    An exact match wins over a loose one. Raises UsageError for an unknown name, naming the nearest, and for one that fits
    several classes.
    """
    if typed in names:
        return names.index(typed)
    loose = [_loose(name) for name in names]
    hits = [label for label, name in enumerate(loose) if name == _loose(typed)]
    if len(hits) == 1:
        return hits[0]
    if hits:
        same = ", ".join(repr(shorten(names[label])) for label in hits[:3])
        raise UsageError(f"{shorten(typed)!r} fits {len(hits)} classes: {same}", "type one of them exactly as it is written here")
    near = difflib.get_close_matches(_loose(typed)[:MAX_SLUG], [name[:MAX_SLUG] for name in loose], n=1, cutoff=0.5)
    problem = f"this run has no class named {shorten(typed)!r}."
    if near:
        nearest = next(name for name, key in zip(names, loose, strict=True) if key[:MAX_SLUG] == near[0])
        raise UsageError(problem, f"--class {shorten(nearest)}      (classes of this run: diffrc data classes)")
    raise UsageError(problem, "diffrc data classes lists the classes of this run")


def slug(name: str, class_id: int) -> str:
    """A folder name of a class: `[a-z0-9_-]{1,64}` of its NFC name, then `-` and the id in four digits or more.

    The id makes it a bijection for any names, also equal, empty or hostile ones: "black_swan", 12 -> "black_swan-0012".
    """
    assert class_id >= 0
    lower = unicodedata.normalize("NFC", name[: 4 * MAX_SLUG]).lower()
    safe = re.sub(r"[^a-z0-9_-]+", "_", lower)[:MAX_SLUG].strip("_-")
    return f"{safe or 'class'}-{class_id:04d}"


def shorten(name: str) -> str:
    """A name short enough for one line of a message."""
    return name if len(name) <= MAX_SHOWN else name[: MAX_SHOWN - 1] + "…"


def _loose(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()
