"""`diffrc export`: a trained network as an engine file that agreed with torch, or as a folder of the diffusers library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from diffrc_cli import console
from diffrc_cli.options import ForceOption, JsonOption, RunOption, SetOption
from engines.errors import UsageError

if TYPE_CHECKING:
    from engines.store import RunFolder

ModelOption = Annotated[
    Literal["target", "source"] | None,
    typer.Option("--model", help="The network to export. Default: synth.model of the run's recipe.", show_default=False),
]
EngineOption = Annotated[Literal["onnx"], typer.Option("--engine", help="The kind of engine.")]
DiffusersOption = Annotated[
    Path | None,
    typer.Option("--diffusers", metavar="DIR", help="Write a UNet2DModel and its scheduler into this folder instead.", show_default=False),
]


def export(
    run: RunOption = None,
    model: ModelOption = None,
    engine: EngineOption = "onnx",
    diffusers: DiffusersOption = None,
    force: ForceOption = False,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Export the trained U-Net to ONNX and hold it to torch's numbers; a file that disagrees is not written (exit 6).

    With --diffusers, write a folder of the diffusers library, a whole pipeline if without labels; one that is not empty needs --force.

    Example: diffrc export
    """
    from engines.backends.export import export_run, onnx_path
    from engines.store import open_run

    folder = open_run(run, tuple(overrides or ()))
    model = model or folder.recipe.synth.model
    if diffusers:
        _to_diffusers(folder, model, diffusers, force, json)
        return
    if force:
        raise UsageError("--force goes with --diffusers", "diffrc export; an engine that no longer fits is replaced without it")
    with console.progress() as report:
        (card,) = export_run(folder, (model,), report)
    path = onnx_path(folder, model)
    if json:
        console.emit_json({"model": model, "file": path, **card.model_dump(exclude={"self_test"})})
        return
    console.say(f"{model}: {path}, {path.stat().st_size / 2**20:.1f} MiB, opset {card.opset}, {card.precision}")
    console.say(
        f"against torch: one evaluation within {card.one_step_error:.1e} (allowed {card.tolerance:.0e}), "
        f"a short trajectory within {card.trajectory_psnr_db:.0f} dB"
    )
    console.say("next: diffrc synth --fill, or diffrc synth --class NAME --n 50")


def _to_diffusers(run: RunFolder, model: Literal["target", "source"], out: Path, force: bool, json: bool) -> None:
    from engines.networks.diffusers_folder import write
    from engines.training.stages import load_unet

    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", "--diffusers DIR names a folder")
    if out.exists() and any(out.iterdir()) and not force:
        raise UsageError(f"{out} is not empty", "--force replaces the files of the model in it; or name another folder")
    unet = load_unet(run, model)
    files = write(out, unet, run.recipe)
    if json:
        console.emit_json({"model": model, "folder": out, "files": files})
        return
    console.say(f"{model}: {out}, {files[0].stat().st_size / 2**20:.1f} MiB, {'with' if unet.classes else 'without'} labels")
    load = f"UNet2DModel.from_pretrained({str(out)!r}, subfolder='unet')" if unet.classes else f"DDPMPipeline.from_pretrained({str(out)!r})"
    console.say(f"in Python: from diffusers import {load.partition('.')[0]}; {load}")
    if unet.classes:
        console.say(
            f"labels: 0 to {unet.classes - 2} are the classes in the order of diffrc data classes, {unet.classes - 1} is none of them"
        )
