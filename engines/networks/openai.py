"""OpenAI's published ADM networks (Dhariwal & Nichol 2021): their configurations as data, and a reader of their checkpoints."""

from __future__ import annotations

import difflib
import pickletools
import warnings
import zipfile
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import torch
from torch import Tensor

from engines.errors import DataError, UsageError
from engines.networks.pretrained import WeightsCard, sha256
from engines.networks.unet import Architecture, Encoder, UNet

CLASSES = 1000  # of ImageNet
DIFFUSION_STEPS = 1000
MAX_OPCODES = 200_000  # some forty a tensor
MAX_TUPLES = 20_000  # four a tensor; tuples nested without end overflow the stack of whoever hashes them
CALLED_BY_WEIGHTS = {
    "collections OrderedDict",
    "torch BFloat16Storage",
    "torch FloatStorage",
    "torch HalfStorage",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
}
CALLS = {"GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}  # opcodes that fetch something to be called
LEGACY_PICKLES = 5  # at the head of a file that is no zip archive: magic number, protocol, system, the object, names of storages
REMEDY = "download the file again from the list in the README of github.com/openai/guided-diffusion"

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Configuration:
    """A published diffusion model, class-conditional or not.

    `classes` counts the rows of its label embedding: one a class, no null label. Ours has one row more; `pretrained.load_into`
    makes it the mean of the others.
    """

    architecture: Architecture
    classes: int
    noise_schedule: Literal["linear", "cosine"] = "linear"
    out_channels: int = 6  # of three channels the noise and, by learned range, the variance

    def build(self) -> UNet:
        return UNet(self.architecture, self.out_channels, self.classes)


@dataclass(frozen=True)
class Classifier:
    """A published noisy classifier: (B, 3, H, W), (B,) training timesteps of a process -> (B, 1000) logits."""

    architecture: Architecture
    noise_schedule: Literal["linear", "cosine"] = "linear"  # of the model that it was published to guide
    out_features: int = CLASSES

    def build(self) -> Encoder:
        return Encoder(self.architecture, self.out_features, pool="attention")


_64 = Architecture(64, 3, 192, (1, 2, 3, 4), 3, (32, 16, 8), 64, dropout=0.1, use_new_attention_order=True)
_128 = Architecture(128, 3, 256, (1, 1, 2, 3, 4), 2, (32, 16, 8), num_heads=4)
_256 = Architecture(256, 3, 256, (1, 1, 2, 2, 4, 4), 2, (32, 16, 8), 64)
_512 = Architecture(512, 3, 256, (0.5, 1, 1, 2, 2, 4, 4), 2, (32, 16, 8), 64)

CONFIGURATIONS = {
    "imagenet-64-cond": Configuration(_64, CLASSES, "cosine"),
    "imagenet-128-cond": Configuration(_128, CLASSES),
    "imagenet-256-cond": Configuration(_256, CLASSES),
    "imagenet-256-uncond": Configuration(_256, 0),
    "imagenet-512-cond": Configuration(_512, CLASSES),
}
CLASSIFIERS = {
    "imagenet-64-classifier": Classifier(Architecture(64, 3, 128, (1, 2, 3, 4), 4, (32, 16, 8), 64), "cosine"),
    "imagenet-128-classifier": Classifier(Architecture(128, 3, 128, (1, 1, 2, 3, 4), 2, (32, 16, 8), 64)),
    "imagenet-256-classifier": Classifier(Architecture(256, 3, 128, (1, 1, 2, 2, 4, 4), 2, (32, 16, 8), 64)),
    "imagenet-512-classifier": Classifier(Architecture(512, 3, 128, (0.5, 1, 1, 2, 2, 4, 4), 2, (32, 16, 8), 64)),
}


def read(path: Path, name: str) -> tuple[dict[str, Tensor], WeightsCard]:
    """The weights of a published diffusion model, checked, and the card that `pretrained.write` puts beside them.

    Raises:
        UsageError: no diffusion model was published under that name.
        DataError: see `read_state_dict` and `check_state_dict`.
    """
    if name in CLASSIFIERS:
        raise UsageError(f"{name} is a classifier; a source model starts from a diffusion model", f"--config {_names(CONFIGURATIONS)}")
    if name not in CONFIGURATIONS:
        raise _unknown(name, CONFIGURATIONS)
    state = read_state_dict(path)
    check_state_dict(state, name)
    found = CONFIGURATIONS[name]
    card = WeightsCard(
        architecture=found.architecture,
        out_channels=found.out_channels,
        classes=found.classes,
        noise_schedule=found.noise_schedule,
        diffusion_steps=DIFFUSION_STEPS,
        origin={"format": "openai", "config": name, "file": path.name, "sha256": sha256(path)},
    )
    return state, card


def read_state_dict(path: Path, also: Set[str] = frozenset()) -> dict[str, Tensor]:
    """A checkpoint's tensors by name, mapped from the file where it is a zip archive, as those of torch 1.6 and later are.

    Nothing that the file holds is run. Its pickle is first read as a list of opcodes, in which only the constructors of
    floating-point tensors may be named; then torch's own weights-only reader builds these.

    Args:
        also: more constructors that may be named, as in CALLED_BY_WEIGHTS.

    Raises:
        DataError: not a file, not a checkpoint, damaged, compressed, or one that holds anything but a dictionary of dense
            float32, float16 or bfloat16 tensors.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would keep us waiting
            raise DataError(f"cannot read {path}: it is not a file", REMEDY)
        zipped = zipfile.is_zipfile(path)
        _inspect(path, zipped, CALLED_BY_WEIGHTS | also)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of storage classes that torch has renamed
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)  # noqa: TID251 (inspected, and weights only)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}", REMEDY) from None
    except Exception as error:  # the readers of zip archives and pickles meet damage with whatever comes to hand
        raise DataError(f"{path} is no checkpoint of torch, or is damaged: {_first_line(error)}", REMEDY) from error
    if not isinstance(state, dict) or not state:
        raise DataError(f"{path} holds no weights by name but {_kind(state)}", REMEDY)
    for name, value in state.items():
        if not isinstance(name, str):
            raise DataError(f"{path} holds more than weights by name: a key is {_kind(name)}", REMEDY)
        if not isinstance(value, Tensor):
            raise DataError(f"{path} holds more than weights: {name[:80]!r} is {_kind(value)}", REMEDY)
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise DataError(f"{path} is damaged: {name[:80]!r} claims more values than the file holds for it", REMEDY)
    return {name: value.detach() for name, value in state.items()}


def check_state_dict(state: Mapping[str, Tensor], name: str) -> None:
    """Compare names and shapes with a published configuration's, diffusion model or classifier.

    Raises:
        UsageError: nothing was published under that name.
        DataError: what is missing, unexpected and of another shape, and the configuration that fits, if one does.
    """
    known = CONFIGURATIONS | CLASSIFIERS
    if name not in known:
        raise _unknown(name, known)
    found: Shapes = {key: tuple(value.shape) for key, value in state.items()}
    if found == (expected := shapes(name)):
        return
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    differing = [f"{key} {found[key]}, not {expected[key]}" for key in expected if key in found and found[key] != expected[key]]
    lists = (("missing", missing), ("unexpected", unexpected), ("of another shape", differing))
    mistakes = [f"{len(items):,} {what} ({_few(items)})" for what, items in lists if items]
    fitting = [other for other in known if other != name and found == shapes(other)]
    if fitting:
        remedy = f"--config {fitting[0]}: that one fits" if fitting[0] in CONFIGURATIONS else f"they are those of {fitting[0]}"
    else:
        remedy = f"none of {_names(known)} fits: {REMEDY}"
    raise DataError(f"these are not the weights of {name}: {'; '.join(mistakes)}", remedy)


def shapes(name: str) -> Shapes:
    """Names and shapes of a published state dict, from the network built without memory."""
    with torch.device("meta"):
        network = (CONFIGURATIONS | CLASSIFIERS)[name].build()
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def _inspect(path: Path, zipped: bool, callable_names: Set[str]) -> None:
    """Refuse what could make the reader call, unpack or nest anything that weights need not. Raises DataError, and others on damage."""
    if not zipped:
        with path.open("rb") as file:
            for _ in range(LEGACY_PICKLES):
                _inspect_pickle(path, file, callable_names)
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise DataError(f"{path} is compressed, which a checkpoint never is", REMEDY)
        if damaged := archive.testzip():
            raise DataError(f"{path} is damaged: the checksum of {damaged} is wrong", REMEDY)
        for member in members:
            if member.filename.endswith(".pkl"):
                with archive.open(member, mode="r") as file:
                    _inspect_pickle(path, file, callable_names)


def _inspect_pickle(path: Path, file: IO[bytes], callable_names: Set[str]) -> None:
    tuples = 0
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in CALLS and argument not in callable_names:
            wanted = str(argument or "something that it hides").replace(" ", ".")[:80]
            raise DataError(f"{path} holds more than weights: reading it would call {wanted}; nothing was run", REMEDY)
        tuples += opcode.name.startswith("TUPLE")
        if number > MAX_OPCODES or tuples > MAX_TUPLES:
            raise DataError(f"{path} holds no weights: their names and shapes take no such long description", REMEDY)


def _unknown(name: str, known: Mapping[str, object]) -> UsageError:
    near = difflib.get_close_matches(name, known, n=1)
    remedy = f"--config {near[0]}" if near else "--config NAME, one of these"
    return UsageError(f"nothing was published as {name!r}, only {_names(known)}", remedy)


def _names(known: Mapping[str, object]) -> str:
    *most, last = known
    return f"{', '.join(most)} or {last}"


def _few(items: list[str], most: int = 3) -> str:
    return ", ".join(item[:200] for item in items[:most]) + (", ..." if len(items) > most else "")


def _kind(value: object) -> str:
    return "an empty dictionary" if value == {} else f"an object of type {type(value).__name__}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:160] if lines else type(error).__name__
