"""Pre-trained U-Net weights: one safetensors file that says which network it holds, and how a recipe's U-Net starts from it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import safetensors
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from engines import recipe as recipes
from engines import store
from engines.errors import DataError, UsageError
from engines.networks.unet import Architecture, UNet
from engines.recipe import DiffusionSection

METADATA_KEY = "diffrc.unet"  # of the safetensors header: the card as JSON
LABELS = "label_emb.weight"
KEYS = {  # the parts of an architecture that must be equal, and the recipe keys that set them
    "in_channels": "data.image_channels",
    "model_channels": "unet.model_channels",
    "channel_mult": "unet.channel_mult",
    "num_res_blocks": "unet.num_res_blocks",
    "resblock_updown": "unet.resblock_updown",
    "use_scale_shift_norm": "unet.use_scale_shift_norm",
    "use_new_attention_order": "unet.use_new_attention_order",
}


class WeightsCard(BaseModel):
    """What a file of weights holds: the network's shape, its labels, the process it was trained on, where it came from."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    architecture: Architecture
    out_channels: int  # C, or 2C with a learned variance
    classes: Annotated[int, Field(ge=0)]  # rows of the label embedding that stand for a class, 0 = unconditional
    null_label: bool = False  # whether one more row follows them, the null label
    noise_schedule: Literal["linear", "cosine"] | None = None  # None: unknown
    diffusion_steps: int | None = None  # T; None: unknown
    origin: dict[str, str] = {}  # of what was imported: {"format": ..., "file": ..., "sha256": ...}

    @model_validator(mode="after")
    def _possible(self) -> Self:
        a = self.architecture
        counts = (a.image_size_px, a.in_channels, a.model_channels, a.num_res_blocks, a.num_head_channels, *a.channel_mult)
        if not a.channel_mult or not all(0 < count < math.inf for count in counts) or a.num_heads < 0:
            raise ValueError("these are no sizes of a network")
        return self

    @property
    def label_rows(self) -> int:
        """Rows of the label embedding, as `UNet` counts them."""
        return self.classes + self.null_label if self.classes else 0

    @property
    def learn_sigma(self) -> bool:
        return self.out_channels == 2 * self.architecture.in_channels


def write(path: Path, weights: Mapping[str, Tensor], card: WeightsCard) -> None:
    """Commit a U-Net's weights in float32, with the card in the header.

    Args:
        weights: names and shapes are those of `UNet(card.architecture, card.out_channels, card.label_rows)`.

    Raises:
        DataError: a value is not finite.
        StorageError: the disk is full or the folder cannot be written.
    """
    bad = next((name for name, value in weights.items() if not bool(torch.isfinite(value).all())), None)
    if bad:
        raise DataError(f"{bad} holds values that are not finite; {path.name} is not written", "get the published file again")
    store.require_space(path.parent, 4 * sum(value.numel() for value in weights.values()))
    store.write_tensors(path, {name: value.float() for name, value in weights.items()}, {METADATA_KEY: card.model_dump_json()})


def describe(path: Path) -> WeightsCard:
    """The card of a file of weights; the weights themselves are not read. Raises DataError where it is none."""
    with _opened(path) as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
    if text is None:
        raise DataError(f"{path} was not written by diffrc import", "diffrc import diffusers DIR reads a folder of diffusers")
    try:
        return WeightsCard.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{path} describes no network that this version knows: {where}: {first['msg']}", "import it again with this version"
        ) from None


