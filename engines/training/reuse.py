"""What of a run can be used as it is: each stage knows what its weights depend on; a stale one is kept aside and found again.

Every checkpoint's state holds `made_of`, the settings that its weights depend on, and their digest. A stage is stale where they
are no longer the recipe's. Then its folder moves to `stale/<stage>-<digest8>/`, whole, and back when the settings are those
again. What a folder is, its own checkpoints say, never its name; so a kill between two moves leaves nothing to repair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from engines import recipe as recipes
from engines import store
from engines.recipe import Recipe, StageSection

_SHOWN = 4  # differing keys in a message
_CHANGE_NO_WEIGHT = {
    "data": ("path", "on_bad_image", "quarantine"),  # where images lie; which were kept is in data.kept_sha256
    "stage": ("log_every_steps", "sample_every_steps", "save_every_steps", "workers", "max_nonfinite_steps"),
}


def made_of(recipe: Recipe, stage: str, kept_sha256: str, pretrained_sha256: str = "") -> dict[str, Any]:
    """Everything that the weights of a stage depend on, by recipe key, with plain JSON values.

    The length of a stage is part of it only where a longer run is not the continuation of a shorter one. The target depends
    on the source, and so on the source's length; the guide on both where it starts from the target.

    Args:
        kept_sha256: of the class table.
        pretrained_sha256: of the file source.pretrained, which stands for its path.
    """
    table = recipe.model_dump(mode="json")
    before = {"source": (), "target": ("source",), "guide": ("source", "target") if recipe.guide.init_from == "target" else ()}[stage]
    parts = (*before, stage)
    diffusion_model = "source" in parts
    values = {"seed": recipe.seed, "data.kept_sha256": kept_sha256}
    for name in ("data", *(("unet",) if diffusion_model else ()), "diffusion", *parts):
        skipped = _CHANGE_NO_WEIGHT["stage" if name in store.STAGES else name] if name in ("data", *store.STAGES) else ()
        values |= {f"{name}.{key}": value for key, value in table[name].items() if key not in skipped}
    if diffusion_model:
        values["source.pretrained"] = pretrained_sha256
    else:
        del values["diffusion.vlb_weight"], values["diffusion.timestep_sampler"]  # a guide has its own loss, and draws t uniformly
    if "target" in parts and not recipe.target.patience:
        del values["target.holdout_every_steps"]
    if _continues(table[stage]):
        del values[f"{stage}.train_steps"]
    return values


def identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's state says of its origin: {"digest": sha256 of `made_of`, "made_of": ...}."""
    return {"digest": recipes.digest(values), "made_of": dict(values)}


def pretrained_sha256(path: Path, recipe: Recipe) -> str:
    """sha256 of the file source.pretrained, "" without one; where the file is gone, that of the run's source, even one kept aside.

    Args:
        path: of the run folder.

    Raises DataError where neither is at hand.
    """
    if not recipe.source.pretrained:
        return ""
    from engines.networks import pretrained

    file = Path(recipe.source.pretrained)
    if not file.exists():
        sources = filter(None, map(store.newest_state, (path / "source", *sorted((path / store.STALE).glob("source-*")))))
        known = filter(None, (state.get("made_of", {}).get("source.pretrained") for _, state in sources))
        if (first := next(known, None)) is not None:
            return str(first)
    return pretrained.sha256(file)


# ---------------------------------------------------------------------------------------------------------- examination


@dataclass(frozen=True)
class StageStatus:
    """What a stage of a run needs.

    Attributes:
        steps: asked for by the recipe.
        step: that what will be used has reached; None = nothing is there.
        complete: nothing is left to train.
        changes: why what lies in the stage's folder is not used: "guide.tau = 0.07 -> 0.1". Empty where it is.
        aside: where that goes.
        back: the kept folder that takes its place.
    """

    name: str
    steps: int
    step: int | None
    complete: bool
    changes: tuple[str, ...] = ()
    aside: Path | None = None
    back: Path | None = None

    @property
    def state(self) -> str:
        """One word or two: "complete", "at step 2", "stale", "to train", "comes back"."""
        if self.back:
            return "comes back"
        if self.changes:
            return "stale"
        return "complete" if self.complete else "to train" if self.step is None else f"at step {self.step:,}"

    def sentence(self, run: Path) -> str:
        """What changes and why, "" where nothing does."""
        kept = f"the old one is kept in {self.aside.relative_to(run)}" if self.aside else ""
        if self.back:
            reason = f"{_listed(self.changes)}; " if self.changes else ""
            goes_on = "" if self.complete else f" at step {self.step:,} and trains on"
            return f"{self.name}: {reason}comes back from {self.back.relative_to(run)}{goes_on}" + (f" ({kept})" if kept else "")
        return f"{self.name}: {_listed(self.changes)}; trains again ({kept})" if self.changes else ""


