"""A U-Net as a folder of the diffusers library (`UNet2DModel`), read and written without it: names and config keys are facts.

The two networks compute the same where their options coincide. Theirs has one count of groups for every norm, one head width,
and embeds the time at the width of the first level; ours has an epsilon of 1e-5 and frequencies without a shift. What one
side cannot hold is refused by the name of its key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from engines import store
from engines.diffusion.schedule import betas_of
from engines.errors import DataError, UsageError
from engines.networks.diffusers_names import current_name, from_diffusers, to_diffusers
from engines.networks.pretrained import WeightsCard, sha256
from engines.networks.unet import Architecture, UNet
from engines.recipe import Recipe

DIFFUSERS_VERSION = "0.42.1"  # the one whose networks and schedulers the tests compare ours with
WEIGHTS = "diffusion_pytorch_model.safetensors"
GROUPS = 32  # of a norm of C channels we make gcd(32, C), they one number everywhere: the two agree where all C are multiples of 32
NULL_LABEL_KEY = "_diffrc_null_label"  # diffusers passes over keys with an underscore

Width = Annotated[int, Field(ge=1, le=1 << 16)]


class UNet2DConfig(BaseModel):
    """`config.json` of a `UNet2DModel`; a key that is left out has diffusers' default."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    sample_size: int | tuple[int, int] | None = None
    in_channels: Width = 3
    out_channels: Width = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: Annotated[tuple[str, ...], Field(min_length=1, max_length=12)] = (
        "DownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
    )
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=12)] = (224, 448, 672, 896)
    layers_per_block: Annotated[int, Field(ge=1, le=64)] = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    act_fn: str = "silu"
    attention_head_dim: Width | None = 8
    norm_num_groups: Width = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: Width | None = None
    num_train_timesteps: int | None = None  # of a learned time embedding


class SchedulerConfig(BaseModel):
    """The part of `scheduler_config.json` that says what the network was trained on."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    num_train_timesteps: Annotated[int, Field(ge=1, le=10**6)] = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    variance_type: str | None = None
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False


# --------------------------------------------------------------------------------------------------------------- reading


def read(folder: Path) -> tuple[dict[str, Tensor], WeightsCard]:
    """The weights of a `UNet2DModel` under our names, float32, and their card.

    Args:
        folder: the model's (config.json and its weights as safetensors), or a pipeline's with `unet/` in it. Of a pipeline the
            scheduler is read too: it says which noise the network knows.

    Raises DataError: not such a folder, damaged, or a network that ours cannot hold, with every config key in the way.
    """
    unet_folder = folder / "unet" if (folder / "unet" / "config.json").is_file() else folder
    config, scheduler = _config(unet_folder), _scheduler(unet_folder)
    if obstacles := [*_obstacles(config), *(_process_obstacles(scheduler, config) if scheduler else [])]:
        raise DataError(f"our U-Net cannot hold the one in {folder}: {'; '.join(obstacles)}", "diffrc train makes a source without it")
    card = _card(config, scheduler)
    with torch.device("meta"):
        unet = UNet(card.architecture, card.out_channels, card.label_rows)
    path = _weights_file(unet_folder)
    theirs = {current_name(name): value.float() for name, value in _tensors(path).items()}
    expected = to_diffusers(dict(unet.state_dict()), card.architecture)
    wrong = sorted(
        name
        for name in theirs.keys() | expected.keys()
        if name not in theirs or name not in expected or theirs[name].shape != expected[name].shape
    )
    if wrong:
        raise DataError(
            f"{path} does not fit {unet_folder / 'config.json'}: {len(wrong)} of its parameters are missing, left over or of another "
            f"shape ({wrong[0]})",
            "download the folder again",
        )
    weights = from_diffusers(theirs, card.architecture, config.flip_sin_to_cos)
    assert all(weights[name].shape == value.shape for name, value in unet.state_dict().items()), "the map of names covers the network"
    return weights, card.model_copy(update={"origin": {"format": "diffusers", "file": folder.resolve().name, "sha256": sha256(path)}})


def _config(folder: Path) -> UNet2DConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise DataError(
            f"{folder} is no folder of a UNet2DModel: it has neither config.json nor unet/config.json", "name the folder with config.json"
        )
    table = store.read_json(path)
    name = table.get("_class_name") if isinstance(table, dict) else None
    if name != "UNet2DModel":
        raise DataError(f"{path} describes {name or 'no model'}, not UNet2DModel", "only unconditional or class-conditional U-Nets fit")
    try:
        return UNet2DConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(f"{path} is not what diffusers writes: {_mistakes(error)}", "download the folder again") from None


def _scheduler(unet_folder: Path) -> SchedulerConfig | None:
    """Of the model's pipeline: a folder beside it, or a file in it. None where there is neither."""
    places = (unet_folder.absolute().parent / "scheduler", unet_folder)
    path = next((file for place in places if (file := place / "scheduler_config.json").is_file()), None)
    if path is None:
        return None
    table = store.read_json(path)
    if not isinstance(table, dict) or "beta_schedule" not in table:
        name = table.get("_class_name") if isinstance(table, dict) else None
        raise DataError(f"{path} has no beta_schedule ({name}): its network denoises another process", "choose a DDPM or DDIM model")
    try:
        return SchedulerConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(f"{path} is not what diffusers writes: {_mistakes(error)}", "download the folder again") from None


