"""`diffrc import openai | diffusers | inception`: published weights, as a file that a source starts from or that FID is measured with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffrc_cli import console
from diffrc_cli.options import ForceOption, JsonOption
from diffrc_cli.recipe import embedded
from engines.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from engines.networks.pretrained import WeightsCard

app = typer.Typer(
    no_args_is_help=True,
    help="Published weights, for a source model that starts from them or for FID.\n\nExample: diffrc import diffusers DIR",
)

OutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="The file to write. Default: NAME.safetensors in the working folder.", show_default=False),
]


def _configurations(incomplete: str) -> list[str]:
    from engines.networks.openai import CONFIGURATIONS

    return [name for name in CONFIGURATIONS if name.startswith(incomplete)]


@app.command()
def openai(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The published checkpoint, a .pt file.", show_default=False)],
    config: Annotated[
        str,
        typer.Option(
            "--config",
            metavar="NAME",
            help="Which of the published networks it is, e.g. imagenet-256-uncond; a wrong name lists them.",
            show_default=False,
            autocompletion=_configurations,
        ),
    ],
    out: OutOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Import a checkpoint of OpenAI's guided-diffusion. It is read without running anything that it holds.

    Example: diffrc import openai 256x256_diffusion_uncond.pt --config imagenet-256-uncond
    """
    from engines.networks.openai import read

    target = _target(out, config, force)
    weights, card = read(file, config)
    _finish(weights, card, target, file, json)


@app.command()
def diffusers(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a UNet2DModel, or of its pipeline.", show_default=False)],
    out: OutOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Import a UNet2DModel of the diffusers library, where our U-Net can hold it. diffusers need not be installed.

    Example: diffrc import diffusers ddpm-butterflies
    """
    from engines.networks.diffusers_folder import read

    target = _target(out, folder.resolve().name, force)
    weights, card = read(folder)
    _finish(weights, card, target, folder, json)


@app.command()
def inception(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The published pt_inception-2015-12-05-6726825d.pth.", show_default=False)],
    out: OutOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Import the Inception-v3 that FID is measured with. It is read without running anything that it holds.

    Example: diffrc import inception pt_inception-2015-12-05-6726825d.pth
    """
    from engines.networks.inception import read, write
    from engines.networks.pretrained import sha256

    target = _target(out, "inception-2015-12-05", force)
    weights, card = read(file)
    write(target, weights, card)
    parameters, digest = sum(value.numel() for name, value in weights.items() if "running_" not in name), sha256(target)
    if json:
        found = {"file": target, "sha256": digest, "parameters": parameters, "origin": {"file": card.file, "sha256": card.sha256}}
        console.emit_json({**found, "is_fid": card.is_fid})
        return
    console.say(f"read {file}: {parameters:,} parameters, sha256 {card.sha256[:16]}")
    console.say(f"wrote {target}: {target.stat().st_size / 2**20:,.1f} MiB, sha256 {digest[:16]}")
    if not card.is_fid:
        console.note("warning: these are not the published weights, so a Frechet distance in their features is no FID and is not called so")
    console.say(f"next: diffrc evaluate --features {target}")


def _target(out: Path | None, name: str, force: bool) -> Path:
    """Where to write; asked before a large file is read. Raises UsageError where something is there already."""
    target = out or Path(f"{name or 'imported'}.safetensors")
    if target.suffix != ".safetensors":
        raise UsageError(f"{target} does not end in .safetensors", f"--out {target.with_suffix('.safetensors')}")
    if target.is_dir() or (target.exists() and not force):
        raise UsageError(f"{target} exists already", "--force replaces it; --out names another file")
    return target


def _finish(weights: dict[str, Tensor], card: WeightsCard, target: Path, source: Path, json: bool) -> None:
    """Write the file, and say what a recipe needs to start from it."""
    from engines.networks import pretrained

    table = pretrained.recipe_table(card)  # refused before anything is written
    pretrained.write(target, weights, card)
    table["source"] = {"pretrained": str(target)}
    parameters = sum(value.numel() for value in weights.values())
    digest = pretrained.sha256(target)
    if json:
        found: dict[str, Any] = {"file": target, "sha256": digest, "parameters": parameters}
        console.emit_json({**found, **card.model_dump(mode="json", exclude={"format"}), "recipe": table})
        return
    labels = f"{card.classes:,} classes{' and a null label' if card.null_label else ''}" if card.classes else "no labels"
    console.say(f"read {source}: {parameters:,} parameters, {labels}, sha256 {card.origin.get('sha256', '')[:16]}")
    console.say(f"wrote {target}: {target.stat().st_size / 2**20:,.1f} MiB, sha256 {digest[:16]}")
    if not card.noise_schedule:
        console.note(
            "the weights do not say which noise schedule they were trained on; diffusion.noise_schedule of the recipe must be theirs"
        )
    console.say("a recipe whose source starts with these weights needs:")
    for section, keys in table.items():
        console.say()
        console.say(f"[{section}]")
        for key, value in keys.items():
            console.say(f"{key} = {pretrained.toml_value(value)}")
    console.say()
    near = f"imagenet-lt-{card.architecture.image_size_px}"
    start = near if near in embedded() else "folder"
    console.say(f"next: diffrc recipe cp {start} mine.toml, give its keys these values, diffrc train mine.toml --data DIR")
