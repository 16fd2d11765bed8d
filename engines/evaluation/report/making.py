"""The sections on how it came about: training curves, what it cost, and how to make it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from engines.evaluation import charts
from engines.evaluation.charts import Part, Series, text
from engines.evaluation.report.page import (
    Section,
    curve_legend,
    duration,
    folded,
    listed,
    note,
    row,
    signed,
    table,
)
from engines.evaluation.report.parts import STAGES, Parts, comparison_of, methods_of, stronger_control
from engines.evaluation.report.titles import title_of

STAGE_WORDS = {
    "source": "Source model: diffusion (Eq. 5)",
    "target": "Target model: adapted to the tail (Eq. 10)",
    "guide": "Guide: prototypes on noised images (Eq. 12)",
}
CURVES = {"loss": "loss", "l_base": "L_base", "l_pair": "L_pair", "l_pc": "L_PC"}  # L_vlb, a sum over T, would dwarf them
PROOF = ("evaluate",)  # what only measures, and is no part of the price of better accuracy
CHANGES_IN_COMMAND = 8  # of a recipe; a longer command is no help
STYLES = 6  # c0 ... c5 of the style sheet


def training_section(parts: Parts) -> Section:
    """Losses over the steps of each stage."""
    figures = ""
    for number, stage in enumerate(STAGES):
        lines = parts.metrics.get(stage) or ()
        series = [
            Series(CURVES[key], f"c{(number + i) % STYLES}", points, smooth=True)
            for i, key in enumerate(CURVES)
            if len(points := [(line["step"], line[key]) for line in lines if line.get(key) is not None]) > 1
        ]
        if len(series) == 2 and series[0].points == series[1].points:  # the loss is its only term
            series = series[1:]
        if series:
            chart = charts.line_chart(series, "step", describe=f"Loss of the {stage} stage over its steps")
            figures += f"<figure><h3>{text(STAGE_WORDS[stage])}</h3>{curve_legend(series)}{chart}</figure>"
    return Section("training", "Training", f'<div class="charts">{figures}</div>' if figures else "")


# ---------------------------------------------------------------------------------------------------------------- cost


def cost_section(parts: Parts) -> Section:
    """Time by stage, per image and per point gained."""
    if not parts.cost:
        return Section("cost", "What it cost", "")
    where = text(machine(parts.environment) or "this machine")
    total = sum(parts.cost.values())
    styles = {what: f"c{i % STYLES}" for i, what in enumerate(parts.cost)}
    bar = charts.stacked_bar([Part(s, styles[what], f"{what}: {duration(s)}") for what, s in parts.cost.items()], total, height_px=22)
    rows = ""
    for what, spent in parts.cost.items():
        share = f"{100 * spent / max(total, 1e-9):.0f} %"
        rows += row(f'<i class="dot {styles[what]}"></i>{text(what)}', [duration(spent), share])
    rows += row("<b>total</b>", [f"<b>{duration(total)}</b>", ""])
    shown = bar + table("Time by stage", ("Stage", "Time", "Share"), rows, "narrow")
    content = f"<p>Wall-clock time by stage, on {where}.</p>{shown}{_prices(parts)}"
    return Section("cost", "What it cost", content, "Cost")


def _prices(parts: Parts) -> str:
    """What an image took, and what a point of accuracy took, of the time that is not spent on measuring."""
    kept = sum(count for _, count in parts.made.values())
    making = sum(seconds for what, seconds in parts.cost.items() if what.split(".")[0] not in PROOF)
    synth = sum(seconds for what, seconds in parts.cost.items() if what.split(".")[0] == "synth")
    told = []
    if kept and synth:
        told.append(
            f"{duration(synth / kept)} of synthesis for an image that was kept, {duration(making / kept)} with its share of all training"
        )
    if parts.table and making:
        told += _price_of_a_point(parts.table, making)
    return note(". ".join(told) + ".") if told else ""


def _price_of_a_point(found: Mapping[str, Any], seconds: float) -> list[str]:
    told = []
    for method in methods_of(found):
        comparison = comparison_of(found, stronger_control(found, method), method)
        if not comparison:
            continue
        gain, low = (comparison["interval"][key] for key in ("difference", "low"))
        if low > 0:
            words = f"a point gained on the {found['column']} classes with {title_of(method)}"
            told.append(f"{duration(seconds / gain)} {words} ({signed(gain)} points)")
    if told:
        return told
    return [f"No price of a point: no gain on the {found['column']} classes over the stronger control is larger than the uncertainty"]


def machine(environment: Mapping[str, Any]) -> str:
    """The processor in words, or "" where it is not known."""
    device, cpus = environment.get("device"), environment.get("cpus")
    return f"{cpus} CPU cores" if device == "cpu" and cpus else str(device or "")


# ----------------------------------------------------------------------------------------------------------- reproduce


def reproduce_section(parts: Parts) -> Section:
    """The commands, what the recipe changes, versions and digests."""
    return Section("reproduce", "How to reproduce it", _commands(parts) + _changes(parts) + _facts(parts), "Reproduce")


def _commands(parts: Parts) -> str:
    file = f"{parts.name}.toml"
    if parts.embedded and len(parts.changes) <= CHANGES_IN_COMMAND:
        overrides = "".join(f" --set {shlex.quote(f'{key}={_toml(now)}')}" for key, _, now in parts.changes)
        words = "The recipe comes with DiffRC and holds every number, the seeds too."
        command = f"diffrc run {shlex.quote(parts.embedded)}{overrides}"
    else:
        words = f"The recipe below holds every number, the seeds too. Save it as <code>{text(file)}</code>:"
        command = f"diffrc run {shlex.quote(file)}"
    name = command.removeprefix("diffrc run ")
    steps = "\n".join((f"diffrc train {name}", "diffrc export", "diffrc synth --fill", "diffrc evaluate", "diffrc report"))
    shown = f'<p>{words}</p><pre>{text(command)}</pre><p class="note">Or step by step, each to be looked at:</p>'
    shown += f"<pre>{text(steps)}</pre>"
    return shown + recipe_text(parts.recipe_toml)


def recipe_text(recipe_toml: str) -> str:
    """The whole recipe, folded."""
    return folded("The recipe", f"<pre>{text(recipe_toml)}</pre>", recipe_toml.count("\n")) if recipe_toml else ""


def _changes(parts: Parts) -> str:
    if not parts.embedded:
        return ""
    if not parts.changes:
        return f"<p>Nothing differs from the recipe <code>{text(parts.embedded)}</code> as it comes with DiffRC.</p>"
    rows = [row(key_code(key), [text(_toml(before)), f"<b>{text(_toml(now))}</b>"]) for key, before, now in parts.changes]
    head = ("Key", f"In {parts.embedded}", "Here")
    title = f"What differs from the recipe {parts.embedded} as it comes with DiffRC"
    shown = table(title, head, listed(rows, "recipe.toml"), "keys")
    return f"<h3>What differs from the recipe as it comes</h3>{shown}"


def _facts(parts: Parts) -> str:
    identity = parts.plan.get("identity", {})
    digests = {
        "recipe": parts.recipe_sha256,
        "training images": parts.classes.get("kept_sha256"),
        f"{identity.get('model', 'target')} model": identity.get("weights_sha256"),
        "guide": identity.get("guide_sha256"),
        "engine": identity.get("engine.file_sha256"),
        "synthesis plan": parts.plan.get("plan"),
    }
    facts = {key: parts.environment[key] for key in ("python", "platform", "device", "cpus", "torch_threads") if key in parts.environment}
    versions = {**(parts.environment.get("packages") or {}), **{k: v for k, v in parts.plan.get("versions", {}).items() if k == "diffrc"}}
    return fact_list("Versions and machine", {**facts, **versions}) + fact_list(
        "Digests (sha256)", {key: value for key, value in digests.items() if value}
    )


def key_code(key: str) -> str:
    """A key of a recipe, which may break at its dots and underscores."""
    return f"<code>{text(key).replace('.', '.<wbr>').replace('_', '_<wbr>')}</code>"


def fact_list(title: str, facts: Mapping[str, Any]) -> str:
    """Names and values, folded; "" where there are none."""
    if not facts:
        return ""
    rows = [row(text(key), [f"<code>{text(value)}</code>"]) for key, value in facts.items()]
    return folded(title, table(title, (), "".join(rows), "facts"), len(rows))


def _toml(value: Any) -> str:
    """A value as a recipe has it."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)
