"""What will be made: which classes and how many images of each, and the plan, which fixes every pixel."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from engines import recipe as recipes
from engines import store
from engines.data.names import find_class, shorten
from engines.errors import ConflictError, DataError, UsageError
from engines.recipe import Recipe
from engines.store import RunFolder
from engines.training import reuse

if TYPE_CHECKING:
    from engines.backends.base import EngineCard  # it brings torch

Model = Literal["target", "source"]

PLAN_FILE, MANIFEST_FILE, GUIDANCE_FILE = "plan.json", "manifest.jsonl", "guidance.json"
CPUINFO = Path("/proc/cpuinfo")
# Of [synth]; all but the last two are named by what they stand for.
_NOT_PIXELS = ("model", "engine", "precision", "device", "compile", "fused", "fill_to", "max_bad")
_GOLDEN = 40503  # / 2^16, the golden ratio's fraction: spreads the classes' first rows evenly over a batch
_SHOWN = 3  # differing keys in a message

# ------------------------------------------------------------------------------------------------------------ the plan


@dataclass(frozen=True)
class Plan:
    """Everything that fixes the pixels of image (class, index); how many are made is not part of it.

    Attributes:
        identity: flat, of plain JSON values.
        versions: of the packages at hand when the plan was made; told, not compared.
        stages: marks of the stages that take part (`reuse.mark`), which name the same weights as the identity, at less cost.
    """

    identity: Mapping[str, Any]
    versions: Mapping[str, str]
    stages: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def id(self) -> str:
        """32 hexadecimal digits, equal exactly when every value of the identity is."""
        return recipes.digest(self.identity)[:32]

    @property
    def names(self) -> list[str]:
        """K class names."""
        return list(self.identity["classes"])


@dataclass(frozen=True, order=True, slots=True)
class ImageId:
    """An image's name within a plan."""

    class_id: int
    index: int

    def row(self, batch_size: int) -> int:
        """Its row in every compute batch, part of what fixes its pixels."""
        return (self.index + (self.class_id * _GOLDEN * batch_size >> 16)) % batch_size


def make_plan(
    recipe: Recipe,
    classes: Mapping[str, Any],
    model: Model,
    card: EngineCard,
    guide_sha256: str,
    versions: Mapping[str, str],
    guided_sha256: str = "",
    device: str = "cpu",
    compiled: bool = False,
) -> Plan:
    """The plan of a run.

    Args:
        classes: the run's class table.
        card: of the engine that will run.
        guide_sha256: of the guide's weights; "" where nothing needs it.
        guided_sha256: of the file that makes guided steps in one graph; "" where the network and torch's guide make them.
        device: the kind of device that they run on, "cpu" or "cuda".
        compiled: the torch engine is; see `TorchEngine`.
    """
    identity: dict[str, Any] = {
        "format": 1,
        "classes": list(classes["names"]),
        "data.kept_sha256": classes["kept_sha256"],
        "image": list(card.shape),
        "model": model,
        "weights_sha256": card.weights_sha256,
        "guide_sha256": guide_sha256,
        "engine.kind": card.kind,
        "engine.precision": card.precision,
        "engine.file_sha256": card.file_sha256,
        "diffusion.steps": recipe.diffusion.steps,
        "diffusion.noise_schedule": recipe.diffusion.noise_schedule,
        "select.distance_band": recipe.select.distance_band,
        "select.confidence": recipe.select.confidence,
    }
    synth = recipe.synth.model_dump(mode="json")
    # What is not the case goes unmentioned: the plan is then that of versions that knew no such thing.
    unused = (*_NOT_PIXELS, *(("start", "strength") if recipe.synth.start == "noise" else ()))
    identity |= {f"synth.{key}": value for key, value in synth.items() if key not in unused}
    if any(recipe.select.novelty_band):
        identity["select.novelty_band"] = list(recipe.select.novelty_band)
    if guided_sha256:
        identity["guided_step.file_sha256"] = guided_sha256
    if device != "cpu":
        identity["engine.device"] = device
    if compiled:
        identity["engine.compiled"] = True
    return Plan(identity, versions)


