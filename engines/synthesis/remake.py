"""Synthesized images drawn again from their plan: what draws them, and how far they may be from the files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from engines import recipe as recipes
from engines import store
from engines.backends.base import Kind
from engines.backends.device import gpu_failures, one_thread_each
from engines.data.decode import Pixels
from engines.data.longtail import prepare
from engines.errors import ConflictError, DataError, EngineError, UsageError
from engines.interrupt import StopRequest
from engines.progress import Report
from engines.recipe import Recipe, SelectSection, SynthSection
from engines.store import RunFolder
from engines.synthesis import plan as plans
from engines.synthesis.examine import stopped, versions_of
from engines.synthesis.maker import Drawn, Maker, open_maker
from engines.synthesis.places import Place
from engines.synthesis.plan import PLAN_FILE, ImageId, MadeWith, Model
from engines.synthesis.sheet import Record

CLOSE_VALUES, CLOSE_STEP = 0.999, 1  # across machines: so many of an image's values within so much of 255
_ENGINE_KEYS = ("engine.", "guided_step.")  # of a plan's identity: what another engine has otherwise
_NO_PIXELS = ("diffrc", "pillow")  # packages whose version changes no pixel, or none that our own tests would not see


def recipe_of_plan(recipe: Recipe, identity: dict[str, Any], engine: Kind | None = None) -> Recipe:
    """The recipe of a run with what a plan was made with in place of what it says now: options that were typed are known by it alone.

    Raises UsageError where the plan's values do not fit this version's schema.
    """
    table = recipe.model_dump(mode="json")
    for key, value in (_defaults() | identity).items():  # what a plan does not mention was not the case, whatever the run says now
        section, _, name = key.partition(".")
        if section in ("synth", "select") and name in table[section]:
            table[section][name] = value
    made = {"kind": identity["engine.kind"], "precision": identity["engine.precision"], "device": identity.get("engine.device", "cpu")}
    compiled = bool(identity.get("engine.compiled", False))
    table["synth"] |= {"model": identity["model"], "engine": made["kind"], "precision": made["precision"], "device": made["device"]}
    table["synth"] |= {"compile": compiled, "fused": "guided_step.file_sha256" in identity}
    if engine:
        table["synth"] |= {"engine": engine, "precision": "fp32", "device": "auto", "compile": False}
    return recipes.validate(table, "the plan with the run's recipe")


def maker_of(place: Place, document: Mapping[str, Any], engine: Kind | None, data: Path | None = None) -> tuple[Maker, str]:
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
    """Of keys that a plan does not mention: they stood at what is the default."""
    sections = {"synth": SynthSection(), "select": SelectSection()}
    return {
        f"{name}.{key}": value
        for name, section in sections.items()
        for key, value in section.model_dump(mode="json").items()
        if f"{name}.{key}" not in ("synth.model", "synth.engine")
    }


def other_versions(record: Record, maker: Maker) -> str:
    """Packages of another version than made an image, for a message; "" where there are none."""
    then, now = versions_of(record), maker.plan.versions
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


def drawn_again(maker: Maker, images: Sequence[ImageId], report: Report, stop: StopRequest) -> Iterator[tuple[ImageId, Pixels | None]]:
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
            for made in pool.map(lambda batch: _batch(maker, batch, stop), batches):
                for drawn in made:
                    yield drawn.image, drawn.pixels
                done += len(made)
                report("remake", done, len(images), {})
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _batch(maker: Maker, images: Sequence[ImageId], stop: StopRequest) -> list[Drawn]:
    def step(_figures: object) -> None:
        if stop.requested:
            raise stopped(stop, "the files are examined, not all of the sample is remade")

    with gpu_failures():
        return maker.draw(images, step)
