"""Whether synthesized images are what they say: every file held to its text, its place and its manifest line; some remade and compared.

Two kinds of question. Of every image: is the PNG whole, does its text name plan, class, index, seed, versions and the hash of its
pixels, does it lie where it says, does the manifest say the same? Files alone answer these. Of a sample: do the run's networks,
given the plan and the image's name, draw these pixels again? Nothing that was changed consistently by hand survives that.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from engines import recipe as recipes
from engines import store
from engines.backends.base import Kind
from engines.backends.device import gpu_failures, one_thread_each
from engines.data.decode import Pixels, read_regular_file
from engines.data.longtail import prepare
from engines.data.names import shorten, slug
from engines.errors import ConflictError, DataError, DiffRCError, EngineError, Interrupted, UsageError
from engines.interrupt import StopRequest, catch_signals
from engines.progress import Report, silent
from engines.recipe import Recipe, SelectSection, SynthSection
from engines.store import RunFolder
from engines.synthesis import plan as plans
from engines.synthesis.maker import Maker, open_maker
from engines.synthesis.plan import MANIFEST_FILE, PLAN_FILE, ImageId, MadeWith, Model
from engines.synthesis.sheet import MAX_PNG_BYTES, REJECTED, Record, decode_png, pixels_sha256
from engines.synthesis.shelf import Records

SHEETS = ("sheet.png", "copies.png")  # pictures of a synthesis folder that are no images of the plan
LEAST_SAMPLE, SAMPLED_SHARE = 16, 0.01  # images that are remade where no number is given
CLOSE_VALUES, CLOSE_STEP = 0.999, 1  # across machines: so many of an image's values within so much of 255
_ENGINE_KEYS = ("engine.", "guided_step.")  # of a plan's identity: what another engine has otherwise
_NO_PIXELS = ("diffrc", "pillow")  # packages whose version changes no pixel, or none that our own tests would not see
_IMAGE = re.compile(rf"([^/]+)/({REJECTED}/)?(\d{{6,9}})\.png")

Agreement = Literal["equal", "close"]


class Disagreement(NamedTuple):
    """One thing that is not as it should be."""

    file: str  # relative to the folder of the plan, with "/"
    what: str


@dataclass(frozen=True)
class Verification:
    """What was found in a synthesis folder, or in a part of it.

    Attributes:
        images: PNG files that were examined.
        asked: images that were to be remade.
        equal, close: of the remade ones, those with the same bytes, and those within the tolerance of another machine or engine.
        expected: how the remade images had to agree: "equal" where all else is as it was, "close" otherwise.
        why_close: what is not as it was, "" where nothing is.
        failure: why none was remade, where none could be.
    """

    folder: Path
    plan: str
    images: int
    disagreements: tuple[Disagreement, ...]
    asked: int = 0
    seed: int = 0
    engine: str = ""
    equal: int = 0
    close: int = 0
    expected: Agreement = "equal"
    why_close: str = ""
    failure: DiffRCError | None = None

    @property
    def remade(self) -> int:
        """Images that were drawn again and agree."""
        return self.equal + self.close

    @property
    def sound(self) -> bool:
        """Whether all that could be asked agrees."""
        return not self.disagreements and self.failure is None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "folder": str(self.folder),
            "plan": self.plan,
            "images": self.images,
            "sampled": self.asked,
            "seed": self.seed,
            "engine": self.engine,
            "bit_equal": self.equal,
            "close": self.close,
            "expected": self.expected,
            "why_close": self.why_close,
            "not_remade": self.failure.problem if self.failure else "",
            "sound": self.sound,
            "disagreements": [found._asdict() for found in self.disagreements],
        }


class Place(NamedTuple):
    """What is to be verified: a synthesis folder, or a part of it; or images that lie elsewhere, of the plan of such a folder."""

    folder: Path  # holds plan.json
    images: Path  # the folder itself, a class's in it, or another
    run: Path | None  # the run that made them; None where it is not known

    @property
    def elsewhere(self) -> bool:
        """The images do not lie in the folder of their plan."""
        return not self.images.is_relative_to(self.folder)


def verify(
    folder: Path,
    run: Path | None = None,
    sample: int | None = None,
    seed: int = 0,
    engine: Kind | None = None,
    report: Report = silent,
    data: Path | None = None,
) -> list[Verification]:
    """Hold synthesized images to what they say of themselves, and remake a random sample of them. Writes nothing.

    On the kind of machine and with the engine and versions that made an image, it must come out bit for bit. Elsewhere, or with
    another `engine`, 99.9 % of its values must come within 1 of 255. In half precision rounding adds up over the steps: on another kind
    of machine such an image is held to the trajectory limit of its engine's export, and to another engine not at all.

    Args:
        folder: a run folder, a synthesis folder, a class's in one, or any folder of synthetic images of the run.
        run: that made the images; default the one that the folder lies in, else the latest.
        sample: images to remake in each synthesis folder; None = 1 %, at least LEAST_SAMPLE; a larger number than there are = all.
        seed: draws the sample.
        engine: that remakes them; None = the one that made them.
        data: where the run's data lie, if elsewhere than its recipe says; read only where images begin from real ones.

    Returns: one for each synthesis folder, in which what disagrees is listed.

    Raises:
        UsageError: no such folder, or no images in it.
        DataError: their plan is damaged, or nowhere to be found.
        ConflictError: another process makes images there.
        Interrupted: a signal came.
    """
    with catch_signals() as stop:
        return [_verified(place, sample, seed, engine, data, report, stop) for place in places(folder, run)]


# -------------------------------------------------------------------------------------------------------------- places


def places(folder: Path, run: Path | None = None) -> list[Place]:
    """The synthesis folders that a folder stands for. Raises as `verify`."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}", "name a run folder, or a folder of images that diffrc synth made")
    if (folder / "recipe.toml").is_file() and not (folder / PLAN_FILE).is_file():
        made = [path for path in _synth_folders(folder) if path.parent == folder]
        if not made:
            raise UsageError(f"{folder} has no synthesized images yet", f"diffrc synth --fill --run {folder}")
        return [Place(path, path, run or folder) for path in made]
    here = folder.absolute()
    for place in (here, *here.parents[:2]):  # a class's folder, or its folder of dropped images
        if (place / PLAN_FILE).is_file():
            root = Path(os.path.normpath(folder / os.path.relpath(place, here)))
            return [Place(root, root / here.relative_to(place), run or _run_around(place))]
    return [_elsewhere(folder, run)]


