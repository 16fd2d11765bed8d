"""`diffrc synth`: images of a class, or of every tail class, from a trained and exported run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from diffrc_cli import console, dry_run
from diffrc_cli.options import (
    ClassOption,
    DataOption,
    DryRunOption,
    EngineDeviceOption,
    JsonOption,
    PrecisionOption,
    RunOption,
    SetOption,
    of_run,
)
from engines.errors import UsageError, YieldError

if TYPE_CHECKING:
    from engines.recipe import Recipe
    from engines.store import RunFolder
    from engines.synthesis.shelf import ClassYield
    from engines.synthesis.synthesize import Synthesis

SHOWN = 5  # warnings, and classes in a message

CountOption = Annotated[
    int | None, typer.Option("--n", metavar="N", help="Images of each class; those that are there count.", show_default=False)
]
FillOption = Annotated[bool, typer.Option("--fill", help="Every medium and few class, up to the size of the largest (or synth.fill_to).")]
StepsOption = Annotated[
    str | None, typer.Option("--steps", metavar="N", help='Sampling steps: 50, "ddim50" or "10,15,25".', show_default=False)
]
SamplerOption = Annotated[
    Literal["ddpm", "ddim", "dpmpp_2m"] | None, typer.Option("--sampler", help="Ancestral, or deterministic.", show_default=False)
]
ScaleOption = Annotated[
    float | None, typer.Option("--guidance-scale", help="How hard the guide pushes; 0 = not at all.", show_default=False)
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Names the noise: another seed, other images.", show_default=False)]
EngineOption = Annotated[
    Literal["onnx", "openvino", "tensorrt", "torch", "auto"] | None,
    typer.Option("--engine", help="What runs the U-Net; auto = the fastest that is exported and runs here.", show_default=False),
]
CompileOption = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="Compile the torch engine first: minutes, then faster steps.", show_default=False),
]
BandOption = Annotated[
    float | None,
    typer.Option("--distance-band", metavar="X", help="Keep images up to X class widths from the real ones; 0 = all.", show_default=False),
]
ConfidenceOption = Annotated[
    float | None,
    typer.Option("--confidence", metavar="P", help="Keep images that the guide is this sure of; 0 = all.", show_default=False),
]
TriesOption = Annotated[
    float | None,
    typer.Option(
        "--max-tries", metavar="X", help="Give up after X times N images, those that are not finite aside (exit 9).", show_default=False
    ),
]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where to. Default: synth/ of the run.", show_default=False)]


def synth(
    names: ClassOption = None,
    n: CountOption = None,
    fill: FillOption = False,
    steps: StepsOption = None,
    sampler: SamplerOption = None,
    guidance_scale: ScaleOption = None,
    seed: SeedOption = None,
    engine: EngineOption = None,
    precision: PrecisionOption = None,
    device: EngineDeviceOption = None,
    compiled: CompileOption = None,
    distance_band: BandOption = None,
    confidence: ConfidenceOption = None,
    max_tries: TriesOption = None,
    out: OutOption = None,
    run: RunOption = None,
    data: DataOption = None,
    overrides: SetOption = None,
    plan: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Make images by guided sampling. The same command continues after a kill; a larger --n adds to what is there.

    Example: diffrc synth --class nine --n 50
    """
    if fill == bool(names):
        raise UsageError("synth needs either --class with --n, or --fill", "diffrc synth --class NAME --n 50, or diffrc synth --fill")
    if (n is None) != fill:
        raise UsageError(
            "--n goes with --class, and only with it", "--set synth.fill_to=N says how far --fill goes" if fill else "--n 50, say"
        )
    from engines.store import open_run
    from engines.synthesis.plan import asked_classes, fill_classes
    from engines.synthesis.synthesize import summary, synthesize

    typed = {"steps": steps, "sampler": sampler, "guidance_scale": guidance_scale, "seed": seed, "engine": engine, "precision": precision}
    where = {"device": device, "compile": None if compiled is None else str(compiled).lower()}
    filters = {"distance_band": distance_band, "confidence": confidence, "max_tries": max_tries}
    folder = open_run(run, (*(overrides or ()), *_settings("synth", typed | where), *_settings("select", filters)))
    wanted = fill_classes(folder) if fill else asked_classes(folder, names or [], n or 0)
    if plan:
        _forecast(folder, wanted, out, data, json)
        return
    originals = _originals(folder, data)
    with console.progress() as report:
        parts = synthesize(folder, wanted, out, originals, report=report, tell=console.note)
    if json:
        console.emit_json(summary(parts))
    for part in parts:
        if not json:
            _show(part)
        for line in part.copy_warnings[:SHOWN]:
            console.note(f"warning: {line}")
        if len(part.copy_warnings) > SHOWN:
            console.note(f"and {len(part.copy_warnings) - SHOWN} more such warnings in {part.folder / 'copies.json'}")
        if part.copy_warnings:
            console.note(f"try:     {_fewer_copies(folder.recipe, part.model)}")
    if short := [c for part in parts for c in part.classes if c.short]:
        raise _too_few(short)
    if not json and out is None:  # evaluate reads the run's own images
        console.say(f"next: diffrc evaluate{of_run(folder.path)}")