def _obstacles(c: UNet2DConfig) -> list[str]:
    """The config keys that our network has no option for, with their values and ours."""
    fixed: dict[str, tuple[Any, ...]] = {
        "center_input_sample": (False,),
        "time_embedding_type": ("positional",),
        "time_embedding_dim": (None, 4 * c.block_out_channels[0]),
        "freq_shift": (0,),
        "mid_block_type": ("UNetMidBlock2D",),
        "mid_block_scale_factor": (1,),
        "act_fn": ("silu", "swish"),
        "norm_eps": (1e-5,),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "add_attention": (True,),
        "class_embed_type": (None,),
        "norm_num_groups": (GROUPS,),
        "attn_norm_num_groups": (GROUPS,) if c.resnet_time_scale_shift == "scale_shift" else (None, GROUPS),
        "out_channels": (c.in_channels, 2 * c.in_channels),
    }
    found = [_differs(key, getattr(c, key), allowed) for key, allowed in fixed.items() if getattr(c, key) not in allowed]
    found += [f"{key} is unknown" for key, value in (c.model_extra or {}).items() if not key.startswith("_") and value is not None]
    levels, first = len(c.block_out_channels), c.block_out_channels[0]
    if any(2 * width % first for width in c.block_out_channels):
        found.append(f"block_out_channels = {list(c.block_out_channels)} are no multiples of half the first")
    if odd := [width for width in c.block_out_channels if width % GROUPS]:
        found.append(f"block_out_channels has {odd}, no multiples of {GROUPS}")
    if not _size(c) or _size(c) % 2 ** (levels - 1):
        found.append(f"sample_size = {c.sample_size} is no square that can be halved {levels - 1} times")
    found += _block_obstacles(c)
    attending = {c.block_out_channels[level] for level in _attending(c)} | {c.block_out_channels[-1]}
    if c.attention_head_dim and (uneven := [width for width in sorted(attending) if width % c.attention_head_dim]):
        found.append(f"attention_head_dim = {c.attention_head_dim} does not divide the widths {uneven}")
    return found


def _block_obstacles(c: UNet2DConfig) -> list[str]:
    """Block types of other kinds, levels that attend on one side only, resampling that changes from level to level."""
    down, up, levels = c.down_block_types, tuple(reversed(c.up_block_types)), len(c.block_out_channels)
    kinds = {"down_block_types": ("DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D")}
    kinds["up_block_types"] = ("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D")
    other = [f"{key} has {name}" for key, known in kinds.items() for name in dict.fromkeys(getattr(c, key)) if name not in known]
    if other:
        return other
    if not len(down) == len(up) == levels:
        return [f"down_block_types, up_block_types and block_out_channels have {len(down)}, {len(up)} and {levels} entries"]
    if [name.startswith("Attn") for name in down] != [name.startswith("Attn") for name in up]:
        return ["down_block_types and up_block_types do not attend on the same levels"]
    found = []
    for key in ("downsample_type", "upsample_type"):
        attends = any(name.startswith("Attn") for name in (down[:-1] if key == "downsample_type" else up[1:]))
        if attends and getattr(c, key) not in ("conv", "resnet"):
            found.append(_differs(key, getattr(c, key), ("conv", "resnet")))
    if len(set(_resampling(c))) > 1:
        found.append(
            "down_block_types, up_block_types, downsample_type and upsample_type mix resampling by convolution and by residual block"
        )
    elif "conv" in _resampling(c) and c.downsample_padding != 1:
        found.append(_differs("downsample_padding", c.downsample_padding, (1,)))
    return found


def _process_obstacles(s: SchedulerConfig, c: UNet2DConfig) -> list[str]:
    found = []
    if s.prediction_type != "epsilon":
        found.append(_differs("prediction_type", s.prediction_type, ("epsilon",)))
    if s.rescale_betas_zero_snr:
        found.append(_differs("rescale_betas_zero_snr", True, (False,)))
    if c.out_channels == 2 * c.in_channels and s.variance_type not in ("learned_range", None):
        found.append(_differs("variance_type", s.variance_type, ("learned_range",)))
    if _noise_schedule(s) is None:
        key = "trained_betas" if s.trained_betas else "beta_schedule"
        value = "" if s.trained_betas else f" = {s.beta_schedule} from {s.beta_start:g} to {s.beta_end:g}"
        found.append(f"{key}{value} of {s.num_train_timesteps} steps is neither the linear nor the cosine schedule")
    return found


