"""What an engine depends on: in which fields a card is not what is wanted here and now. Asked wherever one is loaded, kept or listed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel

from engines import recipe as recipes
from engines.errors import EngineError
from engines.recipe import Recipe

if TYPE_CHECKING:
    from engines.backends.base import EngineCard  # it brings torch

EXPORTERS = ("torch", "onnx", "onnxscript")  # packages that make an ONNX file
RUNTIMES = {  # packages that run it, by kind of engine
    "onnx": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt",),
}
SHORT_SHA256 = 12  # characters that messages show
WORDS = {"weights_sha256": "weights", "guide_sha256": "guide's weights", "recipe_sha256": "recipe", "max_batch": "largest batch"}


class AtLeast(NamedTuple):
    """A number that may be larger."""

    least: int


class Difference(NamedTuple):
    """A field of a card that is not what is wanted."""

    field: str  # of the card; for a version, the package
    found: str
    wanted: str

    def __str__(self) -> str:
        return f"{WORDS.get(self.field, self.field)} {self.found} then, {self.wanted} now"


def differences(card: BaseModel, wanted: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Every field of `wanted` that a card has otherwise, in that order; a field that it has not differs too.

    Args:
        wanted: values by the card's fields. `AtLeast` is met by anything that is not smaller; of `versions`, a mapping from
            packages, those that are named are compared, "" being none.
    """
    fields = card.model_dump()
    found: list[Difference] = []
    for name, value in wanted.items():
        there = fields.get(name)
        if name == "versions":
            versions = there if isinstance(there, dict) else {}
            pairs = ((package, versions.get(package, ""), version) for package, version in value.items())
            found += [Difference(package, then or "none", now or "none") for package, then, now in pairs if then != now]
        elif isinstance(value, AtLeast):
            if not (isinstance(there, int) and there >= value.least):
                found.append(Difference(name, str(there), f"at least {value.least}"))
        elif there != (value := value.model_dump() if isinstance(value, BaseModel) else value):
            if isinstance(there, dict) and isinstance(value, dict):  # of a table, what differs in it
                there, value = (_told(each, [key for key in value if there.get(key) != value[key]]) for each in (there, value))
            found.append(Difference(name, *(_short(name, each) for each in (there, value))))
    return tuple(found)


def wanted(recipe: Recipe, card: BaseModel, kind: str, **weights: str) -> dict[str, Any]:
    """What the card of an engine must say, for the engine to be loaded by a run now.

    Args:
        card: that is to be compared: its opset and its largest batch may have been typed at its export, the rest of the recipe not.
        kind: of its runtime, a key of RUNTIMES.
        weights: sha256 by the card's field: `weights_sha256`, and `guide_sha256` where it has one.
    """
    shape = {"image_size_px": recipe.data.image_size_px, "image_channels": recipe.data.image_channels}
    if hasattr(card, "out_channels"):
        shape["out_channels"] = recipe.data.image_channels * (2 if recipe.unet.learn_sigma else 1)
    return {
        **weights,
        "recipe_sha256": _digest_with(recipe, card),
        **shape,
        "timesteps": recipe.diffusion.steps,
        "max_batch": AtLeast(recipe.synth.batch_size),
        "versions": versions_now((*EXPORTERS, *RUNTIMES[kind])),
    }


def check_card(card: EngineCard, recipe: Recipe, weights: str, path: Path, command: str) -> None:
    """Refuse an engine that was exported from, by or for anything else than what is here now. Raises EngineError naming each field.

    Args:
        weights: sha256 of the network's.
        path, command: the engine, and what exports it, for messages.
    """
    found = differences(card, wanted(recipe, card, card.kind, weights_sha256=weights))
    fields = {difference.field for difference in found}
    if "weights_sha256" in fields:
        raise EngineError(f"{path} was exported from other weights than the run's: {told(found)}", command)
    if fields == {"max_batch"}:
        batch = recipe.synth.batch_size
        raise EngineError(f"{path} was checked up to batch {card.max_batch}, synth.batch_size is {batch}", f"{command} --batch {batch}")
    if found:
        raise EngineError(f"{path} passed its gate under other circumstances: {told(found)}", f"{command} holds it to torch again")


def export_digest(recipe: Recipe) -> str:
    """sha256 of the sections that shape a network and its export, the limits of its gate among them."""
    sections = {name: getattr(recipe, name).model_dump(mode="json") for name in ("unet", "diffusion", "export")}
    return recipes.digest(sections)


def _digest_with(recipe: Recipe, card: BaseModel) -> str:
    """The digest of the recipe with a card's own largest batch and opset (which for bf16 is not the recipe's), where that fits."""
    fields = card.model_dump()
    for opset in (fields.get("opset"), recipe.export.opset):
        typed = recipe.export.model_copy(update={"opset": opset, "max_batch": fields.get("max_batch")})
        digest = export_digest(recipe.model_copy(update={"export": typed}))
        if digest == fields.get("recipe_sha256"):
            return digest
    return export_digest(recipe)


def told(found: Iterable[Difference]) -> str:
    """Differences for a message: "weights 1a2b3c4d5e6f then, 6f5e4d3c2b1a now; onnxruntime 1.31.0 then, 1.32.0 now"."""
    return "; ".join(map(str, found))


def versions_now(packages: Iterable[str]) -> dict[str, str]:
    """The versions that are installed, "" for what is not."""
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = ""
    return versions


def _told(table: Mapping[str, Any], keys: Iterable[str]) -> str:
    return ", ".join(f"{key} = {table.get(key)}" for key in keys)


def _short(field: str, value: object) -> str:
    text = " ".join(str(value).split())
    return text[:SHORT_SHA256] if field.endswith("sha256") else text