def _forecast(run: RunFolder, wanted: dict[int, int], out: Path | None, data: Path | None, json: bool) -> None:
    """What would be made and what it would take."""
    from engines.synthesis.forecast import forecast

    originals = None if run.recipe.synth.start == "noise" else _originals(run, data)
    with console.progress() as report:
        parts = forecast(run, wanted, out, report, data=originals)
    totals = dry_run.synthesis(parts, parts[0].folder)
    if json:
        console.emit_json({"run": run.path, "parts": [dry_run.synthesis_json(part) for part in parts], **totals.to_json()})
        return
    for part in parts:
        console.table("", ("class", "asked", "there", "to make"), [(c.name, c.asked, c.there, c.missing) for c in part.classes])
        side = f", {part.parallel} side by side" if part.parallel > 1 else ""
        tried = f"; of those there the selection kept 1 in {part.tries:.3g}" if part.tries > 1 else ""
        pace = f", in {part.batches:,} batches of {console.duration(part.seconds_per_batch)}{side}" if part.missing else ""
        console.prose(f"{part.model}: {part.missing:,} images into {part.folder} by {part.engine}{pace}{tried}")
    totals.show()


def _settings(section: str, typed: dict[str, Any]) -> list[str]:
    return [f"{section}.{key}={value}" for key, value in typed.items() if value is not None]


def _originals(run: RunFolder, data: Path | None) -> Any:
    from engines.data.longtail import prepare

    return prepare(run.recipe.data, data)


def _show(part: Synthesis) -> None:
    reasons = {"distance": "too far", "confidence": "unsure", "both": "both", "novelty": "novelty"}
    dropped = [reason for reason in reasons if any(c.dropped[reason] for c in part.classes)]
    selected = ("yield",) if dropped else ()
    columns = ("class", "asked", "there", "made now", *(reasons[reason] for reason in dropped), *selected, "folder")
    rows = [
        (c.name, c.asked, c.kept, c.made, *(c.dropped[reason] for reason in dropped), *(_percent(c.share) for _ in selected), c.folder)
        for c in part.classes
    ]
    console.table("", columns, rows)
    if part.made:
        console.say(f"{part.made} images in {console.duration(part.seconds)}, {part.images_per_second:.3g} a second")
    if part.not_finite:
        console.note(f"{part.not_finite} images were not finite and not written")
    console.say(f"contact sheet: {part.sheet}")
    if part.copies:
        told = [
            f"{found.copies} of {found.images} by {space}s (real images: {_percent(usual.share)})"
            for space, usual in part.copies.usual.items()
            if (found := part.copies.total(space)).images
        ]
        console.prose(f"copies of training images: {', '.join(told)}; closest pairs: {part.folder / 'copies.png'}")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _fewer_copies(recipe: Recipe, model: str) -> str:
    if recipe.synth.start != "noise":
        return f"a synth.strength above {recipe.synth.strength:g}, with another --out DIR, keeps less of the images that these begin from"
    stops = ", or target.holdout_fraction=0.2 with target.patience=5" if model == "target" else ""
    return f"fewer {model}.train_steps{stops}; select.copy_ratio and select.copy_share say what is a copy, and how many are too many"


def _too_few(short: Sequence[ClassYield]) -> YieldError:
    """A script that asked for 500 images and got 320 must not go on as if it had them: the job ends as a failure, all it made in place."""
    from engines.data.names import shorten

    told = ", ".join(f"{shorten(c.name)} {c.kept} of {c.asked}" for c in short[:SHOWN])
    more = f" and {len(short) - SHOWN} more" if len(short) > SHOWN else ""
    worst = min(c.share or 0.0 for c in short)
    looser = "a wider --distance-band or a lower --confidence, with another --out DIR, keeps more"
    tries = f"the same command with --max-tries {math.ceil(1.25 / worst)} adds to what is there; or " if worst > 0.01 else ""
    return YieldError(f"fewer images than asked for: {told}{more}", tries + looser)
