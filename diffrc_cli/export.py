"""`diffrc export`: a trained network as engines that agreed with torch, or as a folder of the diffusers library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from diffrc_cli import console, dry_run
from diffrc_cli.options import DryRunOption, EngineDeviceOption, ForceOption, JsonOption, PrecisionOption, RunOption, SetOption, of_run
from engines.errors import EngineError, ParityError, UsageError

if TYPE_CHECKING:
    from engines.backends.base import EngineCard
    from engines.backends.choice import Build
    from engines.backends.fused import FusedCard
    from engines.recipe import Recipe
    from engines.store import RunFolder

ModelOption = Annotated[
    Literal["target", "source"] | None,
    typer.Option("--model", help="The network to export. Default: synth.model of the run's recipe.", show_default=False),
]
EngineName = Literal["onnx", "openvino", "tensorrt", "all"]
EngineOption = Annotated[
    EngineName | None,
    typer.Option("--engine", help="For which runtime; all = each that runs here. Default: what synth.engine needs.", show_default=False),
]
BatchOption = Annotated[
    int | None,
    typer.Option("--batch", metavar="N", help="The largest batch that is checked: export.max_batch.", show_default=False),
]
OpsetOption = Annotated[
    int | None, typer.Option("--opset", metavar="N", help="18 to 23. Default: export.opset of the recipe.", show_default=False)
]
DiffusersOption = Annotated[
    Path | None,
    typer.Option("--diffusers", metavar="DIR", help="Write a UNet2DModel and its scheduler into this folder instead.", show_default=False),
]


def export(
    run: RunOption = None,
    model: ModelOption = None,
    engine: EngineOption = None,
    precision: PrecisionOption = None,
    device: EngineDeviceOption = None,
    batch: BatchOption = None,
    opset: OpsetOption = None,
    diffusers: DiffusersOption = None,
    force: ForceOption = False,
    overrides: SetOption = None,
    plan: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Export the trained U-Net to ONNX and hold each engine to torch's numbers; one that disagrees is not published (exit 6).

    With a trained guide, a whole guided step is exported too, behind the same gate; --set synth.fused=false leaves it out.

    Engines share the ONNX file of their precision; each has a card of its own, and without it is not loaded. TensorRT builds a plan
    from it, of this machine alone. With --engine all, one that fails keeps no other from being tried.

    With --diffusers, write a folder of the diffusers library, a whole pipeline if without labels; one that is not empty needs --force.

    Example: diffrc export
    """
    from engines.backends import guided
    from engines.backends.base import engine_path
    from engines.backends.export import export_run, onnx_path
    from engines.store import open_run

    if diffusers and plan:
        raise UsageError("--dry-run plans engines; --diffusers takes a second", "--diffusers without --dry-run")
    if diffusers and (engine or precision or device or batch or opset):
        raise UsageError("--diffusers writes no engine", "leave --engine, --precision, --device, --batch and --opset out")
    typed = {"export.max_batch": batch, "export.opset": opset, "synth.device": device}
    folder = open_run(run, (*(overrides or ()), *(f"{key}={value}" for key, value in typed.items() if value is not None)))
    model = model or folder.recipe.synth.model
    if diffusers:
        _to_diffusers(folder, model, diffusers, force, json)
        return
    if force:
        raise UsageError("--force goes with --diffusers", "diffrc export; an engine that no longer fits is replaced without it")
    builds, failed = _builds(folder.recipe, engine, precision), list[EngineError | ParityError]()
    if plan:
        _forecast(folder, model, builds, json)
        return
    for build in builds:
        try:
            with console.progress() as report:
                (card,) = export_run(folder, (model,), report, (build,))
        except (EngineError, ParityError) as error:
            if len(builds) == 1:
                raise
            console.note(f"not exported: {build}: {error.problem}")
            failed.append(error)
            continue
        path = engine_path(onnx_path(folder, model), *build)
        step = guided.published(onnx_path(folder, model), folder.recipe, build)
        if json:
            guided_step = step and step.model_dump(exclude={"self_test", "self_test_schedule"})
            console.emit_json({"model": model, "file": path, **card.model_dump(exclude={"self_test"}), "guided_step": guided_step})
        else:
            _show(model, path, card)
            if step:
                _show_step(step)
    if failed:  # an engine whose numbers are wrong is worse news than one that cannot be made
        raise max(failed, key=lambda error: error.exit_code)
    if not json:
        here = of_run(folder.path)
        console.say(f"next: diffrc synth --fill{here}, or diffrc synth --class NAME --n 50{here}")


def _forecast(run: RunFolder, model: Literal["target", "source"], builds: list[Build], json: bool) -> None:
    """What would be exported and what it would take."""
    from engines.backends.forecast import forecast
    from engines.progress import peak_memory_bytes

    found = forecast(run, model, builds)
    seconds, disk = sum(f.seconds_left for f in found), sum(f.disk_bytes for f in found)
    totals = dry_run.Totals(seconds, disk, peak_memory_bytes(), "cpu", run.engines)
    if json:
        rows = [f.__dict__ | {"build": str(f.build), "path": str(f.path)} for f in found]
        console.emit_json({"run": run.path, "model": model, "engines": rows, **totals.to_json()})
        return
    states = [(f.build, "fits, is kept" if f.current else "to export", "yes" if f.guided else "no", f.path) for f in found]
    console.table("", ("engine", "state", "guided step", "file"), states)
    totals.show()


def _builds(recipe: Recipe, engine: EngineName | None, precision: Literal["fp32", "bf16", "fp16"] | None) -> list[Build]:
    """What is to be exported. What is named must run here; of all, those that cannot, or gain nothing here, are told of."""
    from engines.backends import choice
    from engines.backends.export import builds_of_recipe, file_opset

    if engine == "all":
        builds = []
        for build in choice.builds_of(engine, precision or "auto"):
            try:
                for needed in filter(None, (choice.source_of(build), build)):
                    choice.require(needed, file_opset(recipe.export, needed))
                if not precision and choice.gains_nothing(build, choice.device_of(build, recipe.synth.device)):
                    raise EngineError(f"{choice.GAINS_NOTHING}; --precision fp16 makes it all the same", "--precision fp16")
                builds.append(build)
            except EngineError as error:
                console.note(f"left out: {build}: {error.problem}")
        if not builds:
            raise EngineError("no engine runs here", 'pip install "diffrc[cpu]"')
        return builds
    if engine or precision:
        return list(choice.builds_of(engine or "auto", precision or "fp32")[:1])
    return list(builds_of_recipe(recipe))


def _show(model: str, path: Path, card: EngineCard) -> None:
    console.say(f"{model}: {path}, {path.stat().st_size / 2**20:.1f} MiB, opset {card.opset}, {card.kind} {card.precision}")
    console.prose(
        f"against torch: one evaluation within {card.one_step_error:.1e} (allowed {card.tolerance:.0e}), "
        f"50 steps within {card.trajectory_psnr_db:.0f} dB; "
        f"{card.ms_per_image:.3g} ms an image at batch {card.measured_batch}, torch {card.torch_ms_per_image:.3g}"
        + (f"; on {card.device}" if card.device != "cpu" else "")
    )


def _show_step(card: FusedCard) -> None:
    console.prose(
        f"guided step in one graph ({card.rules.sampler}): within {card.step_error:.1e} of torch's, "
        f"{card.ms_per_image:.3g} ms an image; the network and torch's guide take {card.apart_ms_per_image:.3g}"
    )


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