def _synth_folders(run: Path) -> list[Path]:
    """A run's folders of images: its own, those of its other model, and those that are kept aside."""
    return [path.parent for pattern in ("synth*", "stale/synth*") for path in sorted(run.glob(f"{pattern}/{PLAN_FILE}"))]


def _run_around(place: Path) -> Path | None:
    return next((path for path in place.parents[:2] if (path / "recipe.toml").is_file()), None)


def _elsewhere(folder: Path, run: Path | None) -> Place:
    """Images that were copied somewhere, by the plan that the first of them names."""
    named = next((plan for path in _pngs(folder) if (plan := _plan_named_in(path))), "")
    if not named:
        raise UsageError(f"{folder} holds no images that diffrc synth made", "name a run folder, or a folder of such images")
    opened = store.open_run(run)
    for place in _synth_folders(opened.path):
        if store.read_json(place / PLAN_FILE).get("plan") == named:
            return Place(place, folder, opened.path)
    raise DataError(
        f"the images in {folder} are of plan {named[:8]}, which {opened.path} does not hold", "--run DIR names the run that made them"
    )


def _plan_named_in(path: Path) -> str:
    try:
        return decode_png(read_regular_file(path, MAX_PNG_BYTES), "", str(path))[1].plan
    except DataError:
        return ""


