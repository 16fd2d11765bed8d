"""Share a run's balanced data set: refuse what must not be written over, write it whole or not at all, say what lies there."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines import store
from engines.data.longtail import LongTail
from engines.errors import ConflictError, Interrupted, UsageError
from engines.interrupt import StopRequest, catch_signals
from engines.progress import Report, silent
from engines.recipe import digest
from engines.sharing import cleanlab, layouts
from engines.sharing.balanced import Balanced, Split, open_balanced
from engines.sharing.card import card, evidence, recipe_digest
from engines.sharing.layouts import Format
from engines.store import RunFolder

CARD_FILE, MARKER_FILE = "README.md", "export.json"
VERSION = 1  # raise it when a change of the code changes what is written
SHARD_BYTES = 256 << 20
_WORDS = {  # for what fixes an export
    "format": "the format",
    "splits": "the splits",
    "cleanlab_folds": "what is there for cleanlab",
    "shard_bytes": "the size of shards",
    "recipe_sha256": "the recipe",
    "data_kept_sha256": "the real images",
    "plan": "the plan of the synthetic images",
    "synthetic_sha256": "the synthetic images",
    "evidence_sha256": "the figures for the card",
}


@dataclass(frozen=True)
class Shared:
    """A data set that lies in a folder."""

    folder: Path
    layout: Format
    written: bool  # by this call; else it was there
    names: tuple[str, ...]
    groups: tuple[str, ...]
    real: tuple[int, ...]  # (K) training images
    synthetic: tuple[int, ...]  # (K)
    test: tuple[int, ...]  # (K) zeros where there is no test split
    files: int
    bytes: int
    cleanlab_folds: int

    @property
    def card(self) -> Path:
        return self.folder / CARD_FILE

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        columns = zip(self.names, self.groups, self.real, self.synthetic, self.test, strict=True)
        keys = ("class", "group", "real", "synthetic", "test")
        return {
            "folder": str(self.folder),
            "format": self.layout,
            "written": self.written,
            "files": self.files,
            "bytes": self.bytes,
            "card": str(self.card),
            "cleanlab_folds": self.cleanlab_folds,
            "classes": [dict(zip(keys, column, strict=True)) for column in columns],
        }


def share(
    run: RunFolder,
    longtail: LongTail,
    out: Path,
    layout: Format,
    *,
    test: bool = True,
    cleanlab_folds: int = 0,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    report: Report = silent,
    tell: Callable[[str], None] = lambda line: None,
) -> Shared:
    """Write the balanced data set of a run into a folder: real long tail, kept synthetic images, test images, card.

    Equal arguments and an equal run give equal bytes. Killed at any moment, the folder is whole or not there; the same call then
    writes it. Where it lies there already, nothing is written.

    Args:
        out: a new or empty folder, or one of an earlier call.
        test: write the test split as well.
        cleanlab_folds: also write `cleanlab/` (see `cleanlab.ask`); 0 = do not.
        shard_bytes: of a table or tar at most.
        force: replace the data set of an earlier call that differs; nothing else is ever replaced.
        report: hears "export" in images, and what `cleanlab.ask` tells.
        tell: is told in a line what `cleanlab.ask` costs before it begins.

    Raises:
        ConflictError: the folder holds other things, or images are being synthesized, or as `open_balanced`.
        UsageError, DataError, StorageError, Interrupted, NumericsError.
    """
    data = Path(run.recipe.data.path) if run.recipe.data.path else None
    if data and data.is_dir() and out.resolve().is_relative_to(data.resolve()):
        raise UsageError(f"{out} lies inside the data set {data}: its images would be read as real ones", "--out DIR elsewhere")
    balanced = open_balanced(run, longtail)
    with store.locked(run.synth):
        splits = [balanced.train, *([balanced.test] if test else [])]
        identity = _identity(balanced, splits, layout, cleanlab_folds, shard_bytes)
        if _is_there(out, identity, force):
            return _shared(balanced, splits, out, layout, cleanlab_folds, written=False)
        opinions = _opinions(balanced, cleanlab_folds, report, tell)
        size_bytes = sum(layouts.size_bound(balanced, split, layout) for split in splits)
        size_bytes += sum(array.nbytes for array in opinions) if opinions else 0
        store.require_space(out, size_bytes)
        with catch_signals() as stop, store.building(out, size_bytes, replace=force and out.exists() and any(out.iterdir())) as building:
            heard = _Heard(sum(map(len, splits)), report, stop)
            sizes = layouts.write(balanced, splits, layout, shard_bytes, building, heard)
            if opinions:
                cleanlab.write(balanced, layouts.order_of(balanced, balanced.train, layout), opinions, cleanlab_folds, building)
            made = {"files": building.files, "bytes": building.bytes}  # the card is the user's to edit
            building.write(CARD_FILE, [card(balanced, splits, layout, sizes, cleanlab_folds).encode()])
            top = sorted([path.name for path in building.path.iterdir()] + [MARKER_FILE])
            marker = {"diffrc_export": VERSION, "digest": digest(identity), **made, "top": top, **identity}
            building.write(MARKER_FILE, [json.dumps(marker, indent=1).encode() + b"\n"])
        return _shared(balanced, splits, out, layout, cleanlab_folds, written=True)


def _identity(balanced: Balanced, splits: Sequence[Split], layout: Format, cleanlab_folds: int, shard_bytes: int) -> dict[str, Any]:
    """What fixes the bytes of an export, apart from the versions of the libraries that encode it."""
    kept = json.dumps([indices.tolist() for indices in balanced.kept])
    return {
        "format": layout,
        "splits": [split.name for split in splits],
        "cleanlab_folds": cleanlab_folds,
        "shard_bytes": shard_bytes if layout in ("parquet", "webdataset") else 0,
        "recipe_sha256": recipe_digest(balanced.run.recipe),
        "data_kept_sha256": balanced.longtail.kept_sha256,
        "plan": balanced.plan["plan"],
        "synthetic_sha256": hashlib.sha256(kept.encode()).hexdigest(),
        "evidence_sha256": digest(evidence(balanced)),
    }


def _is_there(out: Path, identity: dict[str, Any], force: bool) -> bool:
    """Whether this very export lies there, whole. Raises ConflictError for anything that may not be replaced."""
    elsewhere = "--out DIR names a new folder"
    if out.is_symlink():
        raise ConflictError(f"{out} is a symbolic link", f"--out {out.resolve()} if that is what is meant")
    if out.exists() and not out.is_dir():
        raise ConflictError(f"{out} is a file", elsewhere)
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if not there:
        return False
    marker = store.read_json(out / MARKER_FILE) if MARKER_FILE in there else {}
    if not isinstance(marker, dict) or "diffrc_export" not in marker:
        raise ConflictError(f"{out} is not empty and holds no export ({there[0]!r} lies there)", elsewhere)
    if force:
        if foreign := [name for name in there if name not in marker.get("top", ())]:
            raise ConflictError(f"{out} holds an export and other things ({foreign[0]!r} lies there)", f"move them away; or {elsewhere}")
        return False
    again = f"--force replaces it; or {elsewhere}"
    if (marker["diffrc_export"], marker.get("digest")) != (VERSION, digest(identity)):
        changed = [_WORDS[key] for key, value in identity.items() if marker.get(key) != value]
        raise ConflictError(f"{out} holds another export (not the same: {', '.join(changed) or 'the version of DiffRC'})", again)
    if (marker.get("files"), marker.get("bytes")) != _files_and_bytes(out, marker.get("top", ())):
        raise ConflictError(f"files in {out} were changed, added or removed since it was exported", again)
    return True


def _files_and_bytes(out: Path, top: Sequence[str]) -> tuple[int, int]:
    """How many files an export holds, and their bytes, without the card, which is the user's to edit, and the marker."""
    ours = [out / name for name in top if name not in (CARD_FILE, MARKER_FILE)]
    files = [path for place in ours for path in (place, *place.rglob("*")) if path.is_file()]
    return len(files), sum(path.stat().st_size for path in files)


