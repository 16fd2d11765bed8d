"""`diffrc bench quality`: few sampling steps or many, shown on images of this run, so that a user can choose."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from diffrc_cli import console, dry_run
from diffrc_cli.evaluate import FeaturesOption
from diffrc_cli.options import DataOption, DryRunOption, JsonOption, PrecisionOption, RunOption, SetOption, class_names
from diffrc_cli.synth import EngineOption
from engines.errors import UsageError

if TYPE_CHECKING:
    from engines.benchmark.quality import Estimate, Quality, Row, Setting
    from engines.data.longtail import LongTail
    from engines.store import RunFolder

SamplerName = Literal["ddpm", "ddim", "dpmpp_2m"]

SamplersOption = Annotated[str, typer.Option("--samplers", metavar="NAMES", help="ddpm, ddim, dpmpp_2m, with commas.")]
StepsOption = Annotated[
    str, typer.Option("--steps", metavar="NUMBERS", help='Numbers of sampling steps, with commas; "ddim50" is one too.')
]
ScalesOption = Annotated[
    str | None,
    typer.Option("--scales", metavar="NUMBERS", help="Guidance scales, with commas. Default: the recipe's.", show_default=False),
]
CountOption = Annotated[int, typer.Option("--n", metavar="N", min=2, help="Images of each cell, shared evenly by the classes.")]

ClassOption = Annotated[
    list[str] | None,
    typer.Option(
        "--class",
        metavar="NAME",
        help="A class; repeatable. Default: every medium and few class.",
        show_default=False,
        autocompletion=class_names,
    ),
]


def quality(
    samplers: SamplersOption = "ddim,dpmpp_2m,ddpm",
    steps: StepsOption = "10,20,50,250",
    scales: ScalesOption = None,
    n: CountOption = 256,
    names: ClassOption = None,
    engine: EngineOption = None,
    precision: PrecisionOption = None,
    features: FeaturesOption = None,
    run: RunOption = None,
    data: DataOption = None,
    overrides: SetOption = None,
    plan: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Make images with few steps and with many, and show how true, pure, varied and dear they are. The same command continues.

    Example: diffrc bench quality --samplers dpmpp_2m,ddpm --steps 20,250
    """
    from engines.benchmark.quality import advice, bench_quality, settings_of, tail_classes
    from engines.data.longtail import prepare
    from engines.store import open_run

    chosen = [f"synth.{key}={value}" for key, value in (("engine", engine), ("precision", precision)) if value]
    settings = settings_of(_samplers(samplers), _steps(steps), _scales(scales))
    folder = open_run(run, (*(overrides or ()), *chosen))
    classes = tail_classes(folder, names or ())
    if plan:
        _forecast(folder, prepare(folder.recipe.data, data), settings, classes, n, json)
        return
    with console.progress() as report:
        found = bench_quality(
            folder, prepare(folder.recipe.data, data), settings, classes, n, report=report, tell=console.note, extractor=features
        )
    if json:
        console.emit_json(found.to_json())
        return
    show(found)
    console.prose(advice(found))
    console.say(f"chart: {found.chart}")


def _forecast(run: RunFolder, tail: LongTail, settings: list[Setting], classes: list[int], n: int, json: bool) -> None:
    """What would be made and what it would take."""
    from engines.benchmark.quality import folder_of, forecast_quality

    with console.progress() as report:
        found = forecast_quality(run, tail, settings, classes, n, report)
    totals = dry_run.synthesis([part for _, part in found], folder_of(run))
    if json:
        cells = [{"sampler": s.sampler, "steps": s.steps, "guidance_scale": s.scale, **dry_run.synthesis_json(part)} for s, part in found]
        console.emit_json({"run": run.path, "cells": cells, **totals.to_json()})
        return
    columns = ("sampler", "steps", *(("s",) if any(s.scale is not None for s, _ in found) else ()), "to make", "takes")
    rows = [
        (
            s.sampler,
            s.steps,
            *((f"{s.scale:g}",) if s.scale is not None else ()),
            f"{part.missing:,}",
            console.duration(part.seconds_left) if part.missing else None,
        )
        for s, part in found
    ]
    console.table("", columns, rows)
    totals.show()


def show(quality: Quality) -> None:
    """Print a line a cell, and what real images score."""
    real, scaled = quality.real, quality.scales
    columns = ("sampler", "steps", *(("s",) if scaled else ()), "evals", "Frechet", "to train", "hit %", "diversity", "s/image")
    rows = [(row.sampler, row.steps, *((f"{row.scale:g}",) if scaled else ()), row.evaluations, *_figures(row)) for row in quality.rows]
    blank = ("-",) * (2 + scaled)
    rows.append(("real images", *blank, _spread(real.frechet, 2), f"{real.frechet_train:.2f}", f"{real.hit_rate:.1f}", "1.00", "-"))
    console.table(f"{quality.images:,} images of {len(quality.classes)} classes a cell, ± 1 standard deviation", columns, rows)
    console.prose(
        f"Frechet: {'' if quality.distance == 'FID' else 'no FID, the '}{quality.distance}, to the {real.test_images:,} test images of "
        f"these classes and to the {real.train_images:,} training images, each class counted alike. "
        "Real images: what as many unseen ones would score; to train: the test images; hit: the recognizer on the test images."
    )


def _figures(row: Row) -> list[str]:
    seconds = "-" if row.seconds_per_image is None else f"{row.seconds_per_image:.3g}"
    return [_spread(row.frechet, 2), f"{row.frechet_train.value:.2f}", _spread(row.hit_rate, 1), _spread(row.diversity, 2), seconds]


def _spread(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f}±{estimate.spread:.{digits}f}"


def _samplers(typed: str) -> list[str]:
    known = get_args(SamplerName)
    found = _words(typed)
    if unknown := [word for word in found if word not in known]:
        raise UsageError(f"there is no sampler {unknown[0]!r}", f"--samplers {','.join(known)}")
    return found


def _steps(typed: str) -> list[int | str]:
    found = _words(typed)
    if wrong := [word for word in found if not re.fullmatch(r"(ddim)?[1-9]\d{0,8}", word)]:
        raise UsageError(f"--steps {wrong[0]!r} is no number of steps", "--steps 10,20,50,250")
    return [int(word) if word.isdigit() else word for word in found]


def _scales(typed: str | None) -> list[float]:
    try:
        return [float(word) for word in _words(typed)] if typed is not None else []
    except ValueError:
        raise UsageError(f"--scales {typed!r} are no numbers", "--scales 0.1,0.2,0.5") from None


def _words(typed: str) -> list[str]:
    """What stands between the commas, each once, in order. Raises UsageError where nothing does."""
    found = list(dict.fromkeys(word.strip() for word in typed.split(",") if word.strip()))
    if not found:
        raise UsageError(f"{typed!r} names nothing", "diffrc bench quality --help shows what may stand there")
    return found
