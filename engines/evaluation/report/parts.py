"""What the report of a run is made of, read from the run's folder, and what it says of its recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines import recipe as recipes
from engines import store
from engines.data.longtail import LongTail
from engines.evaluation.report.tiles import Closest, Gallery, Unread, data_of_run, read_closest, read_galleries
from engines.recipe import Recipe
from engines.store import RunFolder

STAGES = ("source", "target", "guide")


@dataclass(frozen=True)
class Parts:
    """What a report is made of; everything but the name may be missing, and the report then says what to run or leaves it out."""

    name: str
    recipe_toml: str = ""
    classes: Mapping[str, Any] = field(default_factory=dict)  # names, counts, groups, kept_sha256
    table: Mapping[str, Any] = field(default_factory=dict)  # evaluation/accuracy.json
    trust: Mapping[str, Any] = field(default_factory=dict)  # evaluation/trust.json
    metrics: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)  # lines by stage
    guide: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # {"train": {"t": [...], "accuracy": [...]}}
    made: Mapping[int, tuple[int, int]] = field(default_factory=dict)  # by class: images made, images kept
    dropped: Mapping[int, Mapping[str, int]] = field(default_factory=dict)  # by class: images that the selection dropped, by reason
    galleries: Sequence[Gallery] = ()  # images of some of the classes
    galleries_left_out: int = 0  # classes that were filled and are not shown
    closest: Sequence[Closest] = ()  # generated images beside their nearest real ones, of some of the classes
    closest_left_out: int = 0
    unread: int = 0  # images that were to be shown and are damaged, or that another version made
    sheets: Sequence[tuple[str, bytes]] = ()  # caption, PNG; shown where there is no gallery with real images
    copies: Mapping[str, Any] = field(default_factory=dict)  # synth/copies.json
    pairs: bytes = b""  # PNG of generated images beside their nearest real ones; shown where there is no `closest`
    cost: Mapping[str, float] = field(default_factory=dict)  # seconds by stage
    environment: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)  # synth/plan.json
    recipe_sha256: str = ""
    embedded: str = ""  # the embedded recipe that the run's own began as
    changes: Sequence[tuple[str, Any, Any]] = ()  # key, its value in the embedded recipe, its value here


def collect(run: RunFolder, tail: LongTail | None = None, embedded: Recipe | None = None) -> Parts:
    """Read what the run folder holds so far.

    Args:
        tail: the data that the run was trained on, to show real images beside generated ones; None = the sheets made at synthesis.
        embedded: the embedded recipe of the run's name, to tell in what the run's differs.

    Raises: DataError for a damaged file.
    """

    def document(path: Path) -> dict[str, Any]:
        return dict(store.read_json(path)) if path.exists() else {}

    guide = document(run.stage("guide") / "accuracy.json")
    classes, copies = document(run.path / "classes.json"), document(run.synth / "copies.json")
    made: dict[int, tuple[int, int]] = {}
    dropped: dict[int, Counter[str]] = {}
    pairs = run.synth / "copies.png"
    lines = store.read_json_lines(run.synth / "manifest.jsonl")
    for line in lines:
        count, kept = made.get(line["class_id"], (0, 0))
        made[line["class_id"]] = (count + 1, kept + bool(line.get("kept", True)))
        if line.get("dropped"):
            dropped.setdefault(line["class_id"], Counter())[line["dropped"]] += 1
    tail = data_of_run(classes, tail)
    unread = Unread()
    galleries, galleries_left_out = read_galleries(run.synth, classes, lines, tail, unread)
    closest, closest_left_out = read_closest(run.synth, classes, copies, tail, unread)
    return Parts(
        name=run.recipe.name,
        recipe_toml=recipes.to_toml(run.recipe),
        classes=classes,
        table=with_methods(document(run.evaluation / "accuracy.json")),
        trust=document(run.evaluation / "trust.json"),
        metrics={stage: store.read_json_lines(run.stage(stage) / "metrics.jsonl") for stage in STAGES},
        guide={"": guide} if "t" in guide else guide,
        made=made,
        dropped=dropped,
        galleries=galleries,
        galleries_left_out=galleries_left_out,
        closest=closest,
        closest_left_out=closest_left_out,
        unread=len(unread.places),
        sheets=[
            (path.stem.replace("_", " ").replace("-", " "), path.read_bytes()) for path in sorted(run.synth.glob("*.png")) if path != pairs
        ],
        copies=copies,
        pairs=pairs.read_bytes() if pairs.exists() else b"",
        cost=run.cost(),
        environment=document(run.path / "environment.json"),
        plan=document(run.synth / "plan.json"),
        recipe_sha256=recipes.digest(run.recipe),
        embedded=embedded.name if embedded else "",
        changes=recipes.differences(embedded, run.recipe) if embedded else (),
    )


# ------------------------------------------------------------------------------------------------------- accuracy.json


def with_methods(table: dict[str, Any]) -> dict[str, Any]:
    """The table of a run whose rows are named by their method; it was once called loss."""
    for key in ("rows", "comparisons"):
        if key in table:
            table[key] = [{"method": entry.get("loss"), **entry} for entry in table[key]]
    return table


def methods_of(table: Mapping[str, Any]) -> list[str]:
    """The ways of training that a table holds, in its order."""
    return list(dict.fromkeys(row["method"] for row in table["rows"]))


def first_method(table: Mapping[str, Any]) -> str:
    """The way of training that the verdict is about: cross-entropy where it was trained."""
    methods = methods_of(table)
    return "cross_entropy" if "cross_entropy" in methods else methods[0]


def row_of(table: Mapping[str, Any], variant: str, method: str) -> Mapping[str, Any] | None:
    """The row of a variant and method; None where it was not trained."""
    return next((row for row in table["rows"] if (row["variant"], row["method"]) == (variant, method)), None)


def mean_of(table: Mapping[str, Any], variant: str, method: str) -> float | None:
    """A row's figure of the classes that the comparisons are about."""
    row = row_of(table, variant, method)
    return float(row["figures"][table["column"]]["mean"]) if row else None


def comparison_of(table: Mapping[str, Any], against: str, method: str) -> Mapping[str, Any] | None:
    """Real + synthetic against a control, both trained by a method; None where it was not made."""
    found = (c for c in table["comparisons"] if (c["variant"], c["against"], c["method"]) == ("synthetic", against, method))
    return next(found, None)


def stronger_control(table: Mapping[str, Any], method: str) -> str:
    """Real images alone, or with replay: the one that is better on the classes that the comparisons are about."""
    return max(("real", "replay"), key=lambda variant: mean_of(table, variant, method) or 0.0)