def _pngs(folder: Path) -> Iterator[Path]:
    """Every PNG below a folder, in order; links are not followed."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(root) / name for name in sorted(names) if name.lower().endswith(".png"))


# --------------------------------------------------------------------------------------------------------------- files


def _verified(
    place: Place, sample: int | None, seed: int, engine: Kind | None, data: Path | None, report: Report, stop: StopRequest
) -> Verification:
    if (owner := store.holder(place.folder)) and owner.pid != os.getpid():
        raise ConflictError(f"{place.folder} is in use by another diffrc process", "wait until it ends")
    document = store.read_json(place.folder / PLAN_FILE)
    try:
        identity, plan, names = document["identity"], str(document["plan"]), list(document["identity"]["classes"])
    except (KeyError, TypeError):
        raise DataError(f"{place.folder / PLAN_FILE} is no plan", "restore it, or remove the folder to make its images again") from None
    shelf = _Files(place, identity, plan, names)
    shelf.examine(report, stop)
    found = Verification(place.folder, plan, shelf.count, tuple(shelf.disagreements), seed=seed)
    if not shelf.count and not found.disagreements:
        raise UsageError(f"{place.images} holds no synthesized images", "diffrc synth --fill makes some")
    if recipes.digest(identity)[:32] != plan:
        damaged = Disagreement(PLAN_FILE, "its identity is not the one that its id was made of")
        return replace(found, disagreements=(damaged, *found.disagreements))
    total = sum(map(len, shelf.records.values()))
    if sample == 0 or not total:
        return found
    count = max(LEAST_SAMPLE, math.ceil(SAMPLED_SHARE * total)) if sample is None else sample
    chosen = shelf.sample(min(count, total), seed)
    found = replace(found, asked=len(chosen))
    try:
        maker, why_close = _maker_of(place, document, engine, data)
    except DiffRCError as failure:
        return replace(found, failure=failure)
    return _remake(found, shelf, maker, why_close, chosen, report, stop)


class _Files:
    """The images of a place, and what is wrong with them as files."""

    def __init__(self, place: Place, identity: Mapping[str, Any], plan: str, names: Sequence[str]) -> None:
        self.place, self.plan, self.names = place, plan, names
        self.seed = identity.get("synth.seed")
        self.classes = {slug(name, k): k for k, name in enumerate(names)}
        self.records: dict[int, Records] = {}
        self.moved: dict[ImageId, Path] = {}  # of images elsewhere, whose place says nothing
        self.disagreements: list[Disagreement] = []
        self.count = 0

    def examine(self, report: Report, stop: StopRequest) -> None:
        """Read every image and the manifest. Raises Interrupted."""
        lines = self._lines()
        paths = [path for path in _pngs(self.place.images) if not (path.parent == self.place.folder and path.name in SHEETS)]
        for path in paths:
            if stop.requested:
                raise _stopped(stop, f"{self.count:,} of {len(paths):,} files are examined")
            self.count += 1
            record = self._record(path)
            name = record.path().as_posix() if self.place.elsewhere and isinstance(record, Record) else self._name(path)
            line = lines.get(name) if self.place.elsewhere else lines.pop(name, None)
            if isinstance(record, str):
                self._disagree(path, record)
            elif wrong := _held_to(record, line):
                self._disagree(path, wrong)
            elif (image := ImageId(record.class_id, record.index)) in self.moved:
                self._disagree(path, "is the same image as another file")
            else:
                self.records.setdefault(record.class_id, Records())[record.index] = record
                if self.place.elsewhere:
                    self.moved[image] = path
            report("check", self.count, len(paths), {})
        if not self.place.elsewhere:
            inside = "" if self.place.images == self.place.folder else f"{self._name(self.place.images)}/"
            missing = [name for name in lines if name.startswith(inside)]
            self.disagreements += [Disagreement(name, f"has a line in {MANIFEST_FILE}, and no file") for name in missing]

    def sample(self, count: int, seed: int) -> list[ImageId]:
        """So many images, by class and index."""
        everything = [ImageId(k, index) for k in sorted(self.records) for index in sorted(self.records[k])]
        return sorted(random.Random(seed).sample(everything, count))

    def record(self, image: ImageId) -> Record:
        """What an image says of itself."""
        return self.records[image.class_id][image.index]

    def path(self, image: ImageId) -> Path:
        """Where it lies."""
        return self.moved.get(image) or self.place.folder / self.record(image).path()

    def pixels(self, image: ImageId) -> Pixels:
        """Read again. Raises DataError where it was damaged meanwhile."""
        path = self.path(image)
        return decode_png(read_regular_file(path, MAX_PNG_BYTES), self.names[image.class_id], str(path))[0]

    def _record(self, path: Path) -> Record | str:
        """What an image says of itself, where it is whole, of this plan, and lies where it belongs; else what is wrong."""
        name = self._name(path)
        place = _IMAGE.fullmatch(name)
        if path.is_symlink():
            return "is a symbolic link"
        if not self.place.elsewhere and (place is None or place[1] not in self.classes):
            return "is in no place where an image of this plan lies"
        try:
            record = decode_png(read_regular_file(path, MAX_PNG_BYTES), "", name)[1]
        except DataError as error:
            return error.problem.removeprefix(f"{name}: ").removeprefix(name).strip()
        if record.plan != self.plan:
            return f"is of another plan ({record.plan[:8]})"
        if record.class_id not in range(len(self.names)):
            return f"says that it is of class {record.class_id}, of {len(self.names)}"
        says = replace(record, class_name=self.names[record.class_id])
        if not self.place.elsewhere and says.path().as_posix() != name:
            return f"says that it is {says.path().as_posix()}"
        if self.seed is not None and record.seed != self.seed:
            return f"says that its seed is {record.seed}, not the plan's {self.seed}"
        if not _versions(record):
            return "does not name the versions that made it"
        return says

    def _lines(self) -> dict[str, dict[str, Any]]:
        """The manifest by file. A line that cannot be read, or that is there twice, disagrees."""
        path, found = self.place.folder / MANIFEST_FILE, dict[str, dict[str, Any]]()
        if not path.is_file():
            self.disagreements.append(Disagreement(MANIFEST_FILE, "is not there"))
            return found
        for number, text in enumerate(path.read_bytes().splitlines(), 1):
            try:
                line = json.loads(text)
                name = str(line["file"])
            except (ValueError, KeyError, TypeError, RecursionError):
                self.disagreements.append(Disagreement(MANIFEST_FILE, f"line {number} cannot be read"))
                continue
            if name in found:
                self.disagreements.append(Disagreement(MANIFEST_FILE, f"line {number} names {shorten(name)} again"))
            found[name] = line
        return found

    def _name(self, path: Path) -> str:
        root = self.place.images if self.place.elsewhere else self.place.folder
        return path.relative_to(root).as_posix()

    def _disagree(self, path: Path, what: str) -> None:
        self.disagreements.append(Disagreement(self._name(path), what))


def _held_to(record: Record, line: Mapping[str, Any] | None) -> str:
    """How a line of the manifest differs from what its image says, "" where it does not. Lines of older versions say less."""
    if line is None:
        return f"has no line in {MANIFEST_FILE}"
    expected = record.line()
    needed = ("class_id", "class", "index", "pixels_sha256")
    other = [key for key, value in expected.items() if (key in line or key in needed) and line.get(key) != value]
    return f"its line in {MANIFEST_FILE} says otherwise: {', '.join(other)}" if other else ""


def _versions(record: Record) -> dict[str, str]:
    try:
        versions = json.loads(record.versions)
    except ValueError:
        return {}
    return versions if isinstance(versions, dict) else {}


# -------------------------------------------------------------------------------------------------------------- pixels


def recipe_of_plan(recipe: Recipe, identity: Mapping[str, Any], engine: Kind | None = None) -> Recipe:
    """The recipe of a run with what a plan was made with in place of what it says now: options that were typed are known by it alone.

    Raises UsageError where the plan's values do not fit this version's schema.
    """
    table = recipe.model_dump(mode="json")
    defaults = {"synth": SynthSection().model_dump(mode="json"), "select": SelectSection().model_dump(mode="json")}
    for key, value in identity.items():
        section, _, name = key.partition(".")
        if name in defaults.get(section, {}):
            table[section][name] = value
    made = {"kind": identity["engine.kind"], "precision": identity["engine.precision"], "device": identity.get("engine.device", "cpu")}
    compiled = bool(identity.get("engine.compiled", False))
    table["synth"] |= {"model": identity["model"], "engine": made["kind"], "precision": made["precision"], "device": made["device"]}
    table["synth"] |= {"compile": compiled, "fused": "guided_step.file_sha256" in identity}
    if engine:
        table["synth"] |= {"engine": engine, "precision": "fp32", "device": "auto", "compile": False}
    return recipes.validate(table, "the plan with the run's recipe")


def _maker_of(place: Place, document: Mapping[str, Any], engine: Kind | None, data: Path | None = None) -> tuple[Maker, str]:
    """What draws the images of a plan again, and why they may differ in a last bit. Raises as `open_maker`, and ConflictError."""
    identity = document["identity"]
    missing = [key for key in ("model", "engine.kind", "engine.precision", "weights_sha256") if key not in identity]
    if missing or identity["engine.kind"] not in get_args(Kind):
        raise DataError(f"{place.folder / PLAN_FILE} does not say what made its images", "images of this version say it")
    if engine and identity["engine.precision"] != "fp32":
        made = f"{identity['engine.kind']} in {identity['engine.precision']}"
        problem = f"the images in {place.folder} were made by {made}, whose rounding no other engine can repeat"
        raise UsageError(problem, "leave --engine out: its own engine makes them again; or --sample 0 checks the files alone")
    opened = store.open_run(place.run)
    run = RunFolder(opened.path, recipe_of_plan(opened.recipe, identity, engine))
    model: Model = "source" if identity["model"] == "source" else "target"
    made_with = plans.made_with(place.folder) if engine is None else MadeWith()
    originals = None if run.recipe.synth.start == "noise" else prepare(run.recipe.data, data)
    maker = open_maker(run, model, made_with, data=originals)
    now = {**_defaults(), **maker.plan.identity}
    then = {**_defaults(), **identity}
    differing = [key for key in dict.fromkeys((*then, *now)) if then.get(key) != now.get(key)]
    of_engine = [key for key in differing if key.startswith(_ENGINE_KEYS)]
    if others := [key for key in differing if key not in of_engine]:
        told = plans.told_differences({key: then.get(key) for key in others}, {key: now.get(key) for key in others})
        raise ConflictError(
            f"{run.path} would make other images than those of {place.folder} ({told})",
            "--run DIR names the run that made them; or diffrc synth, which makes them anew",
        )
    if of_engine and engine is None:
        told = plans.told_differences({key: then.get(key) for key in of_engine}, {key: now.get(key) for key in of_engine})
        raise EngineError(f"the engine that made {place.folder} is gone ({told})", "--engine torch holds its images to another engine")
    card = maker.engine.card
    reasons = [f"made with {identity['engine.kind']} {identity['engine.precision']}, remade with {card.kind} {card.precision}"] * bool(
        of_engine
    )
    here, hosts = plans.host(maker.device.type == "cuda"), document.get("hosts", [])
    if hosts != [here]:
        elsewhere = "made on more than one kind of machine" if here in hosts else "made on another kind of machine"
        reasons.append(elsewhere if hosts else "their plan does not say on which kind of machine they were made")
    return maker, "; ".join(reasons)


def _defaults() -> dict[str, Any]:
    """Of keys that a plan of an older version has not: they stood at what is the default today."""
    sections = {"synth": SynthSection(), "select": SelectSection()}
    return {
        f"{name}.{key}": value
        for name, section in sections.items()
        for key, value in section.model_dump(mode="json").items()
        if f"{name}.{key}" not in ("synth.model", "synth.engine")
    }


def _remake(
    found: Verification, shelf: _Files, maker: Maker, why_close: str, chosen: Sequence[ImageId], report: Report, stop: StopRequest
) -> Verification:
    """Draw the chosen images again and compare."""
    card, export = maker.engine.card, maker.recipe.export
    precisions = {card.precision, maker.plan.identity["engine.precision"]}
    half_db = 0.0 if precisions == {"fp32"} else min(export.bf16_trajectory_psnr_db, export.fp16_trajectory_psnr_db)
    wrong: list[Disagreement] = []
    equal = close = 0
    reasons = [why_close] if why_close else []
    failure: DiffRCError | None = None
    try:
        for drawn, pixels in _drawn(maker, chosen, report, stop):
            record, name = shelf.record(drawn), shelf.path(drawn).relative_to(_root(shelf.place)).as_posix()
            if pixels is None:
                wrong.append(Disagreement(name, "remade, it is not finite"))
            elif record.start != maker.start_of(drawn):
                wrong.append(Disagreement(name, f"it says start={record.start}, remade from {maker.start_of(drawn)}"))
            elif pixels_sha256(pixels) == record.pixels_sha256:
                equal += 1
            else:
                other = _other_versions(record, maker)
                told, is_close = compare(shelf.pixels(drawn), pixels, half_db)
                if other and other not in reasons:
                    reasons.append(other)
                if is_close and (why_close or other):
                    close += 1
                else:
                    wrong.append(Disagreement(name, f"remade, it differs: {told}"))
    except Interrupted:
        raise
    except DiffRCError as error:
        failure = error
    return replace(
        found,
        engine=f"{card.kind} {card.precision}",
        equal=equal,
        close=close,
        expected="close" if reasons else "equal",
        why_close="; ".join(reasons),
        disagreements=(*found.disagreements, *wrong),
        failure=failure,
    )


def _root(place: Place) -> Path:
    return place.images if place.elsewhere else place.folder


def _other_versions(record: Record, maker: Maker) -> str:
    """Packages of another version than made an image, for a message; "" where there are none."""
    then, now = _versions(record), maker.plan.versions
    other = [name for name in sorted({*then, *now}) if name not in _NO_PIXELS and then.get(name) != now.get(name)]
    return ", ".join(f"{name} {then.get(name, 'none')} then, {now.get(name, 'none')} now" for name in other)


def compare(there: Pixels, again: Pixels, half_db: float = 0.0) -> tuple[str, bool]:
    """How far two images (H, W, C) uint8 are apart, in words, and whether they count as close.

    Args:
        half_db: least peak signal-to-noise ratio, for engines in half precision; 0 = 99.9 % of the values within 1 of 255.
    """
    if there.shape != again.shape:
        return f"{list(again.shape)} values, not {list(there.shape)}", False
    apart = np.abs(there.astype(np.int16) - again.astype(np.int16))
    near = float((apart <= CLOSE_STEP).mean())
    mean_square = float((apart.astype(np.float64) ** 2).mean())
    psnr_db = 10 * math.log10(255**2 / mean_square) if mean_square else math.inf
    told = f"{1 - near:.2%} of its values by more than {CLOSE_STEP} of 255, at most {int(apart.max())}; {psnr_db:.0f} dB"
    return told, psnr_db >= half_db if half_db else near >= CLOSE_VALUES


def _drawn(maker: Maker, images: Sequence[ImageId], report: Report, stop: StopRequest) -> Iterator[tuple[ImageId, Pixels | None]]:
    """Images drawn again under the circumstances of synthesis: full batches, one thread each, at most one image a row."""
    rows: dict[int, list[ImageId]] = {}
    for image in reversed(images):
        rows.setdefault(image.row(maker.recipe.synth.batch_size), []).append(image)
    batches: list[list[ImageId]] = []
    while rows:
        batches.append(sorted(waiting.pop() for waiting in rows.values()))
        rows = {row: waiting for row, waiting in rows.items() if waiting}
    done = 0
    report("remake", 0, len(images), {})
    with one_thread_each(), ThreadPoolExecutor(maker.parallel, "verify", torch.set_num_threads, (1,)) as pool:
        try:
            for drawn in pool.map(lambda batch: _batch(maker, batch, stop), batches):
                for image in drawn:
                    yield image.image, image.pixels
                done += len(drawn)
                report("remake", done, len(images), {})
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _batch(maker: Maker, images: Sequence[ImageId], stop: StopRequest) -> list[Any]:
    def step(_figures: object) -> None:
        if stop.requested:
            raise _stopped(stop, "the files are examined, not all of the sample is remade")

    with gpu_failures():
        return maker.draw(images, step)


def _stopped(stop: StopRequest, what: str) -> Interrupted:
    """The end of a job that keeps nothing, so that there is nothing to continue."""
    error = stop.error(what)
    return Interrupted(error.problem, "the same command begins again", error.signal_number)