def keep_plan(folder: Path, plan: Plan) -> None:
    """Store the plan in a synthesis folder that this process has locked, or check that it is the one of before.

    Raises:
        ConflictError: images of another plan lie there; the message names the keys that differ.
        DataError: a damaged plan.
    """
    check_plan(folder, plan)
    stored, here = folder / PLAN_FILE, host(plan.identity.get("engine.device") == "cuda")
    document = {"plan": plan.id, "identity": dict(plan.identity), "versions": dict(plan.versions), "stages": dict(plan.stages)}
    before = read_plan(folder) if stored.exists() else {}
    if before.get("plan") != plan.id:
        store.write_json(stored, document | {"hosts": [here]})
        (folder / GUIDANCE_FILE).unlink(missing_ok=True)  # of batches that gave no image
        return
    hosts = before.get("hosts", ["unknown"])  # of a version that did not say
    now = before | {"stages": document["stages"], "hosts": hosts if here in hosts else [*hosts, here]}
    if now != before:  # the same weights, reached by another way; or another machine goes on
        store.write_json(stored, now)


def check_plan(folder: Path, plan: Plan) -> None:
    """Refuse a synthesis folder that holds images of another plan; one that was stopped before its first image may have a new plan.

    Writes nothing. Raises as `keep_plan`.
    """
    if not (folder / PLAN_FILE).exists() or (before := read_plan(folder))["plan"] == plan.id or not _is_begun(folder):
        return
    told = told_differences(before["identity"], plan.identity)
    raise ConflictError(f"{folder} holds images of another plan ({told})", f"--out DIR puts these elsewhere; or remove {folder}")


def _is_begun(folder: Path) -> bool:
    manifest = folder / MANIFEST_FILE
    return (manifest.exists() and manifest.stat().st_size > 0) or any(folder.glob("*/*.png"))


def told_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The keys in which two identities differ, for a message: "synth.steps = 10 there, 50 now; and 2 more"."""
    changed = [key for key in (*new, *(k for k in old if k not in new)) if old.get(key) != new.get(key)]
    told = "; ".join(f"{key} = {_brief(old.get(key))} there, {_brief(new.get(key))} now" for key in changed[:_SHOWN])
    return told + (f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else "")


def host(on_gpu: bool = False) -> str:
    """What decides, beside engine and versions, how a machine rounds: its processor and instruction sets, and its GPU where one computes.

    As "x86_64 Some Processor 25/17/1 1a2b3c4d", with family, model and stepping, and a digest of the instruction sets. It names the
    kind of machine, never the machine.
    """
    text = CPUINFO.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0] if CPUINFO.is_file() else ""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    name = fields.get("model name") or platform.processor() or "unknown processor"
    kind = "/".join(fields.get(key, "-") for key in ("cpu family", "model", "stepping"))
    sets = sorted((fields.get("flags") or fields.get("Features") or "").split())
    words = [platform.machine(), name, kind, hashlib.sha256(" ".join(sets).encode()).hexdigest()[:8]]
    if on_gpu:
        import torch

        words.append(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
    return " ".join(words)


class MadeWith(NamedTuple):
    """What made the images that are to be continued."""

    build: str = ""  # runtime and precision, as `choice.Build` writes itself; "" where there are no images
    guided_sha256: str | None = None  # of the file that made guided steps in one graph; "" = there was none; None = there are no images
    device: str = ""  # "cpu" or "cuda"; "" where there are no images


def read_plan(folder: Path) -> dict[str, Any]:
    """The plan of a synthesis folder: "plan", its id; "identity" with the names of its classes; "stages" and more.

    Raises DataError where there is none, or a damaged one.
    """
    path = folder / PLAN_FILE
    found = store.read_object(path, plan=str, identity=dict)
    names, stages, hosts = found["identity"].get("classes"), found.get("stages", {}), found.get("hosts", [])
    known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not known or not isinstance(stages, dict) or not isinstance(hosts, list):
        raise DataError(f"{path} is damaged: it is no plan", "restore the file, or remove its folder and make the images anew")
    return found


def made_with(folder: Path) -> MadeWith:
    """What made the images of a folder."""
    stored = read_plan(folder)["identity"] if (folder / PLAN_FILE).is_file() else {}
    if not stored:
        return MadeWith()
    build = f"{stored.get('engine.kind')} {stored.get('engine.precision')}"
    return MadeWith(build, stored.get("guided_step.file_sha256", ""), stored.get("engine.device", "cpu"))


def require_current(run: RunFolder) -> None:
    """Refuse a run's own images where a stage that made them has been trained anew or further since. Raises ConflictError, DataError."""
    then = read_plan(run.synth).get("stages", {})
    if other := [stage for stage, mark in then.items() if mark and reuse.mark(run.path, stage) != mark]:
        raise ConflictError(
            f"the images in {run.synth} were made by another {' and '.join(other)} than {run.path} holds now",
            f"diffrc run --run {run.path} keeps them aside and makes new ones",
        )


