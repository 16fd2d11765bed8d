"""`diffrc bench`: how fast the engines are here; `diffrc bench quality`: what few steps cost."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from diffrc_cli import bench_quality, console
from diffrc_cli.options import DeviceOption, DryRunOption, JsonOption, RecipeOption, RunOption, SetOption
from diffrc_cli.recipe import resolve
from engines.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from engines.benchmark.speed import Settings
    from engines.benchmark.subject import Subject

MAX_BATCH = 4096


class Runtime(StrEnum):
    """What `--engine` may name; Typer takes no list of a Literal."""

    torch = "torch"
    autocast = "autocast"
    diffusers = "diffusers"
    onnx = "onnx"
    openvino = "openvino"
    tensorrt = "tensorrt"


app = typer.Typer(invoke_without_command=True)
app.command()(bench_quality.quality)


@app.callback()
def bench(
    context: typer.Context,
    run: RunOption = None,
    recipe: RecipeOption = None,
    network: Annotated[
        Literal["small", "cifar"] | None,
        typer.Option("--network", help="A network that needs no run: of 6 or 38 million parameters, random weights.", show_default=False),
    ] = None,
    overrides: SetOption = None,
    batch: Annotated[str | None, typer.Option("--batch", metavar="N,N", help="Batch sizes. [default: 1,8,32]", show_default=False)] = None,
    mode: Annotated[
        Literal["latency", "throughput"] | None,
        typer.Option(
            "--mode",
            help="latency: one evaluation at a time on all threads; throughput: side by side, one thread each, as synth on a CPU. "
            "[default: both]",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        list[Runtime] | None,
        typer.Option("--engine", help="Only this, beside torch in float32; repeatable. [default: all]", show_default=False),
    ] = None,
    guided: Annotated[bool, typer.Option("--guided", help="Whole guided steps as well, beside plain loops of torch.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile in bf16 as well: minutes for each batch size.")] = False,
    threads: Annotated[int, typer.Option("--threads", metavar="N", min=0, help="Processors to use; 0 = all.")] = 0,
    turns: Annotated[
        int | None, typer.Option("--turns", metavar="N", min=1, help="Timed turns of each engine. [default: 7]", show_default=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="About a minute: batch 8 side by side, 3 short turns.")] = False,
    device: DeviceOption = "auto",
    chart: Annotated[Path | None, typer.Option("--chart", metavar="FILE.png", help="Draw it there too.", show_default=False)] = None,
    plan: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """How fast every engine is here, beside torch and diffusers on the same network; by default that of the latest run.

    Example: diffrc bench --network small --guided --chart speed.png
    """
    if context.invoked_subcommand:
        return
    from dataclasses import replace

    from engines import store
    from engines.benchmark import speed
    from engines.benchmark.chart import speed_png
    from engines.benchmark.report import document

    if chart and chart.suffix.lower() != ".png":
        raise UsageError(f"--chart {chart} is no name of a PNG file", f"--chart {chart.with_suffix('.png')}")
    settings = _settings(batch, mode, guided, compiled, threads, turns, quick, device)
    settings = replace(settings, runtimes=tuple(map(str, engine or ())))
    subject = _subject(run, recipe, network, overrides)
    speed.require(subject, settings)
    seconds = speed.estimate_seconds(subject, settings)
    expected = console.duration(seconds)
    if plan:
        _plan(subject, settings, seconds, json)
        return
    console.note(f"{subject.name}: takes about {expected}; the figures are good where the machine does nothing else")
    with console.progress() as report:
        found = document(speed.measure(subject, settings, report))
    if chart:
        store.write_bytes(chart, speed_png(found))
    if json:
        console.emit_json(found)
        return
    _show(found)
    if chart:
        console.say(f"chart: {chart}")


def _plan(subject: Subject, settings: Settings, seconds: float, json: bool) -> None:
    """What would be timed and how long it would take; a bench keeps nothing but its chart."""
    from engines.benchmark.speed import candidates
    from engines.networks.unet import parameter_count

    arms = {mode: candidates(mode, settings) for mode in settings.modes}
    if json:
        network = {"network": subject.name, "parameters": parameter_count(subject.unet), "device": settings.device}
        asked = {"batches": settings.batches, "turns": settings.turns, "guided": settings.guided, "modes": arms}
        console.emit_json({**network, **asked, "seconds_left": seconds})
        return
    for mode, names in arms.items():
        console.prose(f"{mode}: {', '.join(names)}; batches of {', '.join(map(str, settings.batches))}; {settings.turns} turns each")
    console.prose(f"{subject.name}, {parameter_count(subject.unet) / 1e6:.3g} M parameters: about {console.duration(seconds)}")


def _settings(
    batch: str | None,
    mode: Literal["latency", "throughput"] | None,
    guided: bool,
    compiled: bool,
    threads: int,
    turns: int | None,
    quick: bool,
    device: str,
) -> Settings:
    """What is named, and else the defaults: those of --quick, or the usual ones."""
    from dataclasses import replace

    from engines.backends.device import choose_device, processors
    from engines.benchmark.speed import QUICK, Settings

    settings = QUICK if quick else Settings()
    chosen = choose_device(device)
    have = processors()
    if threads and not hasattr(os, "sched_setaffinity"):
        raise UsageError("--threads cannot be held to on this system", "none: all processors are used")
    if threads > have:
        raise UsageError(f"--threads {threads}: this process may use {have} processors", f"--threads {have}, or none")
    if chosen.type == "cuda":
        if mode == "throughput":
            raise UsageError("a GPU takes one batch at a time", "--mode latency")
        mode = "latency"
    return replace(
        settings,
        batches=batches_of(batch) if batch else settings.batches,
        modes=(mode,) if mode else settings.modes,
        turns=turns or settings.turns,
        threads=threads,
        device=str(chosen),
        guided=guided,
        compiled=compiled,
    )


def batches_of(text: str) -> tuple[int, ...]:
    """ "1,8,32" -> (1, 8, 32), in rising order. Raises UsageError."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and 1 <= int(word) <= MAX_BATCH for word in words):
        raise UsageError(f"--batch {text} is no list of batch sizes from 1 to {MAX_BATCH}", "--batch 1,8,32")
    return tuple(sorted({int(word) for word in words}))


