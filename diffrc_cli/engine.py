"""`diffrc engine ls | why | rm`: what a run has exported, which of it synthesis takes and why, and taking it away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from diffrc_cli import console
from diffrc_cli.options import JsonOption, RunOption, SetOption
from engines.errors import UsageError

if TYPE_CHECKING:
    from engines.backends.inventory import Entry

app = typer.Typer(
    no_args_is_help=True,
    help="Engines: what a run has exported, and what becomes of it.\n\nExample: diffrc engine ls",
)

ModelOption = Annotated[
    Literal["target", "source"] | None,
    typer.Option("--model", help="The network. Default: synth.model of the run's recipe.", show_default=False),
]
EngineOption = Annotated[
    Literal["auto", "onnx", "openvino", "tensorrt", "torch"] | None,
    typer.Option("--engine", help="As for synth. Default: synth.engine of the recipe.", show_default=False),
]
PrecisionOption = Annotated[
    Literal["fp32", "bf16", "fp16"] | None,
    typer.Option("--precision", help="As for synth. Default: synth.precision of the recipe.", show_default=False),
]


@app.command("ls")
def list_engines(run: RunOption = None, json: JsonOption = False) -> None:
    """List a run's engines: size, speed, what the gate measured, and whether each may be loaded here now.

    With --json, a line for each.

    Example: diffrc engine ls
    """
    from engines.backends import inventory
    from engines.store import open_run

    folder = open_run(run)
    entries = inventory.list_engines(folder)
    if json:
        for entry in entries:
            console.emit_json(_record(entry))
        return
    if not entries:
        console.say(f"{folder.path} has no engines: diffrc export makes them")
        return
    rows = [(entry.name, f"{entry.size_bytes / 2**20:.1f}", *_figures(entry), entry.state) for entry in entries]
    console.table("", ("engine", "MiB", "ms/image", "error", "dB", "labels", "state"), rows)
    for entry in entries:
        if entry.reason:
            console.prose(f"{entry.name}: {entry.state}: {entry.reason}")
    if any(entry.state in ("stale", "damaged") for entry in entries):
        console.say("diffrc export makes what is stale or damaged anew; diffrc engine rm --stale takes it away")


@app.command()
def why(
    run: RunOption = None,
    model: ModelOption = None,
    engine: EngineOption = None,
    precision: PrecisionOption = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Say which engine synth would take of a run, and why not each of the others, field by field.

    Example: diffrc engine why --engine openvino
    """
    from engines.backends import inventory
    from engines.store import open_run
    from engines.synthesis import plan

    typed = {"engine": engine, "precision": precision}
    folder = open_run(run, (*(overrides or ()), *(f"synth.{key}={value}" for key, value in typed.items() if value)))
    model = model or folder.recipe.synth.model
    before = plan.made_with(plan.folder_of(folder, model, None))
    verdict, others = inventory.explain(folder, model, before.build, before.device)
    if json:
        taken = verdict.split(":")[0]
        console.emit_json({"model": model, "taken": taken, "why": verdict, "others": {str(fate.build): fate.why for fate in others}})
        return
    console.prose(f"synth takes {verdict}")
    for fate in others:
        console.prose(f"not {fate.build}: {fate.why}")


@app.command("rm")
def remove(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="As ls names them.", show_default=False)] = None,
    run: RunOption = None,
    stale: Annotated[bool, typer.Option("--stale", help="Those that are stale or damaged.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Every one; needs --yes.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask to be sure.")] = False,
    json: JsonOption = False,
) -> None:
    """Take engines of a run away, each with its card; a file that another engine needs stays.

    Example: diffrc engine rm "target openvino bf16"
    """
    from engines.backends import inventory
    from engines.store import open_run

    if bool(names) + stale + everything != 1:
        raise UsageError("which engines?", 'diffrc engine rm "target onnx fp32", or --stale, or --all --yes')
    if everything and not yes:
        raise UsageError("--all takes every engine away", "diffrc engine rm --all --yes does it; diffrc engine ls shows them")
    folder = open_run(run)
    entries = inventory.list_engines(folder)
    gone = _named(entries, names) if names else [entry for entry in entries if everything or entry.state in ("stale", "damaged")]
    freed = inventory.remove(folder, gone)
    if json:
        console.emit_json({"removed": [entry.name for entry in gone], "bytes": freed})
        return
    for entry in gone:
        console.say(f"removed {entry.name}")
    console.say(f"{len(gone)} removed, {freed:,} bytes freed")


def _named(entries: tuple[Entry, ...], names: list[str]) -> list[Entry]:
    """The entries of those names. Raises UsageError for one that is none."""
    known = {entry.name: entry for entry in entries}
    for name in names:
        if name not in known:
            listed = ", ".join(f'"{known_name}"' for known_name in known) or "none"
            raise UsageError(f"this run has no engine named {name!r}", f"diffrc engine ls names them: {listed}")
    return [known[name] for name in dict.fromkeys(names)]


def _figures(entry: Entry) -> tuple[str, str, str, str]:
    """ms an image, error of one evaluation, dB after a trajectory, labels kept: "-" for what was not measured."""
    figures = entry.measured
    error = next((figures[name] for name in ("one_step_error", "step_error", "max_error") if name in figures), None)
    ms, psnr, labels = (figures.get(name) for name in ("ms_per_image", "trajectory_psnr_db", "label_agreement"))
    return (
        f"{ms:.3g}" if ms else "-",
        f"{error:.1e}" if error is not None else "-",
        f"{psnr:.0f}" if psnr is not None else "-",
        f"{labels:.1%}" if labels is not None else "-",
    )


def _record(entry: Entry) -> dict[str, object]:
    return {
        "name": entry.name,
        "model": entry.model,
        "what": entry.what,
        "kind": entry.kind,
        "precision": entry.precision,
        "opset": getattr(entry.described, "opset", None),
        "max_batch": getattr(entry.described, "max_batch", None),
        "bytes": entry.size_bytes,
        **entry.measured,
        "state": entry.state,
        "reason": entry.reason,
        "file": entry.file,
    }