def make_room(run: RunFolder, folder: Path, plan: Plan) -> None:
    """Keep a run's own images of another plan in `stale/<folder>-<plan>`, and bring those of this one back from there.

    Killed between the two, the same call does the rest. Raises ConflictError where another process is at work in the folder, or
    where it is not a synthesis folder; DataError for a damaged plan; StorageError.
    """
    check_folder(folder)
    here = _plan_of(folder)
    if here == plan.id:
        return
    if folder.exists():
        with store.locked(folder):
            store.move_folder(folder, store.free_place(run.stale, f"{folder.name}-{here[:8] or 'unsaved'}"))
    back = next((place for place in sorted(run.stale.glob(f"{folder.name}-*")) if _plan_of(place) == plan.id), None)
    if back:
        store.move_folder(back, folder)


def check_folder(folder: Path) -> None:
    """Refuse a place that is not a synthesis folder and not free. Writes nothing. Raises ConflictError."""
    elsewhere = "--out DIR names a new folder"
    if folder.is_symlink():
        raise ConflictError(f"{folder} is a symbolic link", f"--out {folder.resolve()} if that is what is meant")
    if folder.exists() and not folder.is_dir():
        raise ConflictError(f"{folder} is a file", elsewhere)
    if folder.is_dir() and not (folder / PLAN_FILE).exists():
        foreign = [p.name for p in folder.iterdir() if p.name != store.LOCK_FILE and not store.is_temporary(p)]
        if foreign:
            raise ConflictError(f"{folder} is not empty and holds no synthesized images ({sorted(foreign)[0]!r} lies there)", elsewhere)


# ----------------------------------------------------------------------------------------------------------- a request


def asked_classes(run: RunFolder, typed: Sequence[str], n: int) -> dict[int, int]:
    """n images of each class that a person named. Raises UsageError for an unknown class, or n < 1."""
    if n < 1:
        raise UsageError(f"--n {n} asks for no image", "--n 50, say; or --fill for every tail class")
    names = run.classes()["names"]
    return {find_class(name, names): n for name in typed}


def fill_classes(run: RunFolder) -> dict[int, int]:
    """Every medium and few class up to N_fill, as `fill_counts` says.

    Raises UsageError where no class lacks any.
    """
    table = run.classes()
    counts = np.array(table["counts"], dtype=np.int64)
    lacking = fill_counts(run.recipe, counts, table["groups"])
    if not lacking.any():
        full = run.recipe.synth.fill_to or int(counts.max())
        raise UsageError(f"no medium or few class has fewer than {full} images", "--set synth.fill_to=N with a larger N")
    return {int(k): int(lacking[k]) for k in np.flatnonzero(lacking)}


def fill_counts(recipe: Recipe, counts: npt.NDArray[np.int64], groups: Sequence[str]) -> npt.NDArray[np.int64]:
    """(K,) images that a fill adds: max(0, N_fill - N_k) for medium and few classes, N_fill = synth.fill_to or the largest class."""
    full = recipe.synth.fill_to or int(counts.max())
    tail = np.array([group != "many" for group in groups])
    return np.where(tail, np.maximum(0, full - counts), 0).astype(np.int64)


def by_model(run: RunFolder, wanted: Mapping[int, int], source_ready: bool) -> dict[Model, dict[int, int]]:
    """Which network draws which class: `synth.model`; but a head class is not drawn by a target model that has forgotten it.

    Args:
        source_ready: the source model is at hand as well.

    Raises UsageError for a head class where it is not.
    """
    table, recipe = run.classes(), run.recipe
    forgets = recipe.synth.model == "target" and recipe.target.adapt_on != "all"
    parts: dict[Model, dict[int, int]] = {}
    for k, n in wanted.items():
        head = forgets and table["groups"][k] == "many"
        if head and not source_ready:
            raise UsageError(
                f"{shorten(table['names'][k])!r} is a head class: the target model was adapted to the tail and has forgotten it",
                "diffrc export --model source, then the same command: the source model draws it",
            )
        parts.setdefault("source" if head else recipe.synth.model, {})[k] = n
    return parts


def folder_of(run: RunFolder, model: Model, out: Path | None) -> Path:
    """A folder holds one plan: images by another model than `synth.model` go to the folder's neighbor `<name>-source`."""
    folder = run.synth if out is None else out
    return folder if model == run.recipe.synth.model else folder.absolute().with_name(f"{folder.absolute().name}-{model}")


def _plan_of(folder: Path) -> str:
    return str(read_plan(folder)["plan"]) if (folder / PLAN_FILE).exists() else ""


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:13]}..."