def examine(path: Path, recipe: Recipe, kept_sha256: str, pretrained_sha256: str = "") -> list[StageStatus]:
    """What each stage of a run needs under a recipe, in their order. Reads the checkpoints' states and writes nothing."""
    return [_status(path, recipe, stage, made_of(recipe, stage, kept_sha256, pretrained_sha256)) for stage in store.STAGES]


def arrange(stages: list[StageStatus], path: Path) -> None:
    """Move what `examine` found stale aside and what is wanted again back. The caller holds the run's lock.

    Killed between two moves, or with the recipe not yet stored, the same command finds the rest to do. Raises StorageError.
    """
    for status in stages:
        if status.aside:
            store.move_folder(path / status.name, status.aside)
        if status.back:
            store.move_folder(status.back, path / status.name)


def mark(path: Path, stage: str) -> str:
    """What names the weights that a stage of a run holds: digest and step, as "1a2b3c4d@20000"; "" of one that does not say."""
    found = store.newest_state(path / stage)
    return f"{found[1]['digest'][:8]}@{found[0]}" if found and "digest" in found[1] else ""


def changes(state: Mapping[str, Any], step: int, recipe: Recipe, stage: str, kept_sha256: str) -> str:
    """How the settings that a checkpoint was made of differ from the recipe's, "" where it is current.

    The file source.pretrained is taken to be the one of then: it need not be at hand to use what was trained from it.
    """
    then = str(state.get("made_of", {}).get("source.pretrained", ""))
    now = made_of(recipe, stage, kept_sha256, (then or "another file") if recipe.source.pretrained else "")
    return _listed(tuple(_differences(state, now)) or _too_far(step, recipe, stage))


def settings_of(recipe: Recipe, stage: str) -> StageSection:
    """A stage's section of a recipe."""
    sections: dict[str, StageSection] = {"source": recipe.source, "target": recipe.target, "guide": recipe.guide}
    return sections[stage]


def _status(path: Path, recipe: Recipe, stage: str, now: Mapping[str, Any]) -> StageStatus:
    steps, folder = settings_of(recipe, stage).train_steps, path / stage
    there = store.newest_state(folder)
    reasons = (tuple(_differences(there[1], now)) or _too_far(there[0], recipe, stage)) if there else ()
    usable = [(*found, place) for place, found in _kept(path, stage) if found[0] <= steps and not any(_differences(found[1], now))]
    step, state, back = max(usable, key=lambda kept: kept[0], default=(-1, {}, None))
    if there and not reasons and there[0] >= step:
        return StageStatus(stage, steps, there[0], _complete(*there, steps))
    if not back:
        return StageStatus(stage, steps, None, complete=False, changes=reasons, aside=_aside(path, stage, there[1]) if there else None)
    aside = _aside(path, stage, there[1] if there else {}) if folder.exists() else None
    return StageStatus(stage, steps, step, _complete(step, state, steps), reasons, aside, back)


def _differences(state: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Of a checkpoint that does not say what it was made of, nothing is known: the run folder is held to its stored recipe.

    A key that the schema did not have then stood at what is its default today.
    """
    if "made_of" in state and state.get("digest") != recipes.digest(now):
        for key, value in now.items():
            before = state["made_of"].get(key, _defaults().get(key))
            if before != value:
                yield f"{key} = {_brief(before)} -> {_brief(value)}"


def _too_far(step: int, recipe: Recipe, stage: str) -> tuple[str, ...]:
    steps = settings_of(recipe, stage).train_steps
    return (f"{stage}.train_steps = {steps:,}, but it stands at step {step:,}",) if step > steps else ()


def _complete(step: int, state: Mapping[str, Any], steps: int) -> bool:
    """As `loop.is_complete`, of a state whose tensors were not read."""
    return step >= steps or state.get("stopped_at") is not None


def _continues(section: Mapping[str, Any]) -> bool:
    """Whether a longer run of a stage goes on from a shorter one: its length shows nowhere in the steps of the shorter."""
    return section["lr_decay"] == "none" and not section.get("patience")


def _kept(path: Path, stage: str) -> Iterator[tuple[Path, tuple[int, dict[str, Any]]]]:
    for place in sorted((path / store.STALE).glob(f"{stage}-*")):
        found = store.newest_state(place)
        if found and "made_of" in found[1]:
            yield place, found


def _aside(path: Path, stage: str, state: Mapping[str, Any]) -> Path:
    """Where a stage goes; it may be kept twice with the same settings, at different lengths."""
    return store.free_place(path / store.STALE, f"{stage}-{str(state.get('digest', 'unsaved'))[:8]}")


def _listed(texts: tuple[str, ...]) -> str:
    more = f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return "; ".join(texts[:_SHOWN]) + more


def _brief(value: Any) -> str:
    text = "none" if value in ("", None) else str(value)
    return text if len(text) <= 24 else f"{text[:8]}..."


@cache
def _defaults() -> dict[str, Any]:
    table = Recipe(name="defaults").model_dump(mode="json")
    return {f"{name}.{key}": value for name, section in table.items() if isinstance(section, dict) for key, value in section.items()}
