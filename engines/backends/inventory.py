"""What a run has exported: every engine with its card, whether it may be loaded here and now, and if not, why; and taking them away."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from pydantic import BaseModel, ValidationError

from engines.backends import choice
from engines.backends.base import EngineCard, Kind, Precision, card_path, engine_path, weights_sha256
from engines.backends.choice import Build
from engines.backends.device import device_name
from engines.backends.export import Model, export_command, onnx_path
from engines.backends.fused import FusedCard, rules_of
from engines.backends.gradient import GradientCard
from engines.backends.keys import check_card, differences, told, wanted
from engines.backends.trt_engine import PlanCard
from engines.errors import DiffRCError, EngineError, StorageError, UsageError
from engines.store import RunFolder

What = Literal["network", "gradient", "guided step", "timing cache", "unknown"]
State = Literal["ready", "stale", "cannot run here", "damaged"]
Card = EngineCard | PlanCard | GradientCard | FusedCard
OPENVINO = tuple(f".openvino-{precision}" for precision in ("fp32", "bf16", "fp16"))  # before .json: cards of a file that runtimes share
NOT_TRAINED = "of nothing that is trained"  # no weights have this sha256


@dataclass(frozen=True)
class Entry:
    """An engine of a run, or a file beside them that belongs to none."""

    name: str  # what it is called, and removed by: "target onnx fp32"
    model: str  # "target", "source" or "guide"; "" where that is not known
    what: What
    kind: str  # of the runtime; "" where that is not known
    precision: str
    file: Path
    card_path: Path | None
    card: Card | None  # None where it cannot be read
    size_bytes: int  # of the file, which several engines may share
    state: State
    reason: str  # of any state but "ready"

    @property
    def described(self) -> EngineCard | GradientCard | FusedCard | None:
        """The card without what a plan's adds to it."""
        return self.card.engine if isinstance(self.card, PlanCard) else self.card

    @property
    def measured(self) -> dict[str, float]:
        """Figures of its gate, by the card's names."""
        fields = self.described.model_dump() if self.described else {}
        kept = ("one_step_error", "step_error", "max_error", "cosine", "trajectory_psnr_db", "label_agreement", "ms_per_image")
        return {name: fields[name] for name in kept if name in fields and (name != "label_agreement" or fields["labels_by"])}


def list_engines(run: RunFolder) -> tuple[Entry, ...]:
    """Every engine in a run's folder, by name; files without a card and cards without a file too. Links are left alone."""
    weights = _weights(run)
    found: list[Entry] = []
    claimed: set[Path] = set()
    for path in _files(run.engines):
        if path.suffix == ".json":
            entry = _of_card(run, path, weights)
            claimed |= {entry.file, path}
            found.append(entry)
    found += [_without_card(path) for path in _files(run.engines) if path not in claimed]
    return tuple(sorted(found, key=lambda entry: entry.name))


class Fate(NamedTuple):
    """What becomes of a build that is not taken."""

    build: Build
    why: str


def explain(run: RunFolder, model: Model, made_with: str = "", made_on: str = "") -> tuple[str, tuple[Fate, ...]]:
    """Which engine `synth` takes of a run, as text, and what becomes of every other and why.

    Args:
        made_with, made_on: the build, as text, and the kind of device of the images that would be continued.
    """
    from engines.training.stages import load_unet  # reads checkpoints, and brings the training with it

    recipe, synth, path = run.recipe, run.recipe.synth, onnx_path(run, model)
    if synth.engine == "torch":
        return "torch: it is named, and needs no export", ()
    asked = choice.builds_of(synth.engine, synth.precision)
    where = made_on if synth.device == "auto" and made_on else synth.device
    weights = weights_sha256(load_unet(run, model))

    def check(file: Any) -> None:
        check_card(file.card, recipe, weights, path, export_command(run, model))

    taken: Build | None = None
    try:
        chosen = choice.choose(path, asked, check, made_with, export_command(run, model), where)
        taken, why = chosen.build, chosen.own
        verdict = f"{taken}: {why or ('it is the only one that was asked for' if len(asked) == 1 else 'no other can be taken')}"
    except EngineError as error:
        verdict = f"none: {error.problem}; try {error.remedy}"
    fates = []
    for build in choice.BUILDS:
        if build == taken:
            continue
        reason = _reason(path, build, check) if build in asked else f"not asked for: synth.engine is {synth.engine}, in {synth.precision}"
        fates.append(Fate(build, reason))
    return verdict, tuple(fates)


def remove(run: RunFolder, entries: Sequence[Entry]) -> int:
    """Take engines away, cards first, so that killed in between nothing without a card is loaded; gives the bytes freed.

    A file goes with the last card that names it, and only files in the run's own folder of engines go. Raises StorageError.
    """
    folder = run.engines.resolve()
    others = {entry.file for entry in list_engines(run) if entry.card_path and entry.card_path not in {e.card_path for e in entries}}
    cards = [entry.card_path for entry in entries if entry.card_path]
    files = [entry.file for entry in entries if entry.file not in others]
    freed = 0
    for path in dict.fromkeys((*cards, *files)):
        if not path.is_file() or path.is_symlink() or not path.resolve().is_relative_to(folder):
            continue
        try:
            size = path.stat().st_size
            path.unlink()
        except OSError as error:
            raise StorageError(f"cannot remove {path}: {error.strerror}", "make the folder writable") from error
        freed += size
    return freed


def _reason(path: Path, build: Build, check: Callable[[Any], None]) -> str:
    """Why a build that was asked for is not taken."""
    file = engine_path(path, *build)
    if not (file.is_file() and card_path(file, *build).is_file()):
        return "not exported"
    try:
        found = choice.read(path, build)
        check(found)
        choice.require(build)
    except DiffRCError as error:
        return error.problem
    return f"ready, {found.card.ms_per_image:.3g} ms an image" if found.card.ms_per_image else "ready, its speed was not measured"


