"""`diffrc synth`: images of a class, or of every tail class, from a trained and exported run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from diffrc_cli import console
from diffrc_cli.options import DataOption, JsonOption, RunOption, SetOption
from engines.errors import UsageError

if TYPE_CHECKING:
    from engines.store import RunFolder
    from engines.synthesis.synthesize import Synthesis

ClassOption = Annotated[
    list[str] | None,
    typer.Option("--class", metavar="NAME", help="A class of the run, as you would type it; repeatable.", show_default=False),
]
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
    Literal["onnx", "torch", "auto"] | None, typer.Option("--engine", help="What runs the U-Net; auto = onnx.", show_default=False)
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
    out: OutOption = None,
    run: RunOption = None,
    data: DataOption = None,
    overrides: SetOption = None,
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

    typed = {"steps": steps, "sampler": sampler, "guidance_scale": guidance_scale, "seed": seed, "engine": engine}
    folder = open_run(run, (*(overrides or ()), *_settings(typed)))
    wanted = fill_classes(folder) if fill else asked_classes(folder, names or [], n or 0)
    if folder.recipe.synth.engine == "auto":
        console.note("engine: onnx (auto: the exported network on ONNX Runtime's CPU provider; --engine torch runs without an export)")
    originals = _originals(folder, data)
    with console.progress() as report:
        parts = synthesize(folder, wanted, out, originals, report=report)
    if json:
        console.emit_json(summary(parts))
        return
    for part in parts:
        _show(part)


def _settings(typed: dict[str, Any]) -> list[str]:
    return [f"synth.{key}={value}" for key, value in typed.items() if value is not None]


def _originals(run: RunFolder, data: Path | None) -> Any:
    from engines.data.longtail import prepare

    return prepare(run.recipe.data, data)


def _show(part: Synthesis) -> None:
    selected = any(c.rejected for c in part.classes)
    columns = ("class", "asked", "there", "made now", *(("dropped",) if selected else ()), "folder")
    rows = [(c.name, c.asked, c.kept, c.made, *((c.rejected,) if selected else ()), c.folder) for c in part.classes]
    console.table("", columns, rows)
    if part.made:
        console.say(f"{part.made} images in {console.duration(part.seconds)}, {part.images_per_second:.3g} a second")
    for c in part.classes:
        if c.kept < c.asked:
            console.note(f"{c.name}: the selection kept {c.kept} of {c.kept + c.rejected}; select.max_tries ended it before {c.asked}")
    if part.not_finite:
        console.note(f"{part.not_finite} images were not finite and not written")
    console.say(f"contact sheet: {part.sheet}")