def _card(c: UNet2DConfig, scheduler: SchedulerConfig | None) -> WeightsCard:
    first, size = c.block_out_channels[0], _size(c)
    architecture = Architecture(
        image_size_px=size,
        in_channels=c.in_channels,
        model_channels=first,
        channel_mult=tuple(width / first for width in c.block_out_channels),
        num_res_blocks=c.layers_per_block,
        attention_resolutions=tuple(size // 2**level for level in _attending(c)),
        num_head_channels=c.attention_head_dim or 64,
        num_heads=0 if c.attention_head_dim else 1,
        dropout=c.dropout,
        resblock_updown="resnet" in _resampling(c),
        use_scale_shift_norm=c.resnet_time_scale_shift == "scale_shift",
    )
    rows = c.num_class_embeds or 0
    null_label = rows > 1 and (c.model_extra or {}).get(NULL_LABEL_KEY) is True
    return WeightsCard(
        architecture=architecture,
        out_channels=c.out_channels,
        classes=rows - null_label,
        null_label=null_label,
        noise_schedule=_noise_schedule(scheduler) if scheduler else None,
        diffusion_steps=scheduler.num_train_timesteps if scheduler else None,
    )


def _noise_schedule(s: SchedulerConfig) -> Literal["linear", "cosine"] | None:
    """The one of our two schedules that a scheduler's betas are, or None."""
    steps = s.num_train_timesteps
    kinds: tuple[Literal["linear", "cosine"], ...] = ("linear", "cosine")
    if s.trained_betas:
        betas = torch.tensor(s.trained_betas, dtype=torch.float64)
        return next((k for k in kinds if len(betas) == steps and torch.allclose(betas, betas_of(k, steps), rtol=1e-5, atol=1e-9)), None)
    if s.beta_schedule == "squaredcos_cap_v2":
        return "cosine"
    ends = betas_of("linear", steps)[[0, -1]].tolist()
    same = all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip((s.beta_start, s.beta_end), ends, strict=True))
    return "linear" if s.beta_schedule == "linear" and same else None


def _size(c: UNet2DConfig) -> int:
    """Of the square images, px; 0 where they are none."""
    if isinstance(c.sample_size, tuple):
        return c.sample_size[0] if c.sample_size[0] == c.sample_size[1] else 0
    return max(c.sample_size or 0, 0)


def _attending(c: UNet2DConfig) -> list[int]:
    return [level for level, name in enumerate(c.down_block_types[: len(c.block_out_channels)]) if name.startswith("Attn")]


def _resampling(c: UNet2DConfig) -> list[str]:
    """How each change of size is made, down, then up: "conv" or "resnet"."""
    plain = {"DownBlock2D": "conv", "UpBlock2D": "conv", "ResnetDownsampleBlock2D": "resnet", "ResnetUpsampleBlock2D": "resnet"}
    return [plain.get(name, c.downsample_type) for name in c.down_block_types[:-1]] + [
        plain.get(name, c.upsample_type) for name in c.up_block_types[:-1]
    ]


def _weights_file(folder: Path) -> Path:
    path = folder / WEIGHTS
    if path.is_file():
        return path
    save = f"UNet2DModel.from_pretrained({str(folder)!r}).save_pretrained(NEW, max_shard_size='100GB') writes one"
    others = sorted(
        file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".safetensors") or file.name.endswith(".index.json")
    )
    there = f" but {', '.join(others[:3])}" if others else ""
    raise DataError(f"{folder} has no {WEIGHTS}{there}", save if others else "download the folder again")


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, OSError) as error:
        raise DataError(f"cannot read {path}: {error}", "download the folder again") from None


# --------------------------------------------------------------------------------------------------------------- writing


def write(folder: Path, unet: UNet, recipe: Recipe) -> list[Path]:
    """Write a trained U-Net as a pipeline folder: `unet/`, `scheduler/` and, for a network without labels, `model_index.json`.

    A labeled network gets no `model_index.json`, because `DDPMPipeline` passes no labels.

    Returns: the files, in that order.

    Raises:
        UsageError: the recipe's keys that `UNet2DModel` has no option for.
        StorageError: the folder cannot be written.
    """
    config = _unet_config(unet)
    weights = to_diffusers(dict(unet.state_dict()), unet.architecture)
    back = from_diffusers(weights, unet.architecture, True)
    assert all(torch.equal(back[name], value) for name, value in unet.state_dict().items()), "the map of names loses nothing"
    store.require_space(folder, 4 * sum(value.numel() for value in weights.values()))
    paths = [folder / "unet" / WEIGHTS, folder / "unet" / "config.json", folder / "scheduler" / "scheduler_config.json"]
    store.write_tensors(paths[0], weights, {"format": "pt"})
    store.write_json(paths[1], config)
    store.write_json(paths[2], _scheduler_config(recipe))
    if not unet.classes:
        paths.append(folder / "model_index.json")
        parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
        store.write_json(paths[3], {"_class_name": "DDPMPipeline", "_diffusers_version": DIFFUSERS_VERSION, **parts})
    return paths