def _of_card(run: RunFolder, path: Path, weights: Callable[[str], str]) -> Entry:
    """The entry of a card, whatever it says."""
    stem = path.name.removesuffix(".json")
    shared = next((end for end in OPENVINO if stem.endswith(end)), "")
    stem = stem.removesuffix(shared)
    file = path.with_name(stem + (".plan" if path.parent.name == "tensorrt" else ".onnx"))
    card = _read(path)
    if card is None:
        runtime = shared.removeprefix(".").split("-") if shared else ("", "")
        return _entry(stem, "unknown", runtime[0], runtime[1], file, path, None, "damaged", "its card is not one of this version")
    what: What = "guided step" if isinstance(card, FusedCard) else "gradient" if isinstance(card, GradientCard) else "network"
    described = card.engine if isinstance(card, PlanCard) else card
    kind, precision = described.kind if isinstance(described, EngineCard) else described.runtime, described.precision
    model = stem.partition(".")[0]
    own = engine_path(onnx_path(run, cast("Model", model)), kind, precision) if what == "network" else file
    if (file, path) != (own, card_path(own, kind, precision)):
        told_of = f"its card is of another engine: {kind} {precision}"
        return _entry(stem, what, kind, precision, file, path, card, "damaged", told_of)
    state, reason = _state(run, model, file, card, kind, precision, weights)
    return _entry(stem, what, kind, precision, file, path, card, state, reason)


def _entry(
    stem: str, what: What, kind: str, precision: str, file: Path, card_path: Path, card: Card | None, state: State, reason: str
) -> Entry:
    model, _, rest = stem.partition(".")
    label = stem.replace(".guided-", " ") if rest and rest not in ("fp16", "bf16") else model
    name = " ".join(word for word in (label, kind, precision) if word)
    size = file.stat().st_size if file.is_file() else 0
    return Entry(name, model, what, kind, precision, file, card_path, card, size, state, reason)


def _state(
    run: RunFolder, model: str, file: Path, card: Card, kind: Kind, precision: Precision, weights: Callable[[str], str]
) -> tuple[State, str]:
    """Whether an engine may be loaded: its file is the card's, it fits the run, and it can run here."""
    described = card.engine if isinstance(card, PlanCard) else card
    if file.is_symlink():
        return "damaged", f"{file.name} is a link"
    try:
        data = file.read_bytes()
    except OSError as error:
        return "damaged", f"cannot read {file.name}: {error.strerror}"
    if hashlib.sha256(data).hexdigest() != described.file_sha256:
        return "damaged", f"{file.name} is not the file that its card describes"
    asked, build = _asked(run, model, described, kind, weights), Build(kind, precision)
    try:
        if isinstance(card, EngineCard):
            asked["device"] = device_name(choice.device_of(build, run.recipe.synth.device))
    except DiffRCError as error:
        return "cannot run here", error.problem
    if stale := differences(described, asked):
        return "stale", told(stale)
    try:
        choice.require(build, described.opset)
        if isinstance(card, PlanCard):
            choice.read(onnx_path(run, cast("Model", model)), Build("tensorrt", card.engine.precision))
    except DiffRCError as error:
        return "cannot run here", error.problem
    return "ready", ""


def _asked(run: RunFolder, model: str, card: BaseModel, kind: str, weights: Callable[[str], str]) -> dict[str, Any]:
    """What a card must say, see `keys.wanted`; of a guided step, the rules of the recipe too."""
    if isinstance(card, GradientCard):
        return wanted(run.recipe, card, kind, weights_sha256=weights("guide"))
    asked = wanted(run.recipe, card, kind, weights_sha256=weights(model))
    if isinstance(card, FusedCard):
        asked |= {"guide_sha256": weights("guide"), "rules": rules_of(run.recipe.synth)}
    return asked


def _weights(run: RunFolder) -> Callable[[str], str]:
    """sha256 of the weights of "target", "source" or "guide", each read once; NOT_TRAINED where there are none."""
    from engines.training.stages import load_guide, load_unet  # reads checkpoints, and brings the training with it

    @cache
    def digest(stage: str) -> str:
        try:
            return weights_sha256(load_guide(run) if stage == "guide" else load_unet(run, cast("Model", stage)))
        except UsageError:
            return NOT_TRAINED

    return lambda stage: digest(stage) if stage in ("target", "source", "guide") else NOT_TRAINED


def _read(path: Path) -> Card | None:
    """A card of any kind, or None."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    for kind in (EngineCard, PlanCard, GradientCard, FusedCard):
        try:
            card: Card = kind.model_validate_json(data)
            return card
        except ValidationError:
            continue
    return None


def _files(folder: Path) -> list[Path]:
    """Files of the folder of engines, but for links and what killed writers left behind."""
    places = [folder, *(path for path in sorted(folder.iterdir()) if path.is_dir() and not path.is_symlink())] if folder.is_dir() else []
    found = [path for place in places for path in sorted(place.iterdir()) if not path.name.startswith(".")]
    return [path for path in found if path.is_file() and not path.is_symlink()]


def _without_card(path: Path) -> Entry:
    size, model = path.stat().st_size, path.name.partition(".")[0]
    if path.suffix == ".cache":
        return Entry(path.name, "", "timing cache", "tensorrt", "", path, None, None, size, "ready", "")
    return Entry(path.name, model, "unknown", "", "", path, None, None, size, "damaged", "it has no card, and is never loaded")