def _subject(run: Path | None, recipe: str | None, network: str | None, overrides: list[str] | None) -> Subject:
    """The network to measure; exactly one way to name it."""
    from engines import recipe as recipes
    from engines import store
    from engines.benchmark.subject import NETWORKS, of_recipe, of_run

    named = [option for option, value in (("--run", run), ("--recipe", recipe), ("--network", network)) if value]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} name two networks", f"{named[0]} alone")
    if network:
        return of_recipe(recipes.load(NETWORKS[network], tuple(overrides or ()), network))
    if recipe:
        return of_recipe(resolve(recipe, overrides))
    if run is None and not (store.DEFAULT_ROOT / "latest.json").exists():
        raise UsageError(f"there is no run in ./{store.DEFAULT_ROOT}", "diffrc bench --network small needs none; or diffrc train first")
    return of_run(store.open_run(run, tuple(overrides or ())))


def _show(found: Mapping[str, Any]) -> None:
    from engines.benchmark.report import (
        COST_COLUMNS,
        EVALUATION_COLUMNS,
        GUIDED_COLUMNS,
        MODE_TITLES,
        cost_table,
        evaluation_table,
        guided_table,
        modes_of,
        sentences,
    )

    for mode in modes_of(found):
        console.table(f"{mode}: {MODE_TITLES[mode]}; ms an image", EVALUATION_COLUMNS, evaluation_table(found, mode))
        console.say()
        console.table("", COST_COLUMNS, cost_table(found, mode))
        console.say()
    if found["guided"]:
        console.table(f"guided: seconds an image at {found['network']['steps']} steps", GUIDED_COLUMNS, guided_table(found))
        console.say()
    for sentence in sentences(found):
        console.prose(sentence)