def _opinions(balanced: Balanced, folds: int, report: Report, tell: Callable[[str], None]) -> cleanlab.Opinions | None:
    if not folds:
        return None
    steps, share = balanced.run.recipe.recognizer.train_steps, 100 * (folds - 1) / folds
    tell(
        f"cleanlab: {folds} recognizers of {steps:,} steps, each on {share:.0f} % of the {len(balanced.longtail.train):,} real images, and "
        "the run's judge on all of them; those that are kept from before cost nothing"
    )
    with store.locked(balanced.run.path):
        return cleanlab.ask(balanced, folds, report)


def _shared(balanced: Balanced, splits: Sequence[Split], out: Path, layout: Format, cleanlab_folds: int, *, written: bool) -> Shared:
    classes = len(balanced.names)
    marker = store.read_json(out / MARKER_FILE)
    real, synthetic = (tuple(balanced.train.counts(classes, synthetic=kind)) for kind in (False, True))
    tested = [split.counts(classes, synthetic=False) for split in splits if split.name == "test"]
    test = tuple(tested[0]) if tested else (0,) * classes
    groups = balanced.longtail.groups
    counted = (marker["files"], marker["bytes"])
    return Shared(out, layout, written, balanced.names, groups, real, synthetic, test, *counted, cleanlab_folds)


class _Heard:
    """Counts images, and ends the export when it is asked to stop: what was written so far goes."""

    def __init__(self, total: int, report: Report, stop: StopRequest) -> None:
        self.done, self.total, self.report, self.stop = 0, total, report, stop

    def __call__(self) -> None:
        self.done += 1
        self.report("export", self.done, self.total, {})
        if self.stop.requested:
            name = signal.Signals(self.stop.signal_number).name
            problem = f"stopped by {name}: {self.done} of {self.total} images were written, and removed again"
            raise Interrupted(problem, "the same command writes them anew", self.stop.signal_number)
