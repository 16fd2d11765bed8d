"""A study as data: its arms, each a recipe with a few keys changed, what they are compared with, and the paper's figures.

An arm that trains nothing of its own is a control: "real" images alone, or "replay", as many duplicates as another arm has images.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from engines import recipe as recipes
from engines.errors import UsageError
from engines.recipe import Count, Method, Recipe, Section

Images = Literal["real", "replay", "replay_as_synthetic", "synthetic"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Resolve = Callable[[str, Sequence[str]], Recipe]
"""A recipe by its name or file, with overrides: the command line knows where the embedded ones lie."""


class ArmSection(Section):
    """One row of a study's table."""

    name: Name
    title: str
    images: Images = "synthetic"  # beside the real ones: none, duplicates of them, these with a synthetic image's weight, synthetic ones
    recipe: str = ""  # of its own, where it is not the study's
    set: tuple[str, ...] = ()  # section.key=value, as --set takes it
    paper: dict[str, float] = Field(default_factory=dict)  # what the paper prints for it, by column


class SweepSection(Section):
    """A curve: one arm for each value of a key."""

    name: Name
    title: str
    key: str  # section.key
    values: Annotated[tuple[float, ...], Field(min_length=2)]
    set: tuple[str, ...] = ()


class Study(Section):
    """What is run, with what, and what is compared. `load` reads one from TOML."""

    name: Name
    title: str
    recipe: str  # an embedded recipe or a file; `diffrc study --recipe` wins
    seeds: Count = 3  # of everything: diffusion models, noise, recognizers
    split: Literal["test", "held-out"] = "test"  # "held-out": training images that the long tail leaves out, to choose settings on
    methods: tuple[Method, ...] = ()  # of training a recognizer; none = those of the recipe
    set: tuple[str, ...] = ()  # changed in every arm
    against: tuple[Name, ...] = ()  # arms that the others are compared with, pair by pair
    arms: tuple[ArmSection, ...] = ()
    sweeps: tuple[SweepSection, ...] = ()

    @model_validator(mode="after")
    def _arms_fit(self) -> Self:
        names = [arm.name for arm in self.rows()]
        if not names:
            raise ValueError("a study needs an arm or a sweep")
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"more than one arm is named {sorted(twice)[0]!r}")
        if unknown := set(self.against) - set(names):
            raise ValueError(f"against names {sorted(unknown)[0]!r}, which is no arm")
        return self

    def rows(self) -> tuple[ArmSection, ...]:
        """The arms, those of the sweeps last."""
        swept = (
            ArmSection(name=f"{s.name}-{value:g}", title=f"{s.title} = {value:g}", set=(*s.set, f"{s.key}={value!r}"))
            for s in self.sweeps
            for value in s.values
        )
        return (*self.arms, *swept)


def load(text: str, origin: str = "study") -> Study:
    """Parse and validate a study. Raises UsageError with every mistake at once."""
    remedy = "diffrc study --list names the embedded ones; CONTRIBUTING says what a file of one's own holds"
    try:
        return Study.model_validate_json(json.dumps(tomllib.loads(text), default=str))
    except ValidationError as error:
        mistakes = "; ".join(sorted({_mistake(dict(e)) for e in error.errors(include_url=False)}))
        raise UsageError(f"{origin} is no study: {mistakes}", remedy) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{origin} is not valid TOML: {error}", remedy) from None


def read(path: Path) -> Study:
    """`load` a file. Raises UsageError where it cannot be read as UTF-8 text."""
    try:
        with path.open("rb") as file:
            text = file.read(recipes.MAX_RECIPE_BYTES + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the study {path}: {error}", "diffrc study --list names the embedded ones") from None
    if len(text.encode()) > recipes.MAX_RECIPE_BYTES:
        raise UsageError(f"{path} is larger than 1 MiB", "a study is a page of TOML")
    return load(text, str(path))


def is_study(path: Path) -> bool:
    """Whether a TOML file holds arms or sweeps, and so is not a recipe. What cannot be read is taken for one, and its reader says why."""
    try:
        with path.open("rb") as file:
            table = tomllib.loads(file.read(recipes.MAX_RECIPE_BYTES).decode())
    except (OSError, ValueError, RecursionError):
        return False
    return bool({"arms", "sweeps"} & set(table))


class Arm(Section):
    """An arm with its recipe resolved."""

    name: str
    title: str
    images: Images
    recipe: Recipe
    changes: tuple[str, ...]  # what it sets, beside the study's recipe
    paper: dict[str, float]

    def seeded(self, seed: int) -> Recipe:
        """Its recipe for one seed: networks, their training and the noise of the images are those of this seed."""
        synth = self.recipe.synth.model_copy(update={"seed": self.recipe.synth.seed + seed})
        return self.recipe.model_copy(update={"seed": self.recipe.seed + seed, "synth": synth})


def resolve_arms(study: Study, resolve: Resolve, recipe: str | None = None, overrides: Sequence[str] = ()) -> tuple[Arm, ...]:
    """The arms of a study with their recipes.

    Args:
        recipe: in place of the study's own.
        overrides: changed in every arm; an arm's own changes come last, since they are what the study is about.

    Raises UsageError for a mistake in any of them, or where `recipe` would be overruled by arms that name one.
    """
    rows = study.rows()
    if recipe and (own := [row.name for row in rows if row.recipe]):
        raise UsageError(
            f"the arms of {study.name} have recipes of their own ({own[0]} and {len(own) - 1} more)", "leave --recipe out, or --set keys"
        )

    def arm(row: ArmSection) -> Arm:
        base = recipe or row.recipe or study.recipe
        settings = resolve(base, (*study.set, *overrides, *row.set))
        return Arm(name=row.name, title=row.title, images=row.images, recipe=settings, changes=row.set, paper=row.paper)

    return tuple(arm(row) for row in rows)


def _mistake(error: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message[0].lower()}{message[1:]}" if where else message