def _unet_config(unet: UNet) -> dict[str, Any]:
    """`config.json` with every key that decides. Raises UsageError with all of the recipe's keys that it cannot express."""
    a, levels = unet.architecture, range(len(unet.architecture.channel_mult))
    attends = [a.image_size_px // 2**level in a.attention_resolutions for level in levels]
    widths = [int(mult * a.model_channels) for mult in a.channel_mult]
    attending = {width for width, yes in zip(widths, attends, strict=True) if yes} | {widths[-1]}
    head_widths = {width // a.num_heads if a.num_heads else a.num_head_channels for width in attending}
    found = []
    if a.channel_mult[0] != 1:
        found.append(f"unet.channel_mult begins with {a.channel_mult[0]}, not 1")
    if len(head_widths) > 1 and a.num_heads > 1:
        found.append(f"unet.num_heads = {a.num_heads} at the widths {sorted(attending)}, not heads of one width")
    if not a.resblock_updown and not a.conv_resample:
        found.append("unet.conv_resample = false")
    if odd := [width for width in widths if width % GROUPS]:
        found.append(f"unet.model_channels = {a.model_channels} makes widths of {odd}, no multiples of {GROUPS}")
    if found:
        raise UsageError(
            f"diffusers' UNet2DModel cannot hold this network: {'; '.join(found)}", "diffrc export without --diffusers writes ONNX"
        )
    kinds = ("Attn{}Block2D", "Resnet{}sampleBlock2D" if a.resblock_updown else "{}Block2D")
    down = [kinds[0 if yes else 1].format("Down") for yes in attends]
    up = [kinds[0 if yes else 1].format("Up") for yes in reversed(attends)]
    resampling = "resnet" if a.resblock_updown else "conv"
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "add_attention": True,
        "attention_head_dim": None if len(head_widths) > 1 else head_widths.pop(),  # None: one head at every width
        "attn_norm_num_groups": GROUPS,
        "block_out_channels": widths,
        "center_input_sample": False,
        "class_embed_type": None,
        "down_block_types": down,
        "downsample_padding": 1,
        "downsample_type": resampling,
        "dropout": a.dropout,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": a.in_channels,
        "layers_per_block": a.num_res_blocks,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": GROUPS,
        "num_class_embeds": unet.classes or None,
        "out_channels": unet.state_dict()["out.2.bias"].numel(),
        "resnet_time_scale_shift": "scale_shift" if a.use_scale_shift_norm else "default",
        "sample_size": a.image_size_px,
        "time_embedding_type": "positional",
        "up_block_types": up,
        "upsample_type": resampling,
        **({NULL_LABEL_KEY: True} if unet.classes else {}),
    }


def _scheduler_config(recipe: Recipe) -> dict[str, Any]:
    """The recipe's process as a `DDPMScheduler`; betas that its formulas do not give are written out."""
    steps, kind = recipe.diffusion.steps, recipe.diffusion.noise_schedule
    betas = betas_of(kind, steps)
    formula = kind == "cosine" or steps > 20  # below, our linear schedule meets its upper end, 0.999
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "beta_end": float(betas[-1]) if kind == "linear" else 0.02,
        "beta_schedule": "squaredcos_cap_v2" if kind == "cosine" else "linear",
        "beta_start": float(betas[0]) if kind == "linear" else 0.0001,
        "clip_sample": recipe.synth.clip_denoised,
        "clip_sample_range": 1.0,
        "num_train_timesteps": steps,
        "prediction_type": "epsilon",
        "timestep_spacing": "linspace",  # first and last included, as ours
        "trained_betas": None if formula else betas.tolist(),
        "variance_type": "learned_range" if recipe.unet.learn_sigma else "fixed_small",
    }


def _differs(key: str, value: Any, allowed: Sequence[Any]) -> str:
    return f"{key} = {_word(value)}, not {' or '.join(map(_word, allowed))}"


def _word(value: Any) -> str:
    """As JSON has it, strings without quotes."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _mistakes(error: ValidationError) -> str:
    return "; ".join(f"{e['loc'][0]}: {e['msg'][:1].lower()}{e['msg'][1:]}" for e in error.errors(include_url=False))