def sha256(path: Path) -> str:
    """Of the whole file, in hex: two equal ones give equal training. Raises DataError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}", _REMEDY) from None


def load_into(unet: UNet, path: Path, diffusion: DiffusionSection | None = None) -> list[str]:
    """Give a recipe's U-Net the weights of a file. Everything but the following must be equal, or nothing is loaded.

    - dropout has no weights; the recipe's counts.
    - The image size may differ where attention stands on the same levels: the network is convolutional. It is noted.
    - Labels. A file without, a recipe with: a table of zeros, with which the network starts as the file's. As many classes, the
      null label missing: it becomes the mean of the classes, which is what an unconditional prediction averages over. Other
      classes: every row becomes that mean, because the time path of a labeled network expects a label's share beside it; zeros
      would be a label that it never saw. A file with labels, a recipe without, is refused for that same reason.

    Args:
        diffusion: the recipe's process; given, it must be the file's, since a network knows noise only by its timestep.

    Returns: what differs and was settled as above, a sentence each.

    Raises:
        UsageError: the recipe's keys that differ, all at once, each with both values.
        DataError: the file is missing, damaged or none of `diffrc import`.
    """
    card = describe(path)
    if found := _mismatches(card, unet, diffusion):
        raise UsageError(f"{path} does not fit the recipe: {'; '.join(found)}", "give the recipe the file's values, or name another file")
    own, notes = unet.state_dict(), _notes(card, unet, diffusion)
    with _opened(path) as file, torch.no_grad():
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        expected = {name: tuple(value.shape) for name, value in own.items()} | {LABELS: (card.label_rows, own["time_embed.2.bias"].numel())}
        if not card.label_rows:
            del expected[LABELS]
        if shapes != expected:
            wrong = sorted(name for name in shapes | expected if shapes.get(name) != expected.get(name))
            raise DataError(f"{path} is damaged: {len(wrong)} of its parameters do not fit its own card ({wrong[0]})", "import it again")
        for name, shape in shapes.items():
            value = file.get_tensor(name)
            if not bool(torch.isfinite(value).all()):
                raise DataError(f"{path} is damaged: {name} {shape} holds values that are not finite", "import it again")
            own[name].copy_(_label_table(value, card, unet.classes) if name == LABELS else value)
        if unet.classes and not card.classes:
            own[LABELS].zero_()
    return notes


def recipe_table(card: WeightsCard) -> dict[str, dict[str, Any]]:
    """The keys that a recipe needs to start from a file, by section; `[diffusion]` where the file knows its process.

    Raises UsageError where no recipe can describe the network.
    """
    a = card.architecture
    table: dict[str, dict[str, Any]] = {"data": {"image_size_px": a.image_size_px, "image_channels": a.in_channels}}
    table["unet"] = {key.partition(".")[2]: _setting(a, field) for field, key in KEYS.items() if key.startswith("unet.")}
    table["unet"] |= {"attention_resolutions": a.attention_resolutions, "learn_sigma": card.learn_sigma, "class_cond": bool(card.classes)}
    table["unet"] |= {"num_heads": a.num_heads} if a.num_heads else {"num_head_channels": a.num_head_channels}
    table["unet"] |= {} if a.resblock_updown else {"conv_resample": a.conv_resample}
    process = {"noise_schedule": card.noise_schedule, "steps": card.diffusion_steps}
    if any(process.values()):
        table["diffusion"] = {key: value for key, value in process.items() if value}
    guide = {"channel_mult": [1], "attention_resolutions": []}  # whatever a guide may look like at this image size
    steps = {"steps": 1}
    recipes.validate({"name": "imported", **table, "guide": guide, "synth": steps}, "the recipe of this network")
    return table


def toml_value(value: Any) -> str:
    """A recipe's value as TOML."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _mismatches(card: WeightsCard, unet: UNet, diffusion: DiffusionSection | None) -> list[str]:
    """The recipe keys that keep a network from taking a file's weights, with both values."""
    theirs, ours = card.architecture, unet.architecture
    pairs = {key: (_setting(theirs, field), _setting(ours, field)) for field, key in KEYS.items()}
    if _attention_levels(theirs) != _attention_levels(ours):
        same_levels = tuple(ours.image_size_px // 2**level for level in _attention_levels(theirs))
        pairs["unet.attention_resolutions"] = (same_levels, ours.attention_resolutions)
    if _heads(theirs) != _heads(ours):
        pairs |= {f"unet.{key}": (getattr(theirs, key), getattr(ours, key)) for key in ("num_heads", "num_head_channels")}
    if not theirs.resblock_updown and not ours.resblock_updown:
        pairs["unet.conv_resample"] = (theirs.conv_resample, ours.conv_resample)
    pairs["unet.learn_sigma"] = (card.learn_sigma, _out_channels(unet) == 2 * ours.in_channels)
    if card.classes and not unet.classes:
        pairs["unet.class_cond"] = (True, False)
    if diffusion:
        pairs["diffusion.noise_schedule"] = (card.noise_schedule or diffusion.noise_schedule, diffusion.noise_schedule)
        pairs["diffusion.steps"] = (card.diffusion_steps or diffusion.steps, diffusion.steps)
    return [f"{key} = {toml_value(a)} in the file, {toml_value(b)} in the recipe" for key, (a, b) in pairs.items() if a != b]


def _notes(card: WeightsCard, unet: UNet, diffusion: DiffusionSection | None) -> list[str]:
    notes, px = [], unet.architecture.image_size_px
    if card.architecture.image_size_px != px:
        notes.append(f"the pre-trained weights are for images of {card.architecture.image_size_px} px, the recipe has {px} px")
    if unet.classes and not card.classes:
        notes.append("the pre-trained weights have no labels: the label table starts with zeros")
    elif card.classes and card.classes != unet.classes - 1:
        notes.append(
            f"the pre-trained weights know {card.classes:,} classes, the recipe {unet.classes - 1:,}: "
            "each row of the label table starts as the mean of theirs"
        )
    elif card.classes and not card.null_label:
        notes.append("the pre-trained weights have no null label: it starts as the mean of their classes, taken in this run's order")
    if diffusion and not (card.noise_schedule and card.diffusion_steps):
        notes.append("the pre-trained weights do not say which noise schedule they were trained on: the recipe's is assumed")
    return notes


def _label_table(rows: Tensor, card: WeightsCard, wanted: int) -> Tensor:
    """(wanted, D) rows of a recipe's label embedding, the last of them the null label, from the file's."""
    mean = rows[: card.classes].mean(0, keepdim=True)  # (1, D)
    if card.classes != wanted - 1:
        return mean.expand(wanted, -1)
    return rows if card.null_label else torch.cat([rows, mean])


def _setting(a: Architecture, field: str) -> Any:
    """A part of an architecture as a recipe writes it: whole multipliers without a point."""
    value = getattr(a, field)
    return tuple(int(mult) if mult == int(mult) else mult for mult in value) if field == "channel_mult" else value


def _attention_levels(a: Architecture) -> list[int]:
    return [level for level in range(len(a.channel_mult)) if a.image_size_px // 2**level in a.attention_resolutions]


def _heads(a: Architecture) -> list[int]:
    """Heads at each width that attends: two settings that give the same are the same network."""
    widths = [int(a.model_channels * a.channel_mult[level]) for level in (*_attention_levels(a), -1)]  # the middle block attends too
    return [a.num_heads or width // a.num_head_channels for width in widths]


def _out_channels(unet: UNet) -> int:
    return int(unet.state_dict()["out.2.bias"].numel())


_REMEDY = "source.pretrained names a file that diffrc import wrote; a relative path counts from the working folder"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, mapped, not read. Raises DataError."""
    try:
        if path.exists() and not path.is_file():  # a pipe would keep us waiting
            raise DataError(f"cannot read {path}: it is not a file", _REMEDY)
        with path.open("rb") as raw:
            torch_file = raw.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}", _REMEDY) from None
    if torch_file:
        raise DataError(f"{path} is a torch checkpoint", f"diffrc import openai {path} --config NAME makes a safetensors file of it")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise DataError(f"cannot read {path}: {error}", _REMEDY) from None
