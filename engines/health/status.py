"""What a run has got, stage by stage, and what is next: from names, sizes and JSON alone; no weights are read, no image is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from engines import store
from engines.backends.keys import RUNTIMES, differences, told, wanted
from engines.data.names import slug
from engines.errors import DataError, UsageError
from engines.store import Holder, RunFolder
from engines.synthesis import plan as plans
from engines.synthesis.plan import PLAN_FILE
from engines.training import reuse
from engines.training.reuse import StageStatus

_IMAGE = re.compile(r"\d{6,9}\.png")


@dataclass(frozen=True)
class EngineState:
    """A published engine, as far as its card tells.

    Attributes:
        fits: it is of this recipe, of the versions that are installed, and, where that is known, of the run's weights.
        reason: why it does not fit.
    """

    name: str
    network: str  # "target", "source" or "guide"
    kind: str
    whole: bool  # a network that synth can run, not a part of guided steps
    fits: bool
    reason: str
    size_bytes: int


@dataclass(frozen=True)
class ClassImages:
    """The images of a class."""

    name: str
    group: str
    real: int  # N_k
    synthetic: int  # kept ones that lie there
    asked: int  # by the last synth job, or by `synth --fill` where none has ended


@dataclass(frozen=True)
class Images:
    """A folder of synthesized images.

    Attributes:
        stale: the stages that hold other weights now than those that made the images.
        ended: the last job came to its end.
    """

    folder: Path
    classes: tuple[ClassImages, ...]
    stale: tuple[str, ...]
    ended: bool

    @property
    def there(self) -> int:
        return sum(row.synthetic for row in self.classes)

    @property
    def asked(self) -> int:
        return sum(row.asked for row in self.classes)


@dataclass(frozen=True)
class Lock:
    """A folder of the run that a process holds."""

    folder: str  # relative to the run, "" for the run itself
    holder: Holder

    @property
    def told(self) -> str:
        """Who, for a message."""
        if self.holder.pid is None:
            return "another process"
        return f"process {self.holder.pid}" + (f" ({self.holder.command})" if self.holder.command else "")


@dataclass(frozen=True)
class Status:
    """See the module. `next_command` is what to type, "" where nothing is left; `why` says why."""

    path: Path
    recipe: str
    classes: int  # 0 where the run has no class table yet
    train_images: int
    stages: tuple[StageStatus, ...]
    engines: tuple[EngineState, ...]
    images: tuple[Images, ...]
    evaluated: bool
    evaluated_images: bool  # the evaluation is of as many images as lie there
    report: bool
    locks: tuple[Lock, ...]
    disk_bytes: Mapping[str, int]  # by part, the largest first
    free_bytes: int
    cost_seconds: Mapping[str, float]
    next_command: str
    why: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "run": str(self.path),
            "recipe": self.recipe,
            "classes": self.classes,
            "train_images": self.train_images,
            "stages": [
                {"stage": stage.name, "step": stage.step or 0, "steps": stage.steps, "state": stage.state, "changes": stage.changes}
                for stage in self.stages
            ],
            "engines": [
                {"name": e.name, "network": e.network, "kind": e.kind, "fits": e.fits, "reason": e.reason, "bytes": e.size_bytes}
                for e in self.engines
            ],
            "images": [
                {
                    "folder": str(part.folder),
                    "there": part.there,
                    "asked": part.asked,
                    "ended": part.ended,
                    "stale": part.stale,
                    "classes": [row.__dict__ for row in part.classes],
                }
                for part in self.images
            ],
            "evaluated": self.evaluated,
            "evaluation_is_of_these_images": self.evaluated_images,
            "report": self.report,
            "locks": [{"folder": lock.folder, "pid": lock.holder.pid, "command": lock.holder.command} for lock in self.locks],
            "disk_bytes": dict(self.disk_bytes),
            "free_bytes": self.free_bytes,
            "cost_seconds": dict(self.cost_seconds),
            "next": self.next_command,
            "why": self.why,
        }


def look(path: Path | None = None) -> Status:
    """The status of a run; None = the latest one. Writes nothing, takes no lock.

    Raises UsageError where there is no run, DataError where its JSON is damaged.
    """
    run = store.open_run(path)
    table = run.classes() if (run.path / "classes.json").exists() else {}
    stages = tuple(_stages(run, table.get("kept_sha256", "")))
    images = tuple(_images(run, table))
    engines = tuple(_engines(run))
    accuracy = _document(run.evaluation / "accuracy.json")
    own = next((part for part in images if part.folder == run.synth), None)
    there = own.there if own else 0
    of_these = bool(accuracy) and _document(run.evaluation / "trust.json").get("images", there) == there
    disk = _disk(run.path)
    next_command, why = _next(run, stages, engines, own, bool(accuracy) and of_these)
    return Status(
        path=run.path,
        recipe=run.recipe.name,
        classes=len(table.get("names", ())),
        train_images=sum(table.get("counts", ())),
        stages=stages,
        engines=engines,
        images=images,
        evaluated=bool(accuracy),
        evaluated_images=of_these,
        report=run.report.is_file(),
        locks=tuple(_locks(run)),
        disk_bytes=disk,
        free_bytes=store.free_bytes(run.path),
        cost_seconds=run.cost(),
        next_command=next_command,
        why=why,
    )


def _next(
    run: RunFolder, stages: tuple[StageStatus, ...], engines: tuple[EngineState, ...], images: Images | None, evaluated: bool
) -> tuple[str, str]:
    """The command to type, and why."""
    here = f" --run {run.path}"
    unfinished = [stage for stage in stages if not stage.complete]
    if unfinished:
        return f"diffrc train{here}", f"the {unfinished[0].name} is {_told(unfinished[0])}"
    synth = run.recipe.synth
    able = [engine for engine in engines if engine.whole and engine.network == synth.model and engine.kind in (synth.engine, engine.kind)]
    if synth.engine != "auto":
        able = [engine for engine in able if engine.kind == synth.engine]
    if synth.engine != "torch" and not any(engine.fits for engine in able):
        return f"diffrc export{here}", f"{able[0].name} is stale: {able[0].reason}" if able else f"the {synth.model} is not exported"
    if images is None or not images.there:
        return f"diffrc synth --fill{here}", "there are no images yet"
    if images.stale:
        return f"diffrc run{here}", f"the images were made by another {' and '.join(images.stale)}; they are kept aside"
    if not images.ended:
        return f"diffrc synth --fill{here}", "the last synthesis did not come to its end"
    if not evaluated:
        return f"diffrc evaluate{here}", "nothing says yet whether these images help"
    if not run.report.is_file():
        return f"diffrc report{here}", "there is no report yet"
    return "", "everything is there"


def _told(stage: StageStatus) -> str:
    return "not trained" if stage.state == "to train" else stage.state


# -------------------------------------------------------------------------------------------------------------- stages


def _stages(run: RunFolder, kept_sha256: str) -> Iterator[StageStatus]:
    """As `reuse.examine`; the file source.pretrained, which may be large, is taken to be the one of then."""
    then = next(filter(None, (store.newest_state(run.stage(stage)) for stage in ("source", "target"))), None)
    pretrained = str(then[1].get("made_of", {}).get("source.pretrained", "")) if then else ""
    yield from reuse.examine(run.path, run.recipe, kept_sha256, (pretrained or "a file") if run.recipe.source.pretrained else "")


# ------------------------------------------------------------------------------------------------------------- engines


class _Card(BaseModel):
    """A card of any kind; its fields are compared by name."""

    model_config = ConfigDict(extra="allow", frozen=True)

    recipe_sha256: str
    precision: str
    file_sha256: str


def _engines(run: RunFolder) -> Iterator[EngineState]:
    for path in sorted(run.engines.glob("*/*.json")):
        if path.name.startswith("."):
            continue
        stem = re.sub(r"\.openvino-\w+$", "", path.name.removesuffix(".json"))
        file = path.with_name(stem + (".plan" if path.parent.name == "tensorrt" else ".onnx"))
        network = stem.partition(".")[0]
        size = file.stat().st_size if file.is_file() else 0
        document = _document(path)
        nested = document.get("engine")
        try:
            card = _Card.model_validate(nested if isinstance(nested, dict) else document)
        except ValidationError:
            yield EngineState(path.name, network, "", False, False, "its card is not one of this version", size)
            continue
        fields = card.model_dump()
        kind, whole = str(fields.get("runtime") or fields.get("kind", "")), "runtime" not in fields
        name = f"{path.relative_to(run.engines).as_posix().removesuffix('.json')}: {kind} {card.precision}"
        if not size:
            reason = f"{file.name} is gone"
        elif kind not in RUNTIMES:
            reason = f"no runtime is named {kind!r}"
        else:
            reason = told(differences(card, wanted(run.recipe, card, kind))) or _other_weights(run, network, fields)
        yield EngineState(name, network, kind, whole, not reason, reason, size)


def _other_weights(run: RunFolder, network: str, fields: Mapping[str, Any]) -> str:
    """What the run's images tell of an engine's weights, "" where they tell nothing wrong: their plan names weights and training."""
    folder = plans.folder_of(run, "source" if network == "source" else "target", None)
    document = _document(folder / PLAN_FILE)
    then, identity = document.get("stages", {}).get(network, ""), document.get("identity", {})
    now = reuse.mark(run.path, network)
    theirs = identity.get("weights_sha256" if identity.get("model") == network else "guide_sha256" if network == "guide" else "")
    if not (then and theirs and now):
        return ""
    same = theirs == fields.get("weights_sha256")
    return f"it was exported from other weights than the {network}'s of now" if same != (then == now) else ""


# -------------------------------------------------------------------------------------------------------------- images


def _images(run: RunFolder, table: Mapping[str, Any]) -> Iterator[Images]:
    for folder in sorted(run.path.glob("synth*")):
        if not (folder / PLAN_FILE).is_file():
            continue
        document = _document(folder / PLAN_FILE)
        yields = {row["class"]: row for row in _rows(folder / "yield.json")}
        try:
            fill = plans.fill_classes(run) if folder == run.synth and table else {}
        except UsageError:
            fill = {}
        rows = []
        for k, name in enumerate(table.get("names", ())):
            there = _count(folder / slug(name, k))
            asked = (yields.get(name) or {}).get("asked") or (0 if yields else fill.get(k, 0))
            if there or asked:
                rows.append(ClassImages(name, table["groups"][k], table["counts"][k], there, asked))
        stale = tuple(stage for stage, mark in document.get("stages", {}).items() if mark and reuse.mark(run.path, stage) != mark)
        listed = {row.name for row in rows if row.synthetic}
        yield Images(folder, tuple(rows), stale, ended=bool(yields) and listed <= set(yields))


def _count(folder: Path) -> int:
    try:
        with os.scandir(folder) as entries:
            return sum(_IMAGE.fullmatch(entry.name) is not None for entry in entries)
    except OSError:
        return 0


# ------------------------------------------------------------------------------------------------------- locks and disk


def _locks(run: RunFolder) -> Iterator[Lock]:
    for folder in (run.path, *sorted(path.parent for path in run.path.glob("*/.lock"))):
        if found := store.holder(folder):
            yield Lock("" if folder == run.path else folder.name, found)


def _disk(path: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    with os.scandir(path) as entries:
        for entry in entries:
            part = entry.name if entry.is_dir(follow_symlinks=False) else "other"
            sizes[part] = sizes.get(part, 0) + _size(entry)
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _size(entry: os.DirEntry[str]) -> int:
    """Bytes of a file, or of all files in a folder; links count as themselves, and what goes away meanwhile as nothing."""
    try:
        if not entry.is_dir(follow_symlinks=False):
            return entry.stat(follow_symlinks=False).st_size
        with os.scandir(entry) as entries:
            return sum(map(_size, entries))
    except OSError:
        return 0


def _document(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is none. Raises DataError where it is damaged."""
    if not path.is_file():
        return {}
    found = store.read_json(path)
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no JSON object", "remake it with the command that wrote it, or restore the file")
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    found = store.read_json(path) if path.is_file() else []
    return [row for row in found if isinstance(row, dict) and "class" in row] if isinstance(found, list) else []
